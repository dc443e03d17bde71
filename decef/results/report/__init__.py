"""results/report.html: claims, tables, charts and runs on one page, which works offline and without an account.

`page.html` is the page's template and `page.css` its style. `page.js` sorts and filters. `charts` makes the charts.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from importlib.resources import files
from typing import Any
from urllib.parse import quote

import yaml
from jinja2 import Environment, StrictUndefined
from markupsafe import Markup, escape

from decef.plans import layer_names
from decef.results.claims import FAILS, HOLDS, MIXED, NOT_TESTED, REFUTED, UNDECIDED, Claim, Verdict
from decef.results.claims_page import told
from decef.results.comparisons import comparison_groups
from decef.results.look import look_of
from decef.results.report import charts
from decef.results.tables import table_rows
from decef.training.record import Record

#: The metrics of `metrics.jsonl` that can be drawn, and their names on the page.
CURVES = {
    "test_top1": "test top-1 (%)",
    "train_top1": "training top-1 (%)",
    "val_top1": "validation top-1 (%)",
    "test_loss": "test loss",
    "train_loss": "training loss",
    "val_loss": "validation loss",
}
#: What the page's script knows of a row: its id, what to filter by, and how many runs it has.
FILTERED = ("id", "dataset", "network", "layer", "schedule", "n")
VERDICTS = (HOLDS, MIXED, REFUTED, FAILS, UNDECIDED, NOT_TESTED)
#: The number that each numeric column of `Row.cells` is sorted by. The other columns are sorted by their text.
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


def build(records: Sequence[Record], verdicts: Sequence[tuple[Claim, Verdict]]) -> str:
    """The page as HTML. The same input gives the same text.

    Args:
        records: finished runs, see `decef.training.record.load_records`. A run without metrics has no curve.
        verdicts: claims and what came out, see `decef.results.claims.judge`.
    """
    epochs = [epoch for record in records for epoch in record.metrics]
    curves = {key: label for key, label in CURVES.items() if any(epoch.get(key) is not None for epoch in epochs)}
    named = comparison_groups(records).items()
    groups = [_group(number, name, group, curves) for number, (name, group) in enumerate(named)]
    found = Counter(verdict.verdict for _, verdict in verdicts)
    data = {
        "groups": [[{key: row[key] for key in FILTERED} for row in group["rows"]] for group in groups],
        "charts": {chart["id"]: chart["spec"] for group in groups for chart in group["charts"]},
    }
    rows = [row for group in groups for row in group["rows"]]
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.policies["json.dumps_kwargs"] = {"sort_keys": True, "separators": (",", ":")}
    environment.filters |= {"code": _code, "quote": lambda text: quote(text, safe=""), "slug": _slug}
    page = environment.from_string(_file("page.html")).render(
        css=Markup(_file("page.css")),
        js=Markup(_file("page.js")),
        vega=Markup(charts.script()),
        data=data,
        groups=groups,
        n_runs=len(records),
        run_ids={record.id for record in records},
        choices={key: sorted({row[key] for row in rows}) for key in ("dataset", "network", "schedule")},
        layers=[name for name in layer_names() if any(row["layer"] == name for row in rows)],
        looks={name: look_of(name) for name in layer_names()},
        curves=curves,
        sorted_by=SORTED_BY,
        claims=[told(*one) for one in verdicts],
        tally={verdict: found[verdict] for verdict in VERDICTS if found[verdict]},
    )
    # Indentation goes, but not that of scripts and what they read, which are the second part.
    tags, data_and_scripts = page.split('<script type="application/json"', 1)
    return "".join([re.sub(r"\n\s+(?=<)", "\n", tags), '<script type="application/json"', data_and_scripts])


def _group(number: int, name: str, records: Sequence[Record], curves: Mapping[str, str]) -> dict[str, Any]:
    """One comparison: a table and its charts."""
    found = table_rows(records)
    shared = _shared(records)
    one_network = len({row.first.model for row in found}) == 1
    rows = []
    for i, row in enumerate(found):
        first, numbers = row.first, row.to_dict()
        words = [first.model, first.layer, *([first.setting] if first.setting != "dense" else [])]
        rows.append(
            {
                "id": f"{number}-{i}",
                "dataset": first.task,
                "network": first.model,
                "layer": first.layer,
                "schedule": first.config.train.name,
                "setting": first.setting,
                "n": len(row.runs),
                "name": ", ".join(words),
                "legend": ", ".join(words[one_network:]),
                "cells": row.cells(),
                "numbers": {key: _finite(numbers[key]) for key in (*SORTED_BY.values(), "top1_high")},
                "source": row.source,
                "runs": row.runs,
                "configurations": _configurations(row.runs, shared),
                "curves": [_curves(run, curves) for run in row.runs],
            }
        )
    drawn = {
        "Top-1 (%) against FLOPs": charts.tradeoff(rows, "flops"),
        "Top-1 (%) against parameters": charts.tradeoff(rows, "params"),
        **({"Training": charts.training(rows, list(curves))} if curves else {}),
    }
    return {
        "id": str(number),
        "name": name,
        "train": records[0].config.train,
        "rows": rows,
        "configuration": _yaml(shared),
        "dashes": {row_id: " ".join(map(str, dashes)) for row_id, dashes in charts.dashes(rows).items()},
        "charts": [
            {"id": f"{number}-{i}", "title": title, "spec": spec} for i, (title, spec) in enumerate(drawn.items())
        ],
    }


def _curves(run: Record, curves: Mapping[str, str]) -> dict[str, Any]:
    """A run's metrics, each a list over its epochs."""
    values = {key: [_finite(epoch.get(key), digits=4) for epoch in run.metrics] for key in curves}
    return {"seed": run.config.seed, "epoch": [epoch["epoch"] for epoch in run.metrics], **values}


def _finite(value: Any, digits: int = 6) -> float | None:
    """The number for JSON: so many digits, integers unchanged, None for NaN, infinity and None."""
    if value is None or not math.isfinite(value):
        return None
    return value if isinstance(value, int) else float(f"{value:.{digits}g}")


def _code(text: str) -> Markup:
    """Text as HTML, in which Markdown's `code` becomes <code>."""
    parts = enumerate(text.split("`"))
    return Markup().join(Markup("<code>{}</code>").format(part) if i % 2 else escape(part) for i, part in parts)


def _slug(text: str) -> str:
    """A verdict as a CSS class."""
    return re.sub(r"\W+", "-", text)


def _configurations(runs: Sequence[Record], shared: Mapping[str, Any]) -> dict[str, list[int]]:
    """What these runs' settings have beside the shared ones, as YAML, and the seeds of the runs that have it."""
    seeds: dict[str, list[int]] = {}
    for run in runs:
        if own := {key: value for key, value in _settings(run).items() if key not in shared}:
            seeds.setdefault(_yaml(own), []).append(run.config.seed)
    return seeds


def _settings(run: Record) -> dict[str, Any]:
    """A run's settings but for its seed, by dotted key as on the command line."""
    groups = {name: group for name, group in run.settings.items() if isinstance(group, Mapping)}
    return {f"{name}.{key}": value for name, group in groups.items() for key, value in group.items()}


def _shared(runs: Sequence[Record]) -> dict[str, Any]:
    """The settings that all runs have in common."""
    first, *others = map(_settings, runs)
    return {key: value for key, value in first.items() if all(key in o and o[key] == value for o in others)}


def _yaml(settings: Mapping[str, Any]) -> str:
    return yaml.safe_dump(settings, sort_keys=False, allow_unicode=True)


def _file(name: str) -> str:
    return (files("decef.results.report") / name).read_text(encoding="utf-8")
