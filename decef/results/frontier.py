"""results/frontier: accuracy against measured time, by layer type and precision."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from decef.conversion import convert
from decef.data import Data
from decef.inference.deploy import Deployed, Deployer
from decef.inference.engines import need_engines
from decef.inference.timing import inference_call, times_beside
from decef.machine import Environment
from decef.models.released import load, read
from decef.plans import planner
from decef.ranks import Budget
from decef.results.pages import write_measured
from decef.results.without_finetuning import moments_of, recalibrated_on
from decef.training.record import load_records

log = logging.getLogger(__name__)

ROUNDS = 40  # interleaved; the median of their ratios counts
CALIBRATION = 256  # images
DECOMPOSED, FINETUNED = "decomposed", "fine-tuned"


@dataclass(frozen=True)
class Point:
    """A network to be measured: its layer type, its budget in words, `DECOMPOSED` or `FINETUNED`, and itself."""

    layer: str
    budget: str
    stage: str
    network: nn.Module


def decomposed(
    model: nn.Module,
    layers: Sequence[str],
    shares: Sequence[float],
    *,
    exclude: str | None,
    seen: Data,
    augmented: Data,
) -> Iterator[Point]:
    """A trained network decomposed to shares of its FLOPs, fitted to its layers' outputs, batch norm measured again.

    Args:
        model: the network; it stays as it is.
        layers: layer types.
        shares: of the dense network's FLOPs.
        exclude: pattern of the names that stay dense.
        seen: training images to fit to.
        augmented: training images as they were augmented in training, for batch norm.

    Raises:
        ValueError: there is no such layer type, or it can't have so small a share; nothing was decomposed then.
    """
    input_size = next(seen.views(1))[0].shape[1:]
    planners = {layer: planner(model, layer, exclude=exclude, input_size=input_size) for layer in layers}
    plans = [(layer, share, make(Budget(flops=share))) for share in shares for layer, make in planners.items()]

    def points() -> Iterator[Point]:
        moments = moments_of(seen, model)
        for layer, share, made in plans:
            network = recalibrated_on(augmented, convert(model, made, data=moments))
            yield Point(layer, f"{share:g} of FLOPs", DECOMPOSED, network)

    return points()


def finetuned(
    results: Path, model: str, weights_md5: str, schedule: str, mean: Sequence[float], std: Sequence[float]
) -> Iterator[Point]:
    """The released networks of a results folder that began with some weights and were trained on by a schedule.

    Args:
        results: folder with runs and networks.
        model: name of the network.
        weights_md5: of its weights.
        schedule: name of the training schedule.
        mean, std: how inputs must be normalised; networks that want it otherwise are logged and left out.
    """
    records = {record.id: record for record in load_records(results)}
    for path in sorted((results / "networks").glob("*.safetensors")):
        card, _ = read(path)
        record = records.get(card.run)
        if record is None:
            continue
        config = record.config
        if (config.model.name, config.model.weights_md5, config.train.name) == (model, weights_md5, schedule):
            if np.array_equal(np.round([*card.mean, *card.std], 6), np.round([*mean, *std], 6)):
                yield Point(record.layer, record.rank_setting, FINETUNED, load(path))
            else:
                log.warning("left out: %s is for inputs that are normalised in another way", path.name)


def measure(
    dense: nn.Module,
    points: Iterable[Point],
    test: Data,
    seen: Data,
    *,
    batch: int,
    precisions: Sequence[str],
    progress: bool = False,
) -> Iterator[dict[str, Any]]:
    """Accuracy and time of networks in several precisions, each deployed, in the engine that is fastest for it.

    Networks of equal shapes, such as one before and after fine-tuning, all run as was fastest for the first.

    Args:
        dense: the dense network, which comes first.
        points: the others.
        test: images to measure accuracy on.
        seen: training images; the first ones are timed, and calibrate what runs in 8 bits.
        batch: images in the call that is timed.
        precisions: some of `decef.inference.engines.PRECISIONS`.
        progress: show progress bars.

    Yields:
        A row per network and precision: `layer`, `budget`, `stage`, `precision`, `top1` in percent, `seconds` of a
        call, `time`, that over the dense network's in fp32, see `times_beside`, `engine`, `forms`, `bytes` of its file.

    Raises:
        ValueError: a precision that no engine has here, a batch without images, or fewer images than a batch.
    """
    if batch < 1:
        raise ValueError(f"a batch of {batch} images: it must be at least 1")
    if len(seen) < batch:
        raise ValueError(f"batches of {batch} need as many training images, not {len(seen)}")
    seen = seen.subset(slice(0, min(len(seen) // batch, max(1, CALIBRATION // batch)) * batch))
    calibration = [seen.normalize(images) for images, _ in seen.views(batch)]
    x = calibration[0]

    engines = {
        precision: [engine for engine in need_engines(x.device, precision) if engine != "compile"]  # too slow
        for precision in ("fp32", *precisions)
    }
    chosen: dict[Any, dict[str, Any]] = {}

    def deployed(deployer: Deployer, shapes: list[Any], precision: str) -> Deployed:
        calibrate = calibration if precision == "int8" else None
        if (*shapes, precision) in chosen:
            return deployer.apply(chosen[*shapes, precision], calibrate)
        fastest = deployer.deploy(engines[precision], precision, calibrate)
        chosen[*shapes, precision] = fastest.choice
        return fastest

    reference = None
    for point in chain([Point("conv2d", "dense", "", dense)], points):
        deployer = Deployer(point.network, x, progress=progress)
        shapes = [(name, value.shape) for name, value in point.network.state_dict().items()]
        reference = reference or deployed(deployer, shapes, "fp32")
        for precision in precisions:
            network = deployed(deployer, shapes, precision)
            seconds, ratio = times_beside(inference_call(reference, x), inference_call(network, x), ROUNDS)
            forms = Counter(network.forms.values())
            yield {
                "layer": point.layer,
                "budget": point.budget,
                "stage": point.stage,
                "precision": precision,
                "top1": top1(network, test, batch),
                "seconds": ratio * seconds,
                "time": ratio,
                "engine": network.engine,
                "forms": ", ".join(f"{count} {form}" for form, count in sorted(forms.items())),
                "bytes": network.bytes,
            }


def top1(network: nn.Module, test: Data, batch: int) -> float:
    """Accuracy in percent of a network that may take batches of one size only."""
    right = total = 0
    for images, labels in test.views(batch):
        missing = batch - len(images)
        x: Tensor = torch.cat([images, images[:1].expand(missing, *images.shape[1:])]) if missing else images
        right += int((network(test.normalize(x))[: len(labels)].argmax(1) == labels).sum())
        total += len(labels)
    return 100 * right / total


def write_frontier(rows: Sequence[dict[str, Any]], out: Path, about: str, made: Environment) -> None:
    """Write rows of `measure`; see `write_measured`."""
    frame = pd.DataFrame(rows)
    # Seconds of different moments can't be compared on a shared machine, as the ratios can.
    shown = frame.assign(MB=frame.bytes / 1e6).drop(columns=["seconds", "bytes"])
    write_measured("frontier", frame, shown.round({"top1": 2, "time": 3, "MB": 2}).fillna(""), out, about, made)
