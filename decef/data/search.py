"""Find datasets, and download them."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path

from filelock import FileLock


def search_path(root: Path | None) -> list[Path]:
    """Folders in which to look for a dataset, in order: `root` and `$DECEF_DATA`, or `data/` if neither is given."""
    given = [root] if root is not None else []
    if os.environ.get("DECEF_DATA"):
        given.append(Path(os.environ["DECEF_DATA"]))
    return given or [Path("data")]


def root_or_search_path(root: Path | None) -> list[Path]:
    """`root` alone if it is given, for data of which others than were asked for would not be noticed."""
    return search_path(None) if root is None else [root]


def download(
    name: str,
    what: str,
    root: Path | None,
    fetch: Callable[[Path], None],
    there: Callable[[Path], bool],
    hint: str = "",
) -> Path:
    """Download a dataset into the first folder of the search path, and return that folder.

    Several processes may ask for it at once: one downloads it, the others wait. It appears there when it is complete.

    Args:
        name: the dataset's name in messages.
        what: the files or folders that were looked for, for the message.
        root: see `search_path`.
        fetch: downloads the dataset into the given folder.
        there: whether the dataset is in the given folder.
        hint: another way out, appended to the message.

    Raises:
        FileNotFoundError: the download failed; the message says what was tried and what to do.
    """
    tried = search_path(root)
    try:
        tried[0].mkdir(parents=True, exist_ok=True)
        with FileLock(tried[0] / ".download.lock"):
            if not there(tried[0]):
                with tempfile.TemporaryDirectory(dir=tried[0], prefix=".download-") as folder:
                    fetch(Path(folder))
                    _move(Path(folder), tried[0])
    except Exception as error:
        raise FileNotFoundError(
            f"{name} was not found: no {what} in {', '.join(map(str, tried))}, and the download failed "
            f"({type(error).__name__}: {error}). Either put it there, or say where it is with dataset.root=FOLDER or "
            f"the environment variable DECEF_DATA.{hint}"
        ) from error
    return tried[0]


def _move(source: Path, target: Path) -> None:
    """Move all that is in a folder into another, whole folders at once where the other has none of that name."""
    for path in source.iterdir():
        if path.is_dir() and (target / path.name).exists():
            _move(path, target / path.name)
        else:
            path.replace(target / path.name)
