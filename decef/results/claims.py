"""What the papers claim, judged by what was run: `claims.yaml` holds the claims, `judge` checks one.

A claim's `asks` names one of the kinds below and its arguments. Each kind sorts the runs it concerns into experiments
(one network, layer setting and training, over seeds) and yields what it asks of every one as comparisons of values, one
per seed, with a bound. `judge` tests all comparisons of a claim, corrected for their number, and sums them up. One seed
decides nothing; what isn't decided needs more seeds, and is no sign that a claim fails.
"""

from __future__ import annotations

import json
import logging
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import cache
from importlib.resources import files
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

import yaml

from decef.results.statistics import (
    ALPHA,
    MOST_SEEDS,
    Estimate,
    differences,
    estimate,
    holm,
    p_value,
    rank_correlation,
    seeds_needed,
)
from decef.training.run import OF_REPLACEMENT

if TYPE_CHECKING:
    import pandas as pd

    from decef.results.tables import Record

log = logging.getLogger(__name__)

HOLDS, MIXED, FAILS = "holds", "holds in some, not in others", "doesn't hold"
UNDECIDED, ONE_SEED, NOT_TESTED = "too few seeds to say", "one seed", "not tested yet"
STATUSES = ("verified", "verified-code")
#: Costs that a claim can bound, as shares of the dense network's.
SHARES = ("params", "trainable_params", "flops")
#: Training options that differ between a low-rank layer and the control that it is held against.
LAYER_TRAINING = ("atcd", "decay")


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
    task: str = ""


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
class Measured:
    """What scripts/ranks.py and scripts/significance.py found, by the names of their tables, see `load_measured`.

    `origins` has what scripts/ranks.py says of each of its tables: `network`, `weights` and more.
    """

    ranks: Mapping[str, pd.DataFrame] = field(default_factory=dict)
    significance: Mapping[str, pd.DataFrame] = field(default_factory=dict)
    origins: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)


@dataclass(frozen=True)
class Comparison:
    """What one test is about: whether the mean of `values`, one per seed, is above `bound`.

    `words` tell people, and `runs` are what the values come from: those of one control are the same comparison wherever
    it stands.
    """

    words: str
    values: tuple[float, ...]
    bound: float
    runs: tuple[str, ...]


@dataclass(frozen=True)
class Finding:
    """What a kind has to say of one experiment: what that is, what came out in words, and what must all hold of it.

    Without a comparison there was nothing to hold it against.
    """

    what: str
    n: int
    result: str
    comparisons: tuple[Comparison, ...]
    runs: tuple[str, ...]


@dataclass(frozen=True)
class Evidence:
    """What one experiment says: what it is, its runs and those it is held against, what came out, the verdict."""

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

    @property
    def open(self) -> bool:
        """Whether more runs are what it takes."""
        return self.verdict in (NOT_TESTED, UNDECIDED)

    @property
    def words(self) -> str:
        """How many comparisons were decided, which way, and what is left; nothing where nothing ran.

        An experiment's counts as one even if it takes two to hold.
        """
        found = Counter(evidence.verdict for evidence in self.evidence)
        holds, fails, left, alone = found[HOLDS], found[FAILS], found[UNDECIDED] + found[ONE_SEED], found[NOT_TESTED]
        words = []
        if tested := holds + fails + left:
            words.append(f"{holds + fails} of {tested} comparison{'s' * (tested > 1)} decided")
        if holds + fails:
            words[0] += f": {holds} hold{'s' * (holds == 1)}, {fails} {'doesn' if fails == 1 else 'don'}'t"
        if left:
            words.append(f"{left} need{'s' * (left == 1)} more seeds")
        if alone:
            words.append(f"{alone} {'has' if alone == 1 else 'have'} nothing to be compared with")
        return "; ".join(words)


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
            key = (figure.id, figure.dataset, figure.task, figure.network, figure.metric, setting)
            if key in seen:
                raise ValueError(f"claims.yaml: {' '.join(filter(None, key))} stands there twice")
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


@cache
def load_known_weights() -> dict[str, str]:
    """The networks of trained weights that others published, by the MD5 of their file.

    Raises:
        ValueError: `claims.yaml` has one without a network.
    """
    try:
        return {str(md5): str(entry["network"]) for md5, entry in _read()["weights"].items()}
    except (KeyError, TypeError) as error:
        raise ValueError(f"claims.yaml: its weights cannot be read: {error}") from error


def load_measured(results: Path) -> Measured:
    """What scripts/ranks.py and scripts/significance.py wrote to results/ranks and results/significance, by name."""
    import pandas as pd

    ranks, significance = (
        {path.stem: pd.read_csv(path) for path in sorted((results / kind).glob("*.csv"))}
        for kind in ("ranks", "significance")
    )
    return Measured(ranks, significance, {name: _origin(results / "ranks" / f"{name}.json") for name in ranks})


def _origin(path: Path) -> dict[str, Any]:
    """What stands beside a table; nothing when that cannot be read, so that the table's origin isn't known."""
    try:
        return dict(json.loads(path.read_text()))
    except (OSError, ValueError, TypeError):
        return {}


def judge(claim: Claim, records: Sequence[Record], measured: Measured | None = None) -> Verdict:
    """Hold a claim against what was run.

    Every comparison of two seeds or more is tested by a two-sided t test against its bound. All of a claim are
    corrected together by Holm, so that the chance of a single wrong decision among them is at most `ALPHA`.

    Args:
        claim: one of `load_claims()`.
        records: finished runs, see `decef.results.tables.load_records`. A run that diverged is not among them.
        measured: see `load_measured`.

    Raises:
        ValueError: a run's control is several experiments, or runs of one experiment have the same seed.
    """
    asks = {key: value for key, value in claim.asks.items() if key != "kind"}
    findings = list(KINDS[claim.asks["kind"]](claim, records, measured or Measured(), **asks))
    # A control that several experiments are held against is one comparison.
    tests = list(dict.fromkeys(c for finding in findings for c in finding.comparisons if len(c.values) > 1))
    corrected = dict(zip(tests, holm([p_value(c.values, c.bound) for c in tests]), strict=True))
    evidence = tuple(_evidence(finding, corrected) for finding in findings)
    return Verdict(_overall(e.verdict for e in evidence), evidence)


def _overall(verdicts: Iterable[str]) -> str:
    """One verdict from those on all comparisons that were tested: a claim is about all of them."""
    found = set(verdicts) - {NOT_TESTED}
    if not found:
        return NOT_TESTED
    if {HOLDS, FAILS} <= found:
        return MIXED
    return next(iter(found)) if found in ({HOLDS}, {FAILS}) else UNDECIDED


def _evidence(finding: Finding, corrected: Mapping[Comparison, float]) -> Evidence:
    """A finding with its verdict: it holds if all its comparisons do, and fails if one does."""
    parts = [_decided(comparison, corrected) for comparison in finding.comparisons]
    found = {verdict for verdict, _ in parts} or {NOT_TESTED}
    verdict = next(v for v in (FAILS, ONE_SEED, UNDECIDED, HOLDS, NOT_TESTED) if v in found)
    result = "; ".join(filter(None, [finding.result, *(words for _, words in parts)]))
    return Evidence(finding.what, finding.n, result, verdict, finding.runs)


def _decided(comparison: Comparison, corrected: Mapping[Comparison, float]) -> tuple[str, str]:
    """The verdict on one comparison, and its words with the p-value, and the seeds that a decision would need."""
    if comparison not in corrected:
        return ONE_SEED, comparison.words
    p = corrected[comparison]
    words = f"{comparison.words} (p {f'= {p:.2g}' if p >= 0.001 else '< 0.001'}"
    if p <= ALPHA:
        return HOLDS if fmean(comparison.values) > comparison.bound else FAILS, f"{words})"
    # Holm asks this much of the smallest p-value, and less of the others.
    needed = seeds_needed(comparison.values, comparison.bound, ALPHA / len(corrected))
    return UNDECIDED, f"{words}; {f'about {needed}' if needed else f'more than {MOST_SEEDS}'} seeds needed)"


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
) -> Iterator[Finding]:
    """Top-1 is at most `margin` points below the control's, as a difference paired by seed and precision.

    Args:
        runs, control: which runs, as config values by dotted key, see `_selects`; the control is Conv2d by default. A
            run is paired with the control of the same seed, precision, data, network and training; the layer, and
            training options that `runs` or `control` name or that Conv2d lacks, may differ.
        margin: in points of accuracy; 0 asks for an improvement.
        shares: `params`, `trainable_params`, `flops` of the runs as shares of the dense network's, [from, to].
    """
    control = control or {"layer.name": "conv2d"}
    twins = _twins(claim, records, runs, control)
    for group in _experiments(_chosen(records, runs, control, shares)):
        against = {record.pair: record for record in twins.get(_twin_key(group[0], runs, control), [])}
        found = differences(((r.pair, r.summary["test_top1"]) for r in group), _top1(against))
        result = f"{_words(_mean(group))}, {_costs(group[0])}{_other_precision(group, against, control)}"
        if not found:
            yield _finding(group, f"{result}; no run of {selector_words(control)} to compare with")
            continue
        difference = estimate(found)
        pairs = [against[r.pair] for r in group if r.pair in against]
        words = f"{difference.mean:+.2f} {difference.interval('+.2f')}".rstrip()
        words += f" against {_words(_mean(pairs))} of {selector_words(control)}"
        words += f", over {difference.n} of the seeds" if difference.n < len(group) else ""
        comparison = Comparison(words, tuple(found), -margin, _ids(group, pairs))
        yield _finding(group, result, comparison, others=pairs)


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
) -> Iterator[Finding]:
    """Top-1 reaches `at_least` percent; with a control, where that stays at `control_at_most`; else as `_no_worse`.

    With a control these are two comparisons: both must be decided for the claim to hold, and if the control trains too
    it fails.
    """
    twins = _twins(claim, records, runs, control) if control else {}
    for group in _experiments(_chosen(records, runs, control, shares)):
        ours = Comparison(_words(_mean(group)), _values(group), at_least, _ids(group))
        if control is None or control_at_most is None:
            yield _finding(group, "", ours)
            continue
        others = twins.get(_twin_key(group[0], runs, control), [])
        if not others:
            yield _finding(group, f"{ours.words}; no run of {selector_words(control)} to compare with")
            continue
        words = f"{selector_words(control)} has {_words(_mean(others))}"
        stuck = Comparison(words, tuple(-value for value in _values(others)), -control_at_most, _ids(others))
        yield _finding(group, "", ours, stuck, others=others)


def _reaches(claim: Claim, records: Sequence[Record], measured: Measured, *, tolerance: float) -> Iterator[Finding]:
    """Top-1 is at most `tolerance` points below the claim's figures, of the same data, network, layer and setting."""
    for figure in claim.figures:
        if figure.metric == "top1":
            for group in _experiments(r for r in records if same_setting(figure, r)):
                words = f"{_words(_mean(group))}, {_costs(group[0])}; {figure.id} has {figure.value:.2f} %"
                yield _finding(group, "", Comparison(words, _values(group), figure.value - tolerance, _ids(group)))


def _monotone_rank(claim: Claim, records: Sequence[Record], measured: Measured, *, over: str) -> Iterator[Finding]:
    """Effective ranks ("threshold") fall with depth, or change less and less over training.

    By Spearman's correlation in every network, whose mean over networks of one architecture must be below 0. Each is a
    comparison of its own:
    "depth": of the layer's number and its rank at the end; and of that number and the ratio to a random kernel's rank.
    "training": of the epoch and the mean change of the ranks since the checkpoint before, per epoch.
    """
    groups: dict[tuple[str, ...], dict[str, pd.DataFrame]] = {}
    for name, table in _dense_ranks(records, measured).items():
        last = table[table.network == table.network.iloc[-1]]
        shape = tuple(last.name + last.in_channels.astype(str) + "-" + last.out_channels.astype(str))
        groups.setdefault(shape, {})[name] = table
    for shape, tables in sorted(groups.items()):
        trends = {name: trend for name, table in tables.items() if (trend := _rank_trends(table, over))}
        sources = tuple(f"ranks/{name}.csv" for name in trends)
        for measure in next(iter(trends.values()), {}):
            values = [trend[measure] for trend in trends.values()]
            mean = estimate(values)
            words = f"rank correlation of {measure} {mean.mean:+.2f} {mean.interval('+.2f')}".rstrip()
            comparison = Comparison(words, tuple(-value for value in values), 0, sources)
            yield Finding(f"{len(shape)} convolutions", len(trends), "", (comparison,), sources)


def _dense_ranks(records: Sequence[Record], measured: Measured) -> dict[str, pd.DataFrame]:
    """Rank tables of dense networks by name: of finished runs, and of weights that claims.yaml knows.

    Which training a table of another origin shows cannot be told; and one network counts once. Both are logged.
    """
    layers = {record.summary["id"]: record.layer for record in records}
    tables: dict[str, pd.DataFrame] = {}
    seen: dict[str, str] = {}
    for name, table in measured.ranks.items():
        made = measured.origins.get(name, {})
        md5 = next(iter(re.findall(r"\(MD5 (\w+)\)$", str(made.get("weights")))), "")  # see describe_file
        if name not in layers and load_known_weights().get(md5, "") != made.get("network"):
            log.warning(
                "left out: ranks/%s.csv is of unknown origin: it has no finished run's id for a name, and its .json "
                "names no weights that claims.yaml knows",
                name,
            )
            continue
        first = seen.setdefault(name if name in layers else md5, name)
        if first != name:
            log.warning("left out: ranks/%s.csv is of the same network as ranks/%s.csv", name, first)
        elif layers.get(name, "conv2d") == "conv2d":  # the claims are about dense kernels
            tables[name] = table
    return tables


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


def _significance(claim: Claim, records: Sequence[Record], measured: Measured, *, measure: str) -> Iterator[Finding]:
    """Components of a larger `measure` are those whose removal costs more, by Spearman's correlation.

    In every layer of a run, then the mean of its layers, whose mean over the runs of one experiment must be above 0.
    """
    tables = measured.significance
    for group in _experiments(r for r in records if r.summary["id"] in tables):
        trends = []
        for record in group:
            layers = tables[record.summary["id"]].groupby("layer")
            found = [rank_correlation(list(t[measure]), list(t.loss_rise)) for _, t in layers if len(t) > 2]
            if found:
                trends.append(sum(found) / len(found))
        if trends:
            mean = estimate(trends)
            words = f"rank correlation {mean.mean:+.2f} {mean.interval('+.2f')}".rstrip()
            words += f" of {measure} with the loss that removal adds"
            yield _finding(group, "", Comparison(words, tuple(trends), 0, _ids(group)))


KINDS: dict[Any, Callable[..., Iterator[Finding]]] = {
    "no_worse": _no_worse,
    "trains": _trains,
    "reaches": _reaches,
    "monotone_rank": _monotone_rank,
    "significance": _significance,
}


# Which runs ------------------------------------------------------------------------------------------------------


def same_setting(figure: Figure, record: Record) -> bool:
    """Whether a run has a figure's task, network, layer and rank; its training and options may be others."""
    ours = (record.task, record.model, record.layer, record.asked)
    return ours == (f"{figure.dataset} {figure.task}".strip(), figure.network, figure.layer, figure.setting)


def _selects(selector: Mapping[str, Any], config: Mapping[str, Any]) -> bool:
    """Whether a config has the selector's values: a list means one of them, a text may have *, null and false off."""
    return all(
        any(_fits(_get(config, key), value) for value in (wanted if isinstance(wanted, list) else [wanted]))
        for key, wanted in selector.items()
    )


def _fits(value: Any, wanted: Any) -> bool:
    if isinstance(wanted, str):
        return isinstance(value, str) and fnmatchcase(value, wanted)
    return bool((value or None) == (wanted or None))  # what is off is null, false, 0 or not there


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


def _experiments(records: Iterable[Record]) -> list[list[Record]]:
    from decef.results.tables import experiments  # which shows figures beside results, and needs this module for that

    return experiments(records)


def _twin_key(record: Record, runs: Mapping[str, Any], control: Mapping[str, Any]) -> str:
    """Equal for a run and its control: what must be the same in both, see `_no_worse`."""
    free = {key.removeprefix("train.") for key in (*runs, *control) if key.startswith("train.")} | set(LAYER_TRAINING)
    kept = {key: value for key, value in record.experiment.items() if key != "layer"}
    kept["train"] = {key: value for key, value in kept["train"].items() if key not in free}
    if control.get("layer.name") == "conv2d":  # which replaces no layer
        kept["model"] = {key: value for key, value in kept["model"].items() if key not in OF_REPLACEMENT}
    return json.dumps(kept, sort_keys=True)


def _twins(
    claim: Claim, records: Iterable[Record], runs: Mapping[str, Any], control: Mapping[str, Any]
) -> dict[str, list[Record]]:
    """The control's experiments by twin key."""
    twins: dict[str, list[Record]] = {}
    for group in _experiments(r for r in records if _selects(control, r.config)):
        other = twins.setdefault(_twin_key(group[0], runs, control), group)
        if other is not group:
            both = f"{other[0].summary['id']} and {group[0].summary['id']}"
            raise ValueError(f"claims.yaml: both {both} are claim {claim.id}'s control: narrow its `control`")
    return twins


# Words ---------------------------------------------------------------------------------------------------------------


def _top1(records: Mapping[Any, Record]) -> dict[Any, float]:
    return {pair: record.summary["test_top1"] for pair, record in records.items()}


def _values(records: Iterable[Record]) -> tuple[float, ...]:
    return tuple(record.summary["test_top1"] for record in records)


def _ids(*groups: Iterable[Record]) -> tuple[str, ...]:
    return tuple(record.summary["id"] for group in groups for record in group)


def _mean(records: Sequence[Record]) -> Estimate:
    return estimate(_values(records))


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


def _mixed(records: Iterable[Record]) -> str:
    """The precisions of runs that have several."""
    from decef.results.tables import precision_words

    words = precision_words(records)
    return f", precision {words}" if words.startswith("mixed") else ""


def _other_precision(
    group: Iterable[Record], against: Mapping[tuple[int, str | None], Record], control: Mapping[str, Any]
) -> str:
    """Says which runs are not paired although the control has their seed, as it ran in another precision."""
    from decef.results.tables import precision_words

    seeds = {seed for seed, _ in against}
    ours = {record.pair[0]: record for record in group if record.pair not in against and record.pair[0] in seeds}
    if not ours:
        return ""
    theirs = [record for (seed, _), record in against.items() if seed in ours]
    words = f"{len(ours)} not paired with {selector_words(control)}, whose precision differs"
    return f"; {words} ({precision_words(ours.values())} here, {precision_words(theirs)} there)"


def _finding(group: Sequence[Record], result: str, *comparisons: Comparison, others: Sequence[Record] = ()) -> Finding:
    first = group[0]
    what = ", ".join(
        [
            f"{first.config['dataset']['name']} {first.model}",
            f"{first.layer} {first.setting}".replace("conv2d dense", "conv2d"),
            f"schedule {first.config['train']['name']}, {first.config['train']['epochs']} epochs",
        ]
    )
    return Finding(f"{what}{_mixed((*group, *others))}", len(group), result, comparisons, _ids(group, others))


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
    return dict(yaml.safe_load((files("decef.results") / "claims.yaml").read_text()))


def _known(what: str, name: object, known: Iterable[object], where: str) -> None:
    if name not in (names := list(known)):
        raise ValueError(f"claims.yaml: {where} has {what} '{name}'; there are {', '.join(map(str, names))}")
