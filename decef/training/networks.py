"""Load networks by what a user calls them: a run's folder, or a name with a file of weights."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from decef.data import Dataset
from decef.models import create_model
from decef.models.released import Card, file_of, load, read
from decef.models.weights import classes_of, load_weights
from decef.plans import Plan
from decef.training.build import network_options, rebuild
from decef.training.checkpoint import load_checkpoint
from decef.training.config import DatasetConfig, ModelConfig
from decef.training.record import CHECKPOINT, Summary, load_config, read_summary


def load_networks(
    name: str, *, weights: str | Path | None = None, pretrained: bool = False
) -> list[tuple[str, nn.Module]]:
    """As `load_network`, with a label; a run gives a network for each checkpoint that it kept, in order, and its last.

    Raises:
        ValueError, FileNotFoundError: see `load_network`; but the run need not be finished.
    """
    if _is_run(name) and weights is None and not pretrained:
        # checkpoint.pt comes last, and may be of the same epoch as the last that was kept.
        paths = sorted(Path(name).glob("checkpoint*.pt")) or [Path(name, CHECKPOINT)]
        found = dict(_network_of(Path(name), path) for path in paths)
        return [(label_of(epoch), network) for epoch, network in found.items()]
    return [(name, load_network(name, weights=weights, pretrained=pretrained))]


def load_network(
    name: str,
    *,
    weights: str | Path | None = None,
    pretrained: bool = False,
    input_size: Sequence[int] | None = None,
    trained: bool = False,
) -> nn.Module:
    """Load a network by what a user calls it.

    Args:
        name: a run's folder, which gives the network that it ended with, what `decef.load` loads, or a name that
            `create_model` knows.
        weights: file with trained weights, of any number of classes.
        pretrained: let timm or torchvision download trained weights.
        input_size: `(C, H, W)`, for networks that are made for one; None is `input_size_of(name)`.
        trained: refuse a network whose weights would be random.

    Raises:
        ValueError: there is no such network, the weights don't fit it, or they are for a run or a file, which has its
            own; or the run is not finished.
        FileNotFoundError: there is no such file of weights, or the run has no checkpoint.
    """
    if _is_released(name) or _is_run(name):
        if weights is not None or pretrained:
            raise ValueError(f"{name} has weights of its own: give no others")
        if _is_released(name):
            return load(name)
        check_finished(Path(name))
        return _network_of(Path(name), Path(name, CHECKPOINT))[1]
    if trained and weights is None and not pretrained and ":" not in name:
        raise ValueError(f"{name} would have random weights: say where trained ones are, with --weights FILE")
    classes = 1000 if "/" in name else 10  # timm's and torchvision's networks are for ImageNet, ours for CIFAR-10
    channels, size, _ = input_size or input_size_of(name)
    made_for: dict[str, Any] = {"in_channels": channels, "image_size": size, "pretrained": pretrained}
    try:
        model = create_model(name, num_classes=classes, **made_for)
    except ValueError as error:
        raise ValueError(f"'{name}' is no run's folder, and {error}") from error
    if weights is None:
        return model
    if (own := classes_of(model, weights, classes)) != classes:
        model = create_model(name, num_classes=own, **made_for)
    return load_weights(model, weights)


def check_finished(run: Path) -> Summary:
    """A run's summary.

    Raises:
        ValueError: the run is not finished.
    """
    summary = read_summary(run)
    if summary.get("status") != "finished":
        raise ValueError(f"{run} is {summary.get('status', 'not begun')}, not finished")
    return summary


def card_of(run: Path, name: str) -> tuple[Card, Dataset]:
    """What `decef.models.released` says of a finished run's network, and the dataset that it was trained on.

    Raises:
        FileNotFoundError: the folder is no run's, or has no checkpoint.
        ValueError: the run is not finished.
    """
    config, summary = load_config(run), check_finished(run)
    card = card_for(name, config.model, config.dataset)
    plan = load_checkpoint(run / CHECKPOINT)["plan"]
    return replace(card, plan=plan, top1=summary["test_top1"], run=run.name), config.dataset.dataset()


def card_for(name: str, model: ModelConfig, dataset: DatasetConfig) -> Card:
    """What a config says of its network: everything but the plan and what came out."""
    data, own = dataset.dataset(), ":" in model.name  # a function of the user's
    return Card(
        name=name,
        model="" if own else model.name,
        options={} if own else network_options(model),
        input_size=data.input_size,
        num_classes=data.num_classes,
        mean=data.mean,
        std=data.std,
        dataset=dataset.name,
    )


def input_size_of(name: str) -> tuple[int, int, int]:
    """Input shape `(C, H, W)` of a network: its run's or file's, else ImageNet's for timm and torchvision, CIFAR's."""
    if _is_released(name):
        return read(name)[0].input_size
    if _is_run(name):
        return load_config(Path(name)).dataset.dataset().input_size
    return (3, 224, 224) if "/" in name else (3, 32, 32)


def _is_released(name: str) -> bool:
    """Whether `decef.load` knows it: a released network, or a file or folder of `decef.compress`."""
    return name.endswith(".safetensors") or file_of(name).is_file()


def _is_run(name: str) -> bool:
    return Path(name).is_dir() and not _is_released(name)


def label_of(epoch: int) -> str:
    """What a run's network after an epoch is called, in tables of ranks too."""
    return f"epoch {epoch}"


def epoch_of(label: object) -> int | None:
    """The epoch in what `label_of` said; None of anything else."""
    found = re.fullmatch(r"epoch ([0-9]+)", str(label))
    return int(found[1]) if found else None


def _network_of(run: Path, path: Path) -> tuple[int, nn.Module]:
    """The network in a run's checkpoint, and after how many epochs."""
    if not path.is_file():
        raise FileNotFoundError(f"{run} has no {path.name}: checkpoints stay on the machine where a run was made")
    config, checkpoint = load_config(run), load_checkpoint(path)
    network = rebuild(config.model, config.dataset.dataset(), Plan.from_dict(checkpoint["plan"])).model
    network.load_state_dict(checkpoint["model"])
    return checkpoint["epoch"], network
