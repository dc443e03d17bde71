"""Second moments of the inputs of convolutions. They tell how much changing a kernel changes the layer's output.

Let W be a kernel with a filter in each row, V an approximation of W, and x the input patches. The squared error of the
output is `sum ||(W - V) x||^2 = tr((W - V) S (W - V)^T)` with the second moments `S = sum x x^T`. It is the squared
norm of W - V in the metric S. A few hundred images without labels are enough to estimate S.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from decef.copies import copied
from decef.costs import shared_weights
from decef.inputs import NO_BATCH, check_batches, inputs_of, inputs_seen
from decef.layers.factorized import without_autocast
from decef.layers.padding import padded, pair, zero_pads
from decef.progress import bar

PATCHES_AT_ONCE = 2**24  # numbers in an unfolded input


def input_moments(
    model: nn.Module, names: Sequence[str], inputs: Iterable[object], *, progress: bool = False
) -> dict[str, Tensor]:
    """Mean second moments of the input patches of convolutions, with the network in evaluation mode.

    Args:
        model: any network; it does not change.
        names: names of `torch.nn.Conv2d` modules in it.
        inputs: batches for the network: tensors `(B, ...)`, or tuples that begin with one, as a DataLoader yields them.
            They are moved to the network's device.
        progress: show a progress bar.

    Returns:
        Moments by name, `(groups, d, d)` in float64 with `d = in_channels // groups * kh * kw`, in the order of a
        kernel's weights. Convolutions that share a weight have the same, over the patches of all of them. Those that do
        not run are left out.

    Raises:
        ValueError: `inputs` is one tensor, yields nothing or something else than batches, or makes a convolution's
            inputs NaN or infinite.
        KeyError: the network has no module of such a name.
    """
    check_batches(inputs)
    model = copied(model).eval()
    modules = dict(model.named_modules())
    sums: dict[str, Tensor] = {}
    counts: dict[str, int] = {}
    wanted = {name: modules[name] for name in names}
    if not _collect(model, wanted, bar(inputs, "moments", progress), sums, counts):
        raise ValueError(NO_BATCH)
    sharing = shared_weights(model)
    found = {}
    for name, total in sums.items():
        if not total.isfinite().all():
            raise ValueError(f"on these data the inputs of '{name}' are NaN or infinite")
        same = [n for n in sharing.get(name, [name]) if n in sums and sums[n].shape == total.shape]  # the same groups
        patches = sum(counts[n] for n in same)
        # In place where it can be: a ResNet-101's moments take a gigabyte.
        found[name] = total.div_(patches) if same == [name] else torch.stack([sums[n] for n in same]).sum(0) / patches
    return found


def moments_on(
    model: nn.Module,
    names: Sequence[str],
    data: Iterable[object] | Mapping[str, Tensor] | None,
    *,
    progress: bool = False,
) -> Mapping[str, Tensor]:
    """Moments for `data`: none if it is None, `data` itself if it holds moments, else moments collected on it.

    Raises:
        ValueError: none of the moments are of a layer that they are wanted for; or see `input_moments`.
    """
    if data is None:
        return {}
    moments = data if isinstance(data, Mapping) else input_moments(model, names, data, progress=progress)
    if names and not set(moments) & set(names):
        raise ValueError("data would do nothing: it holds moments of none of the layers that may change")
    return moments


@torch.no_grad()
def _collect(
    model: nn.Module,
    wanted: Mapping[str, nn.Module],
    inputs: Iterable[object],
    sums: dict[str, Tensor],
    counts: dict[str, int],
) -> int:
    """Add each convolution's sum of moments and number of patches; return the number of batches."""
    batches = 0

    def add(name: str, x: Tensor) -> None:
        conv = wanted[name]
        assert isinstance(conv, nn.Conv2d)
        for patches in input_patches(conv, x):
            with without_autocast(patches.device):
                moments = patches @ patches.mT
            if name in sums:
                sums[name] += moments  # in place: it may be gigabytes
            else:
                sums[name] = moments.double()
            counts[name] = counts.get(name, 0) + patches.shape[-1]

    with inputs_seen(wanted, add):
        for batch in inputs:
            x = inputs_of(batch, model)
            if len(x):
                model(x)
                batches += 1
    return batches


def input_patches(conv: nn.Conv2d, x: Tensor) -> Iterator[Tensor]:
    """The input patches that a convolution multiplies its kernel with, in float32, a few images at a time.

    Args:
        conv: the convolution, of any padding, stride, dilation and groups.
        x: its input `(B, in_channels, H, W)`, or one without the batch dimension.

    Yields:
        `(groups, d, patches)`, with d as in `input_moments`.
    """
    x = x if x.dim() == 4 else x[None]
    kernel, dilation, stride = (pair(v) for v in (conv.kernel_size, conv.dilation, conv.stride))
    x = padded(x, zero_pads(conv.padding, kernel, dilation), conv.padding_mode)
    unfolded_size = math.prod(x.shape[1:]) * math.prod(kernel) // math.prod(stride)
    for part in x.split(max(1, PATCHES_AT_ONCE // max(1, unfolded_size))):
        patches = F.unfold(part, kernel, dilation, 0, stride)  # (b, in kh kw, positions)
        yield patches.unflatten(1, (conv.groups, -1)).permute(1, 2, 0, 3).flatten(2).float()
