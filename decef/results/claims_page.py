"""results/CLAIMS.md: the claims, what ran, and what came out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from decef.results.claims import Claim, Verdict
from decef.results.findings import SHARES
from decef.results.pages import render
from decef.results.published import load_papers, published_lines
from decef.results.selectors import selector_words

MEASURES = {"product": "norm (the product of its factors' norms)", "channels": "channel factor's norm"}


def markdown(verdicts: Sequence[tuple[Claim, Verdict]]) -> str:
    """The page as Markdown: what was claimed, what ran, what came out. The same input gives the same text."""
    return render("claims", told=[told(*one) for one in verdicts])


def told(claim: Claim, verdict: Verdict) -> dict[str, Any]:
    """A claim and its verdict, with all that a page says about them in words."""
    return {
        "claim": claim,
        "verdict": verdict,
        "paper": load_papers()[claim.paper],
        "published": published_lines(claim.published),
        "asked": asks_words(claim),
    }


def asks_words(claim: Claim) -> str:
    """What `asks` checks, in words."""
    asks = claim.asks
    limits = {key: value for key, value in asks.items() if key in SHARES}
    shares = [f"{low:g} to {high:g} of dense {key.replace('_', ' ')}" for key, (low, high) in limits.items()]
    runs = selector_words(asks.get("runs", {})) + (f" at {' and '.join(shares)}" if shares else "")
    control = selector_words(asks.get("control") or {"layer.name": "conv2d"})
    if asks["kind"] == "non_inferior":
        bound = f"at most {_points(asks['margin'])} below" if asks["margin"] else "above"
        where = " in some experiment" if claim.holds_if == "any" else ""
        return f"top-1 of {runs} is {bound} that of {control}{where}, same seeds, precision and training"
    if asks["kind"] == "trains":
        where = f" where {control} stays at {asks['control_at_most']:g} % or less" if "control" in asks else ""
        return f"top-1 of {runs} is {asks['at_least']:g} % or more{where}"
    if asks["kind"] == "reaches":
        bound = f"at most {_points(asks['tolerance'])} below"
        return f"top-1 of {runs} is {bound} the published values, same task, network, layer and setting"
    if asks["kind"] == "monotone_rank":
        what = "fall from layer to layer" if asks["over"] == "depth" else "change less from checkpoint to checkpoint"
        ranks = "effective ranks (each definition in results/ranks/*.csv of known networks)"
        return f"{ranks} {what}, by rank correlation"
    return f"the larger a component's {MEASURES[asks['measure']]}, the more its removal costs, by rank correlation"


def _points(points: float) -> str:
    return f"{points:g} point{'s' * (points != 1)}"
