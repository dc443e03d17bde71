"""Released networks: one safetensors file each, with everything that is needed to use it in its header."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from decef.conversion import convert
from decef.extras import need
from decef.files import replace_file
from decef.models import create_model
from decef.plans import Plan

#: Where the networks of this repository are.
RELEASED = Path(__file__).resolve().parents[2] / "results" / "networks"
NETWORK = "network"  # the name of the files in a folder of decef.compress, without ending
HEADER = "decef"  # the key of the card in the file's header


@dataclass(frozen=True)
class Card:
    """What is known of a released network.

    Attributes:
        name: what it is loaded by, and its file's name without ending.
        model: name for `decef.models.create_model`, with `options`; empty for a network of the user's own.
        input_size: `(channels, height, width)`.
        num_classes: number of outputs.
        mean, std: per channel, of pixels scaled to [0, 1]: how its inputs are normalised; empty if that is not known.
        plan: which convolutions are factorised, see `Plan.to_dict`.
        dataset: what it was trained and measured on; empty if that is not known.
        top1: test accuracy of exactly these weights, in percent; None if it was not measured.
        run: id of the run that it comes from, whose record is in results/runs; empty for a network of `compress`.
    """

    name: str
    model: str
    input_size: tuple[int, int, int]
    num_classes: int
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    plan: Mapping[str, Any] = field(default_factory=dict)
    dataset: str = ""
    top1: float | None = None
    run: str = ""
    options: Mapping[str, Any] = field(default_factory=dict)

    def measured(self, top1: float) -> Card:
        """The same with another accuracy."""
        return replace(self, top1=round(top1, 4))


def load(name: str | Path, *, folder: Path = RELEASED, model: nn.Module | None = None) -> nn.Module:
    """A released or compressed network, in evaluation mode and single precision; nothing in its file is executed.

    Args:
        name: of the network, such as "resnet20-cifar10-decef-0.667", or the path of its file, or of the folder that
            `decef.compress` wrote.
        folder: where networks are looked for by name.
        model: the dense network, its weights don't matter; needed for one that this package has no name for.

    Returns:
        The network, with its `Card` as the attribute `card`.

    Raises:
        FileNotFoundError: there is no such network; the message names the nearest.
        ValueError: the file is damaged or no released network, or `model` is needed or doesn't fit.
        ImportError: safetensors is not installed.
    """
    card, state = read(name, folder=folder)
    if model is None and (not card.model or ":" in card.model):  # a function's name is not to be called for a file
        raise ValueError(f"{name} was made from a network of your own: give that as model= of decef.load")
    dense = model
    if dense is None:
        dense = create_model(
            card.model,
            num_classes=card.num_classes,
            in_channels=card.input_size[0],
            image_size=card.input_size[1],
            **card.options,
        )
    network = convert(dense, Plan.from_dict(card.plan), from_scratch=True)
    try:
        network.load_state_dict(
            {key: value.float() if value.is_floating_point() else value for key, value in state.items()}
        )
    except RuntimeError as error:
        raise ValueError(f"{name} doesn't fit {type(dense).__name__}: {error}") from error
    network.card = card  # type: ignore[assignment]
    return network.eval()


def file_of(name: str | Path, *, folder: Path = RELEASED) -> Path:
    """Where the file of a released network is, or should be: by name, or as a file or folder of `decef.compress`."""
    if (within := Path(name) / f"{NETWORK}.safetensors").is_file():
        return within
    return Path(name) if str(name).endswith(".safetensors") else folder / f"{name}.safetensors"


def read(name: str | Path, *, folder: Path = RELEASED) -> tuple[Card, dict[str, Tensor]]:
    """The card and the state dict of a released network, as they are in its file.

    Raises:
        FileNotFoundError, ValueError, ImportError: see `load`.
    """
    need("train", "safetensors")
    from safetensors import SafetensorError, safe_open

    path = file_of(name, folder=folder)
    if not path.is_file():
        if Path(name).is_file():
            raise ValueError(f"{name} is no .safetensors file of decef.compress or scripts/release.py")
        if not folder.is_dir():
            raise FileNotFoundError(f"there is no {path}: networks have names in a clone of the repository only")
        nearest = get_close_matches(str(name), [p.stem for p in folder.glob("*.safetensors")], n=3, cutoff=0.0)
        raise FileNotFoundError(
            f"there is no released network {path}; the nearest in {folder}: {', '.join(nearest) or 'none'}"
        )
    try:
        with safe_open(path, framework="pt") as file:
            fields = json.loads((file.metadata() or {})[HEADER])
            state = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        for key in ("input_size", "mean", "std"):
            fields[key] = tuple(fields[key])
        return Card(**fields), state
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is damaged or no released network: {error}") from error


def save(network: nn.Module, card: Card, folder: Path, *, half: bool) -> Path:
    """Write a network and its card as `<folder>/<name>.safetensors`.

    Args:
        network: of `card.model`, converted by `card.plan`.
        card: what is known of it.
        folder: where to.
        half: write floating-point weights in half precision.

    Raises:
        ImportError: safetensors is not installed.
    """
    need("train", "safetensors")
    from safetensors.torch import save as packed

    state = {
        key: (value.half() if half and value.is_floating_point() else value).detach().cpu().contiguous().clone()
        for key, value in network.state_dict().items()
    }
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{card.name}.safetensors"
    replace_file(path, packed(state, metadata={HEADER: json.dumps(asdict(card))}))
    return path


def halved(network: nn.Module) -> nn.Module:
    """`network` with its floating-point weights rounded to half precision, in place."""
    with torch.no_grad():
        for value in (*network.parameters(), *network.buffers()):
            if value.is_floating_point():
                value.copy_(value.half())
    return network
