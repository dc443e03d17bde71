"""Train one network, or a grid of them.

python scripts/train.py dataset=cifar10 model=resnet20 layer=decef layer.rank=4 train=quick seed=0
python scripts/train.py -m layer=conv2d,decef,basisconv,cpac,rank1 layer.flops=0.667 seed=0,1,2

Run again, the same command skips what is finished and resumes what is not. configs/ says what there is to choose.
"""

import logging
import sys

import hydra
from cli import check_arguments, expand_model, fail
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

failed: list[str] = []


@hydra.main(version_base="1.3", config_path="../configs", config_name="train")
def main(cfg: DictConfig) -> None:
    from decef.run import InputError, run

    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout, force=True)
    try:
        run(OmegaConf.to_container(cfg, resolve=True))  # type: ignore[arg-type]
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
        failed.append(f"{job}: {error}")


if __name__ == "__main__":
    sys.argv[1:] = expand_model(sys.argv[1:])
    check_arguments(sys.argv[1:])
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("interrupted; the same command resumes")
    if failed:
        sys.exit("\n".join([f"{len(failed)} of the sweep's jobs failed:", *failed]))
