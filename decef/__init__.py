"""Low-rank convolution layers: DeCEF, BasisConv, CPAC and rank-1, against the plain Conv2d."""

from decef.convert import Plan, convert, fold, plan
from decef.cost import cost
from decef.layers import LAYERS, BasisConv2d, CPACConv2d, DeCEFConv2d, Rank1Conv2d

__all__ = [
    "LAYERS",
    "BasisConv2d",
    "CPACConv2d",
    "DeCEFConv2d",
    "Plan",
    "Rank1Conv2d",
    "convert",
    "cost",
    "fold",
    "plan",
]
