"""results/significance: what it costs to remove each CPAC component."""

from __future__ import annotations

import copy

import pandas as pd
import torch
from torch import nn

from decef.data import Data
from decef.layers import CPACConv2d
from decef.training.loop import evaluate


def removal_table(model: nn.Module, test: Data) -> pd.DataFrame:
    """What removing each CPAC component costs in test loss and top-1, beside the component's significance.

    Args:
        model: a trained network; it stays as it is.
        test: images to measure on.

    Returns:
        A row per component: `layer`, `component`, `channels` and `product` (the two kinds of
        `CPACConv2d.significance`), `loss_rise` and `top1_drop` (in percentage points).

    Raises:
        ValueError: the network has no CPAC layer.
    """
    model = copy.deepcopy(model)
    loss, top1 = evaluate(model, test)
    rows = []
    for name, layer in model.named_modules():
        if not isinstance(layer, CPACConv2d):
            continue
        channels, product = (layer.significance(kind).tolist() for kind in ("channels", "product"))
        whole = layer.filters.detach().clone()
        for component in range(len(product)):
            layer.remove_(torch.tensor([component]))
            left = evaluate(model, test)
            with torch.no_grad():
                layer.filters.copy_(whole)
            rows.append(
                {
                    "layer": name,
                    "component": component,
                    "channels": channels[component],
                    "product": product[component],
                    "loss_rise": left[0] - loss,
                    "top1_drop": top1 - left[1],
                }
            )
    if not rows:
        raise ValueError("the network has no CPAC layer to remove components from")
    return pd.DataFrame(rows)
