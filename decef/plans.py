"""Plan a conversion: which convolutions are factorised, at what rank, and what that saves."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor, nn

from decef.extras import need
from decef.files import replace_file
from decef.layers import LAYERS, FactorizedConv2d
from decef.layers.factorized import is_rank
from decef.moments import moments_on
from decef.progress import bar
from decef.ranks import Budget, Candidate, EffectiveRank, Fixed, Latency, PerLayer, Rule, Share, Totals, as_rule
from decef.ranks.budget import NO_INPUT_SIZE
from decef.ranks.latency import NO_TIMES
from decef.ranks.steps import Step, measured_energy
from decef.sites import Site, add_units, candidates_of, find_sites, listed, note_kept

if TYPE_CHECKING:
    import pandas as pd

AUTO = "auto"
#: The types that "auto" chooses from: those whose layers are one kernel.
AUTO_TYPES = ("decef", "basisconv", "cpac", "rank1")


@dataclass
class PlanRow:
    """What happens to one convolution.

    Costs exclude the bias and are those of the rank that was planned, whatever it is changed to. MACs are for one input
    of the network. They are None if no input size was given or if the convolution does not run.
    """

    name: str
    action: str  # "convert" | "keep"
    reason: str  # why it is kept, or which layer it shares its weight with
    rank: int | None
    max_rank: int | None
    error: float | None  # relative error of the new layer, see `convert`; None until the plan is carried out
    params_before: int
    params_after: int
    macs_before: int | None
    macs_after: int | None
    layer: str | None = None  # the layer type, if the plan's is "auto"


@dataclass
class Plan:
    """A row for every convolution of a network, the layer type to convert them to, and options of that type.

    If the layer type is "auto", every row that is converted has its own.
    """

    layer: str
    rows: list[PlanRow]
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def ranks(self) -> dict[str, int]:
        """Ranks of the converted layers by name."""
        return {row.name: row.rank for row in self.rows if row.action == "convert" and row.rank is not None}

    def to_frame(self) -> pd.DataFrame:
        """The rows as a DataFrame; raises ImportError if pandas is not installed."""
        need("results", "pandas")
        import pandas as pd

        whole = dict.fromkeys(("rank", "max_rank", "macs_before", "macs_after"), "Int64")
        rows = [_plain(row) for row in self.rows]
        return pd.DataFrame(rows, columns=None if rows else [f.name for f in fields(PlanRow)]).astype(whole)

    def to_dict(self) -> dict[str, Any]:
        """The plan as plain data, for `from_dict`."""
        return {"layer": self.layer, "rows": [_plain(row) for row in self.rows], "options": dict(self.options)}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Plan:
        """The plan that `to_dict` returned as plain data.

        Raises:
            ValueError: this is no plan, or a row has an action that does not exist or is converted without a rank or,
                in an auto plan, a layer type.
        """
        try:
            read = cls(data["layer"], [PlanRow(**row) for row in data["rows"]], dict(data["options"]))
        except KeyError as error:
            raise ValueError(f"this is no plan: it has no {error}") from error
        except TypeError as error:
            raise ValueError(f"this is no plan: {error}") from error
        for row in read.rows:
            if row.action not in ("convert", "keep"):
                raise ValueError(f"'{row.name}' has the action {row.action!r}: it must be convert or keep")
            if row.action == "convert" and (not isinstance(row.rank, int) or isinstance(row.rank, bool)):
                raise ValueError(f"'{row.name}' is converted at rank {row.rank!r}: it must be a whole number")
            if row.action == "convert" and read.layer == AUTO and row.layer is None:
                raise ValueError(f"'{row.name}' is converted, but has no layer, which an auto plan needs in such a row")
        return read

    def save(self, path: str | Path) -> None:
        """Write the plan as YAML, to read, edit and load again; raises ImportError if PyYAML is not installed."""
        need("train", "yaml")
        import yaml

        replace_file(Path(path), yaml.safe_dump(self.to_dict(), sort_keys=False).encode())

    @classmethod
    def load(cls, path: str | Path) -> Plan:
        """Read a plan that `save` wrote.

        Raises:
            ImportError: PyYAML is not installed.
            FileNotFoundError: there is no such file.
            ValueError: it is not YAML; or see `from_dict`.
        """
        need("train", "yaml")
        import yaml

        if not Path(path).is_file():
            raise FileNotFoundError(f"there is no plan {path}")
        try:
            return cls.from_dict(yaml.safe_load(Path(path).read_text()))
        except yaml.YAMLError as error:
            raise ValueError(f"{path} is no plan, as it is not YAML: {error}") from error
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error

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
    progress: bool = False,
    **options: Any,
) -> Plan:
    """Plan what converting `model` would do, without changing anything.

    If `rank` is a number, ranks by layer name or a `Share`, the ranks are used as given, even where a layer then costs
    more than dense. With `Energy`, `EffectiveRank` and your own rules, a layer stays dense if its rank would save
    nothing: in MACs if `input_size` is given, else in parameters. A rule can opt out of that, see `decef.ranks.Rule`.
    `Budget` chooses which layers stay dense. Convolutions that share a weight get the same rank; their parameters count
    for the first of them.

    Args:
        model: any network.
        layer: a layer type, a key of `decef.layers.LAYERS`; with "conv2d" every convolution is kept. "auto": for every
            convolution the type that keeps most of its energy for its cost, all under one `Budget` or `Latency`.
        rank: a number, ranks by layer name, or a rule such as those of `decef.ranks`.
        include: names of the convolutions to convert, with `*` and `?` as wildcards; None means all.
        exclude: names of convolutions to keep, with the same wildcards.
        min_kernel_size: convolutions whose kernel is smaller than this in both directions are kept.
        input_size: shape of one input without the batch dimension, `(3, 32, 32)` for CIFAR. Needed to know the MACs.
        data: a few hundred inputs, as for `convert`. Rules then use the energy of the layers' outputs on these data,
            not that of the kernels.
        progress: show progress bars.
        **options: keyword arguments for every new layer: `implementation`, and those of its type.

    Raises:
        ValueError: an unknown layer type, a pattern that matches no convolution, an impossible rank, a budget that
            cannot be met, an option value that the layer type refuses, data without a batch or where they would do
            nothing, or a network that does not run on `input_size`.
        TypeError: `rank` is none of the three, or the layer type does not have an option.
    """
    if data is not None and layer != AUTO and _is_blind(as_rule(rank)):
        raise ValueError("data would do nothing: these ranks don't depend on what a kernel keeps; give them to convert")
    made, _ = planned(
        model,
        layer,
        rank=rank,
        include=include,
        exclude=exclude,
        min_kernel_size=min_kernel_size,
        input_size=input_size,
        data=data,
        progress=progress,
        **options,
    )
    return made


def planned(
    model: nn.Module, layer: str, *, rank: int | Mapping[str, int] | Rule, progress: bool = False, **where: Any
) -> tuple[Plan, Mapping[str, Tensor]]:
    """What `plan` returns, and what `convert` needs beside: the moments, from `data`, of the layers that may change.

    Args:
        model, layer, rank, **where: see `plan`.
        progress: show progress bars.

    Raises:
        ValueError, TypeError: see `plan`.
    """
    rule = _weighing(rank) if layer == AUTO else as_rule(rank)
    if layer == AUTO or issubclass(layer_type(layer), FactorizedConv2d):  # refused before a look at the data
        if isinstance(rule, Budget) and rule.params is None and where.get("input_size") is None:
            raise ValueError(NO_INPUT_SIZE)
        if isinstance(rule, Latency) and rule.times is None:
            raise ValueError(NO_TIMES)
    choice = _choice(model, layer, progress=progress, **where)
    return choice.plan(rank), choice.moments


class _RankChoice:
    """What the convolutions of a network may become as layers of one type, to plan their ranks.

    What a rule wants to know of the kernels is computed once: plans by several rules then cost little. For the
    arguments see `plan`.

    Attributes:
        moments: of the inputs of the layers that may change, by name; see `decef.moments.input_moments`.

    Raises:
        ValueError, TypeError: see `plan`.
    """

    def __init__(self, model: nn.Module, layer: str, **where: Any) -> None:
        seen = _survey(model, [layer], **where)
        self.moments, self._layer, self._options, self._totals = seen.moments, layer, seen.options, seen.totals
        self._sites, self._candidates = seen.sites[layer], [candidate for _, candidate in seen.candidates]

    def plan(self, rank: int | Mapping[str, int] | Rule) -> Plan:
        """The plan by a rule, or with given ranks.

        Raises:
            ValueError, TypeError: see `plan`.
        """
        rule, sites = as_rule(rank), [replace(site) for site in self._sites]
        if isinstance(rule, PerLayer):
            rule = PerLayer(_by_first(rule.ranks, sites))
        # What is asked of the whole network can fail even where no layer may have ranks.
        of_network = isinstance(rule, (Budget, Latency)) and issubclass(layer_type(self._layer), FactorizedConv2d)
        if self._candidates or of_network or isinstance(rule, PerLayer):
            chosen = _choose(rule, self._candidates, self._totals)
            for site in sites:
                if not site.reason:
                    site.rank, site.reason = chosen[site.first]
        return Plan(self._layer, [_row(site) for site in sites], dict(self._options))


class _TypeChoice:
    """What every convolution of a network keeps of its energy as every layer type, to plan with layer "auto".

    The energies are measured once, by decomposing the kernels at a few ranks, which takes most of the time. Plans for
    several budgets then cost little. For the arguments see `plan`.

    Attributes:
        moments: see `_RankChoice`.

    Raises:
        ValueError, TypeError: see `plan`.
    """

    def __init__(self, model: nn.Module, *, progress: bool = False, **where: Any) -> None:
        seen = _survey(model, AUTO_TYPES, progress=progress, **where)
        self.moments, self._options, self._totals, self._progress = seen.moments, seen.options, seen.totals, progress
        self._sites = {layer: {site.name: site for site in own} for layer, own in seen.sites.items()}
        self._candidates = seen.candidates
        self._energies: dict[tuple[str, str, int], dict[int, float]] = {}

    def plan(self, rule: object) -> Plan:
        """The plan that keeps most energy within a `Budget` or a `Latency`.

        Raises:
            ValueError: another rule, or one that cannot be met.
        """
        rule = _weighing(rule)
        keys = [(layer, candidate.name, rule.most(candidate)) for layer, candidate in self._candidates]
        unknown = {key: one for key, (_, one) in zip(keys, self._candidates, strict=True) if key not in self._energies}
        if unknown:  # whether the rule can be met depends on costs alone, and energies take long
            rule.spread(self._steps(rule, [dict.fromkeys(range(1, most + 1), 0.0) for *_, most in keys]), self._totals)
        for key, candidate in bar(unknown.items(), "energies", self._progress and bool(unknown)):
            self._energies[key] = measured_energy(candidate, key[-1])
        chosen = rule.spread(self._steps(rule, [self._energies[key] for key in keys]), self._totals)
        rows = []
        for name, dense in self._sites[AUTO_TYPES[0]].items():
            step = chosen.get(dense.first)
            if step is None or step.layer is None:
                row = _row(replace(dense, rank=None))
                if step is not None or not row.reason:  # else no type can have it
                    row.reason = f"left dense by {rule!r}"
            else:
                row = _row(replace(self._sites[step.layer][name], rank=step.rank))
                row.layer = step.layer
            rows.append(row)
        return Plan(AUTO, rows, dict(self._options))

    def _steps(self, rule: Budget | Latency, energies: Sequence[Mapping[int, float]]) -> dict[str, list[Step]]:
        """What every convolution may be, by name; `energies` are by rank, for each candidate."""
        steps: dict[str, list[Step]] = {}
        for (layer, candidate), energy in zip(self._candidates, energies, strict=True):
            of_all = steps.setdefault(candidate.name, [])
            # Dense, a layer costs the same whatever type it might have, but times are measured for each type: the
            # first that could is asked.
            known = any(step.rank is None for step in of_all)
            of_type = rule.steps(candidate, layer, energy)
            of_all += [step for step in of_type if step.rank is not None or not known]
        return steps


def planner(model: nn.Module, layer: str, *, progress: bool = False, **where: Any) -> Callable[[Rule], Plan]:
    """What makes plans by several rules as `plan` does; what they need to know of the kernels is computed once.

    Args:
        model: the network.
        layer: a layer type, or "auto".
        progress: show progress bars.
        **where: other arguments of `plan`.

    Raises:
        ValueError, TypeError: see `plan`.
    """
    return _choice(model, layer, progress=progress, **where).plan


def _choice(model: nn.Module, layer: str, **where: Any) -> _RankChoice | _TypeChoice:
    return _TypeChoice(model, **where) if layer == AUTO else _RankChoice(model, layer, **where)


class _Survey(NamedTuple):
    """A network's convolutions, and what they may become, by layer type."""

    sites: dict[str, list[Site]]
    candidates: list[tuple[str, Candidate]]
    moments: Mapping[str, Tensor]
    totals: Totals
    options: dict[str, Any]


def _survey(
    model: nn.Module,
    layers: Sequence[str],
    *,
    include: str | Iterable[str] | None = None,
    exclude: str | Iterable[str] | None = None,
    min_kernel_size: int = 1,
    input_size: Sequence[int] | None = None,
    data: Iterable[object] | Mapping[str, Tensor] | None = None,
    progress: bool = False,
    **options: Any,
) -> _Survey:
    """Look at all convolutions once, and through `data` once, for all of these layer types."""
    for layer in layers:
        _check_options(layer, options)
    found, totals = find_sites(model, input_size)
    included, excluded = listed(include), listed(exclude) or ()
    sites = {layer: [replace(site) for site in found] for layer in layers}
    changing: dict[str, list[Site]] = {}
    for layer, own in sites.items():
        note_kept(own, layer_type(layer), included, excluded, min_kernel_size)
        changing[layer] = [site for site in own if not site.reason]
        add_units(changing[layer], layer_type(layer), options)
    in_any = {site.name for own in changing.values() for site in own}
    moments = moments_on(model, [site.name for site in found if site.name in in_any], data, progress=progress)
    candidates = [(layer, one) for layer, own in changing.items() for one in candidates_of(own, moments)]
    return _Survey(sites, candidates, moments, totals, options)


def _is_blind(rule: Rule) -> bool:
    """Whether its ranks don't depend on what kernels keep."""
    return isinstance(rule, (Fixed, PerLayer, Share, EffectiveRank)) or (isinstance(rule, Budget) and rule.uniform)


def _plain(row: PlanRow) -> dict[str, Any]:
    """A row as plain data, without a layer type where the plan has one for all."""
    return {key: value for key, value in asdict(row).items() if key != "layer" or value is not None}


def layer_names() -> list[str]:
    """What a plan's layer may be: the layer types, and "auto"."""
    return [*LAYERS, AUTO]


def layer_type(name: str) -> type[nn.Module]:
    """The class of a layer type.

    Raises:
        ValueError: there is no such type; the message lists them.
    """
    if name not in LAYERS:
        raise ValueError(f"unknown layer type '{name}'; there are {', '.join(LAYERS)}, and for plans {AUTO}")
    return LAYERS[name]


def has_training_kernel(layer: str) -> bool:
    """Whether layers of a type, or of those that "auto" chooses from, are convolutions with one kernel in training."""
    return layer == AUTO or getattr(layer_type(layer), "composes_in_training", True)


def _check_options(name: str, options: Iterable[str]) -> None:
    """Raise TypeError for a keyword that is an argument neither of `plan` nor of the layer type."""
    layer_class = layer_type(name)
    if not issubclass(layer_class, FactorizedConv2d):
        known: list[str] = []
    else:
        parameters = inspect.signature(layer_class).parameters.values()
        if any(p.kind is p.VAR_KEYWORD for p in parameters):
            return
        known = [p.name for p in parameters if p.kind is p.KEYWORD_ONLY and p.name != "rank"]
    for key in options:
        if key not in known:
            mine = [p.name for p in inspect.signature(plan).parameters.values() if p.kind is p.KEYWORD_ONLY]
            raise TypeError(f"plan has no argument {key}, nor {name} an option: there are {', '.join(mine + known)}")


def _choose(rule: Rule, candidates: Sequence[Candidate], totals: Totals) -> dict[str, tuple[int | None, str]]:
    """For every candidate by name: its rank and an empty reason, or None and the reason why it stays dense.

    Raises:
        ValueError: the rule gives a rank that is not possible, or one to a layer that was not asked for.
    """
    ranks = rule(candidates, totals)
    if unknown := sorted(set(ranks) - {candidate.name for candidate in candidates}):
        raise ValueError(f"{rule!r} gives ranks to {', '.join(unknown)}, which it was not asked for")
    final = getattr(rule, "ranks_are_final", False)
    chosen: dict[str, tuple[int | None, str]] = {}
    for candidate in candidates:
        rank = ranks.get(candidate.name)
        at = 1 if rank is None else _checked_rank(candidate, rank)
        if not candidate.saves(at) and (rank is None or not final):
            chosen[candidate.name] = None, f"rank {at} would cost no less than dense"
        elif rank is None:
            chosen[candidate.name] = None, f"left dense by {rule!r}"
        else:
            chosen[candidate.name] = at, ""
    return chosen


def _checked_rank(candidate: Candidate, rank: int) -> int:
    """`rank` as an int; raises ValueError if it is not possible for the candidate."""
    if not is_rank(rank, candidate.max_rank):
        raise ValueError(
            f"rank {rank!r} is not possible in layer '{candidate.name}': {candidate.layer.__name__} takes ranks from 1 "
            f"to {candidate.max_rank} there ({candidate.layer.rank_meaning})"
        )
    return int(rank)


def _by_first(ranks: Mapping[str, int], sites: Sequence[Site]) -> dict[str, int]:
    """Ranks by layer name, of the layers that share a weight only the first's.

    Raises:
        ValueError: two of them have different ranks, or a layer that is kept has one.
    """
    by_name = {site.name: site for site in sites}
    found: dict[str, int] = {}
    for name, rank in ranks.items():
        if name in by_name and by_name[name].reason:
            raise ValueError(f"'{name}' has a rank, but is kept: {by_name[name].reason}")
        first = by_name[name].first if name in by_name else name
        if found.setdefault(first, rank) != rank:
            raise ValueError(f"'{name}' shares its weight with '{first}': both must have the same rank")
    return found


def _weighing(rule: object) -> Budget | Latency:
    """`rule`, if it weighs energy against cost."""
    if not isinstance(rule, (Budget, Latency)) or getattr(rule, "uniform", False):
        raise ValueError(f"layer 'auto' weighs energy against cost: rank must be a Budget or a Latency, not {rule!r}")
    return rule


def _row(site: Site) -> PlanRow:
    row = PlanRow(site.name, "keep", site.reason, None, None, None, site.params, site.params, site.macs, site.macs)
    if site.rank is not None:
        assert site.unit is not None
        row.action, row.rank, row.max_rank = "convert", site.rank, site.unit.max_rank
        row.reason = "" if site.first == site.name else f"shares the weight of '{site.first}'"
        row.params_after = site.rank * site.params_per_rank
        row.macs_after = None if site.macs is None else site.rank * site.macs_per_rank
    return row
