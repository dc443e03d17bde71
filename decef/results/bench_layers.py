"""results/bench: times of single layers against the dense convolution, all variants interleaved in one run."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from decef.inference.timing import ROUNDS, Roofline, inference_call, interleaved_times, peak_memory
from decef.layers import FactorizedConv2d
from decef.plans import layer_type, plan
from decef.ranks import Budget
from decef.results.pages import write_bench


@dataclass(frozen=True)
class Shape:
    """One convolution of a network: square kernel, "same" padding, square input of `size` pixels each way."""

    network: str
    in_channels: int
    out_channels: int
    kernel_size: int
    stride: int
    size: int
    groups: int = 1

    def conv(self) -> nn.Conv2d:
        """The dense layer, freshly initialised."""
        return nn.Conv2d(
            self.in_channels,
            self.out_channels,
            self.kernel_size,
            self.stride,
            self.kernel_size // 2,
            groups=self.groups,
            bias=False,
        )

    def __str__(self) -> str:
        groups = f", groups {self.groups}" if self.groups > 1 else ""
        stride = f"/{self.stride}" if self.stride > 1 else ""
        kernel = f"{self.kernel_size}x{self.kernel_size}{stride}"
        return f"{self.in_channels} to {self.out_channels}, {kernel}, {self.size} px{groups}"


#: Convolutions of the networks that the papers use.
SHAPES = (
    Shape("ResNet-20", 16, 16, 3, 1, 32),
    Shape("ResNet-20", 16, 32, 3, 2, 32),
    Shape("ResNet-20", 32, 32, 3, 1, 16),
    Shape("ResNet-20", 64, 64, 3, 1, 8),
    Shape("VGG-16", 64, 64, 3, 1, 32),
    Shape("VGG-16", 128, 256, 3, 1, 8),
    Shape("VGG-16", 512, 512, 3, 1, 4),
    Shape("ResNet-18/50", 3, 64, 7, 2, 224),
    Shape("ResNet-18/50", 64, 64, 3, 1, 56),
    Shape("ResNet-18/50", 128, 256, 3, 2, 28),
    Shape("ResNet-18/50", 256, 1024, 1, 1, 14),
    Shape("MobileNetV2", 96, 24, 1, 1, 56),
    Shape("MobileNetV2", 384, 64, 1, 1, 14),
    Shape("MobileNetV2", 192, 192, 3, 1, 14, groups=192),
)


def layer_times(
    shape: Shape,
    layer: str,
    share: float,
    *,
    batch: int,
    backward: bool,
    roofline: Roofline,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
) -> dict[str, Any] | None:
    """Times of one layer, as a chain and composed, beside the dense convolution's.

    Args:
        shape: the convolution.
        layer: a factorised layer type.
        share: of the dense layer's FLOPs; the largest rank within it is used.
        batch: number of images.
        backward: time the forward and backward pass of a training step instead of inference.
        roofline: that of the device, for `bound`.
        device: to run on.
        dtype: of input and weights.

    Returns:
        None if the layer type does not apply to this shape, or not even rank 1 is within the share. Else a row:
        `rank`, `flops_ratio`;
        `dense`, `factorized`, `reconstructed`: median seconds per call, of interleaved rounds; `reconstructed` is None
        if the layer type has no composed kernel in training;
        `auto`: which implementation "auto" chooses;
        `bound`: the least time of the chain over that of the dense layer (`Roofline.seconds`);
        `memory`: the chain's peak over the dense layer's.
    """
    conv = shape.conv().to(device, dtype, memory_format=torch.channels_last)  # type: ignore[call-overload]
    model = nn.Sequential(conv)
    size = (shape.in_channels, shape.size, shape.size)
    try:
        (row,) = plan(model, layer, rank=Budget(flops=share, uniform=True), input_size=size).rows
    except ValueError:  # not even rank 1 is within the budget
        return None
    if row.rank is None or row.macs_before is None or row.macs_after is None:
        return None
    layer_class = layer_type(layer)
    assert issubclass(layer_class, FactorizedConv2d)
    x = torch.randn(batch, *size, device=device, dtype=dtype).contiguous(memory_format=torch.channels_last)
    x.requires_grad_(backward)
    factorized = layer_class.like(conv, row.rank, implementation="factorized").train(backward)
    with torch.set_grad_enabled(backward):
        prefers_factorized = factorized.prefers_factorized(x)
    variants = {"dense": conv, "factorized": factorized}
    if layer_class.composes_in_training or not backward:
        variants["reconstructed"] = copy.deepcopy(factorized)
        variants["reconstructed"].implementation = "reconstructed"
    steps = {name: _step(module, x, backward) for name, module in variants.items()}
    times = interleaved_times(steps)
    memory = {name: peak_memory(steps[name], device) for name in ("dense", "factorized")}
    return {
        "rank": row.rank,
        "flops_ratio": row.macs_after / row.macs_before,
        **{"reconstructed": None, **times},
        "auto": "factorized" if prefers_factorized else "reconstructed",
        "bound": roofline.seconds(steps["factorized"]) / roofline.seconds(steps["dense"]),
        "memory": memory["factorized"] / memory["dense"] if memory["dense"] else None,
    }


def bench_layers(
    layers: Sequence[str],
    share: float,
    batches: Sequence[int],
    device: torch.device,
    dtype: torch.dtype = torch.float32,
) -> Iterator[dict[str, Any]]:
    """Yield `layer_times` for every shape, layer type, batch and pass, where it is not None."""
    roofline = Roofline.measure(device, dtype)
    for shape, layer, batch, backward in product(SHAPES, layers, batches, (False, True)):
        times = layer_times(
            shape, layer, share, batch=batch, backward=backward, roofline=roofline, device=device, dtype=dtype
        )
        if times is not None:
            what = {"shape": str(shape), "network": shape.network, "layer": layer, "share": share, "batch": batch}
            yield {**what, "pass": "training" if backward else "inference", **times}


def auto_score(frame: pd.DataFrame) -> pd.DataFrame:
    """How often "auto", or one implementation everywhere, is the fastest choice, and how much time each takes.

    Args:
        frame: rows of `layer_times`.

    Returns:
        A row each for `auto`, `factorized` and `reconstructed`. `right`: share of the cases in which it is the fastest
        or within 5 % of it (less is noise). `time`: geometric mean of its time over the fastest one's.
    """
    frame = frame.astype({"reconstructed": float})  # NaN where there is none
    best = frame[["factorized", "reconstructed"]].min(axis=1)
    chosen = frame.factorized.where(frame.auto == "factorized", frame.reconstructed)
    rows = {}
    for name, time in (("auto", chosen), ("factorized", frame.factorized), ("reconstructed", frame.reconstructed)):
        ratio = (time / best).dropna()
        rows[name] = {"right": float((ratio < 1.05).mean()), "time": float(np.exp(np.log(ratio).mean()))}
    return pd.DataFrame.from_dict(rows, orient="index")


def write_layers(rows: Sequence[dict[str, Any]], out: Path, made: Mapping[str, Any]) -> None:
    """Write rows of `bench_layers` as <out>.json, and as a page for people as <out>.md.

    Args:
        rows: what was measured.
        out: path without ending.
        made: where, when and with which code.
    """
    frame = pd.DataFrame(rows).astype({"reconstructed": float})
    ratios = frame.assign(
        FLOPs=frame.flops_ratio,
        factorized=frame.factorized / frame.dense,
        reconstructed=frame.reconstructed / frame.dense,
        auto=frame.factorized.where(frame.auto == "factorized", frame.reconstructed) / frame.dense,
    )
    keys = ["pass", "batch", "network", "shape", "layer"]
    columns = [*keys, "rank", "FLOPs", "bound", "factorized", "reconstructed", "auto", "memory"]
    write_bench(
        "bench_layers",
        rows,
        out,
        made,
        rounds=ROUNDS,
        choices=auto_score(frame).round(3).to_markdown(),
        table=ratios.sort_values(keys, kind="stable")[columns].round(2).to_markdown(index=False),
    )


def _step(module: nn.Module, x: Tensor, backward: bool) -> Callable[[], object]:
    if not backward:
        return inference_call(module, x)

    def train() -> object:
        module.zero_grad()
        x.grad = None
        module(x).sum().backward()
        return x.grad

    return train
