"""Checkpoints: a flat dict of tensors and plain values, written whole or not at all."""

from __future__ import annotations

import io
import os
import pickle
from pathlib import Path
from typing import Any

import torch


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Write `state` whole: a kill or a full disk leaves the last one as it was."""
    buffer = io.BytesIO()  # torch's own writer does not say when a disk is full
    torch.save(state, buffer)
    replace_file(path, buffer.getbuffer())


def replace_file(path: Path, data: bytes | memoryview) -> None:
    """Write `data` beside `path`, then put it in its place in one step: a reader sees the old file or the new one.

    Raises:
        OSError: it cannot be written; the old file is still there.
    """
    partial = path.with_name(path.name + ".partial")
    with partial.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Read what `save_checkpoint` wrote, onto the CPU; nothing in the file is executed.

    Raises:
        ValueError: the file is damaged or no checkpoint.
    """
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, pickle.UnpicklingError, EOFError, ValueError) as error:
        raise ValueError(f"{path} is damaged or no checkpoint: {error}") from error
