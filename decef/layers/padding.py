"""The padding of a convolution, as `torch.nn.Conv2d` takes it."""

from __future__ import annotations

from typing import Literal

import torch.nn.functional as F
from torch import Tensor

Size = int | tuple[int, int]
PaddingMode = Literal["zeros", "reflect", "replicate", "circular"]


def pair(value: Size | tuple[int, ...]) -> tuple[int, int]:
    """One number for both directions, or two, as two."""
    return (value, value) if isinstance(value, int) else (value[0], value[1])


def zero_pads(padding: Size | str | tuple[int, ...], kernel: Size, dilation: Size) -> tuple[int, int, int, int]:
    """What a convolution with this `padding` adds on the left, right, top and bottom."""
    if padding == "same":
        total = [d * (k - 1) for d, k in zip(pair(dilation), pair(kernel), strict=True)]
        (top, bottom), (left, right) = ((t // 2, t - t // 2) for t in total)
        return left, right, top, bottom
    vertical, horizontal = (0, 0) if isinstance(padding, str) else pair(padding)
    return horizontal, horizontal, vertical, vertical


def padded(x: Tensor, pads: tuple[int, int, int, int], mode: str) -> Tensor:
    """`x` with so much more on the left, right, top and bottom, in a convolution's `padding_mode`."""
    return F.pad(x, pads, "constant" if mode == "zeros" else mode) if any(pads) else x
