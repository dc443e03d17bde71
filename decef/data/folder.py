"""Datasets that are too large for memory: ImageNet, and any folder of images sorted by class."""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from decef.data.images import Batch, Part, normalize, parts
from decef.data.search import root_or_search_path
from decef.data.torchvision_cpu import import_torchvision

log = logging.getLogger(__name__)

VIEW_BATCH = 128  # largest evaluation batch, so that evaluation fits into memory wherever training does
EVAL_CROP = 224 / 256  # share of the shorter side that the centre crop shows
MOST_SKIPPED = 0.01  # if a larger share of the images is damaged, something else must be wrong


@dataclass
class ImageFolder:
    """Images that worker processes read, crop and resize on demand; see `Data`.

    For training, a random part of the image (8 to 100 % of its area, aspect ratio 3:4 to 4:3) is resized to `size` and,
    with `flip`, mirrored with probability 1/2. For evaluation, the shorter side is resized to `size * 256 / 224`, and
    the central square of `size` is taken. The random choices depend only on the epoch's generator, not on the number
    of workers.

    An image that cannot be read is named in a warning and recorded in `skipped`. In training, another image of its
    batch takes its place; in evaluation it is left out.

    Args:
        paths: paths of the images.
        labels: int64, `(N,)`.
        size: height and width of the batches' images, in pixels.
        flip: whether training images are mirrored.
        workers: number of processes that read; 0 reads in this process.
        mean, std: see `normalize`.
        device: where the batches go.
        skipped: error messages by path.
    """

    paths: Sequence[Path]
    labels: Tensor
    size: int = 224
    flip: bool = False
    workers: int = 0
    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    skipped: dict[Path, str] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.labels)

    def to(self, device: torch.device) -> ImageFolder:
        """The same images, their batches on `device`."""
        return replace(self, device=device)

    def subset(self, index: Tensor | slice) -> ImageFolder:
        """The images that `index` names."""
        chosen = torch.arange(len(self))[index].tolist()  # a slice, numbers, or a mask
        return replace(self, paths=[self.paths[i] for i in chosen], labels=self.labels[chosen], skipped={})

    def normalize(self, images: Tensor) -> Tensor:
        """See `Data`."""
        return normalize(images, self.mean, self.std)

    def batches(self, batch_size: int, generator: torch.Generator, part: Part = (0, 1)) -> Iterator[Batch]:
        """See `Data`.

        Raises:
            UnreadableError: none of a batch's images can be read, or too many of all images can't.
        """
        order = torch.randperm(len(self), generator=generator).tolist()
        base = int(torch.randint(2**62, (), generator=generator))
        wanted = [order[here] for here in parts(len(self), batch_size, part)]
        for images, good, labels in self._read(_Crops(self, base), wanted):
            if not good.any():
                raise UnreadableError(
                    f"none of a batch's images can be read; the last is {next(reversed(self.skipped))}"
                )
            shown = torch.where(good, torch.arange(len(good)), good.nonzero()[0, 0])
            yield self._here(images[shown]), self._here(labels[shown])

    def views(self, batch_size: int) -> Iterator[Batch]:
        """See `Data`; images that cannot be read are left out.

        Raises:
            UnreadableError: too many images cannot be read.
        """
        wanted = [part.tolist() for part in torch.arange(len(self)).split(min(batch_size, VIEW_BATCH))]
        for images, good, labels in self._read(_Views(self), wanted):
            if good.any():
                yield self._here(images[good]), self._here(labels[good])

    def _here(self, x: Tensor) -> Tensor:
        return x.to(self.device, non_blocking=True)

    def _read(self, dataset: _Files, wanted: list[list[int]]) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        loader: DataLoader[Any] = DataLoader(
            dataset,
            batch_sampler=wanted,
            num_workers=self.workers,
            collate_fn=_collate,
            pin_memory=self.device.type == "cuda",
            generator=torch.Generator(),  # so that reading does not use the global one
        )
        for images, good, labels, errors in loader:
            for path, error in errors:
                if path not in self.skipped:
                    log.warning("%s cannot be read and is left out: %s", path, error)
                    self.skipped[path] = error
            if len(self.skipped) > max(10, MOST_SKIPPED * len(self)):
                raise UnreadableError(
                    f"{len(self.skipped)} of {len(self)} images cannot be read, among them {next(iter(self.skipped))}: "
                    "repair or remove them"
                )
            yield images, good, labels


class UnreadableError(ValueError):
    """Images that are needed are damaged."""


class _Files(Dataset[Any]):
    def __init__(self, images: ImageFolder) -> None:
        self.images = images

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor, tuple[Path, str] | None]:
        from PIL import Image

        path, size = self.images.paths[i], self.images.size
        try:
            with Image.open(path) as file:
                return self.view(_rgb(file), i), self.images.labels[i], None
        # Pillow's error for a damaged file depends on the format.
        except (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError) as error:
            empty = torch.zeros(3, size, size, dtype=torch.uint8)
            return empty, self.images.labels[i], (path, f"{type(error).__name__}: {error}")

    def view(self, image: Any, i: int) -> Tensor:
        raise NotImplementedError


def _rgb(image: Any) -> Any:
    """An image in 8 bits; of 16 bits the upper 8, where Pillow's conversion would make all of it white."""
    from PIL import Image

    if image.mode.startswith("I;16"):
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    elif image.mode in ("I", "F"):
        raise ValueError(f"its pixels have 32 bits (mode {image.mode}): save it with 8 or 16")
    return image.convert("RGB")


class _Views(_Files):
    def view(self, image: Any, i: int) -> Tensor:
        transforms = import_torchvision().transforms.functional
        size = self.images.size
        image = transforms.resize(image, round(size / EVAL_CROP))
        return transforms.pil_to_tensor(transforms.center_crop(image, [size, size]))


class _Crops(_Files):
    def __init__(self, images: ImageFolder, base: int) -> None:
        super().__init__(images)
        self.base = base

    def view(self, image: Any, i: int) -> Tensor:
        transforms = import_torchvision().transforms
        size = [self.images.size] * 2
        with _seeded(self.base + i):
            crop = transforms.RandomResizedCrop.get_params(image, scale=[0.08, 1.0], ratio=[3 / 4, 4 / 3])
            image = transforms.functional.resized_crop(image, *crop, size=size)
            if self.images.flip and torch.rand(()) < 0.5:
                image = transforms.functional.hflip(image)
        return transforms.functional.pil_to_tensor(image)


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Temporarily seed torch's global generator."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


def _collate(items: list[Any]) -> tuple[Tensor, Tensor, Tensor, list[tuple[Path, str]]]:
    images, labels, errors = zip(*items, strict=True)
    good = torch.tensor([error is None for error in errors])
    return torch.stack(images), good, torch.stack(labels), [error for error in errors if error is not None]


def load_folder(root: Path, *, num_classes: int, size: int) -> tuple[ImageFolder, ImageFolder]:
    """Training images from `train/<class>/*` and test images from `val/<class>/*` or `test/<class>/*`.

    `val/` may also be ImageNet's flat folder, with the ground truth of its devkit.

    Args:
        root: the folder that contains these.
        num_classes: expected number of classes.
        size: see `ImageFolder`.

    Raises:
        FileNotFoundError: a part or the devkit is missing.
        ValueError: the number of classes is not the expected one, the two parts have different classes, or the ground
            truth does not fit the images.
    """
    classes = class_names(root)
    if len(classes) != num_classes:
        raise ValueError(
            f"{root / 'train'} has {len(classes)} classes, not {num_classes}: say "
            f"dataset.num_classes={len(classes)}, or check the folder"
        )
    val = next((root / name for name in ("val", "test") if (root / name).is_dir()), None)
    if val is None:
        raise FileNotFoundError(f"{root} has neither val nor test beside train")
    train = ImageFolder(*_by_class(root / "train", classes), size)
    flat = not any(path.is_dir() for path in val.iterdir())
    return train, ImageFolder(*(_by_ground_truth(root, val, classes) if flat else _by_class(val, classes)), size)


def class_names(root: Path) -> list[str]:
    """The classes: the names of the folders in `train`, sorted.

    Raises:
        FileNotFoundError: there is no `train`, or it has no folders.
    """
    import_torchvision()
    from torchvision.datasets.folder import find_classes

    try:
        return find_classes(root / "train")[0]
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{error}: say dataset.root=FOLDER, with images in train/<class>/") from error


def names_md5(root: Path) -> str:
    """MD5 of the paths of all files in the parts of a folder of images, which tells it from other folders.

    Links to folders are followed: parts of ImageNet are often made of them.
    """
    parts = [os.walk(root / name, followlinks=True) for name in ("train", "val", "test")]
    paths = (Path(folder, name) for part in parts for folder, _, names in part for name in names)
    names = sorted(path.relative_to(root).as_posix() for path in paths if path.is_file())
    return hashlib.md5("\n".join(names).encode(), usedforsecurity=False).hexdigest()


def find_folder(root: Path | None, *names: str) -> Path:
    """The first folder with a `train` folder in it, among the search path and folders of these names in it.

    If `root` is given, it is in there, see `root_or_search_path`.

    Raises:
        FileNotFoundError: there is no such folder.
    """
    candidates = [
        place for folder in root_or_search_path(root) for place in (folder, *(folder / name for name in names))
    ]
    for folder in candidates:
        if (folder / "train").is_dir():
            return folder
    raise FileNotFoundError(
        f"no folder with train/ and val/ was found, looking at {', '.join(map(str, candidates))}: say where it is with "
        f"dataset.root=FOLDER{'' if root else ' or the environment variable DECEF_DATA'}"
    )


def _by_class(folder: Path, classes: Sequence[str]) -> tuple[list[Path], Tensor]:
    import_torchvision()
    from torchvision.datasets.folder import IMG_EXTENSIONS, find_classes, make_dataset

    there, index = find_classes(folder)
    if there != list(classes):
        differ = sorted(set(there) ^ set(classes))
        raise ValueError(f"{folder} has not the classes of train: {', '.join(differ[:5])} {'...' * (len(differ) > 5)}")
    samples = make_dataset(folder, index, IMG_EXTENSIONS)
    return [Path(path) for path, _ in samples], torch.tensor([label for _, label in samples])


def _by_ground_truth(root: Path, val: Path, classes: Sequence[str]) -> tuple[list[Path], Tensor]:
    """ILSVRC2012's flat validation folder, labelled by its devkit: numbers from 1, with WordNet ids in meta.mat."""
    places = [root / "ILSVRC2012_devkit_t12" / "data", root / "data", root]
    devkit = next((p for p in places if (p / "ILSVRC2012_validation_ground_truth.txt").is_file()), None)
    if devkit is None or not (devkit / "meta.mat").is_file():
        raise FileNotFoundError(
            f"{val} has no class folders; its labels are in the devkit: put ILSVRC2012_devkit_t12 into {root}"
        )
    from scipy.io import loadmat

    synsets = np.atleast_1d(loadmat(devkit / "meta.mat", squeeze_me=True)["synsets"])
    wnids = {int(s["ILSVRC2012_ID"]): str(s["WNID"]) for s in synsets}
    numbers = [int(line) for line in (devkit / "ILSVRC2012_validation_ground_truth.txt").read_text().split()]
    paths = sorted(val.glob("*.JPEG"))
    if len(paths) != len(numbers):
        raise ValueError(f"{val} has {len(paths)} images, but the devkit's ground truth is for {len(numbers)}")
    index = {name: label for label, name in enumerate(classes)}
    try:
        return paths, torch.tensor([index[wnids[number]] for number in numbers])
    except KeyError as error:
        raise ValueError(f"the devkit names class {error}, which is not in train") from error
