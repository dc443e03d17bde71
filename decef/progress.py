"""Progress bars, where a person waits."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TypeVar

from decef.extras import need

_T = TypeVar("_T")


def bar(items: Sequence[_T], what: str, progress: bool = True) -> Iterable[_T]:
    """`items`, with a progress bar on a terminal where that is asked for.

    Raises:
        ImportError: tqdm is not installed, and a bar is asked for.
    """
    if not progress:
        return items
    need("train", "tqdm")
    from tqdm import tqdm

    return tqdm(items, desc=what, disable=None)
