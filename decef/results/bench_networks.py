"""How long whole networks take: inference as converted and as deployed, and training steps."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset

from decef.conversion import convert
from decef.costs import total_cost
from decef.data import DATASETS, Images
from decef.data.torchvision_cpu import import_torchvision
from decef.inference.deploy import deploy
from decef.inference.engines import available
from decef.inference.timing import Roofline, interleaved, peak_memory
from decef.layers import LAYERS, FactorizedConv2d
from decef.models import create_model, stem_name
from decef.ranks import Budget
from decef.results.bench_layers import write
from decef.training.config import TrainConfig
from decef.training.loop import Training, network_input


@dataclass(frozen=True)
class Case:
    """A network at an input size and a batch size, and the layer types to put into it."""

    network: str
    size: int
    batch: int
    layers: tuple[str, ...] = tuple(LAYERS)
    engines: tuple[str, ...] = ("onnxruntime",)  # torch, uncompiled, came second everywhere, and costs a minute a case

    def dense(self) -> nn.Module:
        """The network, freshly initialised: a time does not depend on the weights."""
        torch.manual_seed(0)
        return create_model(self.network, num_classes=1000 if self.size > 32 else 10)

    @property
    def input_size(self) -> tuple[int, int, int]:
        return (3, self.size, self.size)


ONE_BY_ONE = ("conv2d", "basisconv", "cpac")  # for networks of 1x1 kernels mostly, which have no eigen-filters
INFERENCE = (
    Case("resnet20", 32, 1),
    Case("resnet20", 32, 32),
    Case("vgg16_bn", 32, 1),
    Case("torchvision/resnet18", 224, 1),
    Case("torchvision/resnet50", 224, 1, ONE_BY_ONE),
    Case("torchvision/mobilenet_v2", 224, 1, ONE_BY_ONE),
    Case("torchvision/resnet18", 224, 8, ("conv2d", "decef"), ("compile",)),
)
TRAINING = (Case("resnet20", 32, 128), Case("vgg16_bn", 32, 128), Case("torchvision/resnet18", 64, 32))
CIFAR10 = DATASETS["cifar10"]
NETWORK_ROUNDS = 15  # equal networks must come out equal
STEP = TrainConfig("bench", epochs=1, batch_size=128, lr=0.01)


def networks(case: Case, share: float) -> dict[str, nn.Module]:
    """The dense network and, by layer type, its factorised forms within a share of its FLOPs."""
    dense = case.dense()
    rule = Budget(flops=share, uniform=True)
    return {
        layer: dense
        if layer == "conv2d"
        else convert(dense, layer, rank=rule, exclude=stem_name(dense), input_size=case.input_size, from_scratch=True)
        for layer in case.layers
    }


def bench_inference(cases: Sequence[Case], share: float, device: torch.device) -> Iterator[dict[str, Any]]:
    """Seconds a call of every layer type's network, in torch as it is and as `deploy` makes it, a row each.

    A row has `network`, `batch`, `layer`, `flops_ratio`, `bound` (of the chains over that of the dense network, see
    `Roofline.seconds`), `eager` and `deployed` (medians, all of one case interleaved), `engine` and `forms` (how many
    layers run in which form), and `memory` (peak bytes of the network as it is).
    """
    roofline = Roofline.measure(device)
    for case in cases:
        x = torch.randn(case.batch, *case.input_size, device=device)
        found = {layer: network.to(device).eval() for layer, network in networks(case, share).items()}
        engines = [engine for engine in case.engines if engine in available(device)] or ["eager"]
        deployed = {layer: deploy(network, x, engines=engines) for layer, network in found.items()}
        steps = {(layer, "eager"): _inference(network, x) for layer, network in found.items()}
        steps |= {(layer, "deployed"): _inference(network, x) for layer, network in deployed.items()}
        seconds = interleaved(steps, NETWORK_ROUNDS)
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


def bench_steps(cases: Sequence[Case], share: float, device: torch.device) -> Iterator[dict[str, Any]]:
    """Seconds of a training step (forward, backward, update) of every layer type's network, a row each.

    A row has `network`, `batch`, `layer`, `flops_ratio`, `seconds` (median, all of one case interleaved), `memory`.
    """
    for case in cases:
        x = torch.randn(case.batch, *case.input_size, device=device)
        labels = torch.randint(0, 10, (case.batch,), device=device)
        found = networks(case, share)
        dense_flops = total_cost(found["conv2d"], case.input_size)["flops"]
        steps = {layer: _training(network.to(device), x, labels) for layer, network in found.items()}
        seconds = interleaved(steps)
        for layer, network in found.items():
            yield {
                "network": case.network,
                "batch": case.batch,
                "layer": layer,
                "flops_ratio": total_cost(network, case.input_size)["flops"] / dense_flops,
                "seconds": seconds[layer],
                "memory": peak_memory(steps[layer], device),
            }


def bench_loops(
    device: torch.device, *, network: str = "resnet20", batch: int = 128, steps: int = 8, rounds: int = 3
) -> dict[str, float]:
    """Images a second of a network's training, side by side: the usual script's loop, ours, and ours by schedule.

    "usual" is what public scripts for it do: a PIL image at a time through torchvision's transforms, a `DataLoader`
    with a worker a core, contiguous images, the loss and the accuracy read at every step. "decef" is this project's
    loop on the same images, at full size. "0.75" and "0.5" are the same on images of that scale, which schedule `quick`
    trains on for most of its epochs.
    """
    images = torch.randint(0, 256, (steps * batch, 3, 32, 32), dtype=torch.uint8)
    labels = torch.randint(0, 10, (len(images),))
    model = create_model(network, num_classes=10).to(device)
    ours = Images(images, labels, crop_padding=4, flip=True).to(device)
    loops: dict[str, Callable[[], object]] = {"usual": _usual_loop(copy.deepcopy(model), images, labels, batch)}
    for name, scale in (("decef", 1.0), ("0.75", 0.75), ("0.5", 0.5)):
        loops[name] = _our_loop(copy.deepcopy(model), ours, batch, scale)
    seconds = interleaved(loops, rounds)
    return {name: len(images) / value for name, value in seconds.items()}


def write_inference(rows: Sequence[dict[str, Any]], out: Path, made: Mapping[str, Any]) -> None:
    """Write rows of `bench_inference` as <out>.json, and for people as <out>.md."""
    import pandas as pd

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
    text = f"""# Inference of whole networks

Times over those of the dense network, medians of interleaved rounds. torch: the converted network as it is, over the
dense one as it is. deployed: after `decef.deploy`, over the dense one after `decef.deploy`. FLOPs: as chains. bound:
the least time that the chains' arithmetic and memory traffic leave, over the dense network's. forms: how the factorised
layers run. memory: peak while it runs in torch.

{shown.round(2).to_markdown(index=False)}
"""
    write(rows, out, made, text)


def write_training(
    rows: Sequence[dict[str, Any]], loops: Mapping[str, float], out: Path, made: Mapping[str, Any]
) -> None:
    """Write rows of `bench_steps` and `bench_loops` as <out>.json, and for people as <out>.md."""
    import pandas as pd

    frame = pd.DataFrame(rows)
    dense = frame[frame.layer == "conv2d"].set_index("network")
    shown = pd.DataFrame(
        {
            "network": frame.network,
            "batch": frame.batch,
            "layer": frame.layer,
            "FLOPs": frame.flops_ratio,
            "images/s": frame.batch / frame.seconds,
            "step": frame.seconds / dense.seconds.loc[frame.network].to_numpy(),
            "memory": frame.memory / dense.memory.loc[frame.network].to_numpy(),
        }
    )
    usual = loops["usual"]
    text = f"""# Training

A step (forward, backward, update) over the dense network's, medians of interleaved rounds, `implementation="auto"`.

{shown.round(2).to_markdown(index=False)}

ResNet-20 on CIFAR-10-sized images, batch 128, loading included, in one run:

| loop | images/s | over the usual |
|:--|--:|--:|
| the usual script: PIL transforms one by one, DataLoader, fp32 | {usual:.0f} | 1 |
| this project's loop | {loops["decef"]:.0f} | {loops["decef"] / usual:.2f} |
| ... on images of 3/4 the size | {loops["0.75"]:.0f} | {loops["0.75"] / usual:.2f} |
| ... on images of half the size | {loops["0.5"]:.0f} | {loops["0.5"] / usual:.2f} |
"""
    write([*rows, {"loops": dict(loops)}], out, made, text)


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


def _training(network: nn.Module, x: Tensor, labels: Tensor) -> Callable[[], object]:
    training = Training(network, STEP, x.device)
    training.start_epoch()
    x = x.contiguous(memory_format=torch.channels_last)
    return lambda: training.step(x, labels, STEP.lr, 0)


def _our_loop(network: nn.Module, images: Images, batch_size: int, scale: float) -> Callable[[], object]:
    training = Training(network, STEP, images.device)
    mean, std = (torch.tensor(values, device=images.device) for values in (CIFAR10.mean, CIFAR10.std))

    def epoch() -> None:
        training.start_epoch()
        generator = torch.Generator().manual_seed(0)
        for batch, labels in images.batches(batch_size, generator):
            x = network_input(batch, mean, std, STEP.channels_last, scale)
            training.step(x, labels, STEP.lr, 0)
        training.finish_epoch()

    return epoch


def _usual_loop(network: nn.Module, images: Tensor, labels: Tensor, batch_size: int) -> Callable[[], object]:
    import_torchvision()
    from torchvision import transforms

    transform = transforms.Compose(
        [
            transforms.RandomCrop(32, padding=4),
            transforms.RandomHorizontalFlip(),
            transforms.ToTensor(),
            transforms.Normalize(CIFAR10.mean, CIFAR10.std),
        ]
    )
    data = _PilImages(images, labels, transform)
    loader = DataLoader(data, batch_size, shuffle=True, num_workers=os.cpu_count() or 1, drop_last=True)
    device = next(network.parameters()).device
    optimizer = torch.optim.SGD(network.parameters(), lr=STEP.lr, momentum=0.9, weight_decay=5e-4)

    def epoch() -> None:
        network.train()
        for x, y in loader:
            x, y = x.to(device), y.to(device)
            output = network(x)
            loss = F.cross_entropy(output, y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            loss.item()
            (output.argmax(1) == y).sum().item()

    return epoch


class _PilImages(TorchDataset):
    """As torchvision's CIFAR10: an array, an image at a time through PIL."""

    def __init__(self, images: Tensor, labels: Tensor, transform: Callable[[Any], Tensor]) -> None:
        self.images, self.labels, self.transform = images.permute(0, 2, 3, 1).numpy(), labels.tolist(), transform

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        from PIL import Image

        return self.transform(Image.fromarray(self.images[index])), self.labels[index]
