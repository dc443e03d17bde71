"""Low-rank convolution layers (DeCEF, BasisConv, CPAC, rank-1) that replace `torch.nn.Conv2d`."""

from decef.atcd import ATCD
from decef.conversion import convert, fold
from decef.costs import cost
from decef.inference.deploy import deploy
from decef.layers import LAYERS, Basis2021Conv2d, BasisConv2d, CPACConv2d, DeCEFConv2d, Rank1Conv2d
from decef.models.released import load
from decef.plans import Plan, plan
from decef.ranks import effective_rank

__all__ = [
    "ATCD",
    "LAYERS",
    "Basis2021Conv2d",
    "BasisConv2d",
    "CPACConv2d",
    "DeCEFConv2d",
    "Plan",
    "Rank1Conv2d",
    "convert",
    "cost",
    "deploy",
    "effective_rank",
    "fold",
    "load",
    "plan",
]
