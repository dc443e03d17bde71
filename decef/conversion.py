"""Convert a network's convolutions to factorised layers, and factorised layers back to convolutions."""

from __future__ import annotations

import copy
import logging
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import chain, islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils.parametrize import is_parametrized

from decef.copies import copied, copied_with
from decef.costs import shared_weights
from decef.inputs import NO_BATCH, check_batches, inputs_of, inputs_seen, without_leftover
from decef.layers import Basis2021Conv2d, FactorizedConv2d
from decef.moments import moments_on
from decef.plans import Plan, layer_type, planned
from decef.progress import bar
from decef.sites import check_convertible, count_parameters, reason_against

log = logging.getLogger(__name__)

RECALIBRATION = 50  # batches


def convert(
    model: nn.Module,
    how: Plan | str,
    *,
    from_scratch: bool = False,
    data: Iterable[object] | Mapping[str, Tensor] | None = None,
    progress: bool = False,
    **arguments: Any,
) -> nn.Module:
    """A copy of `model` with its convolutions factorised; `model` itself does not change.

    The forward and backward hooks of a convolution move to the layer that replaces it. Its state-dict hooks do not,
    because they refer to the weight by name. Convolutions that share a weight become layers that share factors. If the
    layer type has a batch norm, each of them still has its own.

    Args:
        model: the network that was planned for, or one with the same module names and shapes.
        how: a plan, or the name of a layer type, for which a plan is made first. Every converted row of the plan gets
            its layer's relative error as `error`, see `FactorizedConv2d.decompose_`; with `from_scratch`, `error` stays
            as it was.
        from_scratch: draw new factors instead of decomposing the weights. Each composed kernel gets the same root mean
            square as the weight that it replaces, so the network starts at the scale of its dense twin.
        data: a few hundred inputs in batches `(B, ...)`, as a DataLoader yields them (labels are ignored; all of it is
            read), or their moments from `decef.moments.input_moments`; not with `from_scratch`. Factors are then fitted
            to the layers' outputs on these data instead of to the kernels, and errors are those of the outputs.
        progress: show progress bars.
        **arguments: arguments of `plan`, if `how` is a layer type.

    Raises:
        ValueError: the plan names a layer that the network doesn't have, no rank or one that is not possible there, or
            different types or ranks for layers that share a weight; a weight has NaN or infinite values, or is on the
            meta device, without values; `data` would do nothing. Also what `plan` and `input_moments` raise.
        TypeError: `how` is neither a plan nor a name, or `arguments` are given together with a plan. Also what `plan`
            raises.
    """
    check_convertible(model)
    if from_scratch and data is not None:
        raise ValueError("data would do nothing with from_scratch: new factors are drawn, not fitted")
    if not isinstance(how, (Plan, str)):
        raise TypeError(f"how must be a plan or the name of a layer type, not {type(how).__name__}")
    if isinstance(how, str):
        if "rank" not in arguments:
            raise TypeError("say rank=: a number, ranks by layer name, or a rule such as decef.ranks.Budget(flops=0.5)")
        how, moments = planned(model, how, data=data, progress=progress, **arguments)
        data = None if data is None else moments  # `data` may last for one pass only
    elif arguments:
        raise TypeError(f"a plan already says all that {', '.join(arguments)} could")
    modules = dict(model.named_modules())
    _warn_of_what_stays(how, modules)
    types = _checked_types(how, modules)
    if not from_scratch:
        copied(model)  # raises, if it can't be copied, before decomposing takes its time
    made = {name: (types[name], rank, modules[name].groups) for name, rank in how.ranks.items()}
    _check_shared(made, shared_weights(model))
    moments = moments_on(model, list(how.ranks), data, progress=progress)
    replaced: dict[nn.Module, nn.Module] = {}
    by_weight: dict[int, tuple[FactorizedConv2d, float | None]] = {}  # the first layer of each weight, and its error
    for row in bar([row for row in how.rows if row.action == "convert"], "decompose", progress):
        conv, layer_class = modules[row.name], types[row.name]
        assert isinstance(conv, nn.Conv2d)
        try:
            if conv.weight.is_meta and not from_scratch:
                raise ValueError(
                    "its weight is on the meta device, which has no values: load them, or from_scratch=True"
                )
            # Factors that are decomposed need not be drawn first.
            layer = layer_class.like(conv, row.rank, device=None if from_scratch else "meta", **how.options)
            if not from_scratch:
                layer.to_empty(device=conv.weight.device)
            if id(conv.weight) in by_weight:
                first, row.error = by_weight[id(conv.weight)]
                _share_factors(layer, first)
            elif from_scratch:
                rms = None if conv.weight.is_meta else conv.weight.float().square().mean().sqrt().item()
                layer.reset_parameters(rms)
            else:
                row.error = layer.decompose_(conv.weight, moments=moments.get(row.name))
        except ValueError as error:
            raise ValueError(f"layer '{row.name}': {error}") from error
        by_weight[id(conv.weight)] = layer, row.error
        layer.bias = conv.bias  # type: ignore[assignment]
        replaced[conv] = layer
    return copied_with(model, replaced)


@torch.no_grad()
def recalibrate(model: nn.Module, data: Iterable[Any], count: int = RECALIBRATION) -> nn.Module:
    """Measure the statistics of a converted network's batch norms again, in place; no labels, no training.

    Decomposed layers give other means and variances than the ones they replace. The images must be augmented as in
    training, or the statistics are of other inputs than the network was trained on. The norms inside `Basis2021Conv2d`
    are measured too, without changing what these layers compute, see `norms_inside_measured`. Other norms that keep
    statistics, as torchvision's `FrozenBatchNorm2d`, stay as they are, with a warning.

    Args:
        model: the network.
        data: training batches, or tuples that begin with one, as a DataLoader yields them. They are moved to the
            network's device.
        count: how many of them to use.

    Returns:
        `model`, in evaluation mode.

    Raises:
        ValueError: `data` yields no batch, something else, NaN or is one tensor; or `count` is less than 1. Then, as
            after any other error, the statistics are as they were.
    """
    check_batches(data)
    batches = islice(data, max(0, count))
    first = next(batches, None)
    if first is None:
        raise ValueError(NO_BATCH if count > 0 else f"count={count} must be 1 or more")
    # torch's update_bn would run the norms inside layers in training mode too, where they are no part of a kernel.
    inner = {layer.norm for layer in model.modules() if isinstance(layer, Basis2021Conv2d)}
    norms = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.track_running_stats and m not in inner]
    measured = {*norms, *inner}
    kept = [m for m in model.modules() if isinstance(getattr(m, "running_mean", None), Tensor) and m not in measured]
    if kept:
        log.warning(
            "%d norms (%s) keep their statistics: only batch norms are measured", len(kept), type(kept[0]).__name__
        )
    if not measured:
        return model.eval()
    momenta, before = [norm.momentum for norm in norms], [copy.deepcopy(norm.state_dict()) for norm in norms]
    model.eval()
    for norm in norms:
        _measure_anew(norm)
    try:
        with norms_inside_measured(model):
            for x in without_leftover(inputs_of(batch, model) for batch in chain([first], batches)):
                if not x.isfinite().all():
                    raise ValueError("the data has NaN or infinite values, which would be every layer's statistics")
                model(x)
    except BaseException:
        for norm, state in zip(norms, before, strict=True):
            norm.load_state_dict(state)
        raise
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
        model.eval()
    for norm, state in zip(norms, before, strict=True):
        if norm.num_batches_tracked == 0:  # this forward does not use it
            norm.load_state_dict(state)
    return model


def _measure_anew(norm: _BatchNorm) -> None:
    """Let a norm take the mean over all batches that it will see, of which the first replaces what it had.

    Until then it has that: a norm that refuses training mode, or whose statistics another module uses, goes on with it.
    """
    assert norm.running_mean is not None
    assert norm.running_var is not None
    assert norm.num_batches_tracked is not None
    if not (norm.running_mean.isfinite().all() and norm.running_var.isfinite().all()):
        norm.reset_running_stats()  # what isn't finite would stay so
    norm.num_batches_tracked.zero_()
    norm.momentum = None
    norm.train()


@contextmanager
def norms_inside_measured(model: nn.Module) -> Iterator[None]:
    """Measure the batch norms inside `Basis2021Conv2d` on what passes through the network, in evaluation mode.

    When it ends without an error, they get the means and variances that they saw, and such weights that every layer
    still computes the same. Decomposed, they had been the identity, which in training mode, where a batch is normalised
    by its own statistics, is another network than in evaluation mode.
    """
    layers = {name: m for name, m in model.named_modules() if isinstance(m, Basis2021Conv2d)}
    sums: dict[str, Tensor] = {}
    counts: dict[str, int] = {}

    def see(name: str, x: Tensor) -> None:
        y = layers[name].before_norm(x)
        y = y.to(torch.promote_types(y.dtype, torch.float32))
        var, mean = (value.double() for value in torch.var_mean(y, (0, 2, 3), correction=0))
        count = y[:, 0].numel()
        sums[name] = sums.get(name, 0) + torch.stack([mean, var + mean.square()]) * count
        counts[name] = counts.get(name, 0) + count

    with inputs_seen(layers, see):
        yield
    for name, total in sums.items():
        mean, square = total / counts[name]
        layers[name].set_statistics(mean, (square - mean.square()).clamp(min=0))


def fold(model: nn.Module) -> nn.Module:
    """A copy of `model` with a `torch.nn.Conv2d` for each factorised layer; it computes the same in evaluation mode.

    Hooks move as in `convert`. Layers that share factors become convolutions that share a weight, unless they contain
    batch norms: their kernels then differ.

    Raises:
        ValueError: a factor is computed before each call, by pruning or weight norm.
    """
    replaced: dict[nn.Module, nn.Module] = {}
    weights: dict[tuple[Tensor, ...], Tensor] = {}
    for layer in model.modules():
        if isinstance(layer, FactorizedConv2d):
            check_factors(layer)
            conv = layer.to_conv2d()
            if not count_parameters(layer, factors=False):  # no batch norm
                conv.weight = weights.setdefault(tuple(layer.factors().values()), conv.weight)
                conv.bias = layer.bias
            replaced[layer] = conv
    return copied_with(model, replaced)


def _warn_of_what_stays(plan: Plan, modules: Mapping[str, nn.Module]) -> None:
    if plan.layer != "conv2d" and all(row.action != "convert" for row in plan.rows):
        reasons = Counter(row.reason for row in plan.rows)
        why = "; ".join(f"{n} x {reason}" for reason, n in reasons.items()) or "the network has no convolution"
        log.warning("nothing is converted: %s", why)
    rows = {row.name for row in plan.rows}
    if unplanned := [name for name, m in modules.items() if type(m) is nn.Conv2d and name not in rows]:
        log.warning(
            "the plan was made for another network: of %d convolutions here, such as '%s', it says nothing, and they "
            "stay dense", len(unplanned), unplanned[0],
        )  # fmt: skip


def _checked_types(plan: Plan, modules: Mapping[str, nn.Module]) -> dict[str, type[FactorizedConv2d]]:
    """The layer types of the convolutions that a plan converts, by name.

    Raises:
        ValueError: a row of the plan is not possible in a network of these modules.
    """
    types: dict[str, type[FactorizedConv2d]] = {}
    for row in (row for row in plan.rows if row.action == "convert"):
        layer_class = layer_type(row.layer or plan.layer)
        if row.rank is None:
            raise ValueError(f"the plan converts '{row.name}', but has no rank for it")
        if not issubclass(layer_class, FactorizedConv2d):
            raise ValueError(f"the plan converts '{row.name}' to conv2d, no low-rank layer: its action must be keep")
        there = row.name in modules
        reason = reason_against(modules[row.name], layer_class) if there else "the network has no such module"
        if reason:
            raise ValueError(f"the plan converts '{row.name}', but {reason}")
        try:
            layer_class.like(modules[row.name], row.rank, device="meta", **plan.options)  # type: ignore[arg-type]
        except (ValueError, TypeError) as error:
            raise ValueError(f"the plan converts '{row.name}', but {error}") from error
        types[row.name] = layer_class
    return types


def _check_shared(made: Mapping[str, object], sharing: Mapping[str, list[str]]) -> None:
    for name, one in made.items():
        for other in sharing.get(name, ()):
            if made.get(other) != one:
                raise ValueError(
                    f"'{name}' and '{other}' share one weight: the plan must convert both to one type at the same "
                    "rank, with equal groups, or none"
                )


def _share_factors(layer: FactorizedConv2d, first: FactorizedConv2d) -> None:
    """Make `layer` use the factors of `first`; everything else is copied and stays separate."""
    layer.load_state_dict(first.state_dict(), strict=False)
    for name, factor in first.factors().items():
        setattr(layer, name, factor)


def check_factors(layer: FactorizedConv2d) -> None:
    """Raise ValueError if a hook computes a factor before each call, which no plain convolution can do."""
    for name in layer.factors():
        if name not in layer._parameters and not is_parametrized(layer, name):
            raise ValueError(
                f"{layer} computes its {name} before each call (pruning, weight norm), which plain convolutions can't: "
                "make that permanent first, as torch.nn.utils.prune.remove does"
            )
