"""results/ranks: effective ranks of kernels by depth."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import pandas as pd
import torch
from torch import Tensor, nn

from decef.copies import copied
from decef.layers import FactorizedConv2d
from decef.ranks import DEFINITIONS, effective_rank


def kernels(model: nn.Module) -> Iterator[tuple[str, Tensor, int]]:
    """Name, dense kernel and groups of every convolution wider than 1x1, in the network's order."""
    # A copy in evaluation mode: to ask for a weight with spectral norm is else a step of its power iteration.
    for name, module in copied(model).eval().named_modules():
        if isinstance(module, (nn.Conv2d, FactorizedConv2d)) and max(module.kernel_size) > 1:
            yield name, module.weight.detach(), module.groups


def rank_table(
    model: nn.Module, threshold: float | None = None, *, definitions: Iterable[str] = DEFINITIONS
) -> pd.DataFrame:
    """Effective rank of every kernel by depth, beside that of a random kernel of the same shape.

    A random kernel's effective rank depends only on its shape, and rises with the number of filters. So a fall with
    depth says nothing about training if random kernels show it too.

    Args:
        model: a network, dense or factorised.
        threshold: for the definition "threshold", see `effective_rank`.
        definitions: which definitions to compute.

    Returns:
        A row per convolution wider than 1x1: `name`, `out_channels`, `in_channels`, `kernel`, and for each definition
        `<definition>`, the mean over input channels, and `<definition>_init`, the same for a random Gaussian kernel.

    Raises:
        ValueError: there is no such convolution.
    """
    generator = torch.Generator().manual_seed(0)
    rows = []
    for name, weight, groups in kernels(model):
        row: dict[str, object] = {
            "name": name,
            "out_channels": weight.shape[0],
            "in_channels": weight.shape[1] * groups,
            "kernel": f"{weight.shape[2]}x{weight.shape[3]}",
        }
        random = torch.randn(weight.shape, generator=generator, dtype=torch.float64)
        for definition in definitions:
            given = threshold if definition == "threshold" else None
            for column, kernel in ((definition, weight), (f"{definition}_init", random)):
                row[column] = effective_rank(kernel, given, definition=definition, groups=groups).mean().item()
        rows.append(row)
    if not rows:
        raise ValueError("the network has no convolution wider than 1x1")
    return pd.DataFrame(rows)
