"""The page's charts as Vega-Lite specifications, complete with their data, and the script that draws them.

A filter changes only a chart's parameters. `shown` has the ids of the rows to draw; in training charts, `metric` and
`seeds` choose what to draw of them. All else follows within the chart, so charts can be tested without a page. Colours
are the page's CSS variables, which dark mode changes, with the light values as fallbacks.
"""

from __future__ import annotations

import base64
import gzip
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from typing import Any

import vl_convert

from decef.plans import layer_names
from decef.results.look import look_of

Spec = dict[str, Any]

MUTED, RULE, PAPER = "var(--muted, #5c6670)", "var(--rule, #dfe3e7)", "var(--paper, #fff)"
DASHES: Sequence[Sequence[int]] = (
    [1, 0], [7, 4], [2, 3], [9, 3, 2, 3], [9, 3, 2, 3, 2, 3], [4, 2], [12, 3], [1, 5], [6, 2, 1, 2], [10, 6],
    [3, 1, 1, 1], [14, 3, 5, 3], [5, 5, 1, 5], [2, 6],
)  # fmt: skip
COSTS = {"flops": "FLOPs", "params": "parameters"}
LOGARITHMIC = 8  # if the greatest cost is more than this times the least, the axis is logarithmic
ROOM = 1.04  # the axis extends beyond the extreme costs by this factor, so that nearly equal costs look nearly equal
COLUMN = 0.05  # share of the axis: points nearer than this form a column, in which they may overlap
STEP, ASIDE = 12, 30  # pixels from one point of a column to the next, and at most from the middle
SHOWN = "indexof(shown, datum.row) >= 0"


@cache
def script() -> str:
    """Vega-Embed with all that it needs, which defines `vegaEmbed`: as base64 of gzip, as it is most of the page."""
    bundle = vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;")
    return base64.b64encode(gzip.compress(bundle.encode(), mtime=0)).decode()


def color(layer: str) -> str:
    """A layer type's colour, for CSS."""
    return f"var(--{layer}, {look_of(layer).color})"


def dashes(rows: Iterable[Mapping[str, Any]]) -> dict[str, Sequence[int]]:
    """How each row's line is dashed, by row id. Rows of one layer type share a colour, so they differ in their dashes.

    The dashes depend on a row's place among all rows of its layer type, so a filter doesn't change them.
    """
    seen: Counter[str] = Counter()
    found = {}
    for row in rows:
        found[row["id"]] = DASHES[seen[row["layer"]] % len(DASHES)]
        seen[row["layer"]] += 1
    return found


def tradeoff(rows: Sequence[Mapping[str, Any]], cost: str) -> Spec:
    """Top-1 against a cost, with 95 % intervals and the Pareto front.

    Args:
        rows: with `id`, `layer`, `name`, and `numbers` and `cells` from `to_dict` and `cells` of
            `decef.results.tables.Row`.
        cost: "flops" or "params".
    """
    points = [_point(row, cost) for row in rows if row["numbers"]["top1"] is not None and row["numbers"][cost]]
    costs = [point["cost"] for point in points]
    logarithmic = bool(costs) and max(costs) > LOGARITHMIC * min(costs)
    title = f"{COSTS[cost]}, logarithmic" if logarithmic else COSTS[cost]
    axis = {"format": ".4~s", "grid": False, "labelFlush": False, "tickCount": {"expr": "width / 70"}}
    x = _quantity("cost", title, axis, nice=False, padding=20, **({"type": "log"} if logarithmic else {"zero": False}))
    y = {
        end: _quantity(end, None, {"tickCount": 5}, zero=False, nice=False, padding=10)
        for end in ("top1", "bottom", "top")
    }
    moved = {"xOffset": {"expr": "datum.aside"}, "opacity": 1}
    cap = {"type": "tick", "orient": "horizontal", "size": 7, "thickness": 1.5, "aria": False, **moved}
    point = {
        "type": "point",
        "size": 80,
        "filled": True,
        "stroke": PAPER,
        "strokeWidth": 1,
        "cursor": "pointer",
        **moved,
    }
    measured = {"filter": "isValid(datum.low)"}
    by_cost = [_by("cost"), _by("top1", "descending")]
    front = [
        _window("max", "top1", "best", by_cost),
        _window("lag", "best", "cheaper", by_cost),
        {"filter": "!isValid(datum.cheaper) || datum.top1 > datum.cheaper"},
    ]
    last = {"aggregate": [{"op": "max", "field": name, "as": name} for name in ("cost", "top1")]}
    thin, grey = {"strokeDash": [4, 4], "strokeWidth": 1.25, "aria": False}, {"value": MUTED}
    told = {"name": "title", "result": "top-1", "difference": "against Conv2d", "costs": "costs"}
    layers = [
        # Invisible, but makes room on the axis.
        _layer("room", {"type": "rule", "opacity": 0, "aria": False}, x={**x, "field": "near"}, x2={"field": "far"}),
        _layer("front", {"type": "line", "interpolate": "step-after", **thin}, *front, y=y["top1"], color=grey),
        _layer("beyond", {"type": "rule", **thin}, *front, last, y=y["top1"], x2={"value": "width"}, color=grey),
        _layer(
            "intervals",
            {"type": "rule", "strokeWidth": 1.5, "aria": False, **moved},
            measured,
            y=y["bottom"],
            y2={"field": "top"},
        ),
        *(_layer(f"caps_{end}", cap, measured, y=y[end]) for end in ("bottom", "top")),
        _layer(
            "points",
            point,
            y=y["top1"],
            shape=_scale("layer", {name: look_of(name).path for name in layer_names()}),
            description={"field": "label"},
            tooltip=[{"field": field, "title": title} for field, title in told.items()],
        ),
    ]
    return _chart(
        f"Top-1 against {title}",
        {"shown": [row["id"] for row in rows]},
        points,
        _nothing(SHOWN, "nothing to draw"),
        {
            "transform": [{"filter": SHOWN}, *_aside(logarithmic)],
            "encoding": {"x": x, "color": _scale("layer", {name: color(name) for name in layer_names()})},
            "layer": layers,
        },
    )


def training(rows: Sequence[Mapping[str, Any]], metrics: Sequence[str]) -> Spec:
    """A metric against the epoch. Each row is the mean over its seeds with a band over their range, or a line per seed.

    Args:
        rows: with `id`, `layer`, `name`, and `curves`: for every run its `seed`, and lists `epoch` and one per metric.
        metrics: their names; the first is drawn at the start.
    """
    runs = [
        {"row": row["id"], "layer": row["layer"], "name": row["name"], **run} for row in rows for run in row["curves"]
    ]
    ticks = max([len(run["epoch"]) for run in runs], default=1) - 1  # more ticks would fall between epochs
    axis = {"format": "d", "grid": False, "tickCount": {"expr": f"min(width / 60, {max(1, ticks)})"}}
    x = _quantity("epoch", "epoch", axis, zero=False, nice=False, padding=4)
    y = {end: _quantity(end, None, {"tickCount": 5}, zero=False, nice=True) for end in ("value", "low")}
    operations = {"value": "mean", "low": "min", "high": "max"}
    transform = [
        {"filter": SHOWN},
        {"flatten": ["epoch", *metrics]},
        _calculate("value", "datum[metric]"),
        {"filter": "isValid(datum.value)"},
        _calculate("line", "seeds == 'lines' ? datum.seed : ''"),
        {
            "aggregate": [
                *({"op": operation, "field": "value", "as": name} for name, operation in operations.items()),
                {"op": "count", "as": "n"},
                {"op": "min", "field": "seed", "as": "seed"},
            ],
            "groupby": ["row", "layer", "name", "line", "epoch"],
        },
        _calculate("of", "datum.n > 1 ? 'mean of ' + datum.n + ' seeds' : 'seed ' + datum.seed"),
        _calculate("label", "datum.name + ', ' + datum.of"),
        _calculate("range", "' (' + format(datum.low, '.4~g') + ' to ' + format(datum.high, '.4~g') + ')'"),
        _calculate("text", "format(datum.value, '.4~g') + (datum.n > 1 ? datum.range : '')"),
        _calculate("told", "{title: datum.name, of: datum.of, epoch: datum.epoch, value: datum.text}"),
    ]
    layers = [
        _layer(
            "bands",
            {"type": "area", "opacity": 0.14, "aria": False},
            {"filter": "datum.n > 1"},
            y=y["low"],
            y2={"field": "high"},
        ),
        _layer(
            "lines",
            {"type": "line", "strokeWidth": 1.75, "strokeJoin": "round"},
            y=y["value"],
            strokeDash=_scale("row", dashes(rows)),
            description={"field": "label"},
        ),
        # Only the spot nearest to the pointer is visible. The pointer hits a cell around the spot, and that cell's
        # datum is the spot. In Vega-Lite 6.4 a tooltip by fields doesn't look inside it, so an expression does.
        {
            **_layer(
                "spots",
                {"type": "point", "size": 60, "filled": True, "stroke": PAPER, "strokeWidth": 1.5, "aria": False},
                y=y["value"],
                opacity={"condition": {"param": "near", "empty": False, "value": 1}, "value": 0},
                tooltip={"value": {"expr": "(datum.datum || datum).told"}},
            ),
            "params": [
                {
                    "name": "near",
                    "select": {"type": "point", "nearest": True, "on": "pointermove", "clear": "pointerout"},
                }
            ],
        },
    ]
    return _chart(
        "Training",
        {"shown": [row["id"] for row in rows], "metric": metrics[0], "seeds": "band"},
        runs,
        _nothing(f"{SHOWN} && isValid(extent(datum[metric])[0])", "no such metric was recorded"),
        {
            "transform": transform,
            "encoding": {
                "x": x,
                "color": _scale("layer", {name: color(name) for name in layer_names()}),
                "detail": [{"field": "row"}, {"field": "line"}],
            },
            "layer": layers,
        },
    )


def _point(row: Mapping[str, Any], cost: str) -> dict[str, Any]:
    """A row's data for a chart: numbers to draw and words to show."""
    numbers, cells = row["numbers"], row["cells"]
    words = {
        "result": f"{cells['top-1 %']} % {cells['95 % interval']}".strip() + f", n = {cells['n']}",
        "difference": cells["vs Conv2d"] or "-",
        "costs": f"{cells['params']} parameters, {cells['MFLOPs']} MFLOPs",
    }
    return {
        "row": row["id"],
        "layer": row["layer"],
        "name": row["name"],
        "cost": numbers[cost],
        "top1": numbers["top1"],
        "low": numbers["top1_low"],
        "high": numbers["top1_high"],
        **words,
        "label": "{}; top-1 {result}; against Conv2d {difference}; {costs}".format(row["name"], **words),
    }


def _aside(logarithmic: bool) -> list[Spec]:
    """Transforms that move points aside which would lie on a better one, to its right and its left in turn."""
    distance = "log(datum.{1} / datum.{0})" if logarithmic else "(datum.{1} - datum.{0})"
    gap, axis = distance.format("before", "cost"), distance.format("least", "most")
    best_first = [_by("top1", "descending"), _by("row")]
    heap = ["column", "heap"]
    return [
        _calculate("bottom", "isValid(datum.low) ? max(0, datum.low) : datum.top1"),
        _calculate("top", "isValid(datum.high) ? min(100, datum.high) : datum.top1"),
        _calculate("near", f"datum.cost / {ROOM}"),
        _calculate("far", f"datum.cost * {ROOM}"),
        {"joinaggregate": [{"op": "min", "field": "near", "as": "least"}, {"op": "max", "field": "far", "as": "most"}]},
        # A column begins at a cost that is far enough from the next smaller one.
        _window("lag", "cost", "before", [_by("cost")]),
        _calculate("begins", f"isValid(datum.before) && {gap} > {COLUMN} * {axis} ? 1 : 0"),
        _window("sum", "begins", "column", [_by("cost")]),
        # Within a column, a heap begins at a point whose interval lies wholly below those of all better points.
        _window("min", "bottom", "floor", best_first, ["column"]),
        _window("lag", "floor", "better", best_first, ["column"]),
        _calculate("free", "isValid(datum.better) && datum.top < datum.better ? 1 : 0"),
        _window("sum", "free", "heap", best_first, ["column"]),
        # Within a heap, the best point stays in its place.
        _window("row_number", None, "place", best_first, heap),
        {"joinaggregate": [{"op": "count", "as": "many"}], "groupby": heap},
        _calculate("side", "(datum.place % 2 ? -1 : 1) * floor(datum.place / 2)"),
        _calculate("aside", f"datum.side * min({STEP}, {2 * ASIDE} / datum.many)"),
    ]


# Pieces of specifications ---------------------------------------------------------------------------------------------


def _chart(label: str, parameters: Mapping[str, Any], values: Sequence[Any], *layers: Spec) -> Spec:
    axis = {"domain": False, "ticks": False, "labelColor": MUTED, "titleColor": MUTED, "gridColor": RULE}
    text = {"labelFontSize": 11, "titleFontSize": 11, "titleFontWeight": "normal", "labelPadding": 5}
    return {
        "description": label,
        "width": "container",
        "height": 240,
        "autosize": {"type": "fit-x", "contains": "padding"},
        "padding": {"left": 0, "right": 2, "top": 6, "bottom": 2},
        "background": None,
        "params": [{"name": name, "value": value} for name, value in parameters.items()],
        "data": {"values": list(values)},
        "layer": list(layers),
        "config": {"font": "system-ui, sans-serif", "view": {"stroke": None}, "axis": {**axis, **text}},
    }


def _layer(name: str, mark: Spec, *transform: Spec, **encoding: Any) -> Spec:
    return {"name": name, "transform": list(transform), "mark": mark, "encoding": encoding}


def _nothing(drawn: str, words: str) -> Spec:
    """A layer that shows `words` if `drawn` is true for no row."""
    count = {"aggregate": [{"op": "sum", "field": "drawn", "as": "drawn"}]}
    mark = {"type": "text", "text": words, "color": MUTED, "fontSize": 12}
    return _layer("nothing", mark, _calculate("drawn", f"{drawn} ? 1 : 0"), count, {"filter": "datum.drawn == 0"})


def _quantity(field: str, title: str | None, axis: Spec, **scale: Any) -> Spec:
    return {"field": field, "type": "quantitative", "title": title, "scale": scale, "axis": axis}


def _scale(field: str, looks: Mapping[str, Any]) -> Spec:
    """An encoding that takes a mark's look from the value of a field. The legend is on the page."""
    scale = {"domain": list(looks), "range": list(looks.values())}
    return {"field": field, "type": "nominal", "legend": None, "scale": scale}


def _by(field: str, order: str = "ascending") -> Spec:
    return {"field": field, "order": order}


def _calculate(name: str, expression: str) -> Spec:
    return {"calculate": expression, "as": name}


def _window(operation: str, field: str | None, name: str, sort: Sequence[Spec], groupby: Sequence[str] = ()) -> Spec:
    """An operation over all rows up to each row in the order of `sort`; "lag" gives the value of the row before."""
    window = {"op": operation, "as": name} | ({"field": field} if field else {})
    return {"window": [window], "sort": list(sort), "groupby": list(groupby)}
