"""results/bench: which operators the time of dense and low-rank networks goes to, in ONNX Runtime."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import nn

from decef.costs import cost
from decef.inference.engines import Loadable
from decef.inference.forms import forms_of, to_convolutions
from decef.inference.profiling import time_by_operator
from decef.layers import FactorizedConv2d
from decef.results.bench_inference import ONE_BY_ONE, Case, networks, plans
from decef.results.pages import write_bench

OPERATORS = (
    Case("resnet20", 32, 32, precisions=("fp32", "int8")),
    Case("vgg16_bn", 32, 1, precisions=("int8",)),
    Case("torchvision/resnet18", 224, 1, precisions=("fp32", "int8")),
    Case("torchvision/resnet50", 224, 1, ONE_BY_ONE, precisions=("int8",)),
)
CONVOLUTIONS = ("kxk", "1x1", "depthwise")
KINDS = (*CONVOLUTIONS, "copies and sums", "conversions", "rest")
COPIES_AND_SUMS = ("Add", "Concat", "Split", "QLinearAdd", "QLinearConcat")
CONVERSIONS = ("QuantizeLinear", "DequantizeLinear", "ReorderInput", "ReorderOutput", "Transpose")


def kind(operator: tuple[int, ...] | str) -> str:
    """Which of `KINDS` an operator of `time_by_operator` is."""
    if isinstance(operator, str):
        if operator in COPIES_AND_SUMS:
            return "copies and sums"
        return "conversions" if operator in CONVERSIONS else "rest"
    _, per_group, *size = operator
    return "1x1" if size == [1, 1] else "depthwise" if per_group == 1 else "kxk"


def bench_operators(cases: Sequence[Case], share: float) -> Iterator[dict[str, Any]]:
    """Time by kind of operator of every layer type's network, with all its layers in one form.

    Yields:
        A row per case, precision, layer type and form: `network`, `batch`, `precision`, `layer`, `form`; `seconds`, by
        kind of operator, and `macs`, for the kinds of convolution, both of a call.
    """
    for case in cases:
        x = torch.randn(case.batch, *case.input_size)
        dense = case.dense().eval()
        found = {
            (layer, form): Loadable(to_convolutions(network, form), x)
            for layer, network in networks(dense, plans(case, dense, share)).items()
            for form in forms(network)
        }
        for precision in case.precisions:
            for (layer, form), plain in found.items():
                seconds: Counter[str] = Counter()
                for operator, time in time_by_operator(plain, precision).items():
                    seconds[kind(operator)] += time  # type: ignore[assignment]
                macs = macs_by_kind(plain.module, case)
                row = {"network": case.network, "batch": case.batch, "precision": precision, "layer": layer}
                yield row | {"form": form, "seconds": dict(seconds), "macs": macs}


def forms(network: nn.Module) -> list[str]:
    """The forms that the low-rank layers of a network have, but for the dense one; of a dense network only that."""
    layers = [module for module in network.modules() if isinstance(module, FactorizedConv2d)]
    found = dict.fromkeys(form for layer in layers for form in forms_of(layer) if form != "reconstructed")
    return list(found) or ["reconstructed"]


def macs_by_kind(network: nn.Module, case: Case) -> dict[str, int]:
    """MACs of a call of a network of plain convolutions, by kind of convolution."""
    macs: Counter[str] = Counter()
    for name, row in cost(network, case.input_size).iterrows():
        module = network.get_submodule(str(name))
        if isinstance(module, nn.Conv2d):
            macs[kind(tuple(module.weight.shape))] += case.batch * int(row.macs)
    return dict(macs)


def write_operators(rows: Sequence[Mapping[str, Any]], out: Path, made: Mapping[str, Any]) -> None:
    """Write rows of `bench_operators` as <out>.json, and as a page for people as <out>.md.

    Args:
        rows: what was measured.
        out: path without ending.
        made: where, when and with which code.
    """
    dense: dict[tuple[str, int, str], Mapping[str, Any]] = {}
    shown = []
    for row in rows:
        case = (row["network"], row["batch"], row["precision"])
        if row["layer"] == "conv2d":
            dense[case] = row
        whole = sum(dense[case]["seconds"].values())
        speed = sum(dense[case]["macs"].values()) / sum(dense[case]["seconds"][one] for one in dense[case]["macs"])
        line = {key: row[key] for key in ("network", "batch", "precision", "layer", "form")}
        line |= {"ms": 1e3 * sum(row["seconds"].values()), "of dense": sum(row["seconds"].values()) / whole}
        line |= {one: row["seconds"].get(one, 0.0) / whole for one in KINDS}
        for one, macs in row["macs"].items():
            if row["seconds"][one]:  # the profiler counts whole microseconds
                line[f"speed of {one}"] = macs / row["seconds"][one] / speed
        shown.append(line)
    columns = [*shown[0], *(f"speed of {one}" for one in CONVOLUTIONS)]
    table = pd.DataFrame(shown, columns=list(dict.fromkeys(columns))).round(2).astype(object).fillna("")
    write_bench("bench_operators", list(rows), out, made, table=table.to_markdown(index=False))
