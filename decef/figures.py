"""Figures: readable at column width, told apart without colour, as PNG and SVG."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib as mpl
import pandas as pd
from matplotlib.figure import Figure

STYLE: dict[Any, Any] = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.3,
    "legend.frameon": False,
    "svg.hashsalt": "decef",  # equal figures are equal files
}


def plot_ranks(tables: Mapping[str, pd.DataFrame], threshold: float, out: Path) -> None:
    """Effective rank ("threshold") against depth, a line a network, beside random kernels of the same shapes.

    Args:
        tables: `rank_table`'s frames by label, of networks of one architecture.
        threshold: with which they were made, for the axis.
        out: path without ending; .png and .svg are written.
    """
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(4.5, 3), layout="constrained")
        axes = figure.add_subplot()
        colors = mpl.colormaps["viridis"]
        for i, (label, table) in enumerate(tables.items()):
            depth = range(1, len(table) + 1)
            color = colors(i / max(1, len(tables) - 1) * 0.9)
            axes.plot(depth, table["threshold"], marker="o", markersize=3, color=color, label=label)
        first = next(iter(tables.values()))
        axes.plot(
            range(1, len(first) + 1), first["threshold_init"], linestyle="--", color="0.5", label="random, same shape"
        )
        axes.set_xlabel("convolution, from input to output")
        axes.set_ylabel(f"effective rank (values ≥ {threshold:g} of largest)")
        axes.set_ylim(bottom=0)
        axes.legend(fontsize=7, ncols=1 + len(tables) // 8)
        save(figure, out)


def save(figure: Figure, out: Path) -> None:
    """Write `out`.png and `out`.svg, the same bytes for the same figure."""
    figure.savefig(out.with_suffix(".png"), dpi=200, metadata={"Software": None})
    figure.savefig(out.with_suffix(".svg"), metadata={"Date": None})
