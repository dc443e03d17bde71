"""Copies of networks."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, TypeVar

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

_Module = TypeVar("_Module", bound=nn.Module)

HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_is_full_backward_hook",
)


_PLAIN = (nn.Conv2d(1, 1, 1, device="meta"), nn.BatchNorm2d(1, device="meta"))


def copied(model: _Module) -> _Module:
    """A deep copy. Tensors that were computed with gradients, as by pruning, become values: torch doesn't copy them."""
    with _Copying():
        return copy.deepcopy(model)


def copied_with(model: nn.Module, new: Mapping[nn.Module, nn.Module]) -> nn.Module:
    """As `copied`, with other modules in place of some, wherever those occur: as parts, in lists, by several names.

    Args:
        model: the network.
        new: for a module of it the one to be in its place, which gets copies of its hooks and of the
            attributes that others gave it, such as an index. A bias that is a parameter
            of the network is copied like all others, tied where it was tied.
    """
    memo: dict[int, Any] = {id(old): module for old, module in new.items()}
    with _Copying():
        twin = copy.deepcopy(model, memo)
        for old, module in new.items():
            vars(module).update({name: copy.deepcopy(vars(old)[name], memo) for name in HOOKS})
            taken = set(dir(module))
            if carried := {name: vars(old)[name] for name in noted(old) if name not in taken}:
                vars(module).update(copy.deepcopy(carried, memo), _carried=tuple(carried))
            if module._parameters.get("bias") is not None:
                module.bias = copy.deepcopy(module.bias, memo)
    return twin


def noted(module: nn.Module) -> tuple[str, ...]:
    """The attributes that somebody else has put on a convolution or norm, or on the one that a module stands for."""
    plain = next((one for one in _PLAIN if type(one) is type(module)), None)
    if plain is not None:
        return tuple(name for name in vars(module).keys() - vars(plain).keys() if not name.startswith("_"))
    return vars(module).get("_carried", ())


def copied_to_meta(model: _Module) -> _Module:
    """A copy on the meta device, in evaluation mode. All tensors in it move there, not only parameters and buffers."""
    with _Copying("meta"):
        twin = copy.deepcopy(model)
    return twin.to("meta").eval()


class _Copying(TorchFunctionMode):
    """Deep copies of computed tensors are values; with a `device`, copies of all tensors but parameters are there."""

    def __init__(self, device: str | None = None) -> None:
        super().__init__()
        self._device = device

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not Tensor.__deepcopy__ or (args[0].is_leaf and self._device is None):
            return func(*args, **(kwargs or {}))
        tensor, memo = args
        value = tensor.detach()
        return memo.setdefault(id(tensor), value.clone() if self._device is None else value.to(self._device))
