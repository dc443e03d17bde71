"""Build the network that a config describes."""

from __future__ import annotations

import logging
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from decef.conversion import convert, norms_inside_measured
from decef.copies import copied
from decef.costs import total_cost
from decef.data import Data, Dataset
from decef.inputs import forked_generator, inputs_of
from decef.layers import Basis2021Conv2d
from decef.models import create_model, stem_name
from decef.models.weights import load_weights
from decef.plans import Plan, plan
from decef.ranks import Budget, Energy, Fixed, Rule
from decef.sites import listed
from decef.training.config import LayerConfig, ModelConfig

log = logging.getLogger(__name__)

MOMENTS_BATCH = 128


class Built(NamedTuple):
    """A network, the plan by which it was converted, and the cost of its dense twin."""

    model: nn.Module
    plan: Plan
    dense_cost: dict[str, int]


def build(model: ModelConfig, layer: LayerConfig, dataset: Dataset, seen: Data | None = None) -> Built:
    """Build a network, ready to be trained.

    Its weights are drawn anew, or, with `model.weights`, loaded and decomposed.

    Args:
        model, layer: what to build.
        dataset: sets the input size and the number of classes.
        seen: images on which loaded weights are decomposed, to be nearest in the layers' outputs. None: nearest in the
            kernels. The ranks are chosen by the kernels either way.

    Raises:
        ValueError: the model or layer type is unknown, the rank or budget is not possible, no convolution would be
            replaced, or the weights don't fit.
        FileNotFoundError: there is no such file of weights.
    """
    dense = dense_network(model, dataset)
    if model.weights:
        load_weights(dense, Path(model.weights))
    the_plan = plan(
        dense,
        layer.name,
        rank=rank_rule(layer, trained=bool(model.weights)),
        include=model.include,
        exclude=_excluded(model, dense),
        min_kernel_size=model.min_kernel_size or 1,
        input_size=dataset.input_size,
        **layer.options,
    )
    if layer.name != "conv2d" and not the_plan.ranks:
        reasons = Counter(row.reason for row in the_plan.rows if not row.reason.startswith("excluded"))
        most = f", mostly because: {reasons.most_common(1)[0][0]}" if reasons else ""
        raise ValueError(f"layer={layer.name} would replace none of {model.name}'s convolutions{most}")
    if model.factorize_classifier and layer.name != "conv2d" and "linear" not in the_plan.ranks:
        reason = next(row.reason for row in the_plan.rows if row.name == "linear")
        raise ValueError(f"model.factorize_classifier=true is not possible with layer={layer.name}: {reason}")
    if ":" in model.name and the_plan.ranks and not model.weights:
        log.info("the kernels of replaced layers are drawn anew; to decompose trained ones, say model.weights=FILE")
    data = None if seen is None else [seen.normalize(images) for images, _ in seen.views(MOMENTS_BATCH)]
    network = convert(dense, the_plan, from_scratch=not model.weights, data=data)
    if data is not None and any(isinstance(module, Basis2021Conv2d) for module in network.modules()):
        with torch.no_grad(), norms_inside_measured(network.eval()):
            for images in data:
                network(inputs_of(images, network))
        network.train()
    return Built(network, the_plan, total_cost(dense, dataset.input_size))


def rebuild(model: ModelConfig, dataset: Dataset, plan: Plan) -> Built:
    """The same as `build` returns, of a run that has begun: with the plan that it had then, to take its weights."""
    dense = dense_network(model, dataset)
    return Built(convert(dense, plan, from_scratch=True), plan, total_cost(dense, dataset.input_size))


def dense_network(model: ModelConfig, dataset: Dataset) -> nn.Module:
    """The network before any layer is replaced.

    Raises:
        ValueError: there is no such network, it doesn't take these options, or it is one's own and doesn't give logits.
    """
    channels, size, _ = dataset.input_size
    network = create_model(
        model.name,
        num_classes=dataset.num_classes,
        in_channels=channels,
        image_size=size,
        **network_options(model),
    )
    if ":" in model.name:
        _check_logits(model.name, network, dataset)
    return network


def network_options(model: ModelConfig) -> dict[str, Any]:
    """The options that the dense network is made with."""
    return {**model.options, **({"conv_classifier": True} if model.factorize_classifier else {})}


@torch.no_grad()
def _check_logits(name: str, network: nn.Module, dataset: Dataset) -> None:
    """Raise ValueError if a network of one's own isn't one for these images and classes, in training too."""
    was_training, device = network.training, next((p.device for p in network.parameters()), None)
    size, wanted = " x ".join(map(str, dataset.input_size)), (2, dataset.num_classes)
    for mode in ("evaluation", "training"):
        try:
            found = network.eval() if mode == "evaluation" else copied(network).train()
            with forked_generator(device or torch.device("cpu")):
                logits = found(torch.zeros(2, *dataset.input_size, device=device))
        except Exception as error:
            raise ValueError(f"{name} doesn't run on images of {size}, in {mode}: {error}") from error
        got = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        if got != wanted:
            raise ValueError(
                f"{name} must give logits of shape {wanted} for two images of {size}, not {got}, in {mode}"
            )
    network.train(was_training)


def rank_rule(layer: LayerConfig, *, trained: bool) -> Rule:
    """The rule that chooses the ranks. A budget is spread by the energies of trained kernels, else evenly."""
    if layer.rank is not None:
        return Fixed(layer.rank)
    if layer.energy is not None:
        return Energy(layer.energy)
    return Budget(flops=1.0 if layer.flops is None else layer.flops, uniform=not trained)


def _excluded(model: ModelConfig, dense: nn.Module) -> list[str]:
    exclude = listed(model.exclude) or []
    if model.dense_stem:
        exclude.insert(0, stem_name(dense))
    if model.options.get("shortcut") == "B":  # so that both options replace the same 3x3 convolutions
        exclude.append("*.shortcut.0")
    return exclude
