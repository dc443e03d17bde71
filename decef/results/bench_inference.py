"""results/bench: inference times of whole networks, as converted and as deployed."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn

from decef.conversion import convert
from decef.costs import total_cost
from decef.inference.deploy import deploy
from decef.inference.engines import available
from decef.inference.timing import Roofline, interleaved_times, peak_memory
from decef.layers import LAYERS, FactorizedConv2d
from decef.models import create_model, stem_name
from decef.ranks import Budget
from decef.results.pages import write_bench


@dataclass(frozen=True)
class Case:
    """A network with an input size in pixels, a batch size, and the layer types to put into it."""

    network: str
    size: int
    batch: int
    layers: tuple[str, ...] = tuple(LAYERS)
    engines: tuple[str, ...] = ("onnxruntime",)  # uncompiled torch came second everywhere, and costs a minute a case

    def dense(self) -> nn.Module:
        """The network, freshly initialised: times don't depend on the weights."""
        torch.manual_seed(0)
        return create_model(self.network, num_classes=1000 if self.size > 32 else 10)

    @property
    def input_size(self) -> tuple[int, int, int]:
        return (3, self.size, self.size)


ONE_BY_ONE = ("conv2d", "basisconv", "cpac")  # for networks of mostly 1x1 kernels, which have no eigen-filters
INFERENCE = (
    Case("resnet20", 32, 1),
    Case("resnet20", 32, 32),
    Case("vgg16_bn", 32, 1),
    Case("torchvision/resnet18", 224, 1),
    Case("torchvision/resnet50", 224, 1, ONE_BY_ONE),
    Case("torchvision/mobilenet_v2", 224, 1, ONE_BY_ONE),
    Case("torchvision/resnet18", 224, 8, ("conv2d", "decef"), ("compile",)),
)
NETWORK_ROUNDS = 15  # so many that equal networks get equal times


def networks(case: Case, share: float) -> dict[str, nn.Module]:
    """The network by layer type: dense for "conv2d", else factorised within a share of the dense FLOPs."""
    dense = case.dense()
    rule = Budget(flops=share, uniform=True)
    return {
        layer: dense
        if layer == "conv2d"
        else convert(dense, layer, rank=rule, exclude=stem_name(dense), input_size=case.input_size, from_scratch=True)
        for layer in case.layers
    }


def bench_inference(cases: Sequence[Case], share: float, device: torch.device) -> Iterator[dict[str, Any]]:
    """Inference times of every layer type's network, in torch as it is and as `deploy` makes it.

    Yields:
        A row per case and layer type: `network`, `batch`, `layer`, `flops_ratio`; `bound`, the least time of the chains
        over that of the dense network (`Roofline.seconds`); `eager` and `deployed`, median seconds per call, all of a
        case interleaved; `engine` and `forms` (how many layers run in which form) of the deployed network;
        `candidates`, see `Deployed.times`; `memory`, peak bytes of the network as it is.
    """
    roofline = Roofline.measure(device)
    for case in cases:
        x = torch.randn(case.batch, *case.input_size, device=device)
        found = {layer: network.to(device).eval() for layer, network in networks(case, share).items()}
        engines = [engine for engine in case.engines if engine in available(device)] or ["eager"]
        deployed = {layer: deploy(network, x, engines=engines, progress=True) for layer, network in found.items()}
        steps = {(layer, "eager"): _inference(network, x) for layer, network in found.items()}
        steps |= {(layer, "deployed"): _inference(network, x) for layer, network in deployed.items()}
        seconds = interleaved_times(steps, NETWORK_ROUNDS)
        bounds = {layer: roofline.seconds(_inference(_as_chains(network), x)) for layer, network in found.items()}
        dense_flops = total_cost(found["conv2d"], case.input_size)["flops"]
        for layer, network in found.items():
            forms = list(deployed[layer].forms.values())
            yield {
                "network": case.network,
                "batch": case.batch,
                "layer": layer,
                "flops_ratio": total_cost(network, case.input_size)["flops"] / dense_flops,
                "bound": bounds[layer] / bounds["conv2d"],
                "eager": seconds[layer, "eager"],
                "deployed": seconds[layer, "deployed"],
                "engine": deployed[layer].engine,
                "forms": {form: forms.count(form) for form in sorted(set(forms))},
                "candidates": deployed[layer].times,
                "memory": peak_memory(steps[layer, "eager"], device),
            }


def write_inference(rows: Sequence[dict[str, Any]], out: Path, made: Mapping[str, Any]) -> None:
    """Write rows of `bench_inference` as <out>.json, and as a page for people as <out>.md.

    Args:
        rows: what was measured.
        out: path without ending.
        made: where, when and with which code.
    """
    frame = pd.DataFrame(rows)
    dense = frame[frame.layer == "conv2d"].set_index(["network", "batch"])
    keys = pd.MultiIndex.from_frame(frame[["network", "batch"]])
    shown = pd.DataFrame(
        {
            "network": frame.network,
            "batch": frame.batch,
            "layer": frame.layer,
            "FLOPs": frame.flops_ratio,
            "bound": frame.bound,
            "torch ms": frame.eager * 1e3,
            "torch": frame.eager / dense.eager.loc[keys].to_numpy(),
            "deployed ms": frame.deployed * 1e3,
            "deployed": frame.deployed / dense.deployed.loc[keys].to_numpy(),
            "engine": frame.engine,
            "forms": [", ".join(f"{count} {form}" for form, count in forms.items()) for forms in frame.forms],
            "memory": frame.memory / dense.memory.loc[keys].to_numpy(),
        }
    )
    write_bench("bench_inference", rows, out, made, table=shown.round(2).to_markdown(index=False))


def _inference(network: nn.Module, x: Tensor) -> Callable[[], object]:
    x = x.contiguous(memory_format=torch.channels_last)
    network = network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def infer() -> object:
        with torch.inference_mode():
            return network(x)

    return infer


def _as_chains(network: nn.Module) -> nn.Module:
    network = copy.deepcopy(network)
    for module in network.modules():
        if isinstance(module, FactorizedConv2d):
            module.implementation = "factorized"
    return network
