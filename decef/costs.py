"""Parameters, MACs and FLOPs of a network, per layer. A factorised layer counts as its chain of convolutions.

One MAC is one multiply-add; FLOPs = 2 x MACs, as counted by `torch.utils.flop_counter`. Only convolutions and matrix
products count, not normalisation, activations, pooling or additions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, TypedDict

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.flop_counter import FlopCounterMode

from decef.copies import copied_to_meta
from decef.extras import need
from decef.inputs import inputs_seen
from decef.layers import FactorizedConv2d

if TYPE_CHECKING:
    import pandas as pd

COLUMNS = ("params", "trainable_params", "macs", "flops")


def cost(model: nn.Module, input_size: Sequence[int]) -> pd.DataFrame:
    """Cost of `model` per layer, counted on the meta device without computing anything; `model` does not change.

    Args:
        model: any network whose forward takes one tensor and runs on the meta device.
        input_size: shape of one input without the batch dimension, `(3, 32, 32)` for CIFAR.

    Returns:
        A DataFrame indexed by module name, with a row for every module that has parameters or does MACs. The columns
        are `type`, `params`, `trainable_params`, `macs` and `flops`, the last two for one input. A parameter that
        several modules share counts once. The totals are in `.attrs` under the names of the columns.

    Raises:
        ValueError: the network doesn't run on an input of this size.
        ImportError: pandas is not installed.
    """
    need("results", "pandas")
    import pandas as pd

    rows = _rows(model, input_size)
    frame = pd.DataFrame.from_dict(rows, orient="index", columns=["type", *COLUMNS])
    frame.attrs.update(_totals(rows))
    return frame


def total_cost(model: nn.Module, input_size: Sequence[int]) -> dict[str, int]:
    """The totals of `cost`: params, trainable_params, macs, flops. Works without pandas.

    Raises:
        ValueError: the network doesn't run on an input of this size.
    """
    return _totals(_rows(model, input_size))


def input_shapes(model: nn.Module, input_size: Sequence[int]) -> dict[str, list[tuple[int, ...]]]:
    """Input shapes of every convolution by module name: one for each call, with the batch dimension.

    The network gets a batch of one input. Convolutions that do not run in evaluation mode are left out.

    Raises:
        ValueError: the network doesn't run on an input of this size.
    """
    model = _on_meta(model)
    shapes: dict[str, list[tuple[int, ...]]] = {}
    modules = {name: m for name, m in model.named_modules() if isinstance(m, (nn.Conv2d, FactorizedConv2d))}
    with inputs_seen(modules, lambda name, x: shapes.setdefault(name, []).append(tuple(x.shape))):
        _forward(model, _one(input_size))
    return shapes


def layer_macs(layer: nn.Module, input_shape: Sequence[int]) -> int:
    """MACs of one layer in one call; a factorised layer counts as its chain.

    Args:
        layer: takes one tensor.
        input_shape: `(B, C, H, W)`. B is 1 where a network that gets one input calls it, unless it puts several crops,
            frames or the like into the batch.

    Raises:
        ValueError: the layer doesn't run on an input of this shape.
    """
    with FlopCounterMode(display=False) as counter:
        _forward(_on_meta(layer), input_shape)
    return counter.get_total_flops() // 2


class _Row(TypedDict):
    type: str
    params: int
    trainable_params: int
    macs: int
    flops: int


def _rows(model: nn.Module, input_size: Sequence[int]) -> dict[str, _Row]:
    flops = module_flops(model, input_size)
    rows: dict[str, _Row] = {}
    seen: set[int] = set()
    for name, module in model.named_modules():
        own = [p for p in module.parameters(recurse=False) if id(p) not in seen]
        seen.update(map(id, own))
        count = flops.get(name, 0)
        if own or count:
            rows[name] = {
                "type": type(module).__name__,
                "params": sum(p.numel() for p in own),
                "trainable_params": sum(p.numel() for p in own if p.requires_grad),
                "macs": count // 2,
                "flops": count,
            }
    return rows


def _totals(rows: Mapping[str, _Row]) -> dict[str, int]:
    return {column: sum(row[column] for row in rows.values()) for column in COLUMNS}  # type: ignore[literal-required]


def module_flops(model: nn.Module, input_size: Sequence[int]) -> dict[str, int]:
    """FLOPs of every module by name for one input, summed over its calls, without those of its submodules.

    Raises:
        ValueError: the network doesn't run on an input of this size.
    """
    model = _on_meta(model)
    own: dict[nn.Module, int] = {}
    open_calls: list[tuple[int, int]] = []  # FLOPs counted before the call, FLOPs of the calls inside it
    counter = FlopCounterMode(display=False)

    def enter(module: nn.Module, args: tuple[object, ...]) -> None:
        open_calls.append((counter.get_total_flops(), 0))

    def leave(module: nn.Module, args: tuple[object, ...], output: object) -> None:
        start, inside = open_calls.pop()
        total = counter.get_total_flops() - start
        own[module] = own.get(module, 0) + total - inside
        if open_calls:
            open_calls[-1] = (open_calls[-1][0], open_calls[-1][1] + total)

    for module in model.modules():
        module.register_forward_pre_hook(enter)
        module.register_forward_hook(leave)
    with counter:
        _forward(model, _one(input_size))
    return {name: own.get(module, 0) for name, module in model.named_modules()}


def _on_meta(model: nn.Module) -> nn.Module:
    check_plain(model)
    model = copied_to_meta(model)
    for module in model.modules():
        if isinstance(module, FactorizedConv2d):
            module.implementation = "factorized"
        elif type(module) in (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d):
            # Batch norm does no MACs and keeps the shape, but takes most of the time on the meta device.
            module.forward = _same
    return model


def _same(input: torch.Tensor) -> torch.Tensor:
    return input


def _one(input_size: Sequence[int]) -> tuple[int, ...]:
    """The shape of a batch of one input."""
    if not isinstance(input_size, Sequence):
        raise ValueError(f"input_size={input_size!r} must be the shape of one input, such as (3, 32, 32)")
    return (1, *input_size)


def _forward(model: nn.Module, shape: Sequence[int]) -> None:
    """Run the network on a batch of this shape, `(B, C, H, W)`, for its hooks and counters."""
    parameter = next((p for p in model.parameters() if p.is_floating_point()), None)
    dtype = parameter.dtype if parameter is not None else None
    try:
        with torch.no_grad():
            model(torch.zeros(*shape, device="meta", dtype=dtype))
    # timm's vision transformers assert the image size, and unpack a shape that may be too short.
    except (RuntimeError, AssertionError, ValueError, IndexError, TypeError) as error:
        raise ValueError(
            f"the network does not run on an input of size {tuple(shape[1:])}: {error} (it was run without values, on "
            "the meta device)"
        ) from error


def check_plain(model: nn.Module) -> None:
    """Raise ValueError for a network inside something else, which hides its modules or runs in a way of its own."""
    if isinstance(model, (nn.DataParallel, DistributedDataParallel)):
        raise ValueError(f"the network is in a {type(model).__name__}: give it as model.module")
    if isinstance(model, torch.jit.ScriptModule):
        raise ValueError("the network is in TorchScript, which can't be changed: give the one that it was made from")
    if isinstance(getattr(model, "_orig_mod", None), nn.Module):
        raise ValueError("the network is compiled: give it as model._orig_mod, and compile what comes of it")


def shared_weights(model: nn.Module) -> dict[str, list[str]]:
    """For every Conv2d with a weight parameter, by name: the names of all modules with that parameter.

    These include the Conv2d itself. All names are in the network's order.
    """
    owners: dict[int, list[str]] = {}
    for name, module in model.named_modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                owners.setdefault(id(parameter), []).append(name)
    return {
        name: owners[id(module._parameters["weight"])]
        for name, module in model.named_modules()
        if isinstance(module, nn.Conv2d) and module._parameters.get("weight") is not None
    }
