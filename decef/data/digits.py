"""scikit-learn's bundled handwritten digits: 1,797 real 8x8 images, no download.

The test part of "Optical recognition of handwritten digits" (Alpaydin, Kaynak, UCI 1998).
"""

from __future__ import annotations

import functools
from pathlib import Path

import torch

from decef.data.images import Images
from decef.data.subsets import stratified_split
from decef.extras import need

TEST_IMAGES = 360


def load_digits(root: Path | None = None) -> tuple[Images, Images]:
    """1,437 training and 360 test images `(1, 8, 8)`, always the same stratified split; `root` is ignored.

    Raises:
        ImportError: scikit-learn is not installed.
    """
    need("train", "sklearn")
    return stratified_split(_read(), TEST_IMAGES)


@functools.cache  # the file is text, which takes longer to read than a small network to train
def _read() -> Images:
    from sklearn.datasets import load_digits as bundled

    digits = bundled()
    # 17 grey levels, 0 to 16, spread over a byte
    images = torch.from_numpy(digits.images).mul(15).to(torch.uint8).unsqueeze(1)
    return Images(images, torch.from_numpy(digits.target).long())
