"""results/bench: inference times of whole networks, as converted and as deployed."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn

from decef.conversion import convert
from decef.costs import total_cost
from decef.inference.deploy import Deployer
from decef.inference.engines import Loadable, available
from decef.inference.forms import to_convolutions
from decef.inference.profiling import time_by_operator
from decef.inference.timing import Roofline, inference_call, interleaved_times, peak_memory
from decef.models import create_model, stem_name
from decef.plans import AUTO_TYPES, Plan, plan
from decef.ranks import Budget
from decef.results.pages import write_bench

log = logging.getLogger(__name__)

#: Not basisconv2021: with its batch norm folded it runs as basisconv does.
INFERENCE_LAYERS = ("conv2d", *AUTO_TYPES)


@dataclass(frozen=True)
class Case:
    """A network with an input size in pixels, a batch size, the layer types to put into it, and how it is run."""

    network: str
    size: int
    batch: int
    layers: tuple[str, ...] = INFERENCE_LAYERS
    engines: tuple[str, ...] = ("onnxruntime",)  # in fp32 uncompiled torch came second everywhere
    precisions: tuple[str, ...] = ("fp32", "bf16", "int8")

    def dense(self) -> nn.Module:
        """The network, freshly initialised: times don't depend on the weights."""
        torch.manual_seed(0)
        return create_model(self.network, num_classes=1000 if self.size > 32 else 10)

    @property
    def input_size(self) -> tuple[int, int, int]:
        return (3, self.size, self.size)


ONE_BY_ONE = ("conv2d", "basisconv", "cpac")  # for networks of mostly 1x1 kernels, which have no eigen-filters
INFERENCE = (
    Case("resnet20", 32, 1, precisions=("fp32", "int8")),
    Case("resnet20", 32, 32),
    Case("vgg16_bn", 32, 1, precisions=("fp32", "int8")),
    Case("torchvision/resnet18", 224, 1),
    Case("torchvision/resnet50", 224, 1, ONE_BY_ONE, precisions=("fp32", "int8")),
    Case("torchvision/mobilenet_v2", 224, 1, ONE_BY_ONE, precisions=("fp32",)),
)
NETWORK_ROUNDS = 15  # so many, and the least time, that equal networks get equal times


def plans(case: Case, dense: nn.Module, share: float) -> dict[str, Plan]:
    """Plans within a share of the dense network's FLOPs, by layer type; those that can't be so small are left out."""
    rule = Budget(flops=share, uniform=True)
    found = {}
    for layer in case.layers:
        if layer != "conv2d":
            try:
                found[layer] = plan(dense, layer, rank=rule, exclude=stem_name(dense), input_size=case.input_size)
            except ValueError as error:
                log.warning("left out: %s in %s: %s", layer, case.network, error)
    return found


def networks(dense: nn.Module, made: Mapping[str, Plan]) -> dict[str, nn.Module]:
    """The network by layer type: dense for "conv2d", else factorised by its plan."""
    return {"conv2d": dense} | {layer: convert(dense, one, from_scratch=True) for layer, one in made.items()}


def bench_inference(cases: Sequence[Case], share: float, device: torch.device) -> Iterator[dict[str, Any]]:
    """Inference times of every layer type's network, in torch as it is and as `deploy` makes it in each precision.

    Yields:
        A row per case, layer type and precision: `network`, `batch`, `layer`, `precision`, `flops_ratio`; `bound`, the
        least time of the chains in fp32 over that of the dense network (`Roofline.seconds`); `at_dense_speed`, the time
        over the dense network's, deployed, if what was factorised took time in proportion to its FLOPs, as in the dense
        network, and all else what it takes there (None without ONNX Runtime); `eager`, of the network as it is, and
        `deployed`, least seconds per call, all of a case interleaved; `engine` and `forms` (how many layers run in
        which form) of the deployed network, its size in `bytes` and its `error`; `candidates`, see `Deployed.times`;
        `memory`, peak bytes of the network as it is.
    """
    roofline = Roofline.measure(device)
    for case in cases:
        x = torch.randn(case.batch, *case.input_size, device=device)
        dense = case.dense().to(device).eval()
        made = plans(case, dense, share)
        found = networks(dense, made)
        engines = _engines(case, device)
        deployed = {}
        for layer, network in found.items():
            deployer = Deployer(network, x, progress=True)
            for precision, names in engines.items():
                deployed[layer, precision] = deployer.deploy(names, precision)
        del deployer  # with all that it exported
        steps = {(layer, "eager"): _inference(network, x) for layer, network in found.items()}
        steps |= {key: inference_call(network, x) for key, network in deployed.items()}
        seconds = interleaved_times(steps, NETWORK_ROUNDS, min)
        bounds = {layer: roofline.seconds(_inference(to_convolutions(network), x)) for layer, network in found.items()}
        memory = {layer: peak_memory(steps[layer, "eager"], device) for layer in found}
        dense_flops = total_cost(dense, case.input_size)["flops"]
        even: dict[tuple[str, str], float] = {}
        plain = Loadable(to_convolutions(dense), x)
        for precision in engines:
            if deployed["conv2d", precision].engine == "onnxruntime":
                times = time_by_operator(plain, precision)
                even |= {(layer, precision): at_dense_speed(one, dense, times) for layer, one in made.items()}
        for precision, layer in product(engines, found):
            network = deployed[layer, precision]
            forms = Counter(network.forms.values())
            yield {
                "network": case.network,
                "batch": case.batch,
                "layer": layer,
                "precision": precision,
                "flops_ratio": total_cost(found[layer], case.input_size)["flops"] / dense_flops,
                "bound": bounds[layer] / bounds["conv2d"],
                "at_dense_speed": even.get((layer, precision)),
                "eager": seconds[layer, "eager"],
                "deployed": seconds[layer, precision],
                "engine": network.engine,
                "forms": dict(sorted(forms.items())),
                "bytes": network.bytes,
                "error": network.error,
                "candidates": network.times,
                "memory": memory[layer],
            }


def at_dense_speed(made: Plan, dense: nn.Module, times: Mapping[tuple[int, ...] | str, float]) -> float:
    """Time of a converted network over the dense one's, if its layers ran at the speed of those that they replace.

    Args:
        made: which layers are converted.
        dense: the network.
        times: its time by operator, see `time_by_operator`.
    """
    before: Counter[tuple[int, ...] | str] = Counter()
    after: Counter[tuple[int, ...] | str] = Counter()
    for row in made.rows:
        if row.macs_before is None or row.macs_after is None:  # it doesn't run
            continue
        shape = tuple(dense.get_submodule(row.name).weight.shape)  # type: ignore[arg-type]
        before[shape] += row.macs_before
        after[shape] += row.macs_after
    saved = sum(time * (1 - after[shape] / before[shape]) for shape, time in times.items() if shape in before)
    return 1 - saved / sum(times.values())


def _engines(case: Case, device: torch.device) -> dict[str, list[str]]:
    """The engines to try in each precision that can be had on the device."""
    found = {}
    for precision in case.precisions:
        there = available(device, precision)
        found[precision] = [engine for engine in case.engines if engine in there] or there[:1]
    return {precision: engines for precision, engines in found.items() if engines}


def write_inference(rows: Sequence[dict[str, Any]], out: Path, made: Mapping[str, Any]) -> None:
    """Write rows of `bench_inference` as <out>.json, and as a page for people as <out>.md.

    Args:
        rows: what was measured.
        out: path without ending.
        made: where, when and with which code.
    """
    frame = pd.DataFrame(rows)
    dense = frame[frame.layer == "conv2d"].set_index(["network", "batch", "precision"])
    same = pd.MultiIndex.from_frame(frame[["network", "batch", "precision"]])
    full = pd.MultiIndex.from_frame(frame[["network", "batch"]].assign(precision="fp32"))
    shown = pd.DataFrame(
        {
            "network": frame.network,
            "batch": frame.batch,
            "layer": frame.layer,
            "precision": frame.precision,
            "FLOPs": frame.flops_ratio,
            "bound": frame.bound,
            "at dense speed": frame.at_dense_speed.astype(float),
            "torch ms": frame.eager * 1e3,
            "torch": frame.eager / dense.eager.loc[full].to_numpy(),
            "deployed ms": frame.deployed * 1e3,
            "of dense": frame.deployed / dense.deployed.loc[same].to_numpy(),
            "of dense fp32": frame.deployed / dense.deployed.loc[full].to_numpy(),
            "engine": frame.engine,
            "forms": [", ".join(f"{count} {form}" for form, count in forms.items()) for forms in frame.forms],
            "MB": frame.bytes / 1e6,
            "error": frame.error,
            "memory": frame.memory / dense.memory.loc[full].to_numpy(),
        }
    )
    write_bench(
        "bench_inference", rows, out, made, table=shown.round(2).astype(object).fillna("").to_markdown(index=False)
    )


def _inference(network: nn.Module, x: Tensor) -> Callable[[], object]:
    network = network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return inference_call(network, x.contiguous(memory_format=torch.channels_last))
