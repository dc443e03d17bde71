"""Trained weights from files."""

from __future__ import annotations

import hashlib
import pickle
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from decef.data.search import search_path


def load_state_dict(path: Path) -> dict[str, Tensor]:
    """A state dict from a checkpoint file, wherever in it it is (`state_dict`, `model`, or the file itself).

    Prefixes that `torch.nn.DataParallel` and `torch.compile` leave in the names are taken off. Nothing in the file is
    executed.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is damaged or holds no state dict.
    """
    try:
        data = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, pickle.UnpicklingError, EOFError, ValueError) as error:
        raise ValueError(f"{path} is damaged or no file of weights: {error}") from error
    for key in ("state_dict", "model"):
        if isinstance(data, Mapping) and isinstance(data.get(key), Mapping):
            data = data[key]
    if not isinstance(data, Mapping) or not data or not all(isinstance(v, Tensor) for v in data.values()):
        raise ValueError(f"{path} holds no state dict")
    return {name.removeprefix("_orig_mod.").removeprefix("module."): value for name, value in data.items()}


def find_weights(name: str) -> Path:
    """The file of that path, else of that name in the folder `weights` where datasets are looked for.

    Raises:
        FileNotFoundError: there is none.
    """
    candidates = [Path(name), *(folder / "weights" / name for folder in search_path(None))]
    found = next((path for path in candidates if path.is_file()), None)
    if found is None:
        raise FileNotFoundError(f"there is no file of weights {' or '.join(map(str, candidates))}")
    return found


def load_weights(model: nn.Module, path: Path) -> nn.Module:
    """`model` with the weights of a file.

    Raises:
        FileNotFoundError, ValueError: see `load_state_dict`, or the weights are of another network.
    """
    try:
        model.load_state_dict(load_state_dict(path))
    except RuntimeError as error:
        raise ValueError(f"{path} does not fit {type(model).__name__}: {error}") from error
    return model


def describe_file(path: Path) -> str:
    """A file's name and MD5, to say in a result what it was made from."""
    return f"{path.name} (MD5 {md5_of(path)})"


def md5_of(path: Path) -> str:
    """MD5 of a file's content.

    Raises:
        FileNotFoundError: there is no such file.
    """
    if not path.is_file():
        raise FileNotFoundError(f"there is no file of weights {path}")
    return hashlib.md5(path.read_bytes()).hexdigest()
