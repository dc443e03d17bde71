"""Plan the conversion of a network's convolutions, carry it out, and turn it back."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from torch import Tensor, nn

from decef.costs import input_shapes, layer_macs, total_cost
from decef.layers import LAYERS, FactorizedConv2d
from decef.moments import bar, moments_on
from decef.ranks import Budget, Candidate, Fixed, PerLayer, Rule, Share, Totals, as_rule

if TYPE_CHECKING:
    import pandas as pd

_Module = TypeVar("_Module", bound=nn.Module)


@dataclass
class PlanRow:
    """What happens to one convolution. Costs are without bias; MACs are None where no input size was given."""

    name: str
    action: str  # "convert" | "keep"
    reason: str
    rank: int | None
    max_rank: int | None
    error: float | None  # relative Frobenius error, known once the plan has been carried out
    params_before: int
    params_after: int
    macs_before: int | None
    macs_after: int | None


@dataclass
class Plan:
    """A row for every convolution of a network, the layer type they become, and that type's options."""

    layer: str
    rows: list[PlanRow]
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def ranks(self) -> dict[str, int]:
        """Rank of every converted layer by name."""
        return {row.name: row.rank for row in self.rows if row.action == "convert" and row.rank is not None}

    def to_frame(self) -> pd.DataFrame:
        """The rows as a table."""
        import pandas as pd

        whole = dict.fromkeys(("rank", "max_rank", "macs_before", "macs_after"), "Int64")
        return pd.DataFrame([asdict(row) for row in self.rows]).astype(whole)

    def to_dict(self) -> dict[str, Any]:
        """Plain data from which `from_dict` makes the plan again."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Plan:
        """The plan that `to_dict` described."""
        return cls(data["layer"], [PlanRow(**row) for row in data["rows"]], dict(data["options"]))

    def save(self, path: str | Path) -> None:
        """Write the plan as YAML, to be read, edited and loaded again."""
        import yaml

        Path(path).write_text(yaml.safe_dump(self.to_dict(), sort_keys=False))

    @classmethod
    def load(cls, path: str | Path) -> Plan:
        """Read a plan that `save` wrote."""
        import yaml

        return cls.from_dict(yaml.safe_load(Path(path).read_text()))

    def __str__(self) -> str:
        return f"{self.layer} {self.options or ''}\n{self.to_frame().to_string(index=False, na_rep='')}"


def plan(
    model: nn.Module,
    layer: str,
    *,
    rank: int | Mapping[str, int] | Rule,
    include: str | Iterable[str] | None = None,
    exclude: str | Iterable[str] | None = None,
    min_kernel_size: int = 1,
    input_size: Sequence[int] | None = None,
    data: Iterable[object] | Mapping[str, Tensor] | None = None,
    **options: Any,
) -> Plan:
    """Say what converting `model` would do; nothing is changed.

    A rule that weighs costs (Energy, EffectiveRank, Budget) leaves a layer dense where its rank would cost as much as
    the dense layer; a rank that is given directly is taken as it is. Convolutions that share one weight get one rank,
    and their cost is counted with the first of them.

    Args:
        model: any network.
        layer: a layer type, a key of `decef.layers.LAYERS`; with "conv2d" every convolution is kept.
        rank: a number, ranks by layer name, or a rule of `decef.ranks`.
        include: names of convolutions to convert, `*` and `?` allowed; None is all.
        exclude: names to keep as they are, the same way.
        min_kernel_size: convolutions whose kernel is smaller than this both ways are kept.
        input_size: shape of one input without the batch, for the MACs.
        data: as `convert` takes them, for rules that weigh energies (Energy, Budget): of the layers' outputs on these
            data instead of their kernels.
        **options: passed to every new layer: `implementation`, and what the layer type has of its own.

    Raises:
        ValueError: an unknown layer type, a pattern that matches no convolution, a rank that is not possible, a
            budget that cannot be met, or a network that does not run on `input_size`.
    """
    layer_class = layer_type(layer)
    include, exclude = _patterns(include), _patterns(exclude)
    convolutions = _convolutions(model)
    for pattern in (*(include or ()), *(exclude or ())):
        if not any(fnmatchcase(name, pattern) for name in convolutions):
            raise ValueError(f"the pattern '{pattern}' matches no convolution of the network")
    shapes = input_shapes(model, input_size) if input_size is not None else None

    reasons: dict[str, str] = {}
    for name, module in convolutions.items():
        reason = _reason_to_keep(name, module, layer_class, include, exclude, min_kernel_size)
        if reason is None and shapes is not None and name not in shapes:
            reason = "does not run in evaluation mode"
        if reason is not None:
            reasons[name] = reason
    shared = _shared_weights(model)
    reasons |= _kept_by_sharing(convolutions, shared, reasons)

    macs_of = _mac_counter(shapes or {})
    units: dict[str, FactorizedConv2d] = {}  # every layer that may be converted, at rank 1 and without storage
    for name, module in convolutions.items():
        if name not in reasons:
            assert isinstance(module, nn.Conv2d)
            assert issubclass(layer_class, FactorizedConv2d)
            units[name] = layer_class.like(_shell(module), 1, **options)
    candidates = _candidates(convolutions, units, shared, macs_of, moments_on(model, list(units), data))
    totals = Totals(
        params=sum(p.numel() for p in model.parameters()),
        macs=total_cost(model, input_size)["macs"] if input_size is not None else 0,
    )
    rule = as_rule(rank)
    ranks = rule(list(candidates.values()), totals) if candidates or isinstance(rule, PerLayer) else {}
    if not isinstance(rule, (Fixed, Share, PerLayer, Budget)):  # these mean every rank that they give
        for name, candidate in candidates.items():
            if name in ranks and not candidate.saves(ranks[name]):
                reasons[name] = f"rank {ranks.pop(name)} would cost no less than dense"

    rows = []
    for name, module in convolutions.items():
        first = shared[name][0] if name in shared else name
        params = (_factor_count(module) or module.weight.numel()) if first == name else 0
        macs = macs_of(name, module) if shapes is not None and name in shapes else None
        row = PlanRow(name, "keep", reasons.get(name, ""), None, None, None, params, params, macs, macs)
        if first in ranks:
            row.action, row.rank, row.max_rank = "convert", ranks[first], units[name].max_rank
            row.reason = "" if first == name else f"shares the weight of '{first}'"
            row.params_after = ranks[first] * _factor_count(units[name], shared=first != name)
            row.macs_after = None if macs is None else ranks[first] * macs_of(name, units[name])
        elif not row.reason:
            saves = candidates[first].saves(1)
            why = f"left dense by {rule!r}" if saves else "rank 1 would cost no less than dense"
            row.reason = reasons.get(first, why)
        rows.append(row)
    return Plan(layer, rows, options)


def convert(
    model: nn.Module,
    how: Plan | str,
    *,
    from_scratch: bool = False,
    data: Iterable[object] | Mapping[str, Tensor] | None = None,
    progress: bool = False,
    **arguments: Any,
) -> nn.Module:
    """A copy of `model` in which convolutions are factorised; `model` stays as it is.

    Forward and backward hooks of a convolution go over to the layer that replaces it; hooks on its state dict, which
    know its weight by name, do not. Convolutions that share a weight share the factors; a batch norm that a layer has
    beside them is its own.

    Args:
        model: the network that was planned for, or one with the same module names and shapes.
        how: a plan, each of whose rows then gets its layer's relative Frobenius error as `error`; or a layer type,
            which is planned first.
        from_scratch: draw new factors instead of decomposing the weights, at the scale of the weights that they
            replace, so that the network starts as its dense twin does whatever that one's initialisation is.
        data: a few hundred inputs in batches, as a DataLoader yields them; labels are not looked at. Or what
            `decef.moments.input_moments` found on them. The kernels are then those that are nearest in the layers'
            outputs on these data instead of in their weights, and the rows' errors are of the outputs.
        progress: show bars.
        **arguments: those of `plan`, where `how` is a layer type.

    Raises:
        ValueError: the plan names a layer that the network doesn't have, or a rank that is not possible there, or
            different ranks for layers that share a weight; or what `plan` raises.
    """
    if isinstance(how, str):
        if data is not None:  # once for the plan and its execution
            data = moments_on(model, [n for n, m in _convolutions(model).items() if type(m) is nn.Conv2d], data)
        how = plan(model, how, data=data, **arguments)
    elif arguments:
        raise TypeError(f"a plan already says all that {', '.join(arguments)} could")
    layer_class = layer_type(how.layer)
    model = copy.deepcopy(model)
    modules = dict(model.named_modules())
    _check_shared_ranks(how, _shared_weights(model))
    moments = moments_on(model, list(how.ranks), data, progress=progress)
    replaced: dict[int, nn.Module] = {}
    by_weight: dict[int, tuple[FactorizedConv2d, float | None]] = {}
    for row in bar(how.rows, "decompose", progress):
        if row.action != "convert":
            continue
        conv = modules.get(row.name)
        if not isinstance(conv, nn.Conv2d) or not issubclass(layer_class, FactorizedConv2d):
            raise ValueError(f"the plan converts '{row.name}', which is no Conv2d in this network")
        try:
            layer = layer_class.like(conv, row.rank, **how.options)
            if id(conv.weight) in by_weight:
                sharing, row.error = by_weight[id(conv.weight)]
                layer.load_state_dict(sharing.state_dict(), strict=False)  # what is not a factor starts alike
                for name, factor in sharing.factors().items():
                    setattr(layer, name, factor)
            elif from_scratch:
                layer.reset_parameters(None if conv.weight.is_meta else conv.weight.square().mean().sqrt().item())
            else:
                row.error = layer.decompose_(conv.weight, moments=moments.get(row.name))
        except ValueError as error:
            raise ValueError(f"layer '{row.name}': {error}") from error
        by_weight[id(conv.weight)] = layer, row.error
        layer.bias = conv.bias  # type: ignore[assignment]
        replaced[id(conv)] = _take_over(layer, conv)
    return replace_modules(model, replaced)


def fold(model: nn.Module) -> nn.Module:
    """A copy of `model` in which every factorised layer is the equal `torch.nn.Conv2d`.

    Hooks go over as in `convert`, and layers that share factors give convolutions that share a weight, unless each has
    a batch norm of its own.
    """
    model = copy.deepcopy(model)
    replaced: dict[int, nn.Module] = {}
    weights: dict[tuple[int, ...], Tensor] = {}
    for layer in model.modules():
        if isinstance(layer, FactorizedConv2d):
            conv = layer.to_conv2d()
            if not _factor_count(layer, shared=True):  # else its kernel and bias are its own
                conv.weight = weights.setdefault(tuple(map(id, layer.factors().values())), conv.weight)
                conv.bias = layer.bias
            replaced[id(layer)] = _take_over(conv, layer)
    return replace_modules(model, replaced)


def layer_type(name: str) -> type[nn.Module]:
    """The class of a layer type.

    Raises:
        ValueError: there is no such type; the message lists them.
    """
    if name not in LAYERS:
        raise ValueError(f"unknown layer type '{name}'; there are {', '.join(LAYERS)}")
    return LAYERS[name]


def _reason_to_keep(
    name: str,
    module: nn.Module,
    layer_class: type[nn.Module],
    include: Sequence[str] | None,
    exclude: Sequence[str] | None,
    min_kernel_size: int,
) -> str | None:
    if layer_class is nn.Conv2d:
        return "conv2d keeps every convolution"
    if include is not None and not any(fnmatchcase(name, p) for p in include):
        return "not included"
    matching = next((p for p in exclude or () if fnmatchcase(name, p)), None)
    if matching is not None:
        return f"excluded by '{matching}'"
    if type(module) is not nn.Conv2d:
        return f"{type(module).__name__} is not a plain Conv2d"
    if "weight" not in module._parameters:
        return "its weight is computed before each call (pruning, weight norm), not a parameter"
    if max(module.kernel_size) < min_kernel_size:
        return f"kernel smaller than {min_kernel_size}"
    assert issubclass(layer_class, FactorizedConv2d)
    try:
        layer_class.max_rank_for(*module.weight.shape, groups=module.groups)
    except ValueError as error:
        return str(error)
    return None


def _shell(conv: nn.Conv2d) -> nn.Conv2d:
    """`conv` without its storage."""
    return copy.deepcopy(conv).to("meta")


def _convolutions(model: nn.Module) -> dict[str, nn.Conv2d | FactorizedConv2d]:
    return {n: m for n, m in model.named_modules() if isinstance(m, (nn.Conv2d, FactorizedConv2d))}


def _factor_count(module: nn.Module, shared: bool = False) -> int:
    """Parameters of a factorised layer without its bias, and without factors that another layer shares with it; 0 for
    another module."""
    if not isinstance(module, FactorizedConv2d):
        return 0
    left_out = {"bias", *(module.factors() if shared else ())}
    return sum(p.numel() for name, p in module.named_parameters() if name not in left_out)


def _mac_counter(shapes: Mapping[str, Sequence[tuple[int, ...]]]) -> Callable[[str, nn.Module], int]:
    """What counts the MACs that a module does for one input of the network where the named one stands."""
    # Printed, a layer shows all that its cost depends on, so that equal layers are measured once.
    cached: dict[tuple[str, tuple[int, ...]], int] = {}

    def macs_of(name: str, module: nn.Module) -> int:
        total = 0
        for shape in shapes.get(name, ()):
            key = (repr(module), shape)
            if key not in cached:
                cached[key] = layer_macs(module, shape)
            total += cached[key]
        return total

    return macs_of


def _shared_weights(model: nn.Module) -> dict[str, list[str]]:
    """For every Conv2d that has a weight parameter: all modules that have the same one, itself included, in order."""
    owners: dict[int, list[str]] = {}
    for name, module in model.named_modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                owners.setdefault(id(parameter), []).append(name)
    return {
        name: owners[id(module._parameters["weight"])]
        for name, module in model.named_modules()
        if isinstance(module, nn.Conv2d) and module._parameters.get("weight") is not None
    }


def _candidates(
    convolutions: Mapping[str, nn.Module],
    units: Mapping[str, FactorizedConv2d],
    shared: Mapping[str, Sequence[str]],
    macs_of: Callable[[str, nn.Module], int],
    moments: Mapping[str, Tensor],
) -> dict[str, Candidate]:
    """A candidate for every weight, by the name of the first layer that has it; its MACs are those of all of them."""
    candidates: dict[str, Candidate] = {}
    for name, unit in units.items():
        conv = convolutions[name]
        assert isinstance(conv, nn.Conv2d)
        macs, macs_per_rank = macs_of(name, conv), macs_of(name, unit)
        other = candidates.get(shared[name][0])
        if other is not None:
            macs, macs_per_rank = other.macs + macs, other.macs_per_rank + macs_per_rank
            params_per_rank = other.params_per_rank + _factor_count(unit, shared=True)
            candidates[other.name] = replace(
                other, macs=macs, macs_per_rank=macs_per_rank, params_per_rank=params_per_rank
            )
            continue
        candidates[name] = Candidate(
            name=name,
            layer=type(unit),
            weight=conv.weight.detach(),
            groups=conv.groups,
            max_rank=unit.max_rank,
            params=conv.weight.numel(),
            params_per_rank=_factor_count(unit),
            macs=macs,
            macs_per_rank=macs_per_rank,
            moments=moments.get(name),
        )
    return candidates


def _kept_by_sharing(
    convolutions: Mapping[str, nn.Module], shared: Mapping[str, Sequence[str]], kept: Mapping[str, str]
) -> dict[str, str]:
    """Reasons to keep those that share their weight with something that is kept or runs in another way."""
    reasons = {}
    for name in convolutions:
        for other in shared.get(name, ()):
            same = other in convolutions and convolutions[other].groups == convolutions[name].groups
            if name not in kept and (other in kept or not same):
                reasons[name] = f"shares its weight with '{other}', which is kept"
    return reasons


def _check_shared_ranks(plan: Plan, shared: Mapping[str, Sequence[str]]) -> None:
    for name, rank in plan.ranks.items():
        for other in shared.get(name, ()):
            if plan.ranks.get(other) != rank:
                raise ValueError(
                    f"'{name}' and '{other}' share one weight: the plan must convert both at the same rank, or none"
                )


def _take_over(new: _Module, old: nn.Module) -> _Module:
    """Give `new` the hooks of `old`, whose place it takes."""
    for hooks in (
        "_forward_hooks",
        "_forward_hooks_with_kwargs",
        "_forward_hooks_always_called",
        "_forward_pre_hooks",
        "_forward_pre_hooks_with_kwargs",
        "_backward_hooks",
        "_backward_pre_hooks",
        "_is_full_backward_hook",
    ):
        setattr(new, hooks, getattr(old, hooks))
    return new


def replace_modules(model: nn.Module, new: Mapping[int, nn.Module]) -> nn.Module:
    """`model` with modules replaced by `id`, at every place where they stand."""
    if id(model) in new:
        return new[id(model)]
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):
            if child is not None and id(child) in new:
                setattr(parent, name, new[id(child)])
    return model


def _patterns(patterns: str | Iterable[str] | None) -> tuple[str, ...] | None:
    if patterns is None:
        return None
    return (patterns,) if isinstance(patterns, str) else tuple(patterns)
