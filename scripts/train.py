"""Train one network, or a grid of them.

python scripts/train.py dataset=cifar10 model=resnet20 layer=decef layer.rank=4 train=quick seed=0
python scripts/train.py -m layer=conv2d,decef,basisconv,basisconv2021,cpac,rank1 layer.flops=0.667 seed=0,1,2

The same command, run again, skips what is finished and resumes what is not. configs/ has all settings and choices.

python scripts/train.py --from results/runs/<run id> [results=replayed] [device=cpu] [dataset.root=FOLDER]

repeats a recorded run exactly, in another folder, and says whether the same came out.
"""

import logging
import os
import signal
import sys
import uuid
from dataclasses import replace
from pathlib import Path
from typing import Any

import hydra
from cli import check_arguments, expand, fail, given_value
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

PLACES = ("results", "device", "dataset.root", "dataset.workers", "model.weights")  # the settings that --from takes
SWEEP = "DECEF_SWEEP"  # this variable tells the sweep's id to its jobs, which may be other processes


@hydra.main(version_base="1.3", config_path="../configs", config_name="train")
def main(cfg: DictConfig) -> None:
    from decef.training.config import BusyError, InputError, RunConfig
    from decef.training.run import run

    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout, force=True)
    chosen = HydraConfig.get().runtime.choices.get("experiment")
    settings: Any = OmegaConf.to_container(cfg, resolve=True)
    try:
        run(RunConfig.from_dict({**settings, "experiment": chosen}))
    except Exception as error:
        if HydraConfig.get().mode != RunMode.MULTIRUN:
            if isinstance(error, InputError):
                fail(str(error))
            if isinstance(error, FloatingPointError):
                sys.exit(f"the training failed: {error}")
            raise
        # The other jobs of a sweep still run; the failed ones are listed at the end.
        job = " ".join(HydraConfig.get().overrides.task)
        if isinstance(error, BusyError):  # as conv2d at every budget, where jobs run side by side
            logging.info("left to the process that is at it: %s", job)
            return
        logging.error("FAILED %s: %s", job, error, exc_info=not isinstance(error, InputError))
        failures = _failures(cfg.results)
        failures.parent.mkdir(parents=True, exist_ok=True)
        with failures.open("a") as file:
            file.write(f"{job}: {' '.join(str(error).split())}\n")  # a line a job


def _failures(results: str) -> Path:
    return Path(results) / ".sweeps" / f"{os.environ[SWEEP]}.failed"


def train_again(arguments: list[str]) -> None:
    """Repeat a recorded run. `arguments` are --from, its folder, then where to run, as overrides."""
    from decef.machine import cores
    from decef.training.record import first_difference, read_metrics, read_summary, replay
    from decef.training.run import run

    if len(arguments) < 2:
        fail("--from needs a run's folder: --from results/runs/<run id>")
    source, places = Path(arguments[1]), dict.fromkeys(PLACES)
    for argument in arguments[2:]:
        key, equals, value = argument.partition("=")
        if key not in PLACES or not equals:
            fail(f"{argument}: with --from only the place can be said, by {'=, '.join(PLACES)}=")
        if key == "dataset.workers" and not value.isdigit():
            fail(f"{argument} must be a whole number")
        places[key] = value
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout, force=True)
    try:
        config, precision = replay(source)
        results, workers = Path(places["results"] or "replayed"), int(places["dataset.workers"] or cores())
        done = results / "runs" / source.resolve().name
        if read_summary(done).get("status") == "finished":
            raise ValueError(f"{done} is there already: remove it, or say results=FOLDER for another place")
        config = replace(
            config,
            dataset=replace(config.dataset, root=places["dataset.root"], workers=workers),
            model=replace(config.model, weights=places["model.weights"] or config.model.weights),
            results=results,
            device=places["device"] or ("cpu" if read_summary(source).get("device") == "cpu" else "auto"),
            progress=True,
        )
        before, here = read_summary(source).get("images_md5"), config.resolved().dataset.part_md5()
        if before and here and before != here:
            raise ValueError(f"{source} is of other images than are here: say dataset.root=FOLDER, where those are")
        summary = run(config, precision)
    except (ValueError, FileNotFoundError) as error:
        fail(str(error))
    except FloatingPointError as error:
        sys.exit(f"the training failed: {error}")
    epoch = first_difference(read_metrics(source), read_metrics(results / "runs" / summary["id"]))
    if epoch is not None:
        sys.exit(f"not the same from epoch {epoch} on: another machine or other versions? {source} says what it ran on")
    print(f"the same in all {summary['epochs']} epochs")


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as a cluster or a shutdown stops a run: as by Ctrl-C
    if sys.argv[1:2] == ["--from"]:
        try:
            train_again(sys.argv[1:])
        except KeyboardInterrupt:
            sys.exit("interrupted; the same command resumes")
        sys.exit()
    sys.argv[1:] = expand(sys.argv[1:])
    check_arguments(sys.argv[1:])
    os.environ.setdefault(SWEEP, uuid.uuid4().hex)
    # Some launchers run jobs as processes of their own, which must find what this file imports.
    paths = [str(Path(__file__).resolve().parent), os.environ.get("PYTHONPATH", "")]
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    failures = _failures(given_value("results", sys.argv[1:]) or "results")
    status: str | int = 0
    try:
        main()
    except KeyboardInterrupt:
        status = "interrupted; the same command resumes"
    finally:
        if failures.is_file():
            failed = failures.read_text()
            failures.unlink()
            print(f"{len(failed.splitlines())} of the sweep's jobs failed:\n{failed}", file=sys.stderr)
            status = status or 1
    sys.exit(status)
