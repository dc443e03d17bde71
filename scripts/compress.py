"""Shrink a trained network to a budget: plan, convert, fine-tune, deploy, export, report.

python scripts/compress.py model=resnet56 model.weights=FILE dataset=cifar10 budget.latency=0.6 out=small
python scripts/compress.py model=timm/resnet18 model.weights=FILE dataset=imagefolder dataset.root=FOLDER \\
    layer=auto budget.latency=0.6 finetune.epochs=3 out=small
python scripts/compress.py model=mypackage.nets:make_net ...     (a function of yours that gives the dense network)

The same command, run again, goes on where it was stopped. configs/compress.yaml has all settings.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import hydra
from cli import check_arguments, expand, fail
from omegaconf import DictConfig, OmegaConf

if TYPE_CHECKING:
    from decef.compression import Compression

CONFIG = "compress"
# Settings of the config groups that are for training alone
IDLE = ("layer.", "model.dense_stem", "model.min_kernel_size", "model.factorize_classifier", "model.decompose_on")


@hydra.main(version_base="1.3", config_path="../configs", config_name=CONFIG)
def main(cfg: DictConfig) -> None:
    from decef.compression import Compression
    from decef.compression.report import summary

    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout, force=True)
    logging.getLogger("torch").setLevel(logging.ERROR)
    settings: Any = OmegaConf.to_container(cfg, resolve=True)
    try:
        job = _job(settings, Compression)
        print(job.plan())
        if settings["dry_run"]:
            print(f"fine-tuning would take {job.estimate() / 60:.1f} minutes; leave out dry_run to go on from here")
            return
        done = job.run()
    except (ValueError, FileNotFoundError, ImportError, FloatingPointError) as error:
        fail(str(error))
    except OSError as error:
        fail(f"{error}; what was done before is kept in {settings['out']}")
    print(summary(done.numbers))
    print(f"wrote {done.folder}/: {', '.join(done.numbers['files'])}, report.md")


def _job(settings: dict[str, Any], kind: type[Compression]) -> Compression:
    import torch

    from decef.compression.loaders import TestBatches, TrainingBatches
    from decef.models.weights import load_weights
    from decef.training.build import dense_network
    from decef.training.config import DatasetConfig, ModelConfig, group
    from decef.training.networks import card_for
    from decef.training.run import find_device

    threads, batch_size = settings["threads"], settings["finetune"]["batch_size"]
    for key, value in (("threads", 1 if threads is None else threads), ("finetune.batch_size", batch_size)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{key}={value} must be a whole number, at least 1")
    if threads is not None:
        torch.set_num_threads(threads)
    if not settings["out"]:
        raise ValueError("say out=FOLDER, for everything that is made")
    budget = _budget(settings["budget"])
    dataset_config = group("dataset", DatasetConfig, settings["dataset"]).resolved()
    model_config = group("model", ModelConfig, settings["model"]).resolved()
    if not model_config.weights:
        raise ValueError("say model.weights=FILE: a network that is not trained has nothing to keep")
    model = load_weights(dense_network(model_config, dataset_config.dataset()), Path(model_config.weights))
    device = find_device(settings["device"])
    train, test = dataset_config.load()
    return kind(
        model.to(device),
        TrainingBatches(train, batch_size),
        budget=budget,
        layer=settings["layer"]["name"],
        finetune=settings["finetune"]["epochs"],
        lr=settings["finetune"]["lr"],
        test=TestBatches(test),
        images=settings["images"],
        batch_size=settings["batch_size"],
        include=model_config.include,
        exclude=model_config.exclude,
        engine=settings["engine"],
        seed=settings["seed"],
        out=str(settings["out"]),  # a number is a name too
        card=card_for("network", model_config, dataset_config),
        progress=True,
    )


def _budget(given: object) -> Any:
    from decef.compression import Memory, Milliseconds, Size
    from decef.ranks import Budget, Latency

    kinds: dict[str, Callable[..., Any]] = {
        "latency": Latency,
        "milliseconds": Milliseconds,
        "flops": lambda share: Budget(flops=share),
        "params": lambda share: Budget(params=share),
        "memory": Memory,
        "bytes": Size,
    }
    chosen = {key: value for key, value in given.items() if value is not None} if isinstance(given, dict) else {}
    if len(chosen) != 1:
        raise ValueError(f"say one budget, such as budget.latency=0.6: there are {', '.join(kinds)}")
    ((key, value),) = chosen.items()
    return kinds[key](value)


if __name__ == "__main__":
    if {"-m", "--multirun"} & set(sys.argv):
        fail("one network is shrunk at a time: leave out -m, and give every command an out= of its own")
    sys.argv[1:] = expand(sys.argv[1:])
    check_arguments(sys.argv[1:], CONFIG)
    for argument in sys.argv[1:]:
        if argument.lstrip("+~").startswith(IDLE):
            fail(f"{argument} would do nothing here: ranks follow from the budget; model.exclude= leaves layers dense")
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("interrupted; the same command goes on")
