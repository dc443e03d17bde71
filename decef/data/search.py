"""Find datasets, and download them."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path


def search_path(root: Path | None) -> list[Path]:
    """Folders in which to look for a dataset, in order: `root` and `$DECEF_DATA`, or `data/` if neither is given."""
    given = [root] if root is not None else []
    if os.environ.get("DECEF_DATA"):
        given.append(Path(os.environ["DECEF_DATA"]))
    return given or [Path("data")]


def root_or_search_path(root: Path | None) -> list[Path]:
    """`root` alone if it is given, for data of which others than were asked for would not be noticed."""
    return search_path(None) if root is None else [root]


def download(name: str, what: str, root: Path | None, fetch: Callable[[Path], None], hint: str = "") -> Path:
    """Download a dataset into the first folder of the search path, and return that folder.

    Args:
        name: the dataset's name in messages.
        what: the files or folders that were looked for, for the message.
        root: see `search_path`.
        fetch: downloads the dataset into the given folder.
        hint: another way out, appended to the message.

    Raises:
        FileNotFoundError: the download failed; the message says what was tried and what to do.
    """
    tried = search_path(root)
    try:
        fetch(tried[0])
    except Exception as error:
        raise FileNotFoundError(
            f"{name} was not found: no {what} in {', '.join(map(str, tried))}, and the download failed "
            f"({type(error).__name__}: {error}). Either put it there, or say where it is with dataset.root=FOLDER or "
            f"the environment variable DECEF_DATA.{hint}"
        ) from error
    return tried[0]
