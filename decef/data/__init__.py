"""Datasets as uint8 tensors, found on disk, downloaded, or bundled."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from decef.data.cifar import load_cifar10
from decef.data.digits import load_digits
from decef.data.images import Images, augmented_batches, normalize

Loader = Callable[[Path | None], tuple[Images, Images]]


@dataclass(frozen=True)
class Dataset:
    """What is known of a dataset before it is loaded.

    Args:
        input_size: `(channels, height, width)`.
        num_classes: number of labels.
        mean, std: per channel, of pixels scaled to [0, 1], over the training part.
        load: returns the training and the test images; takes the folder to look in first.
    """

    input_size: tuple[int, int, int]
    num_classes: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    load: Loader


DATASETS = {
    "cifar10": Dataset((3, 32, 32), 10, (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616), load_cifar10),
    "digits": Dataset((1, 8, 8), 10, (0.2874,), (0.3540,), load_digits),
}

__all__ = ["DATASETS", "Dataset", "Images", "augmented_batches", "normalize"]
