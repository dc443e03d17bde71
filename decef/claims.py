"""What the papers claim, judged by what was run: `claims.yaml` holds the claims, `judge` checks one.

A claim's `asks` names one of the kinds below and its arguments. Each kind sorts the runs it concerns into groups (one
network, layer setting and training; the seeds are the group) and judges every group; `judge` sums the groups up. One
seed decides nothing, and a difference counts when its whole 95 % interval lies on one side of what is asked.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from decef.statistics import Estimate, differences, estimate, rank_correlation

if TYPE_CHECKING:
    import pandas as pd

    from decef.tables import Record

HOLDS, IN_PART, FAILS = "holds", "holds in part", "doesn't hold"
INCONCLUSIVE, ONE_SEED, NOT_TESTED = "inconclusive", "inconclusive (one seed)", "not tested yet"
STATUSES = ("verified", "verified-code")
#: Costs that a claim can bound, as shares of the dense network's.
SHARES = ("params", "trainable_params", "flops")
#: Tables by what was measured ("ranks", "significance") and by name, see `load_measured`.
Measured = Mapping[str, Mapping[str, "pd.DataFrame"]]
#: Training options that only factorised layers have, so that their dense twin was trained without them.
LAYER_TRAINING = ("train.atcd", "train.orthogonality")


@dataclass(frozen=True)
class Figure:
    """One published or logged figure; `claims.yaml` says what the fields mean."""

    id: str
    paper: str
    layer: str
    network: str
    dataset: str
    metric: str
    setting: str
    value: float
    where: str
    status: str
    training: str = ""


@dataclass(frozen=True)
class Claim:
    """One claim; `claims.yaml` says what the fields mean."""

    id: str
    paper: str
    statement: str
    where: str
    asks: Mapping[str, Any]
    experiment: str
    figures: tuple[Figure, ...] = ()
    note: str = ""


@dataclass(frozen=True)
class Evidence:
    """What one group of runs says: what it is, its runs and those it is held against, what came out, the verdict."""

    what: str
    n: int
    result: str
    verdict: str
    runs: tuple[str, ...]


@dataclass(frozen=True)
class Verdict:
    """The verdict on a claim and what it rests on."""

    verdict: str
    evidence: tuple[Evidence, ...] = ()


@cache
def load_papers() -> dict[str, str]:
    """Citations by paper key."""
    return dict(_read()["papers"])


@cache
def load_figures() -> tuple[Figure, ...]:
    """All published and logged figures, in the file's order.

    Raises:
        ValueError: `claims.yaml` has a figure with an unknown field, paper or status, or the same figure twice.
    """
    figures, seen = [], set()
    for entry in _read()["figures"]:
        fields = {key: value for key, value in entry.items() if key != "values"}
        for setting, value in entry.get("values", {}).items():
            layer = "conv2d" if setting == "dense" else fields.get("layer")
            try:
                figure = Figure(**{**fields, "layer": layer, "setting": setting, "value": float(value)})
            except (TypeError, ValueError) as error:
                raise ValueError(f"claims.yaml: figure {fields.get('id')} cannot be read: {error}") from error
            _known("paper", figure.paper, load_papers(), figure.id)
            _known("status", figure.status, STATUSES, figure.id)
            key = (figure.id, figure.dataset, figure.network, figure.metric, setting)
            if key in seen:
                raise ValueError(f"claims.yaml: {' '.join(key)} stands there twice")
            seen.add(key)
            figures.append(figure)
    return tuple(figures)


@cache
def load_claims() -> tuple[Claim, ...]:
    """All claims, in the file's order, with their figures.

    Raises:
        ValueError: `claims.yaml` has a claim with an unknown field, paper, figure or kind, or an id twice.
    """
    claims: dict[str, Claim] = {}
    by_id: dict[str, list[Figure]] = {}
    for figure in load_figures():
        by_id.setdefault(figure.id, []).append(figure)
    for entry in _read()["claims"]:
        for figure_id in entry.get("figures", []):
            _known("figure", figure_id, by_id, entry["id"])
        figures = tuple(figure for figure_id in entry.get("figures", []) for figure in by_id[figure_id])
        try:
            claim = Claim(**{**entry, "figures": figures})
        except TypeError as error:
            raise ValueError(f"claims.yaml: claim {entry.get('id')} cannot be read: {error}") from error
        _known("paper", claim.paper, load_papers(), claim.id)
        _known("kind", claim.asks.get("kind"), KINDS, claim.id)
        if claim.id in claims:
            raise ValueError(f"claims.yaml: claim {claim.id} stands there twice")
        claims[claim.id] = claim
    return tuple(claims.values())


def load_measured(results: Path) -> Measured:
    """What scripts/ranks.py and scripts/significance.py wrote to results/ranks and results/significance, by name."""
    import pandas as pd

    return {
        kind: {path.stem: pd.read_csv(path) for path in sorted((results / kind).glob("*.csv"))}
        for kind in ("ranks", "significance")
    }


def judge(claim: Claim, records: Sequence[Record], measured: Measured | None = None) -> Verdict:
    """Hold a claim against what was run.

    Args:
        claim: one of `load_claims()`.
        records: finished runs, see `decef.tables.load_records`. A run that diverged is not among them.
        measured: see `load_measured`.

    Raises:
        ValueError: the claim's control is several runs of one seed.
    """
    asks = {key: value for key, value in claim.asks.items() if key != "kind"}
    evidence = tuple(KINDS[claim.asks["kind"]](claim, records, measured or {}, **asks))
    return Verdict(_overall(e.verdict for e in evidence), evidence)


def _overall(verdicts: Iterable[str]) -> str:
    """One verdict from the groups': a claim is about all of them, so one that fails is enough, unless another holds."""
    found = set(verdicts) - {NOT_TESTED}
    if len(found) < 2:
        return found.pop() if found else NOT_TESTED
    if found & {HOLDS, IN_PART}:
        return IN_PART
    return FAILS if FAILS in found else INCONCLUSIVE


# The kinds -------------------------------------------------------------------------------------------------------


def _no_worse(
    claim: Claim,
    records: Sequence[Record],
    measured: Measured,
    *,
    runs: Mapping[str, Any],
    margin: float,
    control: Mapping[str, Any] | None = None,
    **shares: Sequence[float],
) -> Iterator[Evidence]:
    """Top-1 is at most `margin` points below the control's, as a difference paired by seed.

    Args:
        runs, control: which runs, as config values by dotted key, see `_selects`; the control is Conv2d by default. A
            run is paired with the control of the same seed, data, network and training; the layer, and training
            options that `runs` or `control` name or that Conv2d lacks, may differ.
        margin: in points of accuracy; 0 asks for an improvement.
        shares: `params`, `trainable_params`, `flops` of the runs as shares of the dense network's, [from, to].
    """
    control = control or {"layer.name": "conv2d"}
    twins = _twins(claim, records, runs, control)
    for group in _groups(_chosen(records, runs, control, shares)):
        against = twins.get(_twin_key(group[0], (runs, control)), {})
        found = differences(((r.config["seed"], r.summary["test_top1"]) for r in group), _top1(against))
        words = f"{_words(_mean(group))}, {_costs(group[0])}"
        if not found:
            yield _evidence(group, f"{words}; no run of {selector_words(control)} to compare with", NOT_TESTED)
            continue
        difference = estimate(found)
        pairs = [against[r.config["seed"]] for r in group if r.config["seed"] in against]
        words += f"; {difference.mean:+.2f} {difference.interval('+.2f')}".rstrip()
        words += f" against {_words(_mean(pairs))} of {selector_words(control)}"
        words += f", over {difference.n} of the seeds" if difference.n < len(group) else ""
        yield _evidence(group, words, _above(difference, -margin), pairs)


def _trains(
    claim: Claim,
    records: Sequence[Record],
    measured: Measured,
    *,
    runs: Mapping[str, Any],
    at_least: float,
    control: Mapping[str, Any] | None = None,
    control_at_most: float | None = None,
    **shares: Sequence[float],
) -> Iterator[Evidence]:
    """Top-1 reaches `at_least` percent; with a control, where that stays at `control_at_most`; else as `_no_worse`."""
    twins = _twins(claim, records, runs, control) if control else {}
    for group in _groups(_chosen(records, runs, control, shares)):
        mean = _mean(group)
        verdict, words = _above(mean, at_least), _words(mean)
        if control is None or control_at_most is None:
            yield _evidence(group, words, verdict)
            continue
        others = list(twins.get(_twin_key(group[0], (runs, control)), {}).values())
        if not others:
            yield _evidence(group, f"{words}; no run of {selector_words(control)} to compare with", NOT_TESTED)
            continue
        mean = _mean(others)
        words += f", where {selector_words(control)} has {_words(mean)}"
        stuck = _above(_negative(mean), -control_at_most)
        if verdict == HOLDS:
            verdict = {FAILS: IN_PART}.get(stuck, stuck)  # it trains; whether the control does is the other half
        yield _evidence(group, words, verdict, others)


def _reaches(claim: Claim, records: Sequence[Record], measured: Measured, *, tolerance: float) -> Iterator[Evidence]:
    """Top-1 is at most `tolerance` points below the claim's figures, of the same data, network, layer and setting."""
    for figure in claim.figures:
        if figure.metric == "top1":
            for group in _groups(r for r in records if same_setting(figure, r)):
                mean = _mean(group)
                words = f"{_words(mean)}, {_costs(group[0])}; {figure.id} has {figure.value:.2f} %"
                yield _evidence(group, words, _above(mean, figure.value - tolerance))


def _monotone_rank(claim: Claim, records: Sequence[Record], measured: Measured, *, over: str) -> Iterator[Evidence]:
    """Effective ranks ("threshold") fall with depth, or change less and less over training.

    By Spearman's correlation in every network, whose interval over networks of one architecture must lie below 0:
    "depth": of the layer's number and its rank at the end, and its ratio to a random kernel's; one alone is a part.
    "training": of the epoch and the mean change of the ranks since the checkpoint before, per epoch.
    """
    layers = {record.summary["id"]: record.config["layer"]["name"] for record in records}
    groups: dict[tuple[str, ...], dict[str, pd.DataFrame]] = {}
    for name, table in measured.get("ranks", {}).items():
        if layers.get(name, "conv2d") == "conv2d":  # the claims are about dense kernels
            last = table[table.network == table.network.iloc[-1]]
            shape = tuple(last.name + last.in_channels.astype(str) + "-" + last.out_channels.astype(str))
            groups.setdefault(shape, {})[name] = table
    for shape, tables in sorted(groups.items()):
        trends = {name: trend for name, table in tables.items() if (trend := _rank_trends(table, over))}
        if not trends:
            continue
        measures = list(next(iter(trends.values())))
        estimates = {measure: estimate([trend[measure] for trend in trends.values()]) for measure in measures}
        verdict = _overall(_above(_negative(e), 0) for e in estimates.values())
        words = "; ".join(f"{key} {e.mean:+.2f} {e.interval('+.2f')}".rstrip() for key, e in estimates.items())
        sources = tuple(f"ranks/{name}.csv" for name in trends)
        yield Evidence(f"{len(shape)} convolutions", len(trends), f"rank correlation of {words}", verdict, sources)


def _rank_trends(table: pd.DataFrame, over: str) -> dict[str, float]:
    """The correlations of one network by name; nothing when it has too few checkpoints."""
    networks = list(dict.fromkeys(table.network))
    by_network = [table[table.network == network].reset_index(drop=True) for network in networks]
    if over == "depth":
        last = by_network[-1]
        depth = list(range(len(last)))
        return {
            "depth with rank": rank_correlation(depth, list(last.threshold)),
            "depth with rank / random": rank_correlation(depth, list(last.threshold / last.threshold_init)),
        }
    epochs = [int(word) for network in networks if (word := str(network).removeprefix("epoch ")).isdigit()]
    if len(epochs) < len(networks) or len(epochs) < 4:
        return {}
    steps = list(zip(epochs, epochs[1:], by_network, by_network[1:], strict=False))
    changes = [float((b.threshold - a.threshold).abs().mean()) / (end - start) for start, end, a, b in steps]
    return {"epoch with change of rank": rank_correlation(epochs[1:], changes)}


def _significance(claim: Claim, records: Sequence[Record], measured: Measured, *, measure: str) -> Iterator[Evidence]:
    """Components of a larger `measure` are those whose removal costs more, by Spearman's correlation.

    In every layer of a run, then the mean of its layers, whose interval over the runs of one setting must lie above 0.
    """
    tables = measured.get("significance", {})
    for group in _groups(r for r in records if r.summary["id"] in tables):
        trends = []
        for record in group:
            layers = tables[record.summary["id"]].groupby("layer")
            found = [rank_correlation(list(t[measure]), list(t.loss_rise)) for _, t in layers if len(t) > 2]
            if found:
                trends.append(sum(found) / len(found))
        if trends:
            mean = estimate(trends)
            words = f"rank correlation {mean.mean:+.2f} {mean.interval('+.2f')}".rstrip()
            yield _evidence(group, f"{words} of {measure} with the loss that removal adds", _above(mean, 0))


KINDS: dict[Any, Callable[..., Iterator[Evidence]]] = {
    "no_worse": _no_worse,
    "trains": _trains,
    "reaches": _reaches,
    "monotone_rank": _monotone_rank,
    "significance": _significance,
}


# Which runs ------------------------------------------------------------------------------------------------------


def same_setting(figure: Figure, record: Record) -> bool:
    """Whether a run has a figure's dataset, network, layer and rank; its training and options may be others."""
    ours = (record.config["dataset"]["name"], record.model, record.config["layer"]["name"], record.asked)
    return ours == (figure.dataset, figure.network, figure.layer, figure.setting)


def _selects(selector: Mapping[str, Any], config: Mapping[str, Any]) -> bool:
    """Whether a config has the selector's values: a list means one of them, a text may have *, null and false off."""
    return all(
        any(_fits(_get(config, key), value) for value in (wanted if isinstance(wanted, list) else [wanted]))
        for key, wanted in selector.items()
    )


def _fits(value: Any, wanted: Any) -> bool:
    if isinstance(wanted, str):
        return isinstance(value, str) and fnmatchcase(value, wanted)
    return bool((value or None) == (wanted or None))  # an option that is off is absent from a record's config


def _get(config: Mapping[str, Any], key: str) -> Any:
    value: Any = config
    for part in key.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    return value


def _chosen(
    records: Iterable[Record],
    runs: Mapping[str, Any],
    control: Mapping[str, Any] | None,
    shares: Mapping[str, Sequence[float]],
) -> Iterator[Record]:
    """The runs that `runs` selects, whose costs lie within `shares`, and that are not the control."""
    for record in records:
        ratios = {key: record.summary[key] / record.summary["dense"][key] for key in shares}
        within = all(low <= ratios[key] <= high for key, (low, high) in shares.items())
        if within and _selects(runs, record.config) and not (control and _selects(control, record.config)):
            yield record


def _groups(records: Iterable[Record]) -> list[list[Record]]:
    """Runs that differ in the seed alone, in an order that depends on the configs alone."""
    groups: dict[str, list[Record]] = {}
    for record in records:
        config = {key: value for key, value in record.config.items() if key != "seed"}
        groups.setdefault(json.dumps(config, sort_keys=True), []).append(record)
    return [sorted(groups[key], key=lambda r: (r.config["seed"], r.summary["id"])) for key in sorted(groups)]


def _twin_key(record: Record, selectors: Iterable[Mapping[str, Any]]) -> str:
    """Equal for a run and its control: what must be the same in both, see `_no_worse`."""
    free = {key for selector in selectors for key in selector if key.startswith("train.")} | set(LAYER_TRAINING)
    config = {key: value for key, value in record.config.items() if key not in ("seed", "layer")}
    config["train"] = {key: value for key, value in config["train"].items() if f"train.{key}" not in free}
    return json.dumps(config, sort_keys=True)


def _twins(
    claim: Claim, records: Iterable[Record], runs: Mapping[str, Any], control: Mapping[str, Any]
) -> dict[str, dict[int, Record]]:
    """The control's runs by twin key and seed."""
    twins: dict[str, dict[int, Record]] = {}
    for record in records:
        if _selects(control, record.config):
            seeds = twins.setdefault(_twin_key(record, (runs, control)), {})
            other = seeds.setdefault(record.config["seed"], record)
            if other is not record:
                both = f"{other.summary['id']} and {record.summary['id']}"
                raise ValueError(f"claims.yaml: both {both} are claim {claim.id}'s control: narrow its `control`")
    return twins


# Words ---------------------------------------------------------------------------------------------------------------


def _above(value: Estimate, bound: float) -> str:
    """Whether a mean is above `bound`, as far as its interval can tell."""
    if value.n < 2:
        return ONE_SEED
    if value.low > bound:
        return HOLDS
    return FAILS if value.high < bound else INCONCLUSIVE


def _negative(value: Estimate) -> Estimate:
    return Estimate(-value.mean, -value.high, -value.low, value.n)


def _top1(records: Mapping[int, Record]) -> dict[int, float]:
    return {seed: record.summary["test_top1"] for seed, record in records.items()}


def _mean(records: Sequence[Record]) -> Estimate:
    return estimate([record.summary["test_top1"] for record in records])


def _words(mean: Estimate) -> str:
    return f"{mean.mean:.2f} % {mean.interval()}".rstrip()


def _costs(record: Record) -> str:
    summary, dense = record.summary, record.summary["dense"]
    trained = summary["trainable_params"]
    words = [
        f"{summary['params'] / dense['params']:.3f} of parameters",
        f"{summary['flops'] / dense['flops']:.3f} of FLOPs",
    ]
    if trained != summary["params"]:
        words.insert(1, f"{trained / dense['params']:.3f} trained")
    return ", ".join(words)


def _evidence(group: Sequence[Record], result: str, verdict: str, others: Sequence[Record] = ()) -> Evidence:
    first = group[0].config
    options = [f"{key.partition('.')[2]} {value}" for key in LAYER_TRAINING if (value := _get(first, key))]
    what = ", ".join(
        [
            f"{first['dataset']['name']} {group[0].model}",
            f"{first['layer']['name']} {group[0].setting}".replace("conv2d dense", "conv2d"),
            f"schedule {first['train']['name']}, {first['train']['epochs']} epochs",
            *options,
        ]
    )
    return Evidence(what, len(group), result, verdict, tuple(r.summary["id"] for r in (*group, *others)))


def selector_words(selector: Mapping[str, Any]) -> str:
    """A selector as command-line overrides; the layer alone as its name."""
    if list(selector) == ["layer.name"] and isinstance(selector["layer.name"], str):
        return str(selector["layer.name"])
    words = []
    for key, value in selector.items():
        values = value if isinstance(value, list) else [value]
        words.append(f"{key.removesuffix('.name')}={','.join(json.dumps(v).strip(chr(34)) for v in values)}")
    return f"`{' '.join(words)}`"


@cache
def _read() -> dict[str, Any]:
    return dict(yaml.safe_load((files("decef") / "claims.yaml").read_text()))


def _known(what: str, name: object, known: Iterable[object], where: str) -> None:
    if name not in (names := list(known)):
        raise ValueError(f"claims.yaml: {where} has {what} '{name}'; there are {', '.join(map(str, names))}")
