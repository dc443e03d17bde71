"""CIFAR-10 (Krizhevsky: "Learning multiple layers of features from tiny images", 2009) in its official layouts."""

from __future__ import annotations

import hashlib
import pickle
from pathlib import Path

import torch

from decef.data.images import Images
from decef.data.search import download, search_path
from decef.data.torchvision_cpu import import_torchvision

TRAIN_FILES = tuple(f"data_batch_{i}" for i in range(1, 6))
TEST_FILE = "test_batch"
PIXELS = 3 * 32 * 32
PY_FOLDER, BIN_FOLDER = "cifar-10-batches-py", "cifar-10-batches-bin"
#: MD5 of the official files. Python version: as torchvision checks them. Binary version: of the same labels and pixels
#: in the same order, a byte and 3,072 bytes per image; the SHA-1 of these bytes is the one that MXNet's CIFAR10 checks.
MD5 = {
    "data_batch_1": "c99cafc152244af753f735de768cd75f",
    "data_batch_2": "d4bba439e000b95fd0a9bffe97cbabec",
    "data_batch_3": "54ebc095f3ab1f0389bbae665268c751",
    "data_batch_4": "634d18415352ddfa80567beed471001a",
    "data_batch_5": "482c414d41f54cd18b22e5b47cb7c3cb",
    "test_batch": "40351d587109b95175f43aff81a1287e",
    "data_batch_1.bin": "5dd7e06a14cb22eb9f671a540d1b7c25",
    "data_batch_2.bin": "5ea93a67294ea407fff1d09f752e9692",
    "data_batch_3.bin": "942cd6a4bcdd0dd3c604fbe906cb4421",
    "data_batch_4.bin": "ae636b3ba5c66a11e91e8cb52e771fcb",
    "data_batch_5.bin": "53f37980c15c3d472c316c40844f3f0d",
    "test_batch.bin": "803d5f7f4d78ea53de84dbe85f74fb6d",
}


def load_cifar10(root: Path | None = None) -> tuple[Images, Images]:
    """The 50,000 training and the 10,000 test images `(3, 32, 32)`, in the official order.

    Looks for `cifar-10-batches-py` or `cifar-10-batches-bin` in `root` and `$DECEF_DATA`, or in `data/` if neither is
    given. If none of these folders has it, it is downloaded into the first.

    Raises:
        FileNotFoundError: it is not found and cannot be downloaded, or one of its files is missing.
        ValueError: a file differs from the official one.
    """
    folder = find_cifar10(root) or _download(root)
    suffix, read = (".bin", _read_bin) if folder.name == BIN_FOLDER else ("", _read_pickle)
    paths = [folder / f"{name}{suffix}" for name in (*TRAIN_FILES, TEST_FILE)]
    missing = [path for path in paths if not path.is_file()]
    if missing:
        raise FileNotFoundError(
            f"CIFAR-10 is incomplete: {missing[0]} is missing; put it there, or remove {folder} to download all anew"
        )
    parts = [read(path) for path in paths]
    train = Images(torch.cat([p.images for p in parts[:-1]]), torch.cat([p.labels for p in parts[:-1]]))
    return train, parts[-1]


def find_cifar10(root: Path | None = None) -> Path | None:
    """The folder with CIFAR-10's files, or None if it is not on the search path."""
    for folder in search_path(root):
        for candidate in (folder, folder / PY_FOLDER, folder / BIN_FOLDER):
            if candidate.name in (PY_FOLDER, BIN_FOLDER) and candidate.is_dir():
                return candidate
    return None


def _download(root: Path | None) -> Path:
    def fetch(folder: Path) -> None:
        import_torchvision()
        from torchvision.datasets import CIFAR10

        CIFAR10(str(folder), download=True)

    def there(folder: Path) -> bool:
        return (folder / PY_FOLDER).is_dir()

    return download("CIFAR-10", f"{PY_FOLDER} or {BIN_FOLDER}", root, fetch, there) / PY_FOLDER


def _read(path: Path) -> bytes:
    content = path.read_bytes()
    if hashlib.md5(content, usedforsecurity=False).hexdigest() != MD5[path.name]:
        raise ValueError(
            f"{path} is truncated or damaged: its MD5 is not the official file's, so remove it and get CIFAR-10 anew"
        )
    return content


def _read_bin(path: Path) -> Images:
    rows = torch.frombuffer(bytearray(_read(path)), dtype=torch.uint8).view(-1, 1 + PIXELS)
    return Images(rows[:, 1:].reshape(-1, 3, 32, 32), rows[:, 0].long())


def _read_pickle(path: Path) -> Images:
    batch = pickle.loads(_read(path), encoding="latin1")  # any other file than the official one is refused unread
    return Images(torch.from_numpy(batch["data"]).view(-1, 3, 32, 32), torch.tensor(batch["labels"]))
