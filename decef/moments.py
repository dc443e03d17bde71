"""Second moments of what convolutions receive: the metric in which a kernel's error is that of its output.

For a kernel W, one filter a row, and input patches x, the squared error of the output that an approximation V makes is
`sum ||(W - V) x||^2 = tr((W - V) S (W - V)^T)` with `S = sum x x^T`: the error of the kernel in the metric S. A few
hundred images without labels give an S that is good enough.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_T = TypeVar("_T")
PATCHES_AT_ONCE = 2**24  # numbers in an unfolded input
MEMORY = 2**30  # bytes of moments that are collected in one pass


def input_moments(
    model: nn.Module, names: Sequence[str], inputs: Iterable[object], *, memory: int = MEMORY, progress: bool = False
) -> dict[str, Tensor]:
    """Mean second moments of the input patches of convolutions, in evaluation mode.

    Args:
        model: any network; it stays as it is.
        names: of its `torch.nn.Conv2d`s.
        inputs: batches for the network, `(B, ...)` tensors on its device, or tuples of which they are the first, as a
            DataLoader yields. It is gone through once, or several times where the moments don't fit into `memory`.
        memory: bytes of moments that are collected in one pass.
        progress: show a bar.

    Returns:
        By name: `(groups, d, d)` in float64, d = `in_channels // groups * kh * kw` in the order of a kernel's weights.
        A convolution that does not run is not among them.

    Raises:
        ValueError: `inputs` yields nothing, or can be gone through only once where several passes are needed.
    """
    model = copy.deepcopy(model).eval()
    modules = dict(model.named_modules())
    found: dict[str, Tensor] = {}
    passes = list(_passes({name: modules[name] for name in names}, memory))
    for wanted in bar(passes, "moments", progress):
        sums, counts, batches = _collect(model, wanted, inputs)
        if not batches:
            raise ValueError("the data yields no batch: give a few hundred images, as something to iterate over anew")
        found |= {name: total / counts[name] for name, total in sums.items()}
    return found


def moments_on(
    model: nn.Module,
    names: Sequence[str],
    data: Iterable[object] | Mapping[str, Tensor] | None,
    *,
    progress: bool = False,
) -> Mapping[str, Tensor]:
    """What `data` say: nothing, moments that were collected before, or inputs on which they are collected now."""
    if isinstance(data, Mapping):
        return data
    return {} if data is None else input_moments(model, names, data, progress=progress)


def bar(items: Sequence[_T], what: str, progress: bool) -> Iterable[_T]:
    """`items`, with a progress bar on a terminal where that is asked for."""
    if not progress:
        return items
    from tqdm import tqdm  # the library itself needs torch and numpy alone

    return tqdm(items, desc=what, disable=None)


def _passes(convolutions: dict[str, nn.Module], memory: int) -> Iterator[dict[str, nn.Conv2d]]:
    """Convolutions whose moments fit into memory together, a single one if need be."""
    chosen: dict[str, nn.Conv2d] = {}
    used = 0
    for name, conv in convolutions.items():
        assert isinstance(conv, nn.Conv2d)
        size = 8 * conv.groups * math.prod(conv.weight.shape[1:]) ** 2
        if chosen and used + size > memory:
            yield chosen
            chosen, used = {}, 0
        chosen[name] = conv
        used += size
    yield chosen


@torch.no_grad()
def _collect(
    model: nn.Module, wanted: dict[str, nn.Conv2d], inputs: Iterable[object]
) -> tuple[dict[str, Tensor], dict[str, int], int]:
    """Sums of moments, numbers of patches, and how many batches there were."""
    sums: dict[str, Tensor] = {}
    counts: dict[str, int] = {}
    batches = 0
    hooks = []
    for name, conv in wanted.items():

        def remember(module: nn.Module, args: tuple[Tensor, ...], name: str = name, conv: nn.Conv2d = conv) -> None:
            for patches in input_patches(conv, args[0]):
                moments = (patches @ patches.mT).double()
                sums[name] = sums[name] + moments if name in sums else moments
                counts[name] = counts.get(name, 0) + patches.shape[-1]

        hooks.append(conv.register_forward_pre_hook(remember))
    try:
        for batch in inputs:
            model(batch[0] if isinstance(batch, (tuple, list)) else batch)
            batches += 1
    finally:
        for hook in hooks:
            hook.remove()
    return sums, counts, batches


def input_patches(conv: nn.Conv2d, x: Tensor) -> Iterator[Tensor]:
    """The patches that a convolution multiplies its kernel with, `(groups, d, patches)`, some images at a time.

    Args:
        conv: the convolution, of any padding, stride, dilation and groups.
        x: its input `(B, in_channels, H, W)`.
    """
    pads = conv._reversed_padding_repeated_twice
    if any(pads):
        x = F.pad(x, pads, "constant" if conv.padding_mode == "zeros" else conv.padding_mode)
    kernel, dilation, stride = ((v[0], v[1]) for v in (conv.kernel_size, conv.dilation, conv.stride))
    unfolded_size = math.prod(x.shape[1:]) * math.prod(kernel) // math.prod(stride)
    for part in x.split(max(1, PATCHES_AT_ONCE // unfolded_size)):
        patches = F.unfold(part, kernel, dilation, 0, stride)  # (b, in kh kw, positions)
        yield patches.unflatten(1, (conv.groups, -1)).permute(1, 2, 0, 3).flatten(2).float()
