"""results/costs: parameters and MACs of every architecture, dense and with each layer type."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import pandas as pd
import torch

from decef.costs import total_cost
from decef.data import Dataset
from decef.files import replace_file, write_csv
from decef.results.pages import render
from decef.training.build import build
from decef.training.config import LayerConfig, ModelConfig


def cost_table(
    networks: Iterable[tuple[str, ModelConfig, Dataset]], layers: Sequence[str], flops: float
) -> Iterator[dict[str, object]]:
    """Parameters and MACs of networks with each layer type, within a share of the dense network's FLOPs.

    Args:
        networks: the label, the config and the dataset of each.
        layers: layer types.
        flops: the share.

    Yields:
        Rows with `network`, `layer`, `params`, `macs`, `params_ratio` and `macs_ratio` (to dense), and `note`. Where a
        layer type is not possible, numbers are None and `note` says why.
    """
    for label, model, data in networks:
        for layer in layers:
            asked = LayerConfig(layer) if layer == "conv2d" else LayerConfig(layer, flops=flops)
            row: dict[str, object] = {"network": label, "layer": layer}
            try:
                with torch.device("meta"):
                    network, _, dense = build(model, asked, data)
            except ValueError as error:
                nothing = dict.fromkeys(("params", "macs", "params_ratio", "macs_ratio"))
                yield {**row, **nothing, "note": str(error)}
                continue
            cost = total_cost(network, data.input_size)
            ratios = {f"{key}_ratio": cost[key] / dense[key] for key in ("params", "macs")}
            yield {**row, "params": cost["params"], "macs": cost["macs"], **ratios, "note": ""}


def write_costs(rows: Sequence[dict[str, object]], out: Path, flops: float) -> str:
    """Write rows of `cost_table` as <out>.csv, and as a page for people as <out>.md.

    Args:
        rows: of `cost_table`.
        out: path without ending.
        flops: the share that they were made with.

    Returns:
        The page's table, in Markdown.
    """
    frame = pd.DataFrame(rows)

    def cell(row: pd.Series) -> str:
        if pd.isna(row.macs):
            return "-"
        if row.layer == "conv2d":
            return f"{row.params / 1e6:.2f} M, {row.macs / 1e6:,.1f} M"
        return f"{row.params_ratio:.3f}, {row.macs_ratio:.3f}"

    cells = frame.assign(cell=frame.apply(cell, axis=1))
    pivot = cells.pivot_table(index="network", columns="layer", values="cell", aggfunc="first", sort=False)
    table = pivot.reset_index().to_markdown(index=False)
    notes = [
        f"{', '.join(group.network + ' ' + group.layer)}: {note}"
        for note, group in frame[frame.note != ""].groupby("note", sort=False)
    ]
    out.parent.mkdir(parents=True, exist_ok=True)
    write_csv(out.with_name(f"{out.name}.csv"), frame)
    replace_file(out.with_name(f"{out.name}.md"), render("costs", table=table, notes=notes, flops=flops).encode())
    return table
