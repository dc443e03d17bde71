"""Magnetic-tile defects (Huang, Qiu, Yuan: "Surface defect saliency of magnetic tile", 2020) as CPAC-Conv uses them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from decef.data.images import Images
from decef.data.search import search_path
from decef.data.subsets import stratified_split
from decef.extras import need

CLASSES = ("blowhole", "break", "crack", "fray", "free", "uneven")
SIZE = 100  # pixels, both ways
PER_CLASS = 150
TEST_SHARE = 0.15
MASKS, TRAINING_MASKS = 663, 563


def load_magnetic_tile(root: Path | None = None, as_published: bool = False) -> tuple[Images, Images]:
    """Grey photographs `(1, 100, 100)` of six classes, at most 150 of each; 15 % of them are the test images.

    As in the code of CPAC-Conv's authors, images are resized to 100 x 100 (nearest neighbour) and two small classes
    are enlarged: "crack" by its mirror images, "fray" by its mirror images and rotations by 90 degrees.

    Args:
        root: folder to look in first for `magnetic-tile/MT_<class>/*.jpg`.
        as_published: enlarge before the split, as the authors' code does. Copies of a photograph can then be in both
            parts. By default the split comes first, and only the training part is enlarged.

    Raises:
        FileNotFoundError: it is not found; there is no download.
        ValueError: a class has no photographs, or a file is damaged.
        ImportError: Pillow or scikit-learn is not installed.
    """
    source = "github.com/abin24/Magnetic-tile-defect-datasets."
    folder = _find(root, "magnetic-tile", "photographs", source)
    photographs, labels = [], []
    for label, name in enumerate(CLASSES):
        for pixels in _photographs(folder, name):
            photographs.append(pixels)
            labels.append(label)
    data = Images(torch.stack(photographs), torch.tensor(labels))
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
        root: folder to look in first for `Magnetic-tile-defect-datasets_torch/MT_<class>/*.png`.

    Raises:
        FileNotFoundError: it is not found; there is no download.
        ValueError: there are not 663 images, or a file is damaged.
        ImportError: Pillow is not installed.
    """
    folder = _find(root, "Magnetic-tile-defect-datasets_torch", "masks", "github.com/wyn430/CPAC-CNN, folder Data,")
    masks, labels = [], []
    for label, name in enumerate(CLASSES):
        for path in sorted(_place(folder, name).glob("*.png")):
            masks.append(_pixels(path))
            labels.append(label)
    if len(masks) != MASKS:
        raise ValueError(f"{folder} has {len(masks)} masks (*.png) where the authors have {MASKS}: get the folder anew")
    data = Images(torch.stack(masks), torch.tensor(labels))
    order = torch.randperm(MASKS, generator=torch.Generator().manual_seed(48))  # as torch's random_split draws it
    return data.subset(order[:TRAINING_MASKS]), data.subset(order[TRAINING_MASKS:])


def _find(root: Path | None, name: str, what: str, source: str) -> Path:
    candidates = [f for folder in search_path(root) for f in (folder / name, folder)]
    for folder in candidates:
        if _place(folder, "crack").is_dir():
            return folder
    raise FileNotFoundError(
        f"the magnetic-tile {what} were not found: no MT_<class> folders in {', '.join(map(str, candidates))}. "
        f"Get them from {source} and say where they are with dataset.root=FOLDER or the environment variable DECEF_DATA"
    )


def _place(folder: Path, name: str) -> Path:
    places = [folder / f"MT_{name.capitalize()}", folder / f"MT_{name}"]
    return next((place for place in places if place.is_dir()), places[-1])


def _photographs(folder: Path, name: str) -> Iterator[Tensor]:
    place = _place(folder, name)
    paths = sorted((*place.glob("*.jpg"), *place.glob("Imgs/*.jpg")))[:PER_CLASS]
    if not paths:
        raise ValueError(f"{place} has no photographs (*.jpg)")
    yield from map(_pixels, paths)


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
