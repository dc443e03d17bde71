"""Fine-tuning and evaluation on any loader of (images, labels), without a dataset or config of this package."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from decef.copies import copied
from decef.inputs import forked_generator, without_leftover
from decef.training.config import TrainConfig
from decef.training.loop import Training

log = logging.getLogger(__name__)

Loader = Iterable[Any]


def batches(data: Loader, classes: int | None = None) -> Iterator[tuple[Tensor, Tensor]]:
    """Images and labels of every batch, checked.

    Args:
        data: yields pairs of images `(B, ...)` and class indices `(B,)`.
        classes: number of the network's outputs; labels must be below it.

    Raises:
        ValueError: something else comes, or nothing at all.
    """
    empty = True
    for batch in data:
        empty = False
        if not (isinstance(batch, (tuple, list)) and len(batch) >= 2 and all(isinstance(v, Tensor) for v in batch[:2])):
            raise ValueError("the data must yield batches (images, labels) of tensors, as a DataLoader does")
        images, labels = batch[:2]
        if images.dim() != 4 or not images.is_floating_point():
            raise ValueError(f"images must be (B, C, H, W) in floating point, not {images.dtype} {tuple(images.shape)}")
        if labels.is_floating_point() or labels.dim() != 1 or len(labels) != len(images):
            raise ValueError(f"labels must be one class index for each image, not {labels.dtype} {tuple(labels.shape)}")
        if classes is not None:
            check_labels(labels, classes)
        yield images, labels.long()
    if empty:
        raise ValueError("the data yields no batch: give a loader that can be iterated again and again")


def check_labels(labels: Tensor, classes: int) -> None:
    """Raise ValueError if a label is none of a network with so many outputs."""
    if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < classes:
        raise ValueError(
            f"the labels go from {int(labels.min())} to {int(labels.max())}, but the network has {classes} outputs"
        )


def count_batches(data: Loader) -> int:
    """How many batches a loader yields; it is iterated if it doesn't say."""
    try:
        return len(data)  # type: ignore[arg-type]
    except TypeError:
        log.info("counting the batches of a loader that doesn't say how many it has")
        return sum(1 for _ in data)


def head_size(model: nn.Module, images: Tensor) -> int:
    """Number of the network's outputs; the network is left in evaluation mode.

    Raises:
        ValueError: the network doesn't run on these images, or gives something else than logits `(B, classes)`.
    """
    return _logits(model.eval(), images[:1]).shape[1]


def check_trainable(model: nn.Module, images: Tensor) -> None:
    """Warn of convolutions that fine-tuning won't change.

    Raises:
        ValueError: fine-tuning would fail, as all parameters are frozen or there are no logits in training mode.
    """
    if not any(p.requires_grad for p in model.parameters()):
        raise ValueError("the network's parameters are frozen: model.requires_grad_() lets them train, or finetune=0")
    trains = [conv.weight.requires_grad for conv in model.modules() if isinstance(conv, nn.Conv2d)]
    if not all(trains):
        log.warning(
            "%d of %d convolutions are frozen and stay so in fine-tuning: model.requires_grad_() lets them train",
            trains.count(False), len(trains),
        )  # fmt: skip
    _logits(copied(model).train(), images[:2])


def _logits(model: nn.Module, images: Tensor) -> Tensor:
    device, mode = next(model.parameters()).device, "training" if model.training else "evaluation"
    try:
        with torch.no_grad(), forked_generator(device):
            logits = model(images.to(device))
    except (RuntimeError, ValueError, TypeError, AssertionError, IndexError) as error:
        raise ValueError(
            f"in {mode} mode the network doesn't run on images of {tuple(images.shape)}: {error}"
        ) from error
    if not isinstance(logits, Tensor) or logits.dim() != 2:
        got = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise ValueError(
            f"the network must give logits of shape (images, classes), but in {mode} mode it gives {got}: turn off "
            "auxiliary heads, or wrap it"
        )
    return logits


def top1(model: nn.Module, data: Loader) -> float:
    """Accuracy in percent; the network is left in evaluation mode.

    Raises:
        ValueError: see `batches`.
    """
    device = next(model.parameters()).device
    right = seen = 0
    model.eval()
    with torch.no_grad():  # what a network keeps for later calls, training may use too
        for images, labels in batches(data):
            right += int((model(images.to(device)).argmax(1).cpu() == labels.cpu()).sum())
            seen += len(labels)
    return 100 * right / seen


def finetune(
    model: nn.Module,
    data: Loader,
    config: TrainConfig,
    *,
    classes: int,
    steps: int,
    seed: int,
    saved: Mapping[str, Any] | None,
    save: Callable[[dict[str, Any]], None],
    progress: bool = False,
) -> None:
    """Train `model` in place for `config.epochs`, from where `saved` left off.

    The loader decides about batches, their order and augmentation. In every epoch torch's generator is seeded anew, so
    a loader that shuffles by it yields the same after a stop; after training it is as it was. A single image that is
    left over as the last batch is left out, as batch norm may find no variance in it.

    Args:
        model: on the device to train on.
        data: see `batches`.
        config: how; its batch size is not used.
        classes: number of the network's outputs.
        steps: an epoch, as many as there are batches.
        seed: see above.
        saved: what `save` got last, or None.
        save: called after every epoch with the state to go on from.
        progress: show a progress bar.

    Raises:
        ValueError: see `batches`.
        FloatingPointError: the loss is not finite.
    """
    device = next(model.parameters()).device
    first = saved["epoch"] if saved else 0
    if first >= config.epochs:
        return
    training = Training(model, config, device, saved=saved["training"] if saved else None)
    with (
        forked_generator(device),
        tqdm(
            total=steps * config.epochs, initial=first * steps, desc="fine-tune", disable=None if progress else True
        ) as bar,
    ):
        for epoch in range(first, config.epochs):
            torch.manual_seed(seed * 1_000_003 + epoch)
            there = without_leftover(islice(batches(data, classes), steps))
            on_device = ((_on(images, device, config), labels.to(device)) for images, labels in there)
            loss, accuracy = training.epoch(on_device, epoch, steps, bar.update)
            bar.set_postfix(epoch=epoch + 1, loss=f"{loss:.3f}", top1=f"{accuracy:.2f}")
            save({"epoch": epoch + 1, "training": training.state_dict()})


def step_seconds(model: nn.Module, data: Loader, config: TrainConfig) -> float:
    """Seconds of the fastest of three training steps, each with its batch; `model` is trained by them."""
    device = next(model.parameters()).device
    training = Training(model, config, device)
    training.start_epoch()
    taken, started = [], time.perf_counter()
    for step, (images, labels) in enumerate(islice(batches(data), 3)):
        training.step(_on(images, device, config), labels.to(device), config.lr, step)
        if device.type == "cuda":
            torch.cuda.synchronize(device)  # until here the step has only been begun
        taken.append(time.perf_counter() - started)
        started = time.perf_counter()
    return min(taken)


def _on(images: Tensor, device: torch.device, config: TrainConfig) -> Tensor:
    layout = torch.channels_last if config.channels_last else torch.contiguous_format
    return images.to(device).contiguous(memory_format=layout)
