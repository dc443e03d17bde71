"""Trained weights from files."""

from __future__ import annotations

import argparse
import hashlib
import pickle
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from decef.data.search import search_path
from decef.extras import need


def load_state_dict(path: str | Path) -> dict[str, Tensor]:
    """The state dict in a checkpoint file, which may be under the key `state_dict` or `model` or the whole file.

    A file that ends in .safetensors is of that format, any other of torch.save.

    Prefixes that `torch.nn.DataParallel` and `torch.compile` leave in the names are removed. Nothing in the file is
    executed; beside tensors it may hold the arguments of the script that wrote it, as torchvision's and timm's do.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is damaged or holds no state dict.
        ImportError: safetensors is needed, but not installed.
    """
    path = Path(path)
    try:
        data = _read(path)
    except pickle.UnpicklingError as error:
        unknown = re.search(r"Unsupported global: GLOBAL (\S+)", str(error))
        holds = f" (it holds a {unknown[1]})" if unknown else ""
        raise ValueError(
            f"{path} is damaged, no file of weights, or a network saved whole{holds}: save its state_dict() instead"
        ) from error
    except (FileNotFoundError, ImportError):
        raise
    except Exception as error:  # whatever torch's reader stumbles over in what is no file of its own
        raise ValueError(f"{path} is damaged or no file of weights: {error}") from error
    for key in ("state_dict", "model"):
        if isinstance(data, Mapping) and isinstance(data.get(key), Mapping):
            data = data[key]
    if not isinstance(data, Mapping) or not data or not all(isinstance(v, Tensor) for v in data.values()):
        keys = f": it has {', '.join(map(repr, list(data)[:5]))}" if isinstance(data, Mapping) and data else ""
        raise ValueError(f"{path} holds no state dict, alone or under the key state_dict or model{keys}")
    for prefix in ("module.", "_orig_mod.", "module."):  # in either order
        if all(name.startswith(prefix) for name in data):
            data = {name.removeprefix(prefix): value for name, value in data.items()}
    return dict(data)


def _read(path: Path) -> Any:
    if path.suffix != ".safetensors":
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True)
    need("train", "safetensors")
    from safetensors.torch import load_file

    return load_file(path)


def find_weights(name: str) -> Path:
    """The file with this path, else with this name in the `weights` folders of the search path for datasets.

    Raises:
        FileNotFoundError: there is no such file.
    """
    candidates = [Path(name), *(folder / "weights" / name for folder in search_path(None))]
    found = next((path for path in candidates if path.is_file()), None)
    if found is None:
        raise FileNotFoundError(f"there is no file of weights {' or '.join(map(str, candidates))}")
    return found


def load_weights(model: nn.Module, path: str | Path) -> nn.Module:
    """Load the weights of a file into `model`, and return it.

    The weight of a linear layer also fits a 1x1 convolution in its place, as `conv_classifier` makes it.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is damaged, holds no state dict or is for another network.
    """
    state, own = load_state_dict(path), model.state_dict()
    for name, value in state.items():
        if value.dim() == 2 and name in own and own[name].shape == (*value.shape, 1, 1):
            state[name] = value[:, :, None, None]
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        raise ValueError(f"{path} does not fit {type(model).__name__}: {error}") from error
    return model


def classes_of(model: nn.Module, path: str | Path, classes: int) -> int:
    """The number of classes of the network that a file's weights are of: `classes`, unless their head says another.

    Args:
        model: the network that they are of, but for the size of its head.
        path: the file.
        classes: the number of classes of `model`.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is damaged or holds no state dict.
    """
    own = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    stored = {name: tuple(value.shape) for name, value in load_state_dict(path).items()}
    differ = {name: shape for name, shape in stored.items() if own.get(name, shape) != shape}
    heads = {shape[0] for name, shape in differ.items() if shape and own[name] == (classes, *shape[1:])}
    return heads.pop() if len(heads) == 1 else classes


def describe_file(path: Path) -> str:
    """A file's name and MD5, to say what a result was made from.

    Raises:
        FileNotFoundError: there is no such file.
    """
    return f"{path.name} (MD5 {md5_of(path)})"


def md5_in(described: str | None) -> str:
    """The MD5 in what `describe_file` said; "" of anything else."""
    found = re.search(r"\(MD5 (\w+)\)$", described or "")
    return found[1] if found else ""


def md5_of(path: Path) -> str:
    """MD5 of a file's content.

    Raises:
        FileNotFoundError: there is no such file.
    """
    if not path.is_file():
        raise FileNotFoundError(f"there is no file of weights {path}")
    return hashlib.md5(path.read_bytes(), usedforsecurity=False).hexdigest()
