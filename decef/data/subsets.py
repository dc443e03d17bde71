"""Parts of data in which the classes keep their proportions."""

from __future__ import annotations

import torch

from decef.data.images import Data, Images
from decef.extras import need


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


def stratified_subset(data: Data, size: int) -> Data:
    """A random subset of `size` images in their order, with the classes in proportion; always the same one.

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
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(0))
    by_class = order[labels[order].argsort(stable=True)].split(counts.tolist())
    drawn = [images[:n] for images, n in zip(by_class, share.tolist(), strict=True)]
    return data.subset(torch.cat(drawn).sort().values)
