"""The plain modules that a layer's arrangements are made of, see `FactorizedConv2d.as_convolutions`."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

#: Channels that engines compute at once: 16 floats in AVX-512, 16 outputs of 8-bit products. Fewer cost as much.
BLOCK = 16


@torch.no_grad()
def conv2d_of(weight: Tensor, bias: Tensor | None = None, groups: int = 1, **spatial: Any) -> nn.Conv2d:
    """A `torch.nn.Conv2d` with a copy of `weight`.

    Args:
        weight: `(out, in // groups, kh, kw)`, or `(out, in // groups)` for a 1x1 convolution.
        bias: `(out,)`.
        groups: number of groups.
        **spatial: stride, padding, dilation and padding mode.
    """
    weight = weight if weight.dim() == 4 else weight[:, :, None, None]
    out, per_group, *size = weight.shape
    # On "meta" no weights are drawn, which would move torch's generator on.
    conv = nn.Conv2d(
        per_group * groups, out, (size[0], size[1]), groups=groups, bias=bias is not None, device="meta", **spatial
    )  # fmt: skip
    conv.weight = nn.Parameter(weight.clone(memory_format=torch.contiguous_format))
    if bias is not None:
        conv.bias = nn.Parameter(bias.to(weight, copy=True))
    return conv


def more_components(factor: Tensor, groups: int, more: int) -> Tensor:
    """A factor `(groups * rank, ...)` with zeros for `more` components of every group."""
    by_group = factor.reshape(groups, -1, *factor.shape[1:])
    return F.pad(by_group, (0, 0) * (factor.dim() - 1) + (0, more)).flatten(0, 1)


class Copies(nn.Module):
    """Copies of the input, one after the other in the channels."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.count = count

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x] * self.count, -3)


class BlockSum(nn.Module):
    """The sum of so many equal blocks of channels."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.count = count

    def forward(self, x: Tensor) -> Tensor:
        first, *others = x.chunk(self.count, -3)
        for other in others:
            first = first + other
        return first
