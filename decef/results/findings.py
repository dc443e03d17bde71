"""What the runs say about a claim: each kind of question sorts the runs that it concerns into experiments.

For every experiment (one network, layer setting and training, over seeds) a kind yields a `Finding`: what it asks of
that experiment, as comparisons of values, one per seed, with a bound. `decef.results.claims.judge` decides them.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from decef.results.comparisons import experiments, precision_words
from decef.results.published import Published, load_known_weights
from decef.results.selectors import chosen, selector_words, twin_key, twins
from decef.results.statistics import Estimate, differences, estimate, rank_correlation
from decef.training.record import Record

if TYPE_CHECKING:
    import pandas as pd

log = logging.getLogger(__name__)

#: Costs that a claim can bound, as shares of the dense network's.
SHARES = ("params", "trainable_params", "flops")


@dataclass(frozen=True)
class Measurements:
    """What scripts/ranks.py and scripts/significance.py found, by the names of their tables, see `load_measurements`.

    `origins` has what scripts/ranks.py says of each of its tables: `network`, `weights` and more.
    """

    ranks: Mapping[str, pd.DataFrame] = field(default_factory=dict)
    significance: Mapping[str, pd.DataFrame] = field(default_factory=dict)
    origins: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)


def load_measurements(results: Path) -> Measurements:
    """What scripts/ranks.py and scripts/significance.py wrote to results/ranks and results/significance, by name."""
    import pandas as pd

    ranks, significance = (
        {path.stem: pd.read_csv(path) for path in sorted((results / kind).glob("*.csv"))}
        for kind in ("ranks", "significance")
    )
    return Measurements(ranks, significance, {name: _origin(results / "ranks" / f"{name}.json") for name in ranks})


def _origin(path: Path) -> dict[str, Any]:
    """What stands beside a table; nothing when that cannot be read, so that the table's origin isn't known."""
    try:
        return dict(json.loads(path.read_text()))
    except (OSError, ValueError, TypeError):
        return {}


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


# The kinds -------------------------------------------------------------------------------------------------------


def _non_inferior(
    published: Sequence[Published],
    records: Sequence[Record],
    measured: Measurements,
    *,
    runs: Mapping[str, Any],
    margin: float,
    control: Mapping[str, Any] | None = None,
    **shares: Sequence[float],
) -> Iterator[Finding]:
    """Top-1 is at most `margin` points below the control's, as a difference paired by seed and precision.

    Args:
        runs, control: which runs, as config values by dotted key, see `selects`; the control is Conv2d by default. A
            run is paired with the control of the same seed, precision, data, network and training; the layer, and
            training options that `runs` or `control` name or that Conv2d lacks, may differ.
        margin: in points of accuracy; 0 asks for an improvement.
        shares: `params`, `trainable_params`, `flops` of the runs as shares of the dense network's, [from, to].
    """
    control = control or {"layer.name": "conv2d"}
    controls = twins(records, runs, control)
    for group in experiments(chosen(records, runs, control, shares)):
        against = {record.pair: record for record in controls.get(twin_key(group[0], runs, control), [])}
        found = differences(((r.pair, r.top1) for r in group), _top1(against))
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
    published: Sequence[Published],
    records: Sequence[Record],
    measured: Measurements,
    *,
    runs: Mapping[str, Any],
    at_least: float,
    control: Mapping[str, Any] | None = None,
    control_at_most: float | None = None,
    **shares: Sequence[float],
) -> Iterator[Finding]:
    """Top-1 reaches `at_least` percent; with a control, where that stays at `control_at_most`; else as `_non_inferior`.

    With a control these are two comparisons: both must be decided for the claim to hold, and if the control trains too
    it fails.
    """
    controls = twins(records, runs, control) if control else {}
    for group in experiments(chosen(records, runs, control, shares)):
        ours = Comparison(_words(_mean(group)), _values(group), at_least, _ids(group))
        if control is None or control_at_most is None:
            yield _finding(group, "", ours)
            continue
        others = controls.get(twin_key(group[0], runs, control), [])
        if not others:
            yield _finding(group, f"{ours.words}; no run of {selector_words(control)} to compare with")
            continue
        words = f"{selector_words(control)} has {_words(_mean(others))}"
        stuck = Comparison(words, tuple(-value for value in _values(others)), -control_at_most, _ids(others))
        yield _finding(group, "", ours, stuck, others=others)


def _reaches(
    published: Sequence[Published], records: Sequence[Record], measured: Measurements, *, tolerance: float
) -> Iterator[Finding]:
    """Top-1 is at most `tolerance` points below the published values, of the same data, network, layer and setting."""
    for one in published:
        if one.metric == "top1":
            for group in experiments(r for r in records if one.fits(r)):
                words = f"{_words(_mean(group))}, {_costs(group[0])}; {one.id} has {one.value:.2f} %"
                yield _finding(group, "", Comparison(words, _values(group), one.value - tolerance, _ids(group)))


def _monotone_rank(
    published: Sequence[Published], records: Sequence[Record], measured: Measurements, *, over: str
) -> Iterator[Finding]:
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


def _dense_ranks(records: Sequence[Record], measured: Measurements) -> dict[str, pd.DataFrame]:
    """Rank tables of dense networks by name: of finished runs, and of weights that published.yaml knows.

    Which training a table of another origin shows cannot be told; and one network counts once. Both are logged.
    """
    layers = {record.id: record.layer for record in records}
    tables: dict[str, pd.DataFrame] = {}
    seen: dict[str, str] = {}
    for name, table in measured.ranks.items():
        made = measured.origins.get(name, {})
        md5 = next(iter(re.findall(r"\(MD5 (\w+)\)$", str(made.get("weights")))), "")  # see describe_file
        if name not in layers and load_known_weights().get(md5, "") != made.get("network"):
            log.warning(
                "left out: ranks/%s.csv is of unknown origin: it has no finished run's id for a name, and its .json "
                "names no weights that published.yaml knows",
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


def _significance(
    published: Sequence[Published], records: Sequence[Record], measured: Measurements, *, measure: str
) -> Iterator[Finding]:
    """Components of a larger `measure` are those whose removal costs more, by Spearman's correlation.

    In every layer of a run, then the mean of its layers, whose mean over the runs of one experiment must be above 0.
    """
    tables = measured.significance
    for group in experiments(r for r in records if r.id in tables):
        trends = []
        for record in group:
            layers = tables[record.id].groupby("layer")
            found = [rank_correlation(list(t[measure]), list(t.loss_rise)) for _, t in layers if len(t) > 2]
            if found:
                trends.append(sum(found) / len(found))
        if trends:
            mean = estimate(trends)
            words = f"rank correlation {mean.mean:+.2f} {mean.interval('+.2f')}".rstrip()
            words += f" of {measure} with the loss that removal adds"
            yield _finding(group, "", Comparison(words, tuple(trends), 0, _ids(group)))


KINDS: dict[Any, Callable[..., Iterator[Finding]]] = {
    "non_inferior": _non_inferior,
    "trains": _trains,
    "reaches": _reaches,
    "monotone_rank": _monotone_rank,
    "significance": _significance,
}


# Words ---------------------------------------------------------------------------------------------------------------


def _top1(records: Mapping[Any, Record]) -> dict[Any, float]:
    return {pair: record.top1 for pair, record in records.items()}


def _values(records: Iterable[Record]) -> tuple[float, ...]:
    return tuple(record.top1 for record in records)


def _ids(*groups: Iterable[Record]) -> tuple[str, ...]:
    return tuple(record.id for group in groups for record in group)


def _mean(records: Sequence[Record]) -> Estimate:
    return estimate(_values(records))


def _words(mean: Estimate) -> str:
    return f"{mean.mean:.2f} % {mean.interval()}".rstrip()


def _costs(record: Record) -> str:
    words = [f"{record.ratio('params'):.3f} of parameters", f"{record.ratio('flops'):.3f} of FLOPs"]
    if record.cost("trainable_params") != record.cost("params"):
        trained = record.cost("trainable_params") / record.summary["dense"]["params"]
        words.insert(1, f"{trained:.3f} trained")
    return ", ".join(words)


def _mixed(records: Iterable[Record]) -> str:
    """The precisions of runs that have several."""
    words = precision_words(records)
    return f", precision {words}" if words.startswith("mixed") else ""


def _other_precision(
    group: Iterable[Record], against: Mapping[tuple[int, str | None], Record], control: Mapping[str, Any]
) -> str:
    """Says which runs are not paired although the control has their seed, as it ran in another precision."""
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
            f"{first.config.dataset.name} {first.model}",
            f"{first.layer} {first.setting}".replace("conv2d dense", "conv2d"),
            f"schedule {first.config.train.name}, {first.config.train.epochs} epochs",
        ]
    )
    return Finding(f"{what}{_mixed((*group, *others))}", len(group), result, comparisons, _ids(group, others))
