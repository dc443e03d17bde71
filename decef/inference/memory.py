"""The memory that a network's tensors take, counted, not measured: the same on every machine."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from decef.copies import copied_to_meta


def stored_bytes(model: nn.Module) -> int:
    """Bytes of a network's weights and buffers; what is shared counts once."""
    values = {id(v): v for v in (*model.parameters(), *model.buffers())}.values()
    return sum(value.numel() * value.element_size() for value in values)


def activation_bytes(model: nn.Module, input_shape: Sequence[int]) -> int:
    """Bytes of the intermediate tensors that are alive at once, at their peak, in one call in evaluation mode.

    Counted on the meta device, without computing. The input is not among them, nor is what a kernel needs inside.

    Args:
        model: any network that takes one tensor and runs on the meta device; it does not change.
        input_shape: `(B, ...)`.
    """
    model = copied_to_meta(model)
    x = torch.empty(*input_shape, device="meta")
    with torch.no_grad(), _Living(x) as living:
        model(x)
    return living.peak


class _Living(TorchDispatchMode):
    """Adds up the bytes of tensors as they come and go."""

    def __init__(self, *known: Tensor) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known = {id(t.untyped_storage()) for t in known}
        self._held = known

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {id(t.untyped_storage()) for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self._add(tensor.untyped_storage(), given)
        return out

    def _add(self, storage: torch.UntypedStorage, given: set[int]) -> None:
        key = id(storage)
        if key in self._known or key in given:
            return
        size = storage.nbytes()
        self._known.add(key)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._remove, key, size)

    def _remove(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size
