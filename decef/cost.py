"""Parameters, MACs and FLOPs of a network, per layer, as it is deployed (factorised layers as their chains).

One MAC is one multiply-add; FLOPs = 2 x MACs, as `torch.utils.flop_counter` has them. Convolutions and matrix
products count; normalisation, activations, pooling and additions don't.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from decef.layers import FactorizedConv2d

if TYPE_CHECKING:
    import pandas as pd

COLUMNS = ("params", "trainable_params", "macs", "flops")


def cost(model: nn.Module, input_size: Sequence[int]) -> pd.DataFrame:
    """Cost of `model` per layer; nothing is computed and `model` stays as it is.

    Args:
        model: any network whose forward takes one tensor and runs on the meta device.
        input_size: shape of one input without the batch, `(3, 32, 32)` for CIFAR.

    Returns:
        A frame indexed by module name, a row for every module that has parameters or does MACs, with the columns
        `type`, `params`, `trainable_params`, `macs` and `flops` (for one input). A parameter that several modules
        share counts once. Totals are in `.attrs` under the same names.

    Raises:
        ValueError: the network doesn't run on an input of this size.
    """
    import pandas as pd

    flops = _flops_by_module(model, input_size)
    rows, seen = {}, set()
    for name, module in model.named_modules():
        own = [p for p in module.parameters(recurse=False) if id(p) not in seen]
        seen.update(map(id, own))
        module_flops = flops.get(name, 0)
        if own or module_flops:
            rows[name] = {
                "type": type(module).__name__,
                "params": sum(p.numel() for p in own),
                "trainable_params": sum(p.numel() for p in own if p.requires_grad),
                "macs": module_flops // 2,
                "flops": module_flops,
            }
    frame = pd.DataFrame.from_dict(rows, orient="index", columns=["type", *COLUMNS])
    frame.attrs = {column: int(frame[column].sum()) for column in COLUMNS}
    return frame


def total_cost(model: nn.Module, input_size: Sequence[int]) -> dict[str, int]:
    """The totals of `cost`: params, trainable_params, macs, flops."""
    return dict(cost(model, input_size).attrs)


def input_shapes(model: nn.Module, input_size: Sequence[int]) -> dict[str, tuple[int, ...]]:
    """Shape, batch of one included, of what every convolution receives on its first call, by module name.

    Raises:
        ValueError: the network doesn't run on an input of this size.
    """
    model = _on_meta(model)
    shapes: dict[str, tuple[int, ...]] = {}
    names = {m: name for name, m in model.named_modules() if isinstance(m, (nn.Conv2d, FactorizedConv2d))}

    def remember(module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        shapes.setdefault(names[module], tuple(args[0].shape))

    for module in names:
        module.register_forward_pre_hook(remember)
    _forward(model, input_size)
    return shapes


def layer_macs(layer: nn.Module, input_shape: Sequence[int]) -> int:
    """MACs of one layer, a factorised one as its chain, on an input of this shape (batch included)."""
    with FlopCounterMode(display=False) as counter:
        _forward(_on_meta(layer), input_shape[1:])
    return counter.get_total_flops() // 2


def _flops_by_module(model: nn.Module, input_size: Sequence[int]) -> dict[str, int]:
    model = _on_meta(model)
    with FlopCounterMode(display=False) as counter:
        _forward(model, input_size)
    inclusive = {name: sum(ops.values()) for name, ops in counter.get_flop_counts().items() if name != "Global"}
    root = type(model).__name__
    inclusive = {name.removeprefix(root).removeprefix("."): n for name, n in inclusive.items()}
    own = dict(inclusive)
    for name, n in inclusive.items():  # the counter gives a module what its children do too
        if name:
            parent = name.rpartition(".")[0]
            while parent not in own:
                parent = parent.rpartition(".")[0]
            own[parent] -= n
    return own


def _on_meta(model: nn.Module) -> nn.Module:
    model = copy.deepcopy(model).to("meta").eval()
    for module in model.modules():
        if isinstance(module, FactorizedConv2d):
            module.implementation = "factorized"
    return model


def _forward(model: nn.Module, input_size: Sequence[int]) -> None:
    parameter = next((p for p in model.parameters() if p.is_floating_point()), None)
    dtype = parameter.dtype if parameter is not None else None
    try:
        with torch.no_grad():
            model(torch.zeros(1, *input_size, device="meta", dtype=dtype))
    except RuntimeError as error:
        raise ValueError(f"the network does not run on an input of size {tuple(input_size)}: {error}") from error
