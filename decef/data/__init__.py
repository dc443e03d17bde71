"""Datasets found on disk, downloaded or bundled. Small ones are uint8 tensors, large ones are read on demand."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from decef.data.cifar import load_cifar10
from decef.data.digits import load_digits
from decef.data.folder import ImageFolder, UnreadableError, class_names, find_folder, load_folder, names_md5
from decef.data.images import Data, Images, normalize
from decef.data.small import load_cifar100, load_fashion_mnist, load_mnist, load_svhn
from decef.data.tiles import load_magnetic_tile, load_magnetic_tile_masks
from decef.machine import cores

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class Dataset:
    """What is known about a dataset before it is loaded.

    Args:
        input_size: `(channels, height, width)`.
        num_classes: number of classes.
        mean, std: per channel over the training images, with pixels scaled to [0, 1].
        read: takes the folder to look in first, and returns the training and the test images.
    """

    input_size: tuple[int, int, int]
    num_classes: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    read: Callable[..., tuple[Images, Images] | tuple[ImageFolder, ImageFolder]]

    def load(
        self, root: Path | None = None, *, crop_padding: int = 0, flip: bool = False, workers: int = 0
    ) -> tuple[Data, Data]:
        """The training and the test images.

        Args:
            root: folder to look in first.
            crop_padding: for training images in memory, see `Images`.
            flip: whether training images are mirrored with probability 1/2.
            workers: number of processes that read images from folders.

        Raises:
            FileNotFoundError: the dataset is not found and cannot be downloaded.
            ValueError: a file is damaged, or a folder does not have the expected classes.
            ImportError: a package that reads the dataset is not installed.
        """
        train, test = (replace(part, mean=self.mean, std=self.std) for part in self.read(root))
        if isinstance(train, Images):
            return replace(train, crop_padding=crop_padding, flip=flip), test
        workers = min(workers, cores())  # more would only get in each other's way
        assert isinstance(test, ImageFolder)
        return replace(train, flip=flip, workers=workers), replace(test, workers=workers)


#: Datasets of a fixed image size, which are held in memory.
DATASETS = {
    "cifar10": Dataset((3, 32, 32), 10, (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616), load_cifar10),
    "cifar100": Dataset((3, 32, 32), 100, (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762), load_cifar100),
    "svhn": Dataset((3, 32, 32), 10, (0.4377, 0.4438, 0.4728), (0.1980, 0.2010, 0.1970), load_svhn),
    "mnist": Dataset((1, 28, 28), 10, (0.1307,), (0.3081,), load_mnist),
    "fashion_mnist": Dataset((1, 28, 28), 10, (0.2860,), (0.3530,), load_fashion_mnist),
    "magnetic_tile": Dataset((1, 100, 100), 6, (0.3919,), (0.1790,), load_magnetic_tile),
    "magnetic_tile_masks": Dataset((1, 100, 100), 6, (0.0685,), (0.2520,), load_magnetic_tile_masks),
    "digits": Dataset((1, 8, 8), 10, (0.2874,), (0.3540,), load_digits),
}
#: Datasets in folders, with the names that the folder may have. The caller gives image size and number of classes.
FOLDERS = {"imagenet": ("imagenet", "ILSVRC2012", "imagenet-1k"), "imagefolder": ()}
#: Options that only one dataset has, by dataset.
OPTIONS = {"mnist": ("split_test",), "magnetic_tile": ("as_published",)}


def dataset(
    name: str,
    *,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    size: int | None = None,
    num_classes: int | None = None,
    **options: bool,
) -> Dataset:
    """A dataset by name; nothing is read yet.

    Args:
        name: a key of `DATASETS` or `FOLDERS`.
        mean, std: per channel; None means the dataset's own.
        size, num_classes: image size in pixels and number of classes; required for `FOLDERS`, else not allowed.
        **options: those of `OPTIONS`.

    Raises:
        ValueError: there is no such dataset, or it doesn't take these settings.
    """
    if name not in (*DATASETS, *FOLDERS):
        raise ValueError(f"unknown dataset '{name}'; there are {', '.join((*DATASETS, *FOLDERS))}")
    for key, on in options.items():
        if on and key not in OPTIONS.get(name, ()):
            raise ValueError(f"dataset.{key}={on!r} would do nothing: {name} has no such option")
    if name in DATASETS:
        for key, value in (("size", size), ("num_classes", num_classes)):
            if value is not None:
                raise ValueError(f"dataset.{key}={value!r} would do nothing: {name} has its own")
        known = DATASETS[name]
        if chosen := {key: on for key, on in options.items() if on}:
            known = replace(known, read=partial(known.read, **chosen))
    else:
        for key, value in (("size", size), ("num_classes", num_classes)):
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"dataset.{key}={value!r} must be a whole number, at least 1")
        assert size is not None
        assert num_classes is not None

        def read(root: Path | None) -> tuple[ImageFolder, ImageFolder]:
            return load_folder(find_folder(root, *FOLDERS[name]), num_classes=num_classes, size=size)

        known = Dataset((3, size, size), num_classes, IMAGENET_MEAN, IMAGENET_STD, read)
    for key, values in (("mean", mean), ("std", std)):
        if values is not None and len(values) != known.input_size[0]:
            raise ValueError(f"dataset.{key}={list(values)} must have a number for every channel")
        if values is not None and max(map(abs, values)) > 1:
            raise ValueError(
                f"dataset.{key}={list(values)} is not of pixels from 0 to 1, as images are here: divide by 255"
            )
    if std is not None and min(std) <= 0:
        raise ValueError(f"dataset.std={list(std)} must be above 0 in every channel: images are divided by it")
    return replace(known, mean=tuple(mean or known.mean), std=tuple(std or known.std))


def folder_identity(root: Path | None, name: str = "imagefolder") -> tuple[int, str]:
    """Number of classes in a folder of images, and an MD5 of the names of all files in it.

    Args:
        root: folder to look in first.
        name: a key of `FOLDERS`.

    Raises:
        FileNotFoundError: there is no such folder.
    """
    folder = find_folder(root, *FOLDERS[name])
    return len(class_names(folder)), names_md5(folder)


__all__ = [
    "DATASETS",
    "FOLDERS",
    "Data",
    "Dataset",
    "Images",
    "UnreadableError",
    "dataset",
    "folder_identity",
    "normalize",
]
