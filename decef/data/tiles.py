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
    folder = _find(root)
    photographs, labels = [], []
    for label, name in enumerate(CLASSES):
        for pixels in _read(folder, name):
            photographs.append(pixels)
            labels.append(label)
    data = Images(torch.stack(photographs), torch.tensor(labels))
    if as_published:
        data = _enlarged(data)
        return stratified_split(data, math.ceil(TEST_SHARE * len(data)))
    train, test = stratified_split(data, math.ceil(TEST_SHARE * len(data)))
    return _enlarged(train), test


def _find(root: Path | None) -> Path:
    candidates = [f for folder in search_path(root) for f in (folder, folder / "magnetic-tile")]
    for folder in candidates:
        if (folder / "MT_crack").is_dir() or (folder / "MT_Crack").is_dir():
            return folder
    raise FileNotFoundError(
        f"the magnetic-tile photographs were not found: no MT_<class> folders in {', '.join(map(str, candidates))}. "
        "Get them from github.com/abin24/Magnetic-tile-defect-datasets. and say where they are with "
        "dataset.root=FOLDER or the environment variable DECEF_DATA"
    )


def _read(folder: Path, name: str) -> Iterator[Tensor]:
    need("train", "PIL")
    from PIL import Image

    places = [folder / f"MT_{name.capitalize()}", folder / f"MT_{name}"]
    place = next((place for place in places if place.is_dir()), places[-1])
    paths = sorted((*place.glob("*.jpg"), *place.glob("Imgs/*.jpg")))[:PER_CLASS]
    if not paths:
        raise ValueError(f"{place} has no photographs (*.jpg)")
    for path in paths:
        try:
            image = Image.open(path).convert("L").resize((SIZE, SIZE), Image.Resampling.NEAREST)
        except OSError as error:
            raise ValueError(f"{path} is damaged: {error}") from error
        yield torch.from_numpy(np.array(image)).unsqueeze(0)


def _enlarged(data: Images) -> Images:
    crack, fray = (data.images[data.labels == CLASSES.index(name)] for name in ("crack", "fray"))
    more = [(crack.flip(3), "crack"), (fray.flip(3), "fray"), (fray.rot90(1, (2, 3)), "fray")]
    labels = [torch.full((len(images),), CLASSES.index(name)) for images, name in more]
    return Images(torch.cat([data.images, *(images for images, _ in more)]), torch.cat([data.labels, *labels]))
