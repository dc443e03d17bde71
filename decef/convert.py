"""Plan the conversion of a network's convolutions, carry it out, and turn it back."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from decef.cost import input_shapes, layer_macs, total_cost
from decef.layers import LAYERS, FactorizedConv2d
from decef.ranks import Budget, Candidate, Fixed, PerLayer, Rule, Share, Totals, as_rule

if TYPE_CHECKING:
    import pandas as pd


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
    **options: Any,
) -> Plan:
    """Say what converting `model` would do; nothing is changed.

    A rule that weighs costs (Energy, EffectiveRank, Budget) leaves a layer dense where its rank would cost as much as
    the dense layer; a rank that is given directly is taken as it is.

    Args:
        model: any network.
        layer: a layer type, a key of `decef.layers.LAYERS`; with "conv2d" every convolution is kept.
        rank: a number, ranks by layer name, or a rule of `decef.ranks`.
        include: names of convolutions to convert, `*` and `?` allowed; None is all.
        exclude: names to keep as they are, the same way.
        min_kernel_size: convolutions whose kernel is smaller than this both ways are kept.
        input_size: shape of one input without the batch, for the MACs.
        **options: passed to every new layer: `implementation`, and what the layer type has of its own.

    Raises:
        ValueError: an unknown layer type, a pattern that matches no convolution, a rank that is not possible, a
            budget that cannot be met, or a network that does not run on `input_size`.
    """
    layer_class = layer_type(layer)
    include, exclude = _patterns(include), _patterns(exclude)
    convolutions = {n: m for n, m in model.named_modules() if isinstance(m, (nn.Conv2d, FactorizedConv2d))}
    for pattern in (*(include or ()), *(exclude or ())):
        if not any(fnmatchcase(name, pattern) for name in convolutions):
            raise ValueError(f"the pattern '{pattern}' matches no convolution of the network")
    shapes = input_shapes(model, input_size) if input_size is not None else {}

    reasons: dict[str, str] = {}
    candidates: list[Candidate] = []
    costs: dict[str, tuple[int, int]] = {}
    cached: dict[tuple[Any, ...], int] = {}
    rule = as_rule(rank)
    given = isinstance(rule, (Fixed, Share, PerLayer))

    def macs_of(module: nn.Module, name: str) -> int:
        total = 0
        for shape in shapes.get(name, ()):
            # Printed, a layer shows all that its cost depends on, so that equal layers are measured once.
            key = (repr(module), shape)
            if key not in cached:
                cached[key] = layer_macs(module, shape)
            total += cached[key]
        return total

    for name, module in convolutions.items():
        costs[name] = (
            sum(p.numel() for key, p in module.named_parameters(recurse=False) if key != "bias"),
            macs_of(module, name),
        )
        reason = _reason_to_keep(name, module, layer_class, include, exclude, min_kernel_size)
        if reason is None and input_size is not None and name not in shapes:
            reason = "does not run in evaluation mode"
        if reason is not None:
            reasons[name] = reason
            continue
        assert isinstance(module, nn.Conv2d)
        assert issubclass(layer_class, FactorizedConv2d)
        unit = layer_class.like(_shell(module), 1, **options)
        candidate = Candidate(
            name=name,
            layer=layer_class,
            weight=module.weight.detach(),
            groups=module.groups,
            max_rank=unit.max_rank,
            params=costs[name][0],
            params_per_rank=sum(p.numel() for p in unit.factors().values()),
            macs=costs[name][1],
            macs_per_rank=macs_of(unit, name),
        )
        if not given and _saves_nothing(candidate, 1):
            reasons[name] = "costs no less at rank 1 than dense"
        else:
            candidates.append(candidate)

    totals = Totals(
        params=sum(p.numel() for p in model.parameters()),
        macs=total_cost(model, input_size)["macs"] if input_size is not None else 0,
    )
    ranks = rule(candidates, totals) if candidates or isinstance(rule, PerLayer) else {}
    by_name = {c.name: c for c in candidates}
    for name, candidate in list(by_name.items()):
        # A budget has counted on every rank it gave.
        if not given and not isinstance(rule, Budget) and _saves_nothing(candidate, ranks[name]):
            reasons[name] = f"rank {ranks[name]} would cost no less than dense"
            del by_name[name], ranks[name]
    rows = []
    for name in convolutions:
        params, macs = costs[name]
        row_candidate, new_rank = by_name.get(name), ranks.get(name)
        rows.append(
            PlanRow(
                name=name,
                action="keep" if row_candidate is None else "convert",
                reason=reasons.get(name, ""),
                rank=new_rank,
                max_rank=row_candidate.max_rank if row_candidate else None,
                error=None,
                params_before=params,
                params_after=new_rank * row_candidate.params_per_rank if row_candidate and new_rank else params,
                macs_before=macs if name in shapes else None,
                macs_after=(new_rank * row_candidate.macs_per_rank if row_candidate and new_rank else macs)
                if name in shapes
                else None,
            )
        )
    return Plan(layer, rows, options)


def convert(model: nn.Module, plan: Plan, *, from_scratch: bool = False) -> nn.Module:
    """A copy of `model` in which the plan's layers are factorised; `model` stays as it is.

    Args:
        model: the network that was planned for, or one with the same module names and shapes.
        plan: what to convert; each row's `error` is set to the layer's relative Frobenius error.
        from_scratch: draw new factors instead of decomposing the weights.

    Raises:
        ValueError: the plan names a layer that the network doesn't have, or a rank that is not possible there.
    """
    layer_class = layer_type(plan.layer)
    model = copy.deepcopy(model)
    modules = dict(model.named_modules())
    replaced: dict[int, FactorizedConv2d] = {}
    for row in plan.rows:
        if row.action != "convert":
            continue
        conv = modules.get(row.name)
        if not isinstance(conv, nn.Conv2d) or not issubclass(layer_class, FactorizedConv2d):
            raise ValueError(f"the plan converts '{row.name}', which is no Conv2d in this network")
        try:
            layer = (layer_class.like if from_scratch else layer_class.from_conv2d)(conv, row.rank, **plan.options)
        except ValueError as error:
            raise ValueError(f"layer '{row.name}': {error}") from error
        if not from_scratch:
            weight = conv.weight.detach()
            row.error = _relative_error(weight, layer.compose().detach())
        replaced[id(conv)] = layer
    return _replace(model, replaced)


def fold(model: nn.Module) -> nn.Module:
    """A copy of `model` in which every factorised layer is the equal `torch.nn.Conv2d`."""
    model = copy.deepcopy(model)
    return _replace(model, {id(m): m.to_conv2d() for m in model.modules() if isinstance(m, FactorizedConv2d)})


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
    if max(module.kernel_size) < min_kernel_size:
        return f"kernel smaller than {min_kernel_size}"
    assert issubclass(layer_class, FactorizedConv2d)
    try:
        layer_class.max_rank_for(*module.weight.shape, groups=module.groups)
    except ValueError as error:
        return str(error)
    return None


def _saves_nothing(candidate: Candidate, rank: int) -> bool:
    """Whether the factorised layer costs at least what the dense one does, in MACs where they are known."""
    if candidate.macs:
        return rank * candidate.macs_per_rank >= candidate.macs
    return rank * candidate.params_per_rank >= candidate.params


def _shell(conv: nn.Conv2d) -> nn.Conv2d:
    """`conv` without its storage."""
    return copy.deepcopy(conv).to("meta")


def _relative_error(weight: torch.Tensor, approximation: torch.Tensor) -> float:
    weight, approximation = weight.to(torch.float64), approximation.to(torch.float64)
    norm = weight.norm().item()
    return (weight - approximation).norm().item() / norm if norm else 0.0


def _replace(model: nn.Module, new: Mapping[int, nn.Module]) -> nn.Module:
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
