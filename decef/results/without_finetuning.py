"""results/without_finetuning: accuracy of trained networks right after decomposition."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn

from decef.conversion import convert, recalibrate
from decef.costs import total_cost
from decef.data import Data
from decef.machine import Environment
from decef.moments import input_moments
from decef.plans import AUTO, has_training_kernel, planner
from decef.ranks import Budget
from decef.results.pages import write_measured
from decef.training.loop import EVAL_BATCH, evaluate

ENERGY, UNIFORM = "energy", "uniform"


def without_finetuning(
    model: nn.Module,
    test: Data,
    *,
    layers: Sequence[str],
    shares: Sequence[float],
    exclude: str | None,
    seen: Data | None = None,
    augmented: Data | None = None,
    progress: bool = False,
) -> Iterator[dict[str, object]]:
    """Top-1 of a trained network right after decomposition, without any fine-tuning, at shares of its FLOPs.

    Args:
        model: the network; it stays as it is.
        test: images to measure on.
        layers: layer types.
        shares: of the dense network's FLOPs.
        exclude: pattern of the names that stay dense.
        seen: training images. With them, factors are also fitted to the layers' outputs on them; labels are ignored.
        augmented: training images as they were augmented in training. With them, where the budget is spread by energy,
            batch norm's statistics are measured again.
        progress: show progress bars.

    Yields:
        Rows: the dense network first, then a row for every share, layer type, `spread` and `nearest`. `spread` is how
        the budget is spread over the layers: by "energy" (see `Budget`) or "uniform", the same share of every layer's
        cost. `nearest` is what the factors are fitted to: the "kernels" or the layers' "outputs". `mean_error` is the
        mean relative error of these over the layers. `recalibrated` is the top-1 after batch norm was measured again.
    """
    input_size = next(test.views(1))[0].shape[1:]
    where: dict[str, Any] = {"exclude": exclude, "input_size": input_size}
    # as dense kernels, which is the fastest way to measure accuracy, where a type can
    as_kernels: dict[str, Any] = {"implementation": "reconstructed"}
    options = {layer: as_kernels if has_training_kernel(layer) else {} for layer in layers}
    planners = {layer: planner(model, layer, **where, **options[layer]) for layer in layers}
    plans = {  # all before anything is measured, as one might not be possible
        (share, layer, spread): make(Budget(flops=share, uniform=spread == UNIFORM))
        for share in shares
        for layer, make in planners.items()
        for spread in ((ENERGY,) if layer == AUTO else (ENERGY, UNIFORM))
    }
    dense = total_cost(model, input_size)
    moments: dict[str, Tensor] = {} if seen is None else moments_of(seen, model)

    def row(network: nn.Module, layer: str, budget: str, spread: str, nearest: str, error: float) -> dict[str, object]:
        loss, top1 = evaluate(network, test)
        cost = total_cost(network, input_size)
        recalibrated = None
        if augmented is not None and spread != UNIFORM:
            _, recalibrated = evaluate(recalibrated_on(augmented, copy.deepcopy(network)), test)
        return {
            "layer": layer, "budget": budget, "spread": spread, "nearest": nearest,
            "top1": top1, "recalibrated": recalibrated, "loss": loss, "mean_error": error,
            "params": cost["params"], "params_ratio": cost["params"] / dense["params"],
            "flops": cost["flops"], "flops_ratio": cost["flops"] / dense["flops"],
        }  # fmt: skip

    yield row(model, "conv2d", "dense", "", "", 0.0)
    for (share, layer, spread), made in plans.items():
        for nearest in ("kernels", "outputs") if moments else ("kernels",):
            converted = convert(model, made, data=moments if nearest == "outputs" else None, progress=progress)
            errors = [r.error for r in made.rows if r.error is not None]
            yield row(converted, layer, f"{share:.3f}", spread, nearest, fmean(errors) if errors else 0.0)


def moments_of(seen: Data, model: nn.Module) -> dict[str, Tensor]:
    """Second moments of the inputs of all convolutions on images as they are, see `decef.moments.input_moments`."""
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Conv2d)]
    return input_moments(model, names, [seen.normalize(images) for images, _ in seen.views(EVAL_BATCH)])


def recalibrated_on(augmented: Data, network: nn.Module) -> nn.Module:
    """`network` with batch norm's statistics measured again, in place, on training images as they were augmented."""
    batches = augmented.batches(EVAL_BATCH // 4, torch.Generator().manual_seed(0))
    return recalibrate(network, (augmented.normalize(images) for images, _ in batches))


def write_rows(rows: Sequence[dict[str, object]], out: Path, about: str, made: Environment) -> None:
    """Write rows of `without_finetuning`; see `write_measured`."""
    frame = pd.DataFrame(rows)
    plain = frame.assign(statistics="")
    again = frame.assign(statistics="measured again", top1=frame.recalibrated).dropna(subset="top1")
    index = ["layer", "spread", "nearest", "statistics"]
    shown = pd.concat([plain, again]).pivot_table(index=index, columns="budget", values="top1", sort=False).round(2)
    write_measured("without_finetuning", frame, shown.reset_index().astype(object).fillna(""), out, about, made)
