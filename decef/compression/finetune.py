"""Fine-tuning and evaluation on any loader of (images, labels), without a dataset or config of this package."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from decef.training.config import TrainConfig
from decef.training.loop import Training
from decef.training.optim import lr_at

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
        if classes is not None and len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < classes:
            raise ValueError(
                f"the labels go from {int(labels.min())} to {int(labels.max())}, but the network has {classes} outputs"
            )
        yield images, labels
    if empty:
        raise ValueError("the data yields no batch: give a loader that can be iterated again and again")


def count_batches(data: Loader) -> int:
    """How many batches a loader yields; it is iterated if it doesn't say."""
    try:
        return len(data)  # type: ignore[arg-type]
    except TypeError:
        return sum(1 for _ in data)


def head_size(model: nn.Module, images: Tensor) -> int:
    """Number of the network's outputs.

    Raises:
        ValueError: the network doesn't run on these images, or gives something else than logits `(B, classes)`.
    """
    device = next(model.parameters()).device
    try:
        with torch.no_grad():
            logits = model.eval()(images[:1].to(device))
    except (RuntimeError, ValueError, TypeError) as error:
        raise ValueError(f"the network doesn't run on images of {tuple(images.shape)}: {error}") from error
    if not isinstance(logits, Tensor) or logits.dim() != 2:
        raise ValueError("the network must give logits of shape (images, classes)")
    return logits.shape[1]


def top1(model: nn.Module, data: Loader) -> float:
    """Accuracy in percent, in evaluation mode."""
    device = next(model.parameters()).device
    right = seen = 0
    model.eval()
    with torch.inference_mode():
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
    seed: int,
    saved: Mapping[str, Any] | None,
    save: Callable[[dict[str, Any]], None],
    progress: bool = False,
) -> None:
    """Train `model` in place for `config.epochs`, from where `saved` left off.

    The loader decides about batches, their order and augmentation. Before every epoch torch's generator is seeded, so a
    loader that shuffles by it yields the same after a stop.

    Args:
        model: on the device to train on.
        data: see `batches`.
        config: how; its batch size is not used.
        classes: number of the network's outputs.
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
    steps = count_batches(data)
    training = Training(model, config, device, saved=saved["training"] if saved else None)
    with tqdm(
        total=steps * config.epochs, initial=first * steps, desc="fine-tune", disable=None if progress else True
    ) as bar:
        for epoch in range(first, config.epochs):
            torch.manual_seed(seed * 1_000_003 + epoch)
            training.start_epoch()
            for step, (images, labels) in enumerate(islice(batches(data, classes), steps), start=epoch * steps):
                lr = lr_at(config, (step + 0.5) / (steps * config.epochs))
                x = images.to(device)
                if config.channels_last and x.dim() == 4:
                    x = x.contiguous(memory_format=torch.channels_last)
                training.step(x, labels.to(device), lr, step)
                bar.update()
            loss, accuracy = training.finish_epoch()
            bar.set_postfix(epoch=epoch + 1, loss=f"{loss:.3f}", top1=f"{accuracy:.2f}")
            save({"epoch": epoch + 1, "training": training.state_dict()})


def step_seconds(model: nn.Module, data: Loader, config: TrainConfig) -> float:
    """Seconds that one step takes here, on a copy of the network's layout; `model` is trained by it."""
    device = next(model.parameters()).device
    training = Training(model, config, device)
    training.start_epoch()
    taken = []
    for step, (images, labels) in enumerate(islice(batches(data), 3)):
        started = time.perf_counter()
        training.step(images.to(device), labels.to(device), config.lr, step)
        taken.append(time.perf_counter() - started)
    return min(taken)
