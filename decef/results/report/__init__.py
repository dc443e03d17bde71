"""results/report.html: claims, tables, charts and runs on one page, which needs neither a network nor an account.

`page.html` is the page's template, `page.css` its looks, `page.js` its sorting, filters and charts.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from importlib.resources import files
from typing import Any
from urllib.parse import quote

import yaml
from jinja2 import Environment, StrictUndefined
from markupsafe import Markup, escape

from decef.layers import LAYERS
from decef.results.claims import FAILS, HOLDS, MIXED, NOT_TESTED, UNDECIDED, Claim, Verdict, load_papers
from decef.results.claims_page import asks_words, figure_lines
from decef.results.tables import Record, cells, comparison_groups, experiments, summarize
from decef.training.record import CONFIG, METRICS, SUMMARY

#: What `metrics.jsonl` has to draw, as the page names it.
CURVES = {
    "test_top1": "test top-1 (%)",
    "train_top1": "training top-1 (%)",
    "val_top1": "validation top-1 (%)",
    "test_loss": "test loss",
    "train_loss": "training loss",
    "val_loss": "validation loss",
}
VERDICTS = (HOLDS, MIXED, FAILS, UNDECIDED, NOT_TESTED)
#: What a column of `cells` is sorted by, where that is not its text; the others hold words.
SORTED_BY = {
    "top-1 %": "top1",
    "95 % interval": "top1_low",
    "n": "n",
    "vs Conv2d": "top1_minus_conv2d",
    "params": "params",
    "x dense": "params_ratio",
    "of them trained": "trainable_params",
    "MFLOPs": "flops",
    "x dense ": "flops_ratio",
    "published top-1": "published_top1",
}


def build(
    records: Sequence[Record],
    metrics: Mapping[str, Sequence[Mapping[str, Any]]],
    verdicts: Sequence[tuple[Claim, Verdict]],
) -> str:
    """The page as HTML; the same input, the same text.

    Args:
        records: finished runs, see `decef.results.tables.load_records`.
        metrics: their epochs by run id, see `decef.training.record.read_metrics`; a run without has no curve.
        verdicts: claims and what came out, see `decef.results.claims.judge`.
    """
    groups = [_group(number, name, group) for number, (name, group) in enumerate(comparison_groups(records).items())]
    epochs = [epoch for run in metrics.values() for epoch in run]
    curves = {key: label for key, label in CURVES.items() if any(epoch.get(key) is not None for epoch in epochs)}
    found = Counter(verdict.verdict for _, verdict in verdicts)
    data = {
        "layers": list(LAYERS),
        "metrics": list(curves),
        "groups": [[_drawn(row, metrics, curves) for row in group["rows"]] for group in groups],
    }
    rows = [row for group in groups for row in group["rows"]]
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"code": _code, "quote": lambda text: quote(text, safe=""), "yaml": _yaml, "slug": _slug}
    return environment.from_string(_file("page.html")).render(
        css=Markup(_file("page.css")),
        js=Markup(_file("page.js")),
        data=data,
        groups=groups,
        n_runs=len(records),
        run_ids={record.summary["id"] for record in records},
        choices={key: sorted({row[key] for row in rows}) for key in ("dataset", "network", "schedule")},
        layers=[name for name in LAYERS if any(row["layer"] == name for row in rows)],
        curves=curves,
        sorted_by=SORTED_BY,
        claims=[_claim(claim, verdict) for claim, verdict in verdicts],
        tally={verdict: found[verdict] for verdict in VERDICTS if found[verdict]},
        files=(CONFIG, METRICS, SUMMARY),
    )


def _group(number: int, name: str, records: Sequence[Record]) -> dict[str, Any]:
    """One comparison: a table and its charts."""
    by_row = {(runs[0].model, runs[0].layer, runs[0].setting): runs for runs in experiments(records)}
    config = records[0].config
    rows = []
    for i, row in enumerate(summarize(records).to_dict("records")):
        rows.append(
            {
                "id": f"{number}-{i}",
                "dataset": records[0].task,
                "network": row["model"],
                "layer": row["layer"],
                "schedule": config["train"]["name"],
                "cells": cells(row),
                "numbers": {key: _finite(row[key]) for key in (*SORTED_BY.values(), "top1_high")},
                "setting": row["setting"],
                "source": row["published_source"] if row["published_top1"] == row["published_top1"] else None,
                "runs": by_row[row["model"], row["layer"], row["setting"]],
            }
        )
    return {"id": str(number), "name": name, "train": config["train"], "rows": rows, "config": config}


def _drawn(
    row: Mapping[str, Any], metrics: Mapping[str, Sequence[Mapping[str, Any]]], curves: Iterable[str]
) -> dict[str, Any]:
    """What the page's script needs of a row to filter it and to draw it."""
    runs = []
    for record in row["runs"]:
        epochs = metrics.get(record.summary["id"], [])
        values = {key: [_finite(epoch.get(key)) for epoch in epochs] for key in curves}
        runs.append({"seed": record.config["seed"], "epoch": [epoch["epoch"] for epoch in epochs], **values})
    text = {key: row["cells"][key] for key in ("top-1 %", "95 % interval", "n", "vs Conv2d", "params", "MFLOPs")}
    plain = {key: row[key] for key in ("id", "dataset", "network", "layer", "schedule", "setting", "numbers")}
    return {**plain, "text": text, "runs": runs}


def _claim(claim: Claim, verdict: Verdict) -> dict[str, Any]:
    return {
        "claim": claim,
        "paper": load_papers()[claim.paper],
        "asked": asks_words(claim),
        "figures": figure_lines(claim.figures),
        "verdict": verdict.verdict,
        "words": verdict.words,
        "evidence": verdict.evidence,
        "open": verdict.open,
    }


def _finite(value: Any) -> float | None:
    """A number that JSON has, to six digits; whole numbers as they are; None where there is none."""
    if value is None or not math.isfinite(value):
        return None
    return value if isinstance(value, int) else float(f"{value:.6g}")


def _code(text: str) -> Markup:
    """Text with `code` in Markdown's backticks."""
    parts = enumerate(text.split("`"))
    return Markup().join(Markup("<code>{}</code>").format(part) if i % 2 else escape(part) for i, part in parts)


def _slug(text: str) -> str:
    """A verdict as a CSS class."""
    return re.sub(r"\W+", "-", text)


def _yaml(value: Mapping[str, Any]) -> str:
    return yaml.safe_dump(dict(value), sort_keys=False, allow_unicode=True)


def _file(name: str) -> str:
    return (files("decef.results.report") / name).read_text(encoding="utf-8")
