"""results/CLAIMS.md: claims, what ran, what came out."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from decef.results.claims import SHARES, Claim, Figure, Verdict, load_papers, selector_words

MEASURES = {"product": "norm (the product of its factors' norms)", "channels": "channel factor's norm"}


def asks_words(claim: Claim) -> str:
    """What `asks` checks, for people."""
    asks = claim.asks
    limits = {key: value for key, value in asks.items() if key in SHARES}
    shares = [f"{low:g} to {high:g} of dense {key.replace('_', ' ')}" for key, (low, high) in limits.items()]
    runs = selector_words(asks.get("runs", {})) + (f" at {' and '.join(shares)}" if shares else "")
    control = selector_words(asks.get("control") or {"layer.name": "conv2d"})
    if asks["kind"] == "no_worse":
        bound = f"at most {_points(asks['margin'])} below" if asks["margin"] else "not below"
        return f"top-1 of {runs} is {bound} that of {control}, same seeds, precision and training"
    if asks["kind"] == "trains":
        where = f" where {control} stays at {asks['control_at_most']:g} % or less" if "control" in asks else ""
        return f"top-1 of {runs} is {asks['at_least']:g} % or more{where}"
    if asks["kind"] == "reaches":
        bound = f"at most {_points(asks['tolerance'])} below"
        return f"top-1 is {bound} the figures, same task, network, layer and setting"
    if asks["kind"] == "monotone_rank":
        what = "fall from layer to layer" if asks["over"] == "depth" else "change less from checkpoint to checkpoint"
        return f"effective ranks (`threshold` in results/ranks/*.csv of known networks) {what}, by rank correlation"
    return f"the larger a component's {MEASURES[asks['measure']]}, the more its removal costs, by rank correlation"


def _points(points: float) -> str:
    return f"{points:g} point{'s' * (points != 1)}"


def markdown(verdicts: Sequence[tuple[Claim, Verdict]]) -> str:
    """Claims and verdicts for people: what was claimed, what ran, what came out; the same input, the same text."""
    lines = [
        "# The papers' claims, and what came out here",
        "",
        "Made by `make claims` from the run records and decef/results/claims.yaml. Top-1 is the test accuracy of the last",
        "epoch. Square brackets hold 95 % intervals, Student's t over seeds, each by itself; differences are paired by",
        "seed, in the same precision. Each line of a claim is a comparison with what was asked. It is decided when a",
        "two-sided t test at 0.05 says so; p-values are corrected for the number of comparisons in the claim (Holm).",
        "What isn't decided has too few seeds to say, which isn't to fail: beside it stands how many seeds would be",
        "needed if their mean and spread were what they are so far. A claim holds if all its comparisons hold.",
        "Margins and thresholds are ours unless a note says otherwise. What a schedule shows holds for that schedule;",
        "the papers' own are mostly not known to us. A run that diverged has no accuracy, and is not counted.",
        "",
        "| claim | verdict | comparisons |",
        "|:--|:--|:--|",
        *(f"| [{claim.id}](#{claim.id}) | {verdict.verdict} | {verdict.words} |" for claim, verdict in verdicts),
        "",
    ]
    for claim, verdict in verdicts:
        lines += [
            f"## {claim.id}",
            "",
            f"{claim.statement}",
            "",
            f"- source: {load_papers()[claim.paper]}; {claim.where}",
            *(f"- {line}" for line in figure_lines(claim.figures)),
            f"- asked: {asks_words(claim)}",
        ]
        if claim.note:
            lines.append(f"- note: {claim.note}")
        lines.append(f"- verdict: **{verdict.verdict}**{f' ({verdict.words})' if verdict.words else ''}")
        if verdict.open:
            lines.append(f"- what would test it: `{claim.experiment}`")
        if verdict.evidence:
            lines += ["", "| what ran | n | what came out | verdict | runs |", "|:--|--:|:--|:--|:--|"]
            lines += [
                f"| {e.what} | {e.n} | {e.result} | {e.verdict} | {', '.join(e.runs)} |" for e in verdict.evidence
            ]
        lines.append("")
    return "\n".join(lines)


def figure_lines(figures: Iterable[Figure]) -> list[str]:
    """A line per fact and metric."""
    lines: dict[str, list[str]] = {}
    for f in figures:
        source = "; ".join(filter(None, [f.where, f.training]))
        value = f"{f.value:,.0f}" if f.value >= 1e4 else f"{f.value:g}"
        about = f"{f.id}, {f.network} on {' '.join(filter(None, [f.dataset, f.task]))}, {f.metric} ({source})"
        lines.setdefault(about, []).append(f"{f.setting}: {value}")
    return [f"{about}: {'; '.join(values)}" for about, values in lines.items()]
