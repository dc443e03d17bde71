"""Whether a layer's chain is faster than its composed kernel: measured, once for a shape in a process."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from typing import Any, Protocol, Self

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

#: Whether the chain was faster, by layer and how it runs, then by the input's shape and strides.
MEASURED: dict[tuple[Any, ...], dict[tuple[tuple[int, ...], tuple[int, ...]], bool]] = {}
MOST_SHAPES = 8  # of one layer that are measured: images of ever other sizes would be measured all the time
RUNS = 4


class Layer(Protocol):
    """What is looked at of a `FactorizedConv2d`."""

    in_channels: int
    groups: int
    rank: int
    stride: tuple[int, int]
    dilation: tuple[int, int]
    implementation: str
    padding: str | tuple[int, ...]
    padding_mode: Any

    @property
    def weight_shape(self) -> tuple[int, int, int, int]: ...

    @property
    def _pad_first(self) -> bool: ...

    @property
    def _padding(self) -> tuple[int, int]: ...

    def factors(self) -> dict[str, nn.Parameter]: ...

    def parameters(self) -> Iterator[nn.Parameter]: ...

    def forward(self, input: Tensor) -> Tensor: ...

    def _twin(self) -> Self: ...


def factorized_is_faster(layer: Layer, x: Tensor) -> bool:
    """See `FactorizedConv2d.prefers_factorized`."""
    tracing = torch.compiler.is_compiling() or torch.jit.is_tracing()
    if tracing or x.device.type not in ("cpu", "cuda") or not all(map(_is_ordinary, (x, *layer.factors().values()))):
        return factorized_has_fewer_macs(layer, x)
    kind = (type(layer), layer.weight_shape, layer.groups, layer.rank, layer.stride, layer._padding, layer.dilation)
    trained = tuple(torch.is_grad_enabled() and p.requires_grad for p in layer.parameters())
    channels_last = x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last)
    goes_through = torch.is_grad_enabled() and x.requires_grad
    where = (x.device, x.dtype, channels_last, goes_through, trained, torch.get_num_threads())
    autocast = torch.is_autocast_enabled(x.device.type) and torch.get_autocast_dtype(x.device.type)
    known = MEASURED.setdefault((*kind, *where, autocast), {})
    this = tuple(x.shape), x.stride()
    if this not in known and len(known) >= MOST_SHAPES:
        this = min(known, key=lambda other: abs(math.prod(other[0]) - x.numel()))
    if this not in known:
        trains = goes_through or any(trained)
        known[this] = seconds(layer, "factorized", x, trains) < seconds(layer, "reconstructed", x, trains)
    return known[this]


def factorized_has_fewer_macs(layer: Layer, x: Tensor) -> bool:
    """Whether the chain does fewer MACs than composing the kernel and convolving once.

    Per output position the chain does about one for each of its parameters. Composing costs about `rank` for each
    weight of the kernel, once for all positions.
    """
    dense, chain = math.prod(layer.weight_shape), sum(p.numel() for p in layer.factors().values())
    return chain < dense * (1 + layer.rank / max(1, x.numel() // layer.in_channels))


def seconds(layer: Layer, implementation: str, x: Tensor, trains: bool) -> float:
    """Seconds of the fastest of a few runs, on an input that is already padded where the layer pads first.

    Infinite if the device's memory doesn't suffice.
    """
    try:
        return _seconds(layer, implementation, x, trains)
    except torch.OutOfMemoryError:
        return math.inf


def _seconds(layer: Layer, implementation: str, x: Tensor, trains: bool) -> float:
    twin = layer._twin()
    twin.implementation = implementation
    if layer._pad_first:
        twin.padding, twin.padding_mode = (0, 0), "zeros"
    x = x.detach().clone().requires_grad_(x.requires_grad)
    best = math.inf
    for _ in range(RUNS):
        started = time.perf_counter()
        # What activation checkpointing counts must not hold what the twin saves for its own backward pass.
        with torch.set_grad_enabled(trains), saved_tensors_hooks(_same, _same):
            y = twin.forward(x)  # not twin(x), which would run the hooks
        if trains:
            y.sum().backward()
        if x.device.type == "cuda":
            torch.cuda.synchronize(x.device)
        best = min(best, time.perf_counter() - started)
    return best


def _same(x: Tensor) -> Tensor:
    return x


def _is_ordinary(x: Tensor) -> bool:
    """Whether `x` is an ordinary tensor, not one wrapped by `torch.func` or a tracer."""
    try:
        x.data_ptr()
    except RuntimeError:
        return False
    return type(x) in (Tensor, nn.Parameter)
