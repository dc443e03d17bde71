"""The table in README.md: what each layer type costs. Made from a results folder."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import pandas as pd

from decef.plans import layer_names
from decef.results.comparisons import comparison_groups
from decef.results.tables import Row, table_rows
from decef.training.config import DEFAULT_DECAY
from decef.training.record import Record

NETWORK, DATASET = "resnet20", "cifar10"
FROM_SCRATCH, FINETUNED = ("standard", "0.667 of FLOPs"), ("recover", "0.5 of FLOPs")  # schedule and budget
DECOMPOSED = "0.500"  # budget
TIMED = ("torchvision/resnet18", 1, "fp32")  # network, batch size and precision
NONE = "-"


def overview_table(records: Sequence[Record], results: Path) -> str:
    """The table in Markdown. A row per layer type: trained from scratch, decomposed, and time; a dash for no data."""
    groups = comparison_groups(records)
    trained, finetuned = _rows(groups, *FROM_SCRATCH), _rows(groups, *FINETUNED)
    decomposed, time = _decomposed(results), _time(results)
    rows = []
    for layer in layer_names():
        row, tuned = trained.get(layer), finetuned.get(layer)
        rows.append(
            {
                "layer": f"`{layer}`",
                "trained, 2/3 of the FLOPs: top-1 %": _mean(row),
                "n": _count(row),
                "parameters": _number(row.first.ratio("params") if row else None),
                "minus `conv2d`, paired": (row and row.difference_words) or NONE,
                "decomposed at 1/2: top-1 %": _number(decomposed.get(layer)),
                "and fine-tuned": _mean(tuned),
                "n ": _count(tuned),
                "time at 1/2, in ResNet-18": _number(time.get(layer)),
            }
        )
    align = ("left", "left", "right", "right", "left", "right", "left", "right", "right")
    return pd.DataFrame(rows).to_markdown(index=False, disable_numparse=True, colalign=align)


def _rows(groups: Mapping[str, Sequence[Record]], schedule: str, budget: str) -> dict[str, Row]:
    """By layer type, of its settings at this budget the one with most runs; the dense one has no budget.

    With the schedule of `FINETUNED` only runs of a trained network count, fitted to images where they are low-rank.
    """
    trained = schedule == FINETUNED[0]
    rows = table_rows(groups.get(f"{DATASET}-{schedule}", []))
    found: dict[str, Row] = {}
    for row in rows:
        first = row.first
        model, train = first.config.model, first.config.train
        begun = bool(first.weights) == trained and bool(model.decompose_on) == (trained and first.layer != "conv2d")
        usual = begun and train.atcd is None and train.decay in (None, DEFAULT_DECAY)
        if first.model == NETWORK and first.rank_setting in ("dense", budget) and usual:
            other = found.setdefault(first.layer, row)
            if len(row.runs) > len(other.runs):
                found[first.layer] = row
    return found


def _decomposed(results: Path) -> dict[str, float]:
    """By layer type: fitted to outputs, batch norm measured again."""
    path = results / "without_finetuning" / f"{NETWORK}.csv"
    if not path.is_file():
        return {}
    frame = pd.read_csv(path, dtype={"budget": str})
    best = frame[(frame.spread == "energy") & (frame.nearest == "outputs") & (frame.budget == DECOMPOSED)]
    found = {row["layer"]: float(row["recalibrated"]) for row in best.to_dict("records")}
    return {"conv2d": float(frame[frame.layer == "conv2d"].top1.iloc[0])} | found


def _time(results: Path) -> dict[str, float]:
    path = results / "bench" / "networks-cpu.json"
    if not path.is_file():
        return {}
    record = json.loads(path.read_text())
    if record["environment"].get("share", 0.5) != 0.5:  # it was always half before it was recorded
        return {}
    seconds = {
        row["layer"]: row["deployed"]
        for row in record["rows"]
        if (row["network"], row["batch"], row["precision"]) == TIMED
    }
    return {layer: value / seconds["conv2d"] for layer, value in seconds.items()}


def _mean(row: Row | None) -> str:
    return row.top1.words() if row else NONE


def _count(row: Row | None) -> str:
    return str(len(row.runs)) if row else NONE


def _number(value: float | None) -> str:
    return NONE if value is None else f"{value:.2f}"
