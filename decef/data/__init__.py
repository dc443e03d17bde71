"""Datasets, found on disk, downloaded, or bundled; small ones as uint8 tensors, large ones read as they are wanted."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from decef.data.cifar import load_cifar10
from decef.data.digits import load_digits
from decef.data.folder import class_names, find_folder, load_folder
from decef.data.images import Data, Images, normalize
from decef.data.small import load_cifar100, load_fashion_mnist, load_mnist, load_svhn
from decef.data.tiles import load_magnetic_tile

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class Dataset:
    """What is known of a dataset before it is loaded.

    Args:
        input_size: `(channels, height, width)`.
        num_classes: number of labels.
        mean, std: per channel, of pixels scaled to [0, 1], over the training part.
        load: returns the training and the test images; takes the folder to look in first, and options of its own.
    """

    input_size: tuple[int, int, int]
    num_classes: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    load: Callable[..., tuple[Data, Data]]


#: Datasets of one size, which are held in memory.
DATASETS = {
    "cifar10": Dataset((3, 32, 32), 10, (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616), load_cifar10),
    "cifar100": Dataset((3, 32, 32), 100, (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762), load_cifar100),
    "svhn": Dataset((3, 32, 32), 10, (0.4377, 0.4438, 0.4728), (0.1980, 0.2010, 0.1970), load_svhn),
    "mnist": Dataset((1, 28, 28), 10, (0.1307,), (0.3081,), load_mnist),
    "fashion_mnist": Dataset((1, 28, 28), 10, (0.2860,), (0.3530,), load_fashion_mnist),
    "magnetic_tile": Dataset((1, 100, 100), 6, (0.3919,), (0.1790,), load_magnetic_tile),
    "digits": Dataset((1, 8, 8), 10, (0.2874,), (0.3540,), load_digits),
}
#: Datasets in folders, of the size and with the classes that their settings say, by the names that the folder may have.
FOLDERS = {"imagenet": ("imagenet", "ILSVRC2012", "imagenet-1k"), "imagefolder": ()}
OPTIONS = {"mnist": ("split_test",), "magnetic_tile": ("as_published",)}


def dataset(settings: Mapping[str, Any]) -> Dataset:
    """The dataset that settings (`configs/dataset`, or a record's) describe; nothing is read.

    Raises:
        ValueError: there is no such dataset, or a size or number of classes that makes no sense.
    """
    name = settings["name"]
    if name in DATASETS:
        known = DATASETS[name]
        options = {key: settings.get(key, False) for key in OPTIONS.get(name, ())}
        changes: dict[str, Any] = {"load": partial(known.load, **options)} if options else {}
        for key in ("mean", "std"):
            if settings.get(key) is not None:
                if len(settings[key]) != known.input_size[0]:
                    raise ValueError(f"dataset.{key}={settings[key]} must have a number for every channel")
                changes[key] = tuple(settings[key])
        return replace(known, **changes)
    if name not in FOLDERS:
        raise ValueError(f"unknown dataset '{name}'; there are {', '.join((*DATASETS, *FOLDERS))}")
    for key in ("size", "num_classes"):
        value = settings.get(key)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"dataset.{key}={value!r} must be a whole number, at least 1")
    size, classes = int(settings["size"]), int(settings["num_classes"])

    def load(root: Path | None) -> tuple[Data, Data]:
        return load_folder(dict(settings), find_folder(root, *FOLDERS[name]))

    return Dataset((3, size, size), classes, IMAGENET_MEAN, IMAGENET_STD, load)


def count_classes(root: Path | None) -> int:
    """How many classes a folder of images has.

    Raises:
        FileNotFoundError: there is no such folder.
    """
    return len(class_names(find_folder(root)))


__all__ = ["DATASETS", "FOLDERS", "Data", "Dataset", "Images", "count_classes", "dataset", "normalize"]
