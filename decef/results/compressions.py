"""results/compress: what several compressions of one network came to, side by side."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from decef.results.pages import write_measured

STEPS = ("converted", "recalibrated", "finetuned")
# what all must share to be comparable
SHARED = ("network", "engine", "input", "images", "test", "device", "machine", "threads")


def compressions(folders: Sequence[Path]) -> tuple[pd.DataFrame, dict[str, Any]]:
    """A row for each compression, and where, when and with which code the first was made.

    Args:
        folders: each with the `report.json` of a compression of the same network, for calls of the same size.

    Returns:
        `layer`, `budget`, the share of the dense network's that was `asked`, and what it was `planned` to
        come to, as measured then; over the dense network's: `time`, `flops`, `params`, `bytes`; top-1 in percent
        `dense`, `converted`, `recalibrated`, `finetuned`, where measured, after so many `epochs`; `layers`, how many
        became which type; the `commit` that it was made with.

    Raises:
        FileNotFoundError: a folder has no report.
        ValueError: they are of different networks, engines, inputs, images, devices, machines or threads.
    """
    found = {folder: _read(folder) for folder in folders}
    (first, reference), *others = found.items()
    for folder, numbers in others:
        for key in SHARED:
            one, other = ({"input": n["input"], **n["asked"], **n["made"]}[key] for n in (reference, numbers))
            if one != other:
                raise ValueError(f"{first} and {folder} can't be compared: they have {key} {one!r} and {other!r}")
    return pd.DataFrame([_row(numbers) for numbers in found.values()]), reference["made"]


def write_compressions(folders: Sequence[Path], out: Path, about: str) -> None:
    """Write them as <out>.csv and <out>.md; see `compressions` and `write_measured`."""
    frame, made = compressions(folders)
    written = ["planned", "time", "flops", "params", "bytes", "dense", *STEPS]
    shown = frame.assign(**{key: frame[key].map("{:.2f}".format, na_action="ignore") for key in written}).fillna("")
    write_measured("compressions", frame, shown, out, about, made)


def _read(folder: Path) -> dict[str, Any]:
    path = folder / "report.json"
    if not path.is_file():
        raise FileNotFoundError(f"there is no {path}: scripts/compress.py writes it when it is done")
    numbers: dict[str, Any] = json.loads(path.read_text())
    return numbers


def _row(numbers: dict[str, Any]) -> dict[str, Any]:
    asked, costs = numbers["asked"], numbers["costs"]
    types = Counter(row["layer"] if row["action"] == "convert" else "dense" for row in numbers["layers"])
    return {
        "layer": asked["layer"],
        "budget": asked["budget"],
        "asked": asked["reached"]["asked"],
        "planned": asked["reached"]["value"],
        "time": numbers["seconds"]["small"] / numbers["seconds"]["dense"],
        "flops": costs["small"]["flops"] / costs["dense"]["flops"],
        "params": costs["small"]["params"] / costs["dense"]["params"],
        "bytes": numbers["bytes"]["small"] / numbers["bytes"]["dense"],
        "dense": numbers["top1"].get("dense"),
        **{step: numbers["top1"].get(step) for step in STEPS},
        "epochs": asked["finetune"],
        "layers": ", ".join(f"{count} {name}" for name, count in sorted(types.items())),
        "commit": str(numbers["made"].get("git_commit"))[:10],
    }
