"""The layer types, each a drop-in replacement for `torch.nn.Conv2d`. This package needs only torch."""

from torch import nn

from decef.layers.basis import BasisConv2d
from decef.layers.basis2021 import Basis2021Conv2d
from decef.layers.cpac import CPACConv2d
from decef.layers.decef import DeCEFConv2d
from decef.layers.factorized import FactorizedConv2d
from decef.layers.rank1 import Rank1Conv2d

#: Every layer type by its name in configs and tables.
LAYERS: dict[str, type[nn.Conv2d] | type[FactorizedConv2d]] = {
    "conv2d": nn.Conv2d,
    "decef": DeCEFConv2d,
    "basisconv": BasisConv2d,
    "basisconv2021": Basis2021Conv2d,
    "cpac": CPACConv2d,
    "rank1": Rank1Conv2d,
}

__all__ = ["LAYERS", "Basis2021Conv2d", "BasisConv2d", "CPACConv2d", "DeCEFConv2d", "FactorizedConv2d", "Rank1Conv2d"]
