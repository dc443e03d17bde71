"""Copies of networks."""

from __future__ import annotations

import copy
from typing import TypeVar

from torch import Tensor, nn

_Module = TypeVar("_Module", bound=nn.Module)


def copied(model: _Module) -> _Module:
    """A deep copy. Tensors that were computed with gradients, as by pruning, become values: torch doesn't copy them."""
    computed = {
        id(value): value.detach().clone()
        for module in model.modules()
        for value in vars(module).values()
        if isinstance(value, Tensor) and not value.is_leaf
    }
    return copy.deepcopy(model, computed)


def copied_to_meta(model: _Module) -> _Module:
    """A copy on the meta device, in evaluation mode. Tensors that are plain attributes move too, unlike by `to`."""
    model = copied(model).to("meta").eval()
    for module in model.modules():
        for name, value in vars(module).items():
            if isinstance(value, Tensor):
                vars(module)[name] = value.to("meta")
    return model
