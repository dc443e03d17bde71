"""Files that are there whole or not at all."""

from __future__ import annotations

import json
import os
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pandas as pd


def replace_file(path: Path, data: bytes | memoryview) -> None:
    """Write `data` to a file beside `path`, then rename it: a reader sees either the old file or the new one.

    Raises:
        OSError: the file cannot be written; the old one is still there.
    """
    partial = path.with_name(path.name + ".partial")
    try:
        with partial.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except OSError:
        with suppress(OSError):
            partial.unlink()  # of a disk that is full it takes what little is left
        raise


def write_csv(path: Path, frame: pd.DataFrame) -> None:
    """Write a table without its index, by `replace_file`."""
    replace_file(path, frame.round(6).to_csv(index=False).encode())


def write_json(path: Path, data: Any) -> None:
    """Write plain data as JSON, by `replace_file`."""
    replace_file(path, (json.dumps(data, indent=1) + "\n").encode())
