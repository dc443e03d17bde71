"""CIFAR-100, SVHN, MNIST and Fashion-MNIST, found on disk or downloaded by torchvision, which checks the downloads.

Krizhevsky: "Learning multiple layers of features from tiny images", 2009 (CIFAR-100). Netzer et al.: "Reading digits in
natural images with unsupervised feature learning", 2011 (SVHN). LeCun, Cortes, Burges: "The MNIST database of
handwritten digits", 1998. Xiao, Rasul, Vollgraf: "Fashion-MNIST", 2017.
"""

from __future__ import annotations

import gzip
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch

from decef.data.images import Images
from decef.data.search import download, search_path
from decef.data.subsets import stratified_split
from decef.data.torchvision_cpu import import_torchvision

SPLIT_TEST_IMAGES = 1_500  # test images with `split_test`, of the 10,000 in MNIST's test part


def load_cifar100(root: Path | None = None) -> tuple[Images, Images]:
    """50,000 training and 10,000 test images `(3, 32, 32)` with their 100 fine labels.

    Raises:
        FileNotFoundError: it is not found and cannot be downloaded.
        ValueError: a file is damaged.
    """
    return _checked_by_torchvision("CIFAR-100", "CIFAR100", "cifar-100-python", root)


def load_svhn(root: Path | None = None) -> tuple[Images, Images]:
    """73,257 training and 26,032 test images `(3, 32, 32)` of house numbers; the extra part is left out.

    Raises:
        FileNotFoundError: it is not found and cannot be downloaded.
        ValueError: a file is damaged.
    """
    return _checked_by_torchvision("SVHN", "SVHN", "train_32x32.mat", root)


def load_mnist(root: Path | None = None, split_test: bool = False) -> tuple[Images, Images]:
    """60,000 training and 10,000 test images `(1, 28, 28)`.

    Args:
        root: folder to look in first.
        split_test: split the 10,000 test images into 8,500 for training and 1,500 for testing, always the same ones.
            Use it where the training images are not available.

    Raises:
        FileNotFoundError: it is not found and cannot be downloaded.
        ValueError: a file is damaged.
    """
    return _load_idx("MNIST", "MNIST", root, split_test)


def load_fashion_mnist(root: Path | None = None) -> tuple[Images, Images]:
    """60,000 training and 10,000 test images `(1, 28, 28)` of clothes.

    Raises:
        FileNotFoundError: it is not found and cannot be downloaded.
        ValueError: a file is damaged.
    """
    return _load_idx("Fashion-MNIST", "FashionMNIST", root, False)


def _checked_by_torchvision(name: str, class_name: str, mark: str, root: Path | None) -> tuple[Images, Images]:
    """A dataset whose files torchvision checks each time it reads them; `mark` is a file or folder of it."""
    import_torchvision()
    from torchvision import datasets

    cls = getattr(datasets, class_name)

    def make(folder: Path, train: bool, fetch: bool) -> Any:
        part = {"split": "train" if train else "test"} if class_name == "SVHN" else {"train": train}
        return cls(str(folder), **part, download=fetch)

    def fetch(folder: Path) -> None:
        for train in (True, False):
            make(folder, train, True)

    def there(folder: Path) -> bool:
        return (folder / mark).exists()

    candidates = [f for folder in search_path(root) for f in (folder, folder / class_name)]
    folder = next(filter(there, candidates), None) or download(name, mark, root, fetch, there)
    try:
        train, test = (_images(make(folder, train, False)) for train in (True, False))
    except RuntimeError as error:
        damaged = _damaged(cls, folder)
        raise ValueError(f"{name} is incomplete or damaged: {damaged or error}") from error
    return train, test


def _images(data: Any) -> Images:
    pixels = torch.from_numpy(np.ascontiguousarray(data.data))
    if pixels.shape[-1] == 3:
        pixels = pixels.permute(0, 3, 1, 2).contiguous()
    labels = data.labels if hasattr(data, "labels") else data.targets
    return Images(pixels, torch.as_tensor(labels).long())


def _damaged(cls: Any, folder: Path) -> Path | None:
    """The first file that is missing or has the wrong MD5."""
    from torchvision.datasets.utils import check_integrity

    if hasattr(cls, "split_list"):
        files = [(folder / name, md5) for _, name, md5 in (cls.split_list["train"], cls.split_list["test"])]
    else:
        files = [(folder / cls.base_folder / name, md5) for name, md5 in (*cls.train_list, *cls.test_list)]
    return next((path for path, md5 in files if not check_integrity(str(path), md5)), None)


def _load_idx(name: str, class_name: str, root: Path | None, split_test: bool) -> tuple[Images, Images]:
    def find(folder: Path, part: str) -> tuple[Path, Path] | None:
        raw = folder / class_name / "raw"
        paths = []
        for kind in ("images-idx3-ubyte", "labels-idx1-ubyte"):
            there = [p for p in (raw / f"{part}-{kind}", raw / f"{part}-{kind}.gz") if p.is_file()]
            paths += there[:1]
        return (paths[0], paths[1]) if len(paths) == 2 else None

    def fetch(folder: Path) -> None:
        import_torchvision()
        from torchvision import datasets

        getattr(datasets, class_name)(str(folder), download=True)

    folders = search_path(root)
    parts = ("t10k",) if split_test else ("train", "t10k")

    def there(folder: Path) -> bool:
        return all(find(folder, part) for part in parts)

    folder = next(filter(there, folders), None)
    if folder is None:
        hint = ""
        if name == "MNIST" and any(find(f, "t10k") for f in folders):
            hint = " Its test part alone is there: dataset.split_test=true trains and tests on parts of that."
        folder = download(name, f"{class_name}/raw/{parts[0]}-images-idx3-ubyte", root, fetch, there, hint)
    files = [find(folder, part) for part in parts]
    data = [_read_pair(*pair) for pair in files if pair is not None]
    return stratified_split(data[0], SPLIT_TEST_IMAGES) if split_test else (data[0], data[1])


def _read_pair(images: Path, labels: Path) -> Images:
    pixels, targets = read_idx(images), read_idx(labels)
    if pixels.ndim != 3 or targets.shape != pixels.shape[:1]:
        raise ValueError(f"{images} and {labels} don't belong together: {pixels.shape} images, {targets.shape} labels")
    return Images(torch.from_numpy(pixels).unsqueeze(1), torch.from_numpy(targets).long())


def read_idx(path: Path) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """The array in an IDX file (LeCun's format: two zeros, type 8, the number of dimensions, their sizes, the data).

    Raises:
        ValueError: the file is truncated, or not an IDX file of bytes.
    """
    try:
        data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{path} is truncated or damaged: {error}") from error
    if data[:3] != b"\0\0\x08" or len(data) < 4 or len(data) < 4 + 4 * data[3]:
        raise ValueError(f"{path} is damaged: it doesn't begin as an IDX file of bytes does")
    shape = np.frombuffer(data, ">u4", data[3], 4)
    values = np.frombuffer(data, np.uint8, offset=4 + 4 * data[3])
    if values.size != np.prod(shape, dtype=np.int64):
        raise ValueError(f"{path} is truncated or damaged: it has {values.size:,} bytes of data")
    return values.reshape(shape).copy()
