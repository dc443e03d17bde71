"""What the runs say about a claim. A claim asks a question of one of the `KINDS` below.

A kind sorts the runs that the question is about into experiments: one network, layer setting and training, over seeds.
For each experiment it yields a `Finding` with comparisons of values, one value per seed, with a bound.
`decef.results.claims.judge` decides them.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise, product
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from decef.models.weights import md5_in
from decef.ranks import DEFINITIONS
from decef.results.comparisons import experiments, precision_words
from decef.results.published import Published, load_known_weights
from decef.results.selectors import selector_words, selects, with_controls
from decef.results.statistics import PERCENT, differences, estimate, rank_correlation
from decef.training.networks import epoch_of
from decef.training.record import Record, short_hash

if TYPE_CHECKING:
    import pandas as pd

log = logging.getLogger(__name__)

#: Costs that a claim can bound, as shares of the dense network's.
SHARES = ("params", "trainable_params", "flops")


@dataclass(frozen=True)
class Measurements:
    """The tables of scripts/ranks.py and scripts/significance.py by name, see `load_measurements`.

    `origins` has what scripts/ranks.py recorded about each of its tables: `network`, `weights` and more.
    """

    ranks: Mapping[str, pd.DataFrame] = field(default_factory=dict)
    significance: Mapping[str, pd.DataFrame] = field(default_factory=dict)
    origins: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)


def load_measurements(results: Path) -> Measurements:
    """Read what scripts/ranks.py and scripts/significance.py wrote to `ranks` and `significance` in `results`."""
    import pandas as pd

    ranks, significance = (
        {path.stem: pd.read_csv(path) for path in sorted((results / kind).glob("*.csv"))}
        for kind in ("ranks", "significance")
    )
    return Measurements(ranks, significance, {name: _origin(results / "ranks" / f"{name}.json") for name in ranks})


def _origin(path: Path) -> dict[str, Any]:
    """The contents of the file beside a table; empty if it cannot be read: then the table's origin is unknown."""
    try:
        return dict(json.loads(path.read_text()))
    except (OSError, ValueError, TypeError):
        return {}


@dataclass(frozen=True)
class Comparison:
    """What one test asks: whether the mean of `values`, one per seed, is above `bound`, or `by_sign` most of them.

    `words` are for people. `runs` are what the values come from, runs or columns of tables: thus a control that several
    experiments share gives equal comparisons, and two kinds of rank that happen to have equal values don't. `by_sign`
    is for values that can't be taken for normal.
    """

    words: str
    values: tuple[float, ...]
    bound: float
    runs: tuple[str, ...]
    by_sign: bool = False


@dataclass(frozen=True)
class Finding:
    """What a kind says about one experiment.

    Attributes:
        what: the experiment, in words.
        n: how many runs (or rank tables) it has.
        result: what came out besides the comparisons, in words.
        comparisons: these must all hold. There is none if there was nothing to compare the experiment with.
        runs: the experiment's runs and those they are compared with, or its tables.
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
    """Top-1 is at most `margin` points below the control's: a difference, paired by seed and precision.

    A margin of 0 asks that it is above.

    Args:
        runs, control: which runs, as config values by dotted key, see `selects`. The control is Conv2d by default. A
            run is paired with the control's run of the same seed, data, network and training, and of the same precision
            unless `control` names `train.precision`. They may differ in the layer (in one type's options, and in rank
            or budget of two types, only where `control` names them), in training options that Conv2d lacks, and in what
            else `control` names.
        margin: in percentage points of top-1.
        shares: limits [from, to] on `params`, `trainable_params` or `flops` of the runs, as shares of the dense
            network's.
    """
    control = control or {"layer.name": "conv2d"}
    by_seed_alone = "train.precision" in control

    def pair(record: Record) -> tuple[int, str | None, int]:
        seed, precision, processes = record.pair
        return seed, None if by_seed_alone else precision, processes

    for group, others in with_controls(records, runs, control, shares):
        against = {pair(record): record for record in others}
        found = differences(((pair(r), r.top1) for r in group), {key: other.top1 for key, other in against.items()})
        result = f"{_percent(_top1s(group))}, {_costs(group[0])}"
        result += _not_paired([r for r in group if pair(r) not in against], others, control)
        if not found:
            yield _finding(group, f"{result}; no run of {selector_words(control)} to compare with")
            continue
        difference = estimate(found)
        pairs = [against[pair(r)] for r in group if pair(r) in against]
        words = f"{difference.words('+.2f')} against {_percent(_top1s(pairs))} of {selector_words(control)}"
        words += f", over {difference.n} of the seeds" if difference.n < len(group) else ""
        across = sum(r.hardware != against[pair(r)].hardware for r in group if pair(r) in against)
        words += f", {across} of the pairs across two kinds of hardware" if across else ""
        comparison = Comparison(words, tuple(found), -margin, _ids(group, pairs))
        yield _finding(group, result, comparison, others=pairs)


def differences_in_top1(
    records: Sequence[Record], runs: Mapping[str, Any], control: Mapping[str, Any]
) -> list[Finding]:
    """Top-1 of runs minus their control's, in percentage points, for every experiment; see `_non_inferior`.

    Raises:
        ValueError: an experiment has several as its control, or two runs of one have the same seed.
    """
    return list(_non_inferior((), records, Measurements(), runs=runs, control=control, margin=0))


def _trains(
    published: Sequence[Published],
    records: Sequence[Record],
    measured: Measurements,
    *,
    runs: Mapping[str, Any],
    at_least: float,
    control: Mapping[str, Any] | None = None,
    control_at_most: float = 0.0,
    **shares: Sequence[float],
) -> Iterator[Finding]:
    """Top-1 is at least `at_least` percent and, if there is a control, the control's is at most `control_at_most`.

    With a control these are two comparisons: the claim holds if both do, and fails if the control trains too. For the
    other arguments see `_non_inferior`.
    """
    for group, others in with_controls(records, runs, control, shares):
        ours = Comparison(_percent(_top1s(group)), _top1s(group), at_least, _ids(group))
        if control is None:
            yield _finding(group, "", ours)
            continue
        if not others:
            yield _finding(group, f"{ours.words}; no run of {selector_words(control)} to compare with")
            continue
        words = f"{selector_words(control)} has {_percent(_top1s(others))}"
        stuck = Comparison(words, tuple(-value for value in _top1s(others)), -control_at_most, _ids(others))
        yield _finding(group, "", ours, stuck, others=others)


#: What a published top-1 is of, and the same of a run.
_TOP1: dict[str, Callable[[Record], float]] = {
    "top1": lambda record: record.top1,
    "top1_best": lambda record: max((row["test_top1"] for row in record.metrics), default=math.nan),
}


def _reaches(
    published: Sequence[Published],
    records: Sequence[Record],
    measured: Measurements,
    *,
    runs: Mapping[str, Any],
    tolerance: float,
) -> Iterator[Finding]:
    """Top-1 is at most `tolerance` points below the published value for the same task, network, layer and setting.

    A published best epoch is compared with the runs' best epochs; runs whose epochs are not there are left out.
    """
    for one in published:
        if one.metric in _TOP1:
            known = (r for r in records if one.fits(r) and not math.isnan(_TOP1[one.metric](r)))
            for group in experiments(r for r in known if selects(runs, r)):
                values = tuple(map(_TOP1[one.metric], group))
                best = " in the best epoch" if one.metric == "top1_best" else ""
                words = f"{_percent(values)}{best}, {_costs(group[0])}; {one.id} has {one.value:.2f} %"
                yield _finding(group, "", Comparison(words, values, one.value - tolerance, _ids(group)))


def _monotone_rank(
    published: Sequence[Published], records: Sequence[Record], measured: Measurements, *, over: str
) -> Iterator[Finding]:
    """Effective ranks fall with depth, or change less and less over training; a finding for each of `DEFINITIONS`.

    Spearman's correlation is taken in every network; its mean over networks of one architecture and training must be
    below 0. Each of these correlations is one comparison:
    over="depth": of the layer's number with its rank at the end, and with the ratio of that to a random kernel's rank.
    over="training": of the epoch with the mean change of the ranks, per epoch, since the checkpoint before. With few
    checkpoints it has few values, near -1 where ranks converge, so it is tested by its sign.
    """
    for (network, tables), definition in product(dense_ranks(records, measured).items(), DEFINITIONS):
        trends = {name: trend for name, table in tables.items() if (trend := _rank_trends(table, over, definition))}
        sources = tuple(f"ranks/{name}.csv" for name in trends)
        comparisons = []
        for measure in next(iter(trends.values()), {}):
            values = [trend[measure] for trend in trends.values()]
            by_sign = over == "training"
            spread = f"{fmean(values):+.2f}, from {min(values):+.2f} to {max(values):+.2f}"
            found = spread if by_sign and len(values) > 1 else estimate(values, within=(-1, 1)).words("+.2f")
            words = f"rank correlation of {measure} {found}"
            columns = tuple(f"{source}, {definition}" for source in sources)
            comparisons.append(Comparison(words, tuple(-value for value in values), 0, columns, by_sign))
        if comparisons:
            yield Finding(f"{network}, {definition} rank", len(trends), "", tuple(comparisons), sources)


def dense_ranks(records: Sequence[Record], measured: Measurements) -> dict[str, dict[str, pd.DataFrame]]:
    """Rank tables of dense networks: those of finished runs, and of weights that published.yaml knows.

    Tables of other origin are left out, as their training is unknown. So is a second table of the same network. Both
    are logged.

    Returns:
        By architecture and training, such as "resnet20, 19 convolutions, schedule standard", the tables by their name.
    """
    runs = {record.id: record for record in records}
    tables: dict[str, dict[str, pd.DataFrame]] = {}
    experiments_of: dict[str, str] = {}
    seen: dict[str, str] = {}
    for name, table in measured.ranks.items():
        made = measured.origins.get(name, {})
        run, md5 = runs.get(name), md5_in(made.get("weights"))
        if run is None and load_known_weights().get(md5, "") != made.get("network"):
            log.warning(
                "left out: ranks/%s.csv is of unknown origin: it has no finished run's id for a name, and its .json "
                "names no weights that published.yaml knows",
                name,
            )
            continue
        first = seen.setdefault(name if run else md5, name)
        if first != name:
            log.warning("left out: ranks/%s.csv is of the same network as ranks/%s.csv", name, first)
        elif run is None or run.layer == "conv2d":  # the claims are about dense kernels
            last = table[table.network == table.network.iloc[-1]]
            if run:
                network, trained = run.model, f"schedule {run.config.train.name}"
            else:
                network, trained = made["network"], "trained by others"
            label = f"{network}, {len(last)} convolutions, {trained}"
            about = [run.experiment if run else None, made.get("threshold")]
            experiment = json.dumps(about, sort_keys=True)
            if experiments_of.setdefault(label, experiment) != experiment:  # other data, training or threshold
                label += f", {short_hash(experiment)}"
            tables.setdefault(label, {})[name] = table
    return dict(sorted(tables.items()))


def _rank_trends(table: pd.DataFrame, over: str, definition: str) -> dict[str, float]:
    """The correlations of one network by name; empty if it has too few checkpoints, or no ranks by this definition."""
    if definition not in table:
        return {}
    networks = list(dict.fromkeys(table.network))
    by_network = [table[table.network == network].reset_index(drop=True) for network in networks]
    if over == "depth":
        last = by_network[-1]
        depth = list(range(len(last)))
        return {
            "depth with rank": rank_correlation(depth, list(last[definition])),
            "depth with rank / random": rank_correlation(depth, list(last[definition] / last[f"{definition}_init"])),
        }
    epochs = [epoch for network in networks if (epoch := epoch_of(network)) is not None]
    if len(epochs) < len(networks) or len(epochs) < 4:
        return {}
    steps = pairwise(zip(epochs, by_network, strict=True))
    changes = [float((b[definition] - a[definition]).abs().mean()) / (end - start) for (start, a), (end, b) in steps]
    return {"epoch with change of rank": rank_correlation(epochs[1:], changes)}


def _significance(
    published: Sequence[Published], records: Sequence[Record], measured: Measurements, *, measure: str
) -> Iterator[Finding]:
    """Components with a larger `measure` cost more to remove, by Spearman's correlation.

    The correlation is taken in every layer and averaged over a run's layers. The mean over the runs of one experiment
    must be above 0.
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
            words = f"rank correlation {estimate(trends, within=(-1, 1)).words('+.2f')}"
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


def _top1s(records: Iterable[Record]) -> tuple[float, ...]:
    return tuple(record.top1 for record in records)


def _ids(*groups: Iterable[Record]) -> tuple[str, ...]:
    return tuple(record.id for group in groups for record in group)


def _percent(values: Sequence[float]) -> str:
    return estimate(values, within=PERCENT).words(unit=" %")


def _costs(record: Record) -> str:
    words = [f"{record.ratio('params'):.3f} of parameters", f"{record.ratio('flops'):.3f} of FLOPs"]
    if record.cost("trainable_params") != record.cost("params"):
        trained = record.cost("trainable_params") / record.summary["dense"]["params"]
        words.insert(1, f"{trained:.3f} trained")
    return ", ".join(words)


def _mixed(records: Iterable[Record]) -> str:
    """The precisions of the runs, if there are several."""
    words = precision_words(records)
    return f", precision {words}" if words.startswith("mixed") else ""


def _not_paired(alone: Iterable[Record], others: Iterable[Record], control: Mapping[str, Any]) -> str:
    """How many runs are not paired although the control has their seeds, because it ran in another way."""
    by_seed = {record.config.seed: record for record in others}
    found = [(record, by_seed[record.config.seed]) for record in alone if record.config.seed in by_seed]
    if not found:
        return ""
    words = f"; {len(found)} not paired with {selector_words(control)}, whose"
    if all(ours.pair[1] == theirs.pair[1] for ours, theirs in found):
        return f"{words} number of processes differs"
    here, there = (precision_words(pair[side] for pair in found) for side in (0, 1))
    return f"{words} precision differs ({here} here, {there} there)"


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
