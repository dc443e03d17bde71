"""What trained kernels look like: effective rank against depth, and accuracy right after decomposition."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import yaml
from torch import Tensor, nn

from decef.conversion import Plan, convert, plan
from decef.costs import total_cost
from decef.data import Data, Dataset, dataset, normalize
from decef.layers import CPACConv2d, FactorizedConv2d
from decef.layers.factorized import evaluating
from decef.models import create_model
from decef.models.weights import load_weights
from decef.moments import input_moments
from decef.ranks import DEFINITIONS, Budget, effective_rank
from decef.training.checkpoint import load_checkpoint
from decef.training.loop import EVAL_BATCH, evaluate
from decef.training.record import CHECKPOINT, CONFIG
from decef.training.run import build, dense_network

if TYPE_CHECKING:
    import pandas as pd


def load_networks(name: str, *, weights: Path | None = None, pretrained: bool = False) -> list[tuple[str, nn.Module]]:
    """Networks by what a user calls them, each with a label.

    Args:
        name: the folder of a run (its last checkpoint, or one network for every checkpoint that it kept), a name that
            `create_model` knows.
        weights: file with trained weights, not for a run.
        pretrained: let timm or torchvision download trained weights.

    Raises:
        ValueError: there is no such network, or the weights are not its.
        FileNotFoundError: no such file of weights, or a run without a checkpoint.
    """
    if Path(name).is_dir():
        return list(_networks_of_run(Path(name)))
    try:
        # ImageNet's classes and those of CIFAR-10
        num_classes = 1000 if "/" in name else 10
        model = create_model(name, num_classes=num_classes, pretrained=pretrained)
    except ValueError as error:
        raise ValueError(f"'{name}' is no run's folder, and {error}") from error
    return [(name, load_weights(model, weights) if weights else model)]


def input_size_of(name: str) -> tuple[int, int, int]:
    """Shape `(C, H, W)` of what a network of `load_networks` takes: its run's images; else CIFAR's, or ImageNet's."""
    if Path(name).is_dir():
        return dataset_of(Path(name)).input_size
    return (3, 224, 224) if "/" in name else (3, 32, 32)


def dataset_of(run: Path) -> Dataset:
    """What a run was trained on.

    Raises:
        FileNotFoundError: the folder is no run's.
    """
    return dataset(_config_of(run)["dataset"])


def _config_of(run: Path) -> dict[str, Any]:
    if not (run / CONFIG).is_file():
        raise FileNotFoundError(f"{run} is no folder of a run, it has no {CONFIG}")
    return yaml.safe_load((run / CONFIG).read_text())


def _networks_of_run(folder: Path) -> Iterator[tuple[str, nn.Module]]:
    paths = sorted(folder.glob("checkpoint-*.pt")) or [folder / CHECKPOINT]
    if not paths[0].is_file():
        raise FileNotFoundError(f"{folder} has no checkpoint: checkpoints stay on the machine where a run was made")
    config = _config_of(folder)
    for path in paths:
        checkpoint = load_checkpoint(path)
        model = convert(
            dense_network(config, dataset(config["dataset"])), Plan.from_dict(checkpoint["plan"]), from_scratch=True
        )
        model.load_state_dict(checkpoint["model"])
        yield f"epoch {checkpoint['epoch']}", model


def kernels(model: nn.Module) -> Iterator[tuple[str, Tensor, int]]:
    """Name, dense kernel and groups of every convolution that is wider than 1x1, in the network's order."""
    for name, module in model.named_modules():
        if isinstance(module, (nn.Conv2d, FactorizedConv2d)) and max(module.kernel_size) > 1:
            with evaluating(module):
                weight = module.weight.detach()
            yield name, weight, module.groups


def rank_table(
    model: nn.Module, threshold: float | None = None, *, definitions: Iterable[str] = DEFINITIONS
) -> pd.DataFrame:
    """Effective rank of every kernel by depth, beside that of a random kernel of its shape.

    A random kernel's effective rank depends on its shape alone, and rises with the number of filters; a fall with
    depth that the random kernels share says nothing about training.

    Args:
        model: a network, dense or factorised.
        threshold: of the definition "threshold", see `effective_rank`.
        definitions: which definitions.

    Returns:
        A row per convolution wider than 1x1: `name`, `out_channels`, `in_channels`, `kernel`, and for each definition
        the mean over input channels, `<definition>`, and the same at random Gaussian weights, `<definition>_init`.
    """
    import pandas as pd

    generator = torch.Generator().manual_seed(0)
    rows = []
    for name, weight, groups in kernels(model):
        row: dict[str, object] = {
            "name": name,
            "out_channels": weight.shape[0],
            "in_channels": weight.shape[1] * groups,
            "kernel": f"{weight.shape[2]}x{weight.shape[3]}",
        }
        random = torch.randn(weight.shape, generator=generator, dtype=torch.float64)
        for definition in definitions:
            given = threshold if definition == "threshold" else None
            for column, kernel in ((definition, weight), (f"{definition}_init", random)):
                row[column] = effective_rank(kernel, given, definition=definition, groups=groups).mean().item()
        rows.append(row)
    return pd.DataFrame(rows)


def untuned(
    model: nn.Module,
    test: Data,
    *,
    mean: Tensor,
    std: Tensor,
    layers: Sequence[str],
    shares: Sequence[float],
    exclude: str | None,
    seen: Data | None = None,
) -> Iterator[dict[str, object]]:
    """Top-1 of a trained network right after decomposition, without any fine-tuning, at shares of its FLOPs.

    Args:
        model: the network; it stays as it is.
        test: images to measure on.
        mean, std: see `decef.data.normalize`.
        layers: layer types.
        shares: of the dense network's FLOPs.
        exclude: names that stay dense.
        seen: training images on which kernels are also made nearest in their outputs; labels are not looked at.

    Yields:
        Rows: the dense network first, then a row for every share, layer type, way to spread the budget over the layers
        ("energy": see `Budget`; "uniform": the same share of every layer's cost), and whether the "kernels" or their
        "outputs" are nearest, with the mean relative error there.
    """
    input_size = next(test.views(1))[0].shape[1:]
    dense = total_cost(model, input_size)
    moments: dict[str, Tensor] = {}
    if seen is not None:
        names = [name for name, module in model.named_modules() if isinstance(module, nn.Conv2d)]
        moments = input_moments(model, names, [normalize(images, mean, std) for images, _ in seen.views(EVAL_BATCH)])

    def row(network: nn.Module, layer: str, budget: str, spread: str, nearest: str, error: float) -> dict[str, object]:
        loss, top1 = evaluate(network, test, mean=mean, std=std)
        cost = total_cost(network, input_size)
        return {
            "layer": layer, "budget": budget, "spread": spread, "nearest": nearest,
            "top1": top1, "loss": loss, "mean_error": error,
            "params": cost["params"], "params_ratio": cost["params"] / dense["params"],
            "flops": cost["flops"], "flops_ratio": cost["flops"] / dense["flops"],
        }  # fmt: skip

    yield row(model, "conv2d", "dense", "", "", 0.0)
    for share in shares:
        for layer in layers:
            for spread in ("energy", "uniform"):
                rule = Budget(flops=share, uniform=spread == "uniform")
                the_plan = plan(
                    model, layer, rank=rule, exclude=exclude, input_size=input_size, implementation="reconstructed"
                )
                for nearest in ("kernels", "outputs") if moments else ("kernels",):
                    converted = convert(model, the_plan, data=moments if nearest == "outputs" else None)
                    errors = [r.error for r in the_plan.rows if r.error is not None]
                    yield row(converted, layer, f"{share:.3f}", spread, nearest, sum(errors) / len(errors))


def removal_table(model: nn.Module, test: Data, *, mean: Tensor, std: Tensor) -> pd.DataFrame:
    """What every CPAC component is worth: the test loss and top-1 that its removal costs, beside its significance.

    Args:
        model: a trained network; it stays as it is.
        test: images to measure on.
        mean, std: see `decef.data.normalize`.

    Returns:
        A row per component: `layer`, `component`, `channels` and `product` (the two kinds of
        `CPACConv2d.significance`), `loss_rise` and `top1_drop` (in points).

    Raises:
        ValueError: the network has no CPAC layer.
    """
    import pandas as pd

    model = copy.deepcopy(model)
    loss, top1 = evaluate(model, test, mean=mean, std=std)
    rows = []
    for name, layer in model.named_modules():
        if not isinstance(layer, CPACConv2d):
            continue
        channels, product = (layer.significance(kind).tolist() for kind in ("channels", "product"))
        whole = layer.filters.detach().clone()
        for component in range(len(product)):
            layer.remove_(torch.tensor([component]))
            left = evaluate(model, test, mean=mean, std=std)
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
        raise ValueError("the network has no CPAC layer, whose components could be removed")
    return pd.DataFrame(rows)


def write_untuned(rows: Sequence[dict[str, object]], out: Path, what: str, made: Mapping[str, Any]) -> None:
    """Write `untuned`'s rows as <out>.csv and <out>.md, with what they were made from and the `environment` then."""
    import pandas as pd

    frame = pd.DataFrame(rows)
    rows_of = ["layer", "spread", "nearest"]
    shown = frame.pivot_table(index=rows_of, columns="budget", values="top1", sort=False).round(2)
    dirty = " with uncommitted changes" if made["git_dirty"] else ""
    text = [
        "# Top-1 on CIFAR-10's test images right after decomposition, no fine-tuning",
        "",
        "Columns: share of the dense network's FLOPs. Rows: layer type, and how the budget is spread over the layers:",
        "by the energy that each rank keeps for its FLOPs, or the same share of every layer's FLOPs; and what is",
        "nearest to the dense network's, the kernels or their outputs on training images, without labels. The first",
        "convolution stays dense.",
        "",
        shown.reset_index().astype(object).fillna("").to_markdown(index=False),
        "",
        f"{what}. Commit {str(made['git_commit'])[:10]}{dirty}, {made['started']}, {made['machine']}.",
        "",
    ]
    out.parent.mkdir(parents=True, exist_ok=True)
    frame.round(6).to_csv(out.with_suffix(".csv"), index=False)
    out.with_suffix(".md").write_text("\n".join(text))


def cost_table(
    networks: Iterable[tuple[str, Mapping[str, Any], Dataset]], layers: Sequence[str], flops: float
) -> Iterator[dict[str, object]]:
    """Parameters and MACs of networks made of each layer type, at most at a share of the dense network's FLOPs.

    Args:
        networks: what to call each, its config (as in `configs/model`), and the dataset that it is for.
        layers: layer types.
        flops: the share.

    Yields:
        Rows `network`, `layer`, `params`, `macs`, both `_ratio` to dense, and `note`: why there is nothing to count.
    """
    for label, model, data in networks:
        for layer in layers:
            config = {"model": model, "layer": {"name": layer, "flops": flops}}
            row: dict[str, object] = {"network": label, "layer": layer}
            try:
                with torch.device("meta"):
                    network, _, dense = build(config, data)
            except ValueError as error:
                nothing = dict.fromkeys(("params", "macs", "params_ratio", "macs_ratio"))
                yield {**row, **nothing, "note": str(error)}
                continue
            cost = total_cost(network, data.input_size)
            ratios = {f"{key}_ratio": cost[key] / dense[key] for key in ("params", "macs")}
            yield {**row, "params": cost["params"], "macs": cost["macs"], **ratios, "note": ""}


def write_costs(rows: Sequence[dict[str, object]], out: Path, flops: float) -> str:
    """Write `cost_table`'s rows as <out>.csv and <out>.md, and return the table for people."""
    import pandas as pd

    frame = pd.DataFrame(rows)

    def cell(row: pd.Series) -> str:
        if pd.isna(row.macs):
            return "-"
        if row.layer == "conv2d":
            return f"{row.params / 1e6:.2f} M, {row.macs / 1e6:,.1f} M"
        return f"{row.params_ratio:.3f}, {row.macs_ratio:.3f}"

    cells = frame.assign(cell=frame.apply(cell, axis=1))
    table = cells.pivot_table(index="network", columns="layer", values="cell", aggfunc="first", sort=False)
    shown = table.reset_index().to_markdown(index=False)
    notes = [
        f"- {', '.join(group.network + ' ' + group.layer)}: {note}"
        for note, group in frame[frame.note != ""].groupby("note", sort=False)
    ]
    text = [
        f"# Parameters and MACs, dense and at {flops:g} of the FLOPs",
        "",
        "conv2d: parameters and MACs of the dense network, in millions. Others: share of its parameters and of its",
        f"MACs, for the largest ranks with at most {flops:g} of its FLOPs, every layer at the same share of its own.",
        "The first convolution and the classifier stay dense. 32x32 images, or 224x224 for ImageNet's networks.",
        "",
        shown,
        "",
        "-: not possible.",
        "",
        *notes,
        "",
    ]
    out.parent.mkdir(parents=True, exist_ok=True)
    frame.round(6).to_csv(out.with_suffix(".csv"), index=False)
    out.with_suffix(".md").write_text("\n".join(text))
    return shown
