"""Judge the papers' claims by what was run. `claims.yaml` holds the claims; `judge` checks one.

A claim's `asks` names a kind of question in `decef.results.findings` and its arguments. `judge` tests all comparisons
that the kind yields, corrects the tests for their number, and sums them up. One seed decides nothing. A comparison that
is not decided needs more seeds; it is no sign that the claim fails.
"""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml

from decef.results.findings import KINDS, SHARES, Comparison, Finding, Measurements, load_measurements
from decef.results.published import Published, load_papers, load_published
from decef.results.selectors import is_setting
from decef.results.statistics import ALPHA, MOST_SEEDS, holm, is_above, p_value, seeds_needed
from decef.training.record import Record, load_records

HOLDS, FAILS = "holds", "doesn't hold"
MIXED, REFUTED = "holds in some, not in others", "doesn't hold in some, others open"
UNDECIDED, ONE_SEED, NOT_TESTED = "too few seeds to say", "one seed", "not tested yet"
HOLDS_IF = ("all", "any")  # which of its experiments must hold for a claim to hold


@dataclass(frozen=True)
class Claim:
    """One claim. `claims.yaml` explains the fields."""

    id: str
    paper: str
    statement: str
    where: str
    asks: Mapping[str, Any]
    experiment: str
    published: tuple[Published, ...] = ()
    holds_if: str = "all"
    looks: tuple[int, ...] = ()
    note: str = ""

    @property
    def arguments(self) -> dict[str, Any]:
        """What its kind is asked."""
        return {key: value for key, value in self.asks.items() if key != "kind"}

    @property
    def alpha(self) -> float:
        """The chance of a wrong decision at one look, so that it is at most `ALPHA` over all (Bonferroni)."""
        return ALPHA / max(1, len(self.looks))

    def looked_at(self, values: tuple[float, ...]) -> tuple[float, ...]:
        """The values, in the order of their seeds, that a comparison is tested by: of the largest planned number that
        is there, so that a run more than planned decides nothing, and none before the first; without looks, all."""
        planned = [n for n in self.looks if n <= len(values)]
        return values[: max(planned, default=0)] if self.looks else values


@dataclass(frozen=True)
class Evidence:
    """What one experiment says about a claim.

    Attributes:
        what: the experiment, in words.
        n: how many runs (or rank tables) it has.
        result: what came out, in words.
        verdict: one of this module's verdicts.
        runs: its runs and those they are compared with, or its tables.
    """

    what: str
    n: int
    result: str
    verdict: str
    runs: tuple[str, ...]


@dataclass(frozen=True)
class Verdict:
    """The verdict on a claim, and the evidence that it rests on."""

    verdict: str
    evidence: tuple[Evidence, ...] = ()

    @property
    def open(self) -> bool:
        """Whether more runs are needed for a verdict."""
        return self.verdict in (NOT_TESTED, UNDECIDED, REFUTED)

    @property
    def words(self) -> str:
        """How many comparisons were decided, which way, and what is left; empty if nothing ran.

        An experiment counts as one comparison, even if it takes two for it to hold.
        """
        found = Counter(evidence.verdict for evidence in self.evidence)
        holds, fails, left, single, alone = (found[v] for v in (HOLDS, FAILS, UNDECIDED, ONE_SEED, NOT_TESTED))
        words = []
        if tested := holds + fails + left + single:
            words.append(f"{holds + fails} of {tested} comparison{'s' * (tested > 1)} decided")
        if holds + fails:
            words[0] += f": {holds} hold{'s' * (holds == 1)}, {fails} {'doesn' if fails == 1 else 'don'}'t"
        if left:
            words.append(f"{left} need{'s' * (left == 1)} more seeds")
        if single:
            words.append(f"{single} {'has' if single == 1 else 'have'} one seed")
        if alone:
            words.append(f"{alone} {'has' if alone == 1 else 'have'} nothing to be compared with")
        return "; ".join(words)


@cache
def load_claims() -> tuple[Claim, ...]:
    """All claims in the file's order, with the published values that they are about.

    Raises:
        ValueError: a claim has an unknown field, paper, published value or kind, or two claims have the same id.
    """
    claims: dict[str, Claim] = {}
    by_id: dict[str, list[Published]] = {}
    for one in load_published():
        by_id.setdefault(one.id, []).append(one)
    for entry in _read()["claims"]:
        for name in entry.get("published", []):
            _known("published value", name, by_id, entry["id"])
        published = tuple(one for name in entry.get("published", []) for one in by_id[name])
        looks = tuple(entry.get("looks", ()))
        try:
            claim = Claim(**{**entry, "published": published, "looks": looks})
        except TypeError as error:
            raise ValueError(f"claims.yaml: claim {entry.get('id')} cannot be read: {error}") from error
        _known("paper", claim.paper, load_papers(), claim.id)
        _known("kind", claim.asks.get("kind"), KINDS, claim.id)
        _check_asks(claim)
        _known("holds_if", claim.holds_if, HOLDS_IF, claim.id)
        if any(n < 2 for n in looks) or list(looks) != sorted(looks):
            raise ValueError(f"claims.yaml: {claim.id} has looks {list(looks)}: numbers of seeds, from 2 on, must rise")
        if claim.id in claims:
            raise ValueError(f"claims.yaml: claim {claim.id} stands there twice")
        claims[claim.id] = claim
    return tuple(claims.values())


def judge_all(results: Path) -> tuple[list[Record], list[tuple[Claim, Verdict]]]:
    """A results folder's finished runs, and every claim with its verdict by them.

    Raises:
        ValueError: see `judge` and `load_records`.
    """
    records, measured = load_records(results), load_measurements(results)
    return records, [(claim, judge(claim, records, measured)) for claim in load_claims()]


def judge(claim: Claim, records: Sequence[Record], measured: Measurements | None = None) -> Verdict:
    """Judge a claim by what was run.

    Every comparison with two seeds or more is tested, once it has as many as planned: a two-sided t test of its mean
    against its bound, or a sign test, see `Comparison`. The p-values of a claim are corrected together by Holm's
    method, for all of its comparisons, those too that have one seed yet. So the chance of even one wrong decision among
    them is at most `ALPHA`, as long as the numbers of seeds at which it is looked at, `claim.looks`, were fixed before;
    see `Claim.looked_at`.

    Args:
        claim: one of `load_claims()`.
        records: finished runs, see `decef.training.record.load_records`. Runs that diverged are not among them. Those
            of schedule smoke, with a validation split or on a part of the training images are left out.
        measured: see `load_measurements`.

    Raises:
        ValueError: a run has several experiments as its control, or two runs of one experiment have the same seed.
    """
    records = [record for record in records if not _is_trial(record)]
    find = KINDS[claim.asks["kind"]]
    try:
        findings = list(find(claim.published, records, measured or Measurements(), **claim.arguments))
    except ValueError as error:
        raise ValueError(f"claim {claim.id}: {error}") from error
    # Several experiments may share a control: its comparison counts once.
    comparisons = dict.fromkeys(c for finding in findings for c in finding.comparisons)
    tested = {c: values for c in comparisons if len(values := claim.looked_at(c.values)) > 1}
    p_values = [p_value(values, c.bound, by_sign=c.by_sign) for c, values in tested.items()]
    # What isn't tested yet will be: counted from the start, it takes no verdict back then.
    corrected = dict(zip(tested, holm([*p_values, *[1.0] * (len(comparisons) - len(tested))]), strict=False))
    alpha = claim.alpha / max(1, len(comparisons))  # Holm's bound for the smallest p-value; the others are less strict
    decided = {c: _decided(claim, c, p, alpha) for c, p in corrected.items()}
    for c in comparisons:
        if c not in decided and len(c.values) > 1:
            decided[c] = UNDECIDED, f"{c.words} (looked at when there are {claim.looks[0]} seeds)"
    evidence = tuple(_evidence(finding, decided) for finding in findings)
    return Verdict(_overall((e.verdict for e in evidence), claim.holds_if), evidence)


def _is_trial(record: Record) -> bool:
    """Whether a run only tried something out: that it runs at all, or settings on a part of the training images."""
    config = record.config
    return config.train.name == "smoke" or bool(config.train.validation) or config.dataset.train_size is not None


def _overall(verdicts: Iterable[str], holds_if: str) -> str:
    """One verdict from those of all experiments that were tested."""
    found = set(verdicts) - {NOT_TESTED}
    if not found:
        return NOT_TESTED
    if len(found) == 1 and found <= {HOLDS, FAILS}:
        return found.pop()
    if holds_if == "any":
        return HOLDS if HOLDS in found else UNDECIDED
    if FAILS in found:  # whatever is still open: not all can hold any more
        return MIXED if HOLDS in found else REFUTED
    return UNDECIDED


def _evidence(finding: Finding, decided: Mapping[Comparison, tuple[str, str]]) -> Evidence:
    """A finding with its verdict: it holds if all its comparisons hold, and fails if one of them fails."""
    parts = [decided.get(comparison, (ONE_SEED, comparison.words)) for comparison in finding.comparisons]
    found = {verdict for verdict, _ in parts} or {NOT_TESTED}
    verdict = next(v for v in (FAILS, ONE_SEED, UNDECIDED, HOLDS, NOT_TESTED) if v in found)
    result = "; ".join(filter(None, [finding.result, *(words for _, words in parts)]))
    return Evidence(finding.what, finding.n, result, verdict, finding.runs)


def _decided(claim: Claim, comparison: Comparison, p: float, alpha_of_one: float) -> tuple[str, str]:
    """The verdict on one comparison, and its words with the p-value and, if undecided, the number of seeds needed.

    Args:
        claim: whose comparison it is.
        comparison: a tested one.
        p: its p-value, corrected.
        alpha_of_one: what the p-value by itself must be below, to count how many seeds that takes.
    """
    values = claim.looked_at(comparison.values)
    words = f"{comparison.words} (p {f'= {p:.2g}' if p >= 0.001 else '< 0.001'}"
    if len(values) < len(comparison.values):
        words += f" by the first {len(values)} seeds"
    if p <= claim.alpha:
        above = is_above(values, comparison.bound, by_sign=comparison.by_sign)
        return HOLDS if above else FAILS, f"{words})"
    needed = seeds_needed(values, comparison.bound, alpha_of_one, by_sign=comparison.by_sign)
    return UNDECIDED, f"{words}; {f'about {needed}' if needed else f'more than {MOST_SEEDS}'} seeds needed)"


@cache
def _read() -> dict[str, Any]:
    return dict(yaml.safe_load((files("decef.results") / "claims.yaml").read_text()))


def _check_asks(claim: Claim) -> None:
    """Raise ValueError if the claim's kind lacks an argument, or a selector names a setting that doesn't exist."""
    asks = claim.arguments
    arguments = inspect.signature(KINDS[claim.asks["kind"]])
    try:
        arguments.bind((), (), None, **asks)
    except TypeError as error:
        raise ValueError(f"claims.yaml: claim {claim.id}: {error}") from error
    for key in asks:
        _known("argument", key, [*arguments.parameters, *SHARES], claim.id)
    if ("control" in asks) != ("control_at_most" in asks) and "control_at_most" in arguments.parameters:
        raise ValueError(f"claims.yaml: claim {claim.id} has only one of control and control_at_most")
    _known("over", asks.get("over", "depth"), ("depth", "training"), claim.id)
    _known("measure", asks.get("measure", "product"), ("product", "channels"), claim.id)
    for selector in (asks.get("runs") or {}, asks.get("control") or {}):
        for key in selector:
            if not is_setting(key) and ":" not in str(selector.get("model.name")):  # own networks, own options
                raise ValueError(f"claims.yaml: claim {claim.id} selects by '{key}', which is no setting of a run")


def _known(what: str, name: object, known: Iterable[object], where: str) -> None:
    if name not in (names := list(known)):
        raise ValueError(f"claims.yaml: {where} has {what} '{name}'; there are {', '.join(map(str, names))}")
