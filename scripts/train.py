"""Train one network, or a grid of them.

python scripts/train.py dataset=cifar10 model=resnet20 layer=decef layer.rank=4 train=quick seed=0
python scripts/train.py -m layer=conv2d,decef,basisconv,cpac,rank1 layer.flops=0.667 seed=0,1,2

Run again, the same command skips what is finished and resumes what is not. configs/ says what there is to choose.
"""

import logging
import os
import sys
import uuid
from pathlib import Path

import hydra
from cli import check_arguments, expand, fail
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

SWEEP = "DECEF_SWEEP"  # names the sweep to all of its jobs, which may be other processes


@hydra.main(version_base="1.3", config_path="../configs", config_name="train")
def main(cfg: DictConfig) -> None:
    from decef.run import InputError, run

    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout, force=True)
    chosen = HydraConfig.get().runtime.choices.get("experiment")
    try:
        run({**OmegaConf.to_container(cfg, resolve=True), "experiment": chosen})  # type: ignore[dict-item]
    except Exception as error:
        if HydraConfig.get().mode != RunMode.MULTIRUN:
            if isinstance(error, InputError):
                fail(str(error))
            if isinstance(error, FloatingPointError):
                sys.exit(f"the training failed: {error}")
            raise
        # The other jobs of a sweep go on; this one is named when all are over.
        job = " ".join(HydraConfig.get().overrides.task)
        logging.error("FAILED %s: %s", job, error, exc_info=not isinstance(error, InputError))
        failures = _failures(cfg.results)
        failures.parent.mkdir(parents=True, exist_ok=True)
        with failures.open("a") as file:
            file.write(f"{job}: {error}\n")


def _failures(results: str) -> Path:
    return Path(results) / ".sweeps" / f"{os.environ[SWEEP]}.failed"


if __name__ == "__main__":
    sys.argv[1:] = expand(sys.argv[1:])
    check_arguments(sys.argv[1:])
    os.environ.setdefault(SWEEP, uuid.uuid4().hex)
    # The jobs of other launchers are processes that must find what this file imports.
    paths = [str(Path(__file__).resolve().parent), os.environ.get("PYTHONPATH", "")]
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("interrupted; the same command resumes")
    given = [a.partition("=")[2] for a in sys.argv if a.startswith("results=")]
    failures = _failures(given[-1] if given else "results")
    if failures.is_file():
        failed = failures.read_text()
        failures.unlink()
        sys.exit(f"{len(failed.splitlines())} of the sweep's jobs failed:\n{failed}")
