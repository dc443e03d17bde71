"""Load networks by what a user calls them: a run's folder, or a name with a file of weights."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from torch import nn

from decef.conversion import convert
from decef.data import Dataset
from decef.models import create_model
from decef.models.released import Card
from decef.models.weights import load_weights
from decef.plans import Plan
from decef.training.build import dense_network
from decef.training.checkpoint import load_checkpoint
from decef.training.record import CHECKPOINT, SUMMARY, load_config


def load_networks(name: str, *, weights: Path | None = None, pretrained: bool = False) -> list[tuple[str, nn.Module]]:
    """Load networks by what a user calls them, each with a label.

    Args:
        name: a run's folder, or a name that `create_model` knows. A run gives a network for every checkpoint that it
            kept, in order, and for its last checkpoint.
        weights: file with trained weights.
        pretrained: let timm or torchvision download trained weights.

    Raises:
        ValueError: there is no such network, the weights don't fit it, or they are for a run, which has its own.
        FileNotFoundError: there is no such file of weights, or the run has no checkpoint.
    """
    if Path(name).is_dir():
        if weights is not None or pretrained:
            raise ValueError(f"{name} is a run with weights of its own: give no others")
        return list(_networks_of_run(Path(name)))
    try:
        # timm's and torchvision's networks are for ImageNet, ours for CIFAR-10
        num_classes = 1000 if "/" in name else 10
        model = create_model(name, num_classes=num_classes, pretrained=pretrained)
    except ValueError as error:
        raise ValueError(f"'{name}' is no run's folder, and {error}") from error
    return [(name, load_weights(model, weights) if weights else model)]


def card_of(run: Path, name: str) -> tuple[Card, Dataset]:
    """What `decef.models.released` says of a finished run's network, and the dataset that it was trained on.

    Raises:
        FileNotFoundError: the folder is no run's, or has no checkpoint.
        ValueError: the run is not finished.
    """
    config = load_config(run)
    summary = json.loads((run / SUMMARY).read_text())
    if summary.get("status") != "finished":
        raise ValueError(f"{run} is {summary.get('status')}, not finished")
    data = config.dataset.dataset()
    own = ":" in config.model.name  # a function of the user's
    options = {} if own else dict(config.model.options)
    if config.model.factorize_classifier:
        options["conv_classifier"] = True
    card = Card(
        name=name,
        model="" if own else config.model.name,
        options=options,
        input_size=data.input_size,
        num_classes=data.num_classes,
        mean=data.mean,
        std=data.std,
        plan=load_checkpoint(run / CHECKPOINT)["plan"],
        dataset=config.dataset.name,
        top1=summary["test_top1"],
        run=run.name,
    )
    return card, data


def input_size_of(name: str) -> tuple[int, int, int]:
    """Input shape `(C, H, W)` of a network: its run's, else ImageNet's for timm and torchvision, CIFAR's for ours."""
    if Path(name).is_dir():
        return load_config(Path(name)).dataset.dataset().input_size
    return (3, 224, 224) if "/" in name else (3, 32, 32)


def _networks_of_run(folder: Path) -> Iterator[tuple[str, nn.Module]]:
    paths = [path for path in (*sorted(folder.glob("checkpoint-*.pt")), folder / CHECKPOINT) if path.is_file()]
    if not paths:
        raise FileNotFoundError(f"{folder} has no checkpoint: checkpoints stay on the machine where a run was made")
    config = load_config(folder)
    dense = dense_network(config.model, config.dataset.dataset())
    last = 0
    for path in paths:
        checkpoint = load_checkpoint(path)
        if checkpoint["epoch"] <= last:  # the last one may be among those that were kept
            continue
        last = checkpoint["epoch"]
        model = convert(dense, Plan.from_dict(checkpoint["plan"]), from_scratch=True)
        model.load_state_dict(checkpoint["model"])
        yield f"epoch {checkpoint['epoch']}", model
