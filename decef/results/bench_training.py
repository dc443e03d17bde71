"""results/bench: times of training steps and of whole training loops."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from decef.costs import total_cost
from decef.data import DATASETS, Images
from decef.data.torchvision_cpu import import_torchvision
from decef.inference.timing import Roofline, interleaved_times, peak_memory
from decef.layers import LAYERS
from decef.machine import cores
from decef.models import create_model
from decef.results.bench_inference import Case, networks, plans
from decef.results.pages import write_bench
from decef.training.config import TrainConfig
from decef.training.loop import Training
from decef.training.precision import resolve_precision

TRAINING = tuple(
    Case(network, size, batch, tuple(LAYERS))
    for network, size, batch in (("resnet20", 32, 128), ("vgg16_bn", 32, 128), ("torchvision/resnet18", 64, 32))
)
CIFAR10 = DATASETS["cifar10"]
STEP = TrainConfig("bench", epochs=1, batch_size=128, lr=0.01)


def bench_steps(cases: Sequence[Case], share: float, device: torch.device) -> Iterator[dict[str, Any]]:
    """Times of a training step (forward, backward, update) of every layer type's network.

    Yields:
        A row per case and layer type: `network`, `batch`, `layer`, `flops_ratio`, `seconds` (median, all of a case
        interleaved), `bound` (the least seconds that its arithmetic and memory traffic allow, see `Roofline.seconds`),
        `memory` (peak bytes).
    """
    dtype = torch.bfloat16 if resolve_precision(device, STEP.precision) == "bf16" else torch.float32
    roofline = Roofline.measure(device, dtype)
    for case in cases:
        x = torch.randn(case.batch, *case.input_size, device=device)
        labels = torch.randint(0, 10, (case.batch,), device=device)
        dense = case.dense().to(device)
        found = networks(dense, plans(case, dense, share))
        dense_flops = total_cost(found["conv2d"], case.input_size)["flops"]
        steps = {layer: _training(network, x, labels) for layer, network in found.items()}
        seconds = interleaved_times(steps)
        for layer, network in found.items():
            yield {
                "network": case.network,
                "batch": case.batch,
                "layer": layer,
                "flops_ratio": total_cost(network, case.input_size)["flops"] / dense_flops,
                "seconds": seconds[layer],
                "bound": roofline.seconds(steps[layer]),
                "memory": peak_memory(steps[layer], device),
            }


def bench_loops(device: torch.device, *, batch: int = 128, steps: int = 8, rounds: int = 3) -> dict[str, float]:
    """Images per second in training, with the usual script's loop and with ours, measured side by side.

    Returns:
        By name of the loop. "usual" is what public scripts do: single PIL images through torchvision's transforms, a
        `DataLoader` with a worker per core, contiguous images, loss and accuracy read at every step. "decef" is this
        project's loop on the same images. "0.75" and "0.5" are the same loop on images of 0.75 and 0.5 of the size, as
        schedule `quick` has them for most of its epochs.
    """
    images = torch.randint(0, 256, (steps * batch, 3, 32, 32), dtype=torch.uint8)
    labels = torch.randint(0, 10, (len(images),))
    model = create_model("resnet20", num_classes=10).to(device)
    ours = Images(images, labels, CIFAR10.mean, CIFAR10.std, crop_padding=4, flip=True).to(device)
    loops: dict[str, Callable[[], object]] = {"usual": _usual_loop(copy.deepcopy(model), images, labels, batch)}
    for name, scale in (("decef", 1.0), ("0.75", 0.75), ("0.5", 0.5)):
        loops[name] = _our_loop(copy.deepcopy(model), ours, batch, scale)
    seconds = interleaved_times(loops, rounds)
    return {name: len(images) / value for name, value in seconds.items()}


def write_training(
    rows: Sequence[dict[str, Any]], loops: Mapping[str, float], out: Path, made: Mapping[str, Any]
) -> None:
    """Write the results of `bench_steps` and `bench_loops` as <out>.json, and as a page for people as <out>.md.

    Args:
        rows: of `bench_steps`.
        loops: of `bench_loops`.
        out: path without ending.
        made: where, when and with which code.
    """
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
            "bound": frame.bound / dense.bound.loc[frame.network].to_numpy(),
            "of the roofline": frame.bound / frame.seconds,
            "memory": frame.memory / dense.memory.loc[frame.network].to_numpy(),
        }
    )
    table = shown.round(2).to_markdown(index=False)
    everything = [*rows, {"loops": dict(loops)}]
    write_bench("bench_training", everything, out, made, table=table, loops=loops)


def _training(network: nn.Module, x: Tensor, labels: Tensor) -> Callable[[], object]:
    training = Training(network, STEP, x.device)
    training.start_epoch()
    x = x.contiguous(memory_format=torch.channels_last)
    return lambda: training.step(x, labels, STEP.lr, 0)


def _our_loop(network: nn.Module, images: Images, batch_size: int, scale: float) -> Callable[[], object]:
    training = Training(network, STEP, images.device)

    def epoch() -> None:
        training.start_epoch()
        generator = torch.Generator().manual_seed(0)
        for batch, labels in images.batches(batch_size, generator):
            x = training.network_input(images, batch, scale)
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
    workers = cores()  # which an epoch of few batches must not pay for starting
    loader = DataLoader(data, batch_size, shuffle=True, num_workers=workers, drop_last=True, persistent_workers=True)
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


class _PilImages(Dataset[Any]):
    """Like torchvision's CIFAR10: an array whose images go through PIL one at a time."""

    def __init__(self, images: Tensor, labels: Tensor, transform: Callable[[Any], Tensor]) -> None:
        self.images, self.labels, self.transform = images.permute(0, 2, 3, 1).numpy(), labels.tolist(), transform

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        from PIL import Image

        return self.transform(Image.fromarray(self.images[index])), self.labels[index]
