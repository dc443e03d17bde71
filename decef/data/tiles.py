"""Magnetic-tile defects (Huang, Qiu, Yuan: "Surface defect saliency of magnetic tile", 2020) as CPAC-Conv uses them."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import random_split

from decef.data.images import Images
from decef.data.search import root_or_search_path
from decef.data.subsets import stratified_split
from decef.extras import need

CLASSES = ("blowhole", "break", "crack", "fray", "free", "uneven")
SIZE = 100  # pixels, both ways
PER_CLASS = 150
TEST_SHARE = 0.15
MASKS = (563, 100)  # to train and to test on


def load_magnetic_tile(root: Path | None = None, as_published: bool = False) -> tuple[Images, Images]:
    """Grey photographs `(1, 100, 100)` of six classes, at most 150 of each; 15 % of them are the test images.

    As in the code of CPAC-Conv's authors, images are resized to 100 x 100 (nearest neighbour) and two small classes
    are enlarged: "crack" by its mirror images, "fray" by its mirror images and rotations by 90 degrees.

    Args:
        root: folder to look in for `magnetic-tile/MT_<class>/*.jpg`; None: in those of the search path.
        as_published: enlarge before the split, as the authors' code does. Copies of a photograph can then be in both
            parts. By default the split comes first, and only the training part is enlarged.

    Raises:
        FileNotFoundError: it is not found; there is no download.
        ValueError: a class has no photographs, or a file is damaged.
        ImportError: Pillow or scikit-learn is not installed.
    """
    source = "github.com/abin24/Magnetic-tile-defect-datasets."
    folder = _find(root, "magnetic-tile", "photographs", source)
    data = _read(folder, "*.jpg", "Imgs/*.jpg", most=PER_CLASS)
    if as_published:
        data = _enlarged(data)
        return stratified_split(data, math.ceil(TEST_SHARE * len(data)))
    train, test = stratified_split(data, math.ceil(TEST_SHARE * len(data)))
    return _enlarged(train), test


def load_magnetic_tile_masks(root: Path | None = None) -> tuple[Images, Images]:
    """The masks of the defects `(1, 100, 100)` that CPAC-Conv's authors train and test on: 563 and 100 of their 663.

    White where the defect is, all black where there is none. They come from the authors' repository, resized and with
    the small classes enlarged, as `load_magnetic_tile` does it. The test images are the authors' own, from their seed
    48; copies of a mask are on both sides.

    Args:
        root: folder to look in for `Magnetic-tile-defect-datasets_torch/MT_<class>/*.png`; None: in those of the
            search path.

    Raises:
        FileNotFoundError: it is not found; there is no download.
        ValueError: a class has no masks, there are not 663 of them, or a file is damaged.
        ImportError: Pillow is not installed.
    """
    folder = _find(root, "Magnetic-tile-defect-datasets_torch", "masks", "github.com/wyn430/CPAC-CNN, folder Data,")
    data = _read(folder, "*.png")
    if len(data) != sum(MASKS):
        raise ValueError(f"{folder} has {len(data)} masks (*.png), the authors have {sum(MASKS)}: get the folder anew")
    numbers: Any = range(len(data))
    train, test = random_split(numbers, MASKS, torch.Generator().manual_seed(48))
    return data.subset(torch.tensor(train.indices)), data.subset(torch.tensor(test.indices))


def _find(root: Path | None, name: str, what: str, source: str) -> Path:
    candidates = [f for folder in root_or_search_path(root) for f in (folder / name, folder)]
    for folder in candidates:
        if _place(folder, "crack").is_dir():
            return folder
    anywhere = "" if root else " or the environment variable DECEF_DATA"
    raise FileNotFoundError(
        f"the magnetic-tile {what} were not found: no MT_<class> folders in {', '.join(map(str, candidates))}. "
        f"Get them from {source} and say where they are with dataset.root=FOLDER{anywhere}"
    )


def _place(folder: Path, name: str) -> Path:
    places = [folder / f"MT_{name.capitalize()}", folder / f"MT_{name}"]
    return next((place for place in places if place.is_dir()), places[-1])


def _read(folder: Path, *patterns: str, most: int | None = None) -> Images:
    """The images of all classes, in the order of their files' names, at most `most` of each."""
    images: list[Tensor] = []
    labels: list[int] = []
    for label, name in enumerate(CLASSES):
        place = _place(folder, name)
        paths = sorted(path for pattern in patterns for path in place.glob(pattern))[:most]
        if not paths:
            raise ValueError(f"{place} has no images ({patterns[0]})")
        images += map(_pixels, paths)
        labels += [label] * len(paths)
    return Images(torch.stack(images), torch.tensor(labels))


def _pixels(path: Path) -> Tensor:
    need("train", "PIL")
    from PIL import Image

    try:
        image = Image.open(path).convert("L").resize((SIZE, SIZE), Image.Resampling.NEAREST)
    except OSError as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    return torch.from_numpy(np.array(image)).unsqueeze(0)


def _enlarged(data: Images) -> Images:
    crack, fray = (data.images[data.labels == CLASSES.index(name)] for name in ("crack", "fray"))
    more = [(crack.flip(3), "crack"), (fray.flip(3), "fray"), (fray.rot90(1, (2, 3)), "fray")]
    labels = [torch.full((len(images),), CLASSES.index(name)) for images, name in more]
    return Images(torch.cat([data.images, *(images for images, _ in more)]), torch.cat([data.labels, *labels]))
