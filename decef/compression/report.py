"""The page that says what a compression did, and what it measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from decef.compression.state import FILES
from decef.files import replace_file, write_json
from decef.results.pages import provenance, render

STEPS = {
    "dense": "dense",
    "converted": "converted",
    "recalibrated": "batch norm measured again",
    "finetuned": "fine-tuned",
}


def write_report(path: Path, numbers: Mapping[str, Any], *, own: bool) -> None:
    """Write the page as Markdown, and the numbers beside it as JSON.

    Args:
        path: of the page.
        numbers: see `Compressed.numbers`.
        own: whether the network is the user's own, which `decef.load` has to be given.
    """
    write_json(path.with_suffix(".json"), numbers)
    asked, top1 = numbers["asked"], numbers["top1"]
    steps = [f"{words} {top1[key]:.2f}" for key, words in STEPS.items() if key in top1]
    text = render(
        "compression",
        summary=summary(numbers),
        table=_table(numbers),
        steps=", ".join(steps),
        budget=asked["budget"],
        even=numbers["even"],
        reached=_reached(numbers),
        images=asked["images"],
        layers=_layers(numbers["layers"]),
        files=[(name, FILES[name], f"{size / 1e6:.2f} MB") for name, size in numbers["files"].items()],
        folder=path.parent,
        own=", model=YOUR_DENSE_NETWORK" if own else "",
        provenance=provenance(numbers["made"], f"{numbers['made']['threads']} threads", asked["engine"]),
    )
    replace_file(path, text.encode())


def summary(numbers: Mapping[str, Any]) -> str:
    """What came out, in a sentence."""
    costs, seconds, top1 = numbers["costs"], numbers["seconds"], numbers["top1"]
    share = {key: costs["small"][key] / costs["dense"][key] for key in ("params", "flops")}
    converted = [row for row in numbers["layers"] if row["action"] == "convert"]
    said = (
        f"{len(converted)} of {len(numbers['layers'])} convolutions became low-rank layers. The network has "
        f"{share['params']:.2f} of the parameters and {share['flops']:.2f} of the FLOPs, and "
    )
    if converted and all(row["form"] == "reconstructed" for row in converted):
        said += "is no faster: all of them run as dense convolutions here, which nothing beat"
    else:
        said += f"takes {seconds['small'] / seconds['dense']:.2f} of the time"
    if top1:
        last = list(top1.values())[-1]
        said += f"; its top-1 is {last:.2f} %, the dense network's {top1['dense']:.2f} % ({last - top1['dense']:+.2f})"
    return f"{said}."


def _table(numbers: Mapping[str, Any]) -> list[tuple[str, str, str, str]]:
    costs: Mapping[str, Mapping[str, float]] = numbers["costs"]
    batch, *size = numbers["input"]
    rows = [
        ("parameters", {side: cost["params"] for side, cost in costs.items()}, 1, ",.0f"),
        ("FLOPs", {side: cost["flops"] for side, cost in costs.items()}, 1, ",.0f"),
        (f"ms, {batch} x {' x '.join(map(str, size))}", numbers["seconds"], 1e-3, ".3g"),
        ("weights, as low-rank chains, MB", numbers["bytes"], 1e6, ".3g"),
        ("weights and intermediate results at their peak, as low-rank chains, MB", numbers["memory"], 1e6, ".3g"),
    ]
    return [
        (name, f"{of['dense'] / unit:{how}}", f"{of['small'] / unit:{how}}", f"{of['small'] / of['dense']:.2f}")
        for name, of, unit, how in rows
    ]


def _reached(numbers: Mapping[str, Any]) -> str:
    reached, seconds = numbers["asked"]["reached"], numbers["seconds"]
    said = f"a share of {reached['asked']:.3g}, and the plan came to {reached['value']:.3g} when it was made"
    if numbers["edited"]:
        said += "; then it was edited by hand"
    if numbers["timed"]:
        said += f"; when the network was ready, it came to {seconds['small'] / seconds['dense']:.3g}"
    return said


def _layers(rows: Sequence[Mapping[str, Any]]) -> str:
    columns = ["name", "layer", "rank", "of", "error", "form", "MACs", "over dense", "why it is kept"]
    shown = []
    for row in rows:
        converted = row["action"] == "convert"
        macs = row["macs_after"] if converted else row["macs_before"]
        shown.append(
            [
                f"`{row['name']}`",
                row["layer"] if converted else "dense",
                row["rank"] if converted else "",
                row["max_rank"] if converted else "",
                f"{row['error']:.3f}" if row["error"] is not None else "",
                row["form"],
                f"{macs:,}" if macs is not None else "",
                f"{row['macs_after'] / row['macs_before']:.2f}" if converted and row["macs_before"] else "",
                row["reason"],
            ]
        )
    return pd.DataFrame(shown, columns=columns).to_markdown(index=False, disable_numparse=True)
