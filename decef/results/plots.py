"""Figures as PNG and SVG, readable at column width and without colour.

Each `plot_*` takes data and returns a figure; `save` writes it. `decef.results.figures` draws all figures of a folder.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import wraps
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from decef.results.eigenfilters import EigenFilters
from decef.results.look import look_of

LINES: Sequence[Any] = ("-", "--", "-.", ":", (0, (6, 2, 1, 2, 1, 2)), (0, (1, 3)))
FILLS = ("full", "none", "top", "left", "bottom", "right")

STYLE: dict[Any, Any] = {
    "font.size": 8,
    "axes.labelsize": 8,
    "axes.titlesize": 8,
    "legend.fontsize": 7,
    "xtick.labelsize": 7,
    "ytick.labelsize": 7,
    "axes.linewidth": 0.7,
    "xtick.major.width": 0.7,
    "ytick.major.width": 0.7,
    "lines.linewidth": 1.1,
    "lines.markersize": 4.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.linewidth": 0.5,
    "grid.alpha": 0.3,
    "legend.frameon": False,
    "svg.hashsalt": "decef",  # equal figures give equal files
}
WIDTH = 4.5  # inches
NEAR = 5  # points of accuracy below the dense network's, right after decomposition
NEAR_DEPLOYED = 3  # likewise, of networks that are deployed


def _styled(plot: Callable[..., Figure]) -> Callable[..., Figure]:
    @wraps(plot)
    def in_style(*args: Any, **kwargs: Any) -> Figure:
        with mpl.rc_context({**mpl.rcParamsDefault, "backend": mpl.get_backend(), **STYLE}):
            return plot(*args, **kwargs)

    return in_style


@_styled
def plot_tradeoff(frame: pd.DataFrame) -> Figure:
    """Top-1 against FLOPs and against parameters, with 95 % intervals and the Pareto front.

    Args:
        frame: rows of `decef.results.tables.summarize`, of one network.
    """
    figure = Figure(figsize=(WIDTH, 2.5), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    curves = list(_looks(frame))
    for panel, (cost, label) in zip(
        axes, (("flops", "MFLOPs per image"), ("params", "parameters / million")), strict=True
    ):
        front = pareto(frame, cost)
        panel.step(
            front[cost] / 1e6, front.top1, where="post", color="0.6", linewidth=1, zorder=1, label="Pareto front"
        )
        for row, text, look in curves:
            interval = None if row.n < 2 else [[row.top1 - row.top1_low], [row.top1_high - row.top1]]
            bars = panel.errorbar(
                [row[cost] / 1e6], [row.top1], yerr=interval, capsize=2, elinewidth=0.9, label=text,
                **{**look, "linestyle": "none", "markersize": 6},
            )  # fmt: skip
            for cap in bars.lines[1]:
                cap.set_markeredgecolor(look["color"])
        panel.set_xlabel(label)
        panel.margins(0.12)
        panel.xaxis.set_major_locator(MaxNLocator(4))
    axes[0].set_ylabel("test top-1 / %")
    _legend_below(figure, *axes[0].get_legend_handles_labels())
    return figure


def pareto(frame: pd.DataFrame, cost: str) -> pd.DataFrame:
    """The Pareto front: rows that no other beats in one and equals in the other; of rows equal in both, the first."""
    ordered = frame.sort_values([cost, "top1"], ascending=[True, False])
    return ordered[ordered.top1 > ordered.top1.cummax().shift(fill_value=-np.inf)]


@_styled
def plot_without_finetuning(frame: pd.DataFrame) -> Figure:
    """Top-1 right after decomposition against the share of FLOPs; on the right only what is near the dense network.

    Args:
        frame: rows of `without_finetuning`; besides the dense one, those with spread "energy" are drawn.
    """
    figure = Figure(figsize=(WIDTH, 2.8), layout="constrained")
    axes, near = figure.subplots(1, 2)
    dense = frame[frame.layer == "conv2d"].iloc[0]
    for both in (axes, near):
        both.axhline(dense.top1, color="0.6", linewidth=1, zorder=1)
        both.plot([1], [dense.top1], label="conv2d (dense)", **{**_look("conv2d"), "linestyle": "none"})
        both.set_xlabel("FLOPs, share of dense")
    by_energy = frame[frame.spread == "energy"]
    named: set[str] = set()
    for nearest, column, variant in (("outputs", "recalibrated", 0), ("kernels", "top1", 1)):
        for layer, rows in by_energy[by_energy.nearest == nearest].groupby("layer", sort=False):
            rows = rows.sort_values("flops_ratio")
            label = f"_{layer}, {nearest}" if str(layer) in named else str(layer)
            named.add(str(layer))
            for both in (axes, near):
                both.plot(rows.flops_ratio, rows[column], label=label, **_look(str(layer), variant))
    near.set_ylim(dense.top1 - NEAR, dense.top1 + NEAR / 10)
    axes.set_ylabel("test top-1 / %, no fine-tuning")
    axes.set_ylim(bottom=0)
    handles, labels = axes.get_legend_handles_labels()
    for label, variant in (("outputs, batch norm again", 0), ("kernels", 1)):
        handles.append(Line2D([], [], **{**_look("conv2d", variant), "color": "0.5", "marker": "o"}))
        labels.append(label)
    _legend_below(figure, handles, labels)
    return figure


@_styled
def plot_frontier(frame: pd.DataFrame) -> Figure:
    """Top-1 against measured time, a panel per stage, a line per layer type and precision; the dense network in all.

    A grey line joins the networks that no other is both faster and more accurate than.

    Args:
        frame: rows of `decef.results.frontier.measure`. What is more than `NEAR_DEPLOYED` points below the dense
            network is left out.
    """
    stages = [stage for stage in frame.stage.unique() if stage]  # the dense network has none
    figure = Figure(figsize=(WIDTH, 3.2), layout="constrained")
    panels = np.atleast_1d(figure.subplots(1, len(stages), sharex=True, sharey=True))
    precisions = list(frame.precision.unique())
    for panel, stage in zip(panels, stages, strict=True):
        shown = frame[frame.stage.isin(["", stage])]
        front = pareto(shown, "time")
        panel.step(front.time, front.top1, where="post", label="front", color="0.75", linewidth=3, zorder=1)
        for (layer, precision), rows in shown.groupby(["layer", "precision"], sort=False):
            look = _look(str(layer), precisions.index(precision))
            if layer == "conv2d":  # fine-tuned or not: no line of budgets
                look["linestyle"] = "none"
            panel.plot(rows.time, rows.top1, label=f"{layer}, {precision}", markersize=4.5, **look)
        panel.set_xscale("log")
        panel.xaxis.set_major_formatter("{x:g}")
        panel.xaxis.set_minor_formatter("{x:.1g}")
        panel.set_xlabel("time, share of dense in fp32")
        panel.set_title(stage)
    panels[0].set_ylabel("test top-1 / %")
    top = frame[frame.layer == "conv2d"].top1.max()
    panels[0].set_ylim(top - NEAR_DEPLOYED, top + NEAR_DEPLOYED / 10)
    layers = list(dict.fromkeys(frame.layer))
    looks = [_look(layer) | {"linestyle": "none"} for layer in layers]
    looks += [{**_look("conv2d", variant), "color": "0.5", "marker": "o"} for variant in range(len(precisions))]
    handles = [Line2D([], [], **look) for look in looks]
    _legend_below(figure, handles, [*layers, *precisions])
    return figure


@_styled
def plot_ranks(tables: Mapping[str, pd.DataFrame], threshold: float) -> Figure:
    """Effective rank ("threshold") against depth, a line per network, beside random kernels of the same shapes.

    Args:
        tables: frames of `rank_table` by label, of networks of one architecture. If there are more than eight, eight
            evenly spaced ones are drawn.
        threshold: the one that they were made with, for the axis label.
    """
    figure = Figure(figsize=(WIDTH, 2.6), layout="constrained")
    axes = figure.add_subplot()
    shown = [list(tables)[i] for i in np.unique(np.linspace(0, len(tables) - 1, 8).round().astype(int))]
    first = tables[shown[0]]
    depth = range(1, len(first) + 1)
    axes.plot(depth, first["threshold_init"], linestyle="--", color="0.5", label="random kernels of the same shapes")
    for i, label in enumerate(shown):
        color = mpl.colormaps["viridis"](i / max(1, len(shown) - 1) * 0.9)
        axes.plot(depth, tables[label]["threshold"], marker="o", markersize=3, color=color, label=label)
    axes.set_xlabel("convolution, from input to output")
    axes.set_ylabel(f"effective rank (≥ {threshold:g} of largest)")
    axes.set_ylim(bottom=0)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    _legend_below(figure, *axes.get_legend_handles_labels())
    return figure


@_styled
def plot_ranks_by_network(tables: Mapping[str, Mapping[str, pd.DataFrame]]) -> Figure:
    """Effective rank ("threshold") and its ratio to a random kernel's against depth: a line per architecture.

    Args:
        tables: frames of `rank_table` by architecture and name. A line is the mean over networks, its band goes from
            the least to the greatest.
    """
    figure = Figure(figsize=(WIDTH, 2.8), layout="constrained")
    panels = figure.subplots(1, 2, sharex=True)
    for i, (network, found) in enumerate(tables.items()):
        color = mpl.colormaps["viridis"](i / max(1, len(tables) - 1) * 0.9)
        label = f"{network}, n = {len(found)}"
        for axes, over_random in zip(panels, (False, True), strict=True):
            values = np.array([t.threshold / (t.threshold_init if over_random else 1) for t in found.values()])
            depth = np.linspace(0, 1, values.shape[1])
            axes.plot(depth, values.mean(0), color=color, linestyle=LINES[i % len(LINES)], label=label)
            axes.fill_between(depth, values.min(0), values.max(0), color=color, alpha=0.2, linewidth=0)
    for axes, title in zip(panels, ("effective rank", "over that of a random kernel"), strict=True):
        axes.set_ylim(bottom=0)
        axes.set_title(title)
        axes.set_xlabel("depth, from input to output")
    _legend_below(figure, *panels[0].get_legend_handles_labels())
    return figure


@_styled
def plot_ranks_in_training(frame: pd.DataFrame, threshold: float) -> Figure:
    """Effective rank ("threshold") against the epoch, a line per convolution, dark near the input, and their mean.

    Args:
        frame: rows of `rank_table`, with columns `epoch` and `run`. Lines are means over runs; the band goes from the
            run with the least mean over convolutions to that with the greatest.
        threshold: the one that they were made with, for the axis label.
    """
    figure = Figure(figsize=(WIDTH, 2.6), layout="constrained")
    axes = figure.add_subplot()
    names = list(dict.fromkeys(frame["name"]))
    for i, name in enumerate(names):
        line = frame[frame["name"] == name].groupby("epoch").threshold.mean()
        color = mpl.colormaps["viridis"](i / max(1, len(names) - 1) * 0.95)
        axes.plot(line.index, line, color=color, linewidth=0.7, label=f"_{name}")
    means = frame.groupby(["epoch", "run"]).threshold.mean().unstack()
    axes.fill_between(means.index, means.min(axis=1), means.max(axis=1), color="black", alpha=0.2, linewidth=0)
    axes.plot(means.index, means.mean(axis=1), color="black", linewidth=2, marker="o", label="mean over convolutions")
    scale = mpl.cm.ScalarMappable(mpl.colors.Normalize(1, max(2, len(names))), _truncated("viridis", 0.95))
    figure.colorbar(scale, ax=axes, label="convolution, from input to output").outline.set_visible(False)
    axes.set_xlabel("epoch")
    axes.set_ylabel(f"effective rank (≥ {threshold:g} of largest)")
    axes.set_ylim(bottom=0)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend()
    return figure


@_styled
def plot_training(frame: pd.DataFrame) -> Figure:
    """Training loss and test top-1 against the epoch: mean over seeds, and a band from the least to the greatest.

    Args:
        frame: a row per epoch and run, of one network, with `layer`, `setting`, `seed`, `epoch`, `train_loss` and
            `test_top1`.
    """
    figure = Figure(figsize=(WIDTH, 2.7), layout="constrained")
    axes = figure.subplots(1, 2, gridspec_kw={"wspace": 0.08})
    runs = frame.groupby(["layer", "setting"], sort=False).agg(n=("seed", "nunique")).reset_index()
    for i, (row, text, look) in enumerate(_looks(runs)):
        rows = frame[(frame.layer == row.layer) & (frame.setting == row.setting)]
        for panel, column in zip(axes, ("train_loss", "test_top1"), strict=True):
            over_seeds = rows.groupby("epoch")[column]
            mean = over_seeds.mean()
            every = max(1, len(mean) // 5)
            panel.plot(mean.index, mean, label=text, markevery=(i % every, every), **{**look, "linewidth": 1})
            if row.n > 1:
                panel.fill_between(
                    mean.index, over_seeds.min(), over_seeds.max(), color=look["color"], alpha=0.2, linewidth=0
                )
    for panel, label in zip(axes, ("training loss", "test top-1 / %"), strict=True):
        panel.set_xlabel("epoch")
        panel.set_ylabel(label)
        panel.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
        panel.set_ylim(bottom=0)
    _legend_below(figure, *axes[0].get_legend_handles_labels())
    return figure


@_styled
def plot_eigenfilters(found: EigenFilters) -> Figure:
    """Eigen-filters as images, a row per input channel, with their singular values (see `eigenfilters`)."""
    rows, columns = len(found.channels), len(found.values[0])
    figure = Figure(figsize=(WIDTH, 3.7 / columns * rows * 1.33 + 0.3), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False)
    for channel, filters, values, panels in zip(found.channels, found.filters, found.values, grid, strict=True):
        for panel, image, value in zip(panels, filters, values, strict=True):
            shown = panel.imshow(image, cmap="PuOr_r", vmin=-1, vmax=1)
            panel.set(xticks=[], yticks=[])
            panel.grid(visible=False)
            panel.spines[:].set(visible=True, color="0.6", linewidth=0.5)
            panel.set_title(f"{value:.2f}", fontsize=6, pad=2)
        panels[0].set_ylabel(f"{channel}", rotation=0, ha="right", va="center")
    figure.supylabel("input channel", fontsize=8)
    figure.supxlabel("eigen-filter, with its singular value above", fontsize=8)
    bar = figure.colorbar(shown, ax=grid, shrink=0.5, pad=0.02, ticks=[-1, 0, 1])
    bar.outline.set_visible(False)
    return figure


@_styled
def plot_significance(layers: Mapping[str, Sequence[float]]) -> Figure:
    """Sorted significance of CP components, a line per layer, dark near the input.

    Args:
        layers: values by layer in the network's order, largest first (`decef.results.eigenfilters.significance`).
    """
    figure = Figure(figsize=(WIDTH, 2.6), layout="constrained")
    axes = figure.add_subplot()
    for i, (name, values) in enumerate(layers.items()):
        share = (np.arange(len(values)) + 1) / len(values)
        color = mpl.colormaps["viridis"](i / max(1, len(layers) - 1) * 0.95)
        axes.plot(share, np.array(values) / values[0], color=color, linewidth=0.9, label=f"_{name}")
    scale = mpl.cm.ScalarMappable(mpl.colors.Normalize(1, max(2, len(layers))), _truncated("viridis", 0.95))
    figure.colorbar(scale, ax=axes, label="CPAC layer, from input to output").outline.set_visible(False)
    axes.set_xlabel("share of the layer's components, most significant first")
    axes.set_ylabel("significance / largest")
    axes.set_ylim(0, 1.02)
    axes.set_xlim(0, 1)
    return figure


@_styled
def plot_costs(plans: Mapping[str, pd.DataFrame]) -> Figure:
    """MACs of every convolution, a panel per layer type: grey bars are dense, coloured ones in front are factorised.

    Args:
        plans: `Plan.to_frame()` by layer type, all of one network and made with its input size.
    """
    figure = Figure(figsize=(WIDTH, max(2, 0.7 + 0.8 * len(plans))), layout="constrained")
    panels = figure.subplots(len(plans), sharex=True, sharey=True, squeeze=False)[:, 0]
    for panel, (layer, frame) in zip(panels, plans.items(), strict=True):
        x = np.arange(1, len(frame) + 1)
        before, after = (frame[key].astype(float) / 1e6 for key in ("macs_before", "macs_after"))
        panel.bar(x, before, width=0.85, color="0.82", label="dense")
        panel.bar(x, after, width=0.5, color=look_of(layer).color, label=layer)
        panel.set_title(f"{layer}: {after.sum() / before.sum():.3f} of the dense convolutions' MACs", loc="left", pad=3)
        panel.grid(visible=False, axis="x")
    panels[-1].set_xlabel("convolution, from input to output")
    panels[-1].set_xlim(0.3, len(frame) + 0.7)
    panels[-1].xaxis.set_major_locator(MaxNLocator(integer=True))
    figure.supylabel("million MACs per image", fontsize=8)
    return figure


def save(figure: Figure, out: Path) -> None:
    """Write <out>.png and <out>.svg. Equal figures give equal bytes."""
    with mpl.rc_context(STYLE):
        figure.savefig(f"{out}.png", dpi=200, metadata={"Software": None})
        figure.savefig(f"{out}.svg", metadata={"Date": None})


def _look(layer: str, variant: int = 0) -> dict[str, Any]:
    """How a layer type's points and lines look. Settings of one type differ in line style and marker filling."""
    color, marker = look_of(layer).color, look_of(layer).marker
    return {
        "color": color,
        "marker": marker,
        "linestyle": LINES[variant % len(LINES)],
        "fillstyle": FILLS[(variant + variant // len(LINES)) % len(FILLS)],  # another with each round of lines
        "markerfacecoloralt": "white",
        "markeredgecolor": color if variant else "white",  # so that overlapping points can be told apart
        "markeredgewidth": 0.9 if variant else 0.5,
    }


def _looks(frame: pd.DataFrame) -> Iterator[tuple[Any, str, dict[str, Any]]]:
    """Rows that have `layer`, `setting` and `n`, each with a legend text and a look.

    The text leaves out what all settings of the layer type share.
    """
    for layer, rows in frame.groupby("layer", sort=False):
        settings = [setting.split(", ") for setting in rows.setting]
        for variant, ((_, row), words) in enumerate(zip(rows.iterrows(), settings, strict=True)):
            special = [word for word in words if not all(word in other for other in settings)]
            yield row, f"{', '.join([str(layer), *special])} (n={row.n})", _look(str(layer), variant)


def _legend_below(figure: Figure, handles: Sequence[Any], labels: Sequence[str]) -> None:
    longest = 0.5 + 0.05 * max(map(len, labels))  # inches
    columns = min(4, len(labels), max(1, int(figure.get_figwidth() / longest)))
    rows = -(-len(labels) // columns)
    figure.set_figheight(figure.get_figheight() + 0.15 * (rows - 2))
    figure.legend(handles, labels, loc="outside lower center", ncols=columns, handlelength=2.6, columnspacing=1.2)


def _truncated(name: str, end: float) -> mpl.colors.Colormap:
    return mpl.colors.ListedColormap(mpl.colormaps[name](np.linspace(0, end, 256)))
