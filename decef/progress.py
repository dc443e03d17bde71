"""Progress bars for operations that take a while."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TypeVar

from decef.extras import need

_T = TypeVar("_T")


def bar(items: Iterable[_T], what: str, progress: bool = True) -> Iterable[_T]:
    """`items`, with a progress bar if `progress` is true and the output is a terminal.

    Raises:
        ImportError: `progress` is true and tqdm is not installed.
    """
    if not progress:
        return items
    need("train", "tqdm")
    from tqdm import tqdm

    return tqdm(items, desc=what, disable=None)
