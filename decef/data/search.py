"""Find datasets, download them, split them in two or draw a subset."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import torch

from decef.data.images import Data, Images
from decef.extras import need


def search_path(root: Path | None) -> list[Path]:
    """Folders in which to look for a dataset, in order: `root` and `$DECEF_DATA`, or `data/` if neither is given."""
    given = [root] if root is not None else []
    if os.environ.get("DECEF_DATA"):
        given.append(Path(os.environ["DECEF_DATA"]))
    return given or [Path("data")]


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


def stratified_split(data: Images, test_images: int) -> tuple[Images, Images]:
    """Split off `test_images` images, always the same ones, with the classes in proportion.

    Returns:
        The other images, and those that were split off.

    Raises:
        ImportError: scikit-learn is not installed.
    """
    need("train", "sklearn")
    from sklearn.model_selection import train_test_split

    train, test = train_test_split(
        range(len(data)), test_size=test_images, random_state=0, stratify=data.labels.tolist()
    )
    return data.subset(torch.tensor(train)), data.subset(torch.tensor(test))


def stratified_subset(data: Data, size: int, seed: int = 0) -> Data:
    """A random subset of `size` images in their order, with the classes in proportion; the same for the same `seed`.

    Raises:
        ValueError: `size` is larger than there are images, or smaller than there are classes.
    """
    labels = data.labels.cpu()
    counts = labels.bincount()
    classes = int((counts > 0).sum())
    if not classes <= size <= len(data):
        raise ValueError(
            f"{size} of {len(data)} images can't be drawn with {classes} classes in proportion: take from {classes} to "
            f"{len(data)}"
        )
    if size == len(data):
        return data
    # scikit-learn, used above, needs two images of every class, and one of each left over.
    share, remainder = counts * size // len(data), counts * size % len(data)
    largest = remainder.argsort(descending=True, stable=True)
    share[largest[: size - int(share.sum())]] += 1
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(seed))
    by_class = order[labels[order].argsort(stable=True)].split(counts.tolist())
    drawn = [images[:n] for images, n in zip(by_class, share.tolist(), strict=True)]
    return data.subset(torch.cat(drawn).sort().values)
