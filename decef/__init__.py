"""Low-rank convolution layers (DeCEF, BasisConv, CPAC, rank-1) that replace `torch.nn.Conv2d`."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from torch import nn

from decef.atcd import ATCD
from decef.conversion import convert, fold, recalibrate
from decef.costs import cost
from decef.inference.deploy import deploy
from decef.layers import LAYERS, Basis2021Conv2d, BasisConv2d, CPACConv2d, DeCEFConv2d, Rank1Conv2d
from decef.models.released import load
from decef.plans import Plan, plan
from decef.ranks import effective_rank

if TYPE_CHECKING:
    from decef.compression import Compressed


def compress(model: nn.Module, data: Iterable[Any], **arguments: Any) -> Compressed:
    """Shrink a trained classifier to a budget, and fine-tune it.

    Args:
        model: a trained network.
        data: training images in batches (images, labels).
        **arguments: `budget`, `layer`, `finetune` and more, see `decef.compression.Compression`.

    Raises:
        ValueError: see `Compression`.
        ImportError: the package was installed without its extras.
    """
    from decef.compression import compress

    return compress(model, data, **arguments)


__all__ = [
    "ATCD",
    "LAYERS",
    "Basis2021Conv2d",
    "BasisConv2d",
    "CPACConv2d",
    "DeCEFConv2d",
    "Plan",
    "Rank1Conv2d",
    "compress",
    "convert",
    "cost",
    "deploy",
    "effective_rank",
    "fold",
    "load",
    "plan",
    "recalibrate",
]
