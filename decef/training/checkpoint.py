"""Checkpoints: a flat dict of tensors and plain values, written whole or not at all."""

from __future__ import annotations

import io
import pickle
from pathlib import Path
from typing import Any

import torch

from decef.files import replace_file


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Write `state` as a whole: a kill or a full disk leaves the last checkpoint intact.

    Raises:
        OSError: see `replace_file`.
    """
    buffer = io.BytesIO()  # torch's own writer does not report a full disk
    torch.save(state, buffer)
    replace_file(path, buffer.getbuffer())


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint of `save_checkpoint` onto the CPU. Nothing in the file is executed.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is damaged or not a checkpoint.
    """
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, pickle.UnpicklingError, EOFError, ValueError) as error:
        raise ValueError(f"{path} is damaged or no checkpoint: {error}") from error
