"""Fold batch norms into the convolutions before them."""

from __future__ import annotations

import logging
from inspect import Parameter, signature
from operator import attrgetter
from typing import Any, Self

from torch import fx, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights
from torch.nn.utils.parametrize import is_parametrized

from decef.copies import copied_with
from decef.layers import FactorizedConv2d
from decef.sites import replaced_forward

log = logging.getLogger(__name__)


def _fold_into(conv: nn.Conv2d | FactorizedConv2d, norm: nn.BatchNorm2d) -> None:
    """Fold the batch norm after `conv` into it; factors and weights that it shares stay as they are for the others."""
    assert norm.running_mean is not None
    assert norm.running_var is not None
    name = conv.scale_factor if isinstance(conv, FactorizedConv2d) else "weight"  # its first dimension is the output
    weight, conv.bias = fuse_conv_bn_weights(
        getattr(conv, name), conv.bias, norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias
    )
    setattr(conv, name, weight)


def fold_batch_norms(model: nn.Module) -> tuple[nn.Module, dict[str, FactorizedConv2d]]:
    """Fold batch norms into the convolutions before them.

    Args:
        model: the network, whose convolutions change.

    Returns:
        A copy without these batch norms, and its factorised layers by name.
    """
    modules = dict(model.named_modules())
    rest: dict[nn.Module, nn.Module] = {}
    for name, norm_name in _convolutions_before_norms(model):
        conv, norm = modules[name], modules[norm_name]
        assert isinstance(conv, (nn.Conv2d, FactorizedConv2d))
        assert isinstance(norm, nn.BatchNorm2d)
        _fold_into(conv, norm)
        rest[norm] = _Folded(norm)
    model = copied_with(model, rest)
    return model, {name: module for name, module in model.named_modules() if isinstance(module, FactorizedConv2d)}


class _Folded(nn.Sequential):
    """In place of a batch norm that was folded: what timm's does after it, if anything.

    It has all that the norm has, such as `eps`, for networks that ask for that.
    """

    def __init__(self, norm: nn.BatchNorm2d) -> None:
        super().__init__(*(() if type(norm) is nn.BatchNorm2d else (norm.drop, norm.act)))
        self._norm = (norm,)  # in a tuple, as it is no part of the network any more

    def __bool__(self) -> bool:
        return True  # as every module but an empty Sequential

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        self._norm[0]._apply(fn, recurse)  # to the same device and precision
        return super()._apply(fn, recurse)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name.startswith("_"):
                raise
            return getattr(self._norm[0], name)


class _Tracer(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        ours = isinstance(m, (FactorizedConv2d, nn.Conv2d)) or _is_batch_norm(m)
        return ours or super().is_leaf_module(m, module_qualified_name)


def _is_batch_norm(module: nn.Module) -> bool:
    """Whether it is torch's batch norm or timm's, which goes on with dropout (`drop`) and an activation (`act`)."""
    timms = isinstance(module, nn.BatchNorm2d) and type(module).__name__ == "BatchNormAct2d"
    return timms or type(module) is nn.BatchNorm2d


def _convolutions_before_norms(model: nn.Module) -> list[tuple[str, str]]:
    """Names of convolutions and batch norms, where one feeds only the other and both are used only once."""
    try:
        # Arguments that nobody gives, such as labels, are what they are by default, or another branch would be traced.
        parameters = signature(model.forward).parameters.values()
        graph = _Tracer().trace(model, {p.name: p.default for p in parameters if p.default is not Parameter.empty})
    except Exception as error:
        if any(isinstance(module, nn.BatchNorm2d) for module in model.modules()):
            reason = str(error).partition("\n")[0]
            log.warning("batch norms are not folded, so it will be slower: the network can't be traced: %s", reason)
        return []
    modules = dict(model.named_modules())
    calls = [node for node in graph.nodes if node.op == "call_module"]
    by_hand = {id(attrgetter(str(node.target))(model)) for node in graph.nodes if node.op == "get_attr"}
    count: dict[int, int] = {}
    for node in calls:
        count[id(modules[node.target])] = count.get(id(modules[node.target]), 0) + 1
    found = []
    for node in calls:
        before = node.args[0] if node.args else None
        if not isinstance(before, fx.Node) or before.op != "call_module" or len(before.users) != 1:
            continue
        conv, norm = modules[before.target], modules[node.target]
        once = count[id(conv)] == count[id(norm)] == 1
        pair = not _is_batch_norm(conv) and _is_batch_norm(norm) and norm.track_running_stats
        foldable = pair and _is_plain(conv) and _is_plain(norm)
        used_elsewhere = any(id(p) in by_hand for module in (conv, norm) for p in module.parameters(recurse=False))
        if once and foldable and not used_elsewhere:
            found.append((str(before.target), str(node.target)))
    return found


def _is_plain(module: nn.Module) -> bool:
    """Whether calling a module only runs the forward of a known class on its own parameters, without hooks."""
    hooks = module._forward_hooks or module._forward_pre_hooks
    known = isinstance(module, FactorizedConv2d) or type(module) is nn.Conv2d or _is_batch_norm(module)
    return known and not hooks and not is_parametrized(module) and not replaced_forward(module)
