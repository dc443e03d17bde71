"""What is inside trained layers, as data for figures: eigen-filters, and the significance of CP components."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from decef.conversion import convert
from decef.files import replace_file
from decef.layers import CPACConv2d, FactorizedConv2d
from decef.layers.decef import stack_filters
from decef.machine import environment
from decef.models import stem_name
from decef.ranks import Budget
from decef.results.effective_ranks import kernels

SHARE = 2 / 3  # of its FLOPs, to which a dense network is decomposed


@dataclass(frozen=True)
class EigenFilters:
    """Eigen-filters of some input channels of one kernel, most important first.

    Args:
        channels: indices of the input channels, from 0.
        filters: `(channels, rank, kh, kw)`; each has norm 1, and its element of largest magnitude is positive.
        values: singular values, `(channels, rank)`.
    """

    channels: list[int]
    filters: list[list[list[list[float]]]]
    values: list[list[float]]


def eigenfilters(weight: Tensor, *, groups: int = 1, channels: int = 6) -> EigenFilters:
    """The eigen-filters that a DeCEF layer with this kernel has: those with a singular value above 0.

    Args:
        weight: dense kernel `(out_channels, in_channels // groups, kh, kw)`, such as `layer.weight`.
        groups: of the convolution.
        channels: how many input channels, evenly spaced.
    """
    stacked = stack_filters(weight, groups)  # (in, kh kw, out/g)
    chosen = torch.linspace(0, len(stacked) - 1, min(channels, len(stacked))).round().long()
    u, s, _ = torch.linalg.svd(stacked[chosen], full_matrices=False)
    rank = int((s > 1e-6 * s.max()).any(0).sum())
    filters = u[..., :rank].transpose(1, 2)  # (channels, rank, kh kw)
    # A singular vector's sign is arbitrary. Fixing it makes equal filters look equal.
    largest = filters.gather(2, filters.abs().argmax(2, keepdim=True))
    filters = (filters * largest.sign()).unflatten(2, weight.shape[2:])
    return EigenFilters(chosen.tolist(), filters.tolist(), s[:, :rank].tolist())


def significance(model: nn.Module, input_size: Sequence[int], kind: str = "product") -> dict[str, list[float]]:
    """Significance of every CP component by layer, largest first; see `CPACConv2d.significance`.

    Args:
        model: a network with CPAC layers, or a dense one, which is first decomposed to 2/3 of its FLOPs.
        input_size: shape of one input without the batch.
        kind: "product" or "channels".
    """
    if not _has_cpac(model):
        model = convert(model, "cpac", rank=Budget(flops=SHARE), exclude=stem_name(model), input_size=input_size)
    return {
        name: module.significance(kind).sort(descending=True).values.tolist()
        for name, module in model.named_modules()
        if isinstance(module, CPACConv2d)
    }


def write_filters(
    model: nn.Module, out: Path, *, made_from: dict[str, Any], input_size: Sequence[int], layer: str | None = None
) -> None:
    """Write the eigen-filters of one layer, and the significance of CP components in all layers, as <out>.json.

    Args:
        model: a trained network.
        out: path without ending.
        made_from: what to record about the network and its weights.
        input_size: shape of one input without the batch.
        layer: name of the convolution whose eigen-filters to write; by default the middle one of the network.

    Raises:
        ValueError: the network has no such convolution wider than 1x1.
    """
    all_kernels = {name: (weight, groups) for name, weight, groups in kernels(model)}
    if not all_kernels:
        raise ValueError("the network has no convolution wider than 1x1")
    if layer is None:
        layer = list(all_kernels)[len(all_kernels) // 2]
    if layer not in all_kernels:
        raise ValueError(f"the network has no convolution '{layer}' wider than 1x1; there are {', '.join(all_kernels)}")
    weight, groups = all_kernels[layer]
    # Channel vectors say nothing right after decomposition: their norm is 1. Other low-rank layers have no components.
    factorized = any(isinstance(module, FactorizedConv2d) for module in model.modules())
    kinds = ("product", "channels") if _has_cpac(model) else () if factorized else ("product",)
    data = {
        **made_from,
        **environment("cpu"),
        "layer": layer,
        "eigenfilters": asdict(eigenfilters(weight, groups=groups)),
        "significance": {kind: significance(model, input_size, kind) for kind in kinds},
        "decomposed_to_flops": None if _has_cpac(model) else round(SHARE, 3),
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    replace_file(Path(f"{out}.json"), (json.dumps(_rounded(data)) + "\n").encode())


def _has_cpac(model: nn.Module) -> bool:
    return any(isinstance(module, CPACConv2d) for module in model.modules())


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.4g}")  # four digits, however small
    if isinstance(value, dict):
        return {key: _rounded(v) for key, v in value.items()}
    return [_rounded(v) for v in value] if isinstance(value, list) else value
