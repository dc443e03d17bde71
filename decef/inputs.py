"""Batches of inputs, as a DataLoader yields them, for a network, and their memory layout."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import Tensor, nn

from decef.copies import copied

Batch = TypeVar("Batch", Tensor, tuple[Tensor, Tensor])
NO_BATCH = "the data yields no batch: give a few hundred images, as a list or DataLoader"


def check_batches(data: object) -> None:
    """Raise ValueError for one batch where batches are wanted: to iterate over it would give images, or labels."""
    if isinstance(data, Tensor):
        raise ValueError("data must be batches, such as a list or a DataLoader, not one tensor: give [images]")
    parts = data if isinstance(data, (tuple, list)) and all(isinstance(part, Tensor) for part in data) else ()
    if len(parts) != 2 or parts[0].dim() < 2 or not parts[1].dim():
        return
    images, others = parts
    if others.dim() == 1 or (len(images) == len(others) and images.shape[1] != others.shape[1]):  # such as masks
        raise ValueError("data must be batches, not one batch of images and labels: give [(images, labels)]")


def inputs_of(batch: object, model: nn.Module) -> Tensor:
    """A batch's inputs `(B, ...)`, on the device and in the precision of the network's parameters.

    Raises:
        ValueError: the batch is neither a tensor nor a tuple or list that begins with one, or it has uint8 images.
    """
    x = batch[0] if isinstance(batch, (tuple, list)) and batch else batch
    if not isinstance(x, Tensor):
        raise ValueError(
            f"a batch must be a tensor, or a tuple or list that begins with one, not {type(batch).__name__}"
        )
    if x.dtype == torch.uint8:
        raise ValueError("the data has uint8 images, as they are stored: normalise them as the network's training did")
    parameter = next((p for p in model.parameters() if p.is_floating_point()), None)
    if parameter is None:
        return x
    return x.to(parameter.device, parameter.dtype if x.is_floating_point() else x.dtype)


def argument(args: tuple[Tensor, ...], kwargs: Mapping[str, Tensor]) -> Tensor:
    """What a convolution was called with, for hooks: `conv(x)` or `conv(input=x)`, of a subclass by another name."""
    return args[0] if args else kwargs.get("input", next(iter(kwargs.values())))


@contextmanager
def inputs_seen(modules: Mapping[str, nn.Module], see: Callable[[str, Tensor], None]) -> Iterator[None]:
    """While it lasts, `see` gets the name and the input of a module at each of its calls.

    Args:
        modules: by name; each takes one tensor.
        see: what looks at them.
    """
    hooks = [
        module.register_forward_pre_hook(
            lambda _, args, kwargs, name=name: see(name, argument(args, kwargs)), with_kwargs=True
        )
        for name, module in modules.items()
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def forked_generator(device: torch.device) -> Iterator[None]:
    """Leave torch's generators, on the CPU and on the device, as they were."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        yield


def takes_channels_last(model: nn.Module, x: Tensor) -> bool:
    """Whether the network, in the mode that it is in, runs in channels-last layout, in which convolutions are fastest.

    One that flattens by `x.view(len(x), -1)` may not: unlike `reshape`, `view` needs the elements in order. Nor does
    one with 3-D convolutions.

    Args:
        model: it does not change.
        x: an input `(B, C, H, W)` on the network's device.

    Raises:
        RuntimeError: the network doesn't run in the usual layout either.
    """
    with torch.no_grad(), forked_generator(x.device):
        try:
            twin = copied(model).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
            twin(x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x)
        except RuntimeError:  # of the layout, or of something else?
            copied(model)(x.contiguous())
            return False
    return True


def without_leftover(batches: Iterable[Batch]) -> Iterator[Batch]:
    """Batches without a single image that is left over after larger ones: batch norm may find no variance in it."""
    largest = 0
    for batch in batches:
        count = len(batch[0] if isinstance(batch, tuple) else batch)
        largest = max(largest, count)
        if count > 1 or largest == 1:
            yield batch
