"""The training loop: `fit`, and below it one epoch, one step and one evaluation."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypedDict

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from decef.atcd import ATCD
from decef.conversion import recalibrate
from decef.data import Data, UnreadableError
from decef.inputs import takes_channels_last
from decef.training.config import TrainConfig
from decef.training.distributed import Processes
from decef.training.optim import lr_at, make_optimizer, penalties
from decef.training.precision import autocast_for, resolve_precision
from decef.training.record import Metrics

EVAL_BATCH = 500
CHECK_EVERY = 50  # steps between checks that the loss is finite
ALONE = Processes()


def fit(
    model: nn.Module,
    train: Data,
    test: Data,
    config: TrainConfig,
    *,
    seed: int,
    orthogonality: float = 0.0,
    saved: Mapping[str, Any] | None,
    save: Callable[[dict[str, Any]], object],
    on_epoch: Callable[[Metrics], None],
    processes: Processes = ALONE,
    progress: bool = False,
) -> None:
    """Train `model` in place, from where `saved` left off to the last epoch.

    Everything random in an epoch follows from the seed and the epoch's number. A resumed run therefore gives the same
    result as an uninterrupted one: bit for bit, on the same CPU with the same number of threads. Several processes
    share every batch equally. Up to rounding they do what one process does, except for dropout and for batch norm,
    which sees only a process's part of the batch.

    Args:
        model: on the device of the images; the same in every process.
        train, test: the images. A share `config.validation` of the training images is set aside and only measured.
        config: how to train.
        seed: of data order, augmentation and dropout.
        orthogonality: weight of the layers' penalty in the loss, see `penalties`.
        saved: the state that `save` got last, or None.
        save: called by the first process after every epoch with the state to go on from.
        on_epoch: called by the first process after every epoch, before `save`.
        processes: those that train together.
        progress: show a progress bar.

    Raises:
        ValueError: the processes cannot share a batch equally, or the device cannot do what `config` asks for.
        FloatingPointError: the loss, or a kernel in ATCD, is not finite.
    """
    check_possible(config, train.device, processes)
    train, validation = split_validation(train, config.validation)
    steps = len(train) // _batch_size(config, len(train), processes)
    first = saved["epoch"] if saved else 0
    training = Training(model, config, train.device, orthogonality, processes, saved)
    with tqdm(
        total=steps * config.epochs,
        initial=first * steps,
        disable=None if progress and processes.is_first else True,
        unit="step",
    ) as bar:
        for epoch in range(first, config.epochs):
            started = time.perf_counter()
            trained = train_one_epoch(training, train, epoch, seed=seed, on_step=bar.update)
            test_loss, test_top1 = training.evaluate(test)
            val_loss, val_top1 = training.evaluate(validation) if validation is not None else (None, None)
            bar.set_postfix(epoch=epoch + 1, loss=f"{trained['train_loss']:.3f}", top1=f"{test_top1:.2f}")
            if processes.is_first:
                on_epoch(
                    Metrics(
                        epoch=epoch + 1,
                        lr=trained["lr"],
                        train_loss=trained["train_loss"],
                        train_top1=trained["train_top1"],
                        test_loss=test_loss,
                        test_top1=test_top1,
                        val_loss=val_loss,
                        val_top1=val_top1,
                        images_per_second=trained["images_per_second"],
                        seconds=time.perf_counter() - started,
                    )
                )
                save({"epoch": epoch + 1, **training.state_dict()})
            processes.barrier()


class Trained(TypedDict):
    """The part of `Metrics` that comes from training for an epoch."""

    lr: float
    train_loss: float
    train_top1: float
    images_per_second: float


def train_one_epoch(
    training: Training, train: Data, epoch: int, *, seed: int, on_step: Callable[[], object]
) -> Trained:
    """One pass over the training images.

    Args:
        training: the network in training.
        train: the images.
        epoch: its number, from 0.
        seed: see `fit`.
        on_step: called after every step.

    Raises:
        FloatingPointError: see `fit`.
    """
    started = time.perf_counter()
    config, processes = training.config, training.processes
    part = (processes.rank, processes.count)
    batch_size = _batch_size(config, len(train), processes)
    steps = len(train) // batch_size
    generator = seed_epoch(seed, epoch, processes.rank)
    scale = _scale_at(config, epoch)
    batches = train.batches(batch_size, generator, part)
    inputs = ((training.network_input(train, images, scale), labels) for images, labels in batches)
    loss, top1 = training.epoch(inputs, epoch, steps, on_step)
    seconds = time.perf_counter() - started
    if training.moved:
        again = train.batches(batch_size, generator, part)
        training.recalibrate(training.network_input(train, images, scale) for images, _ in again)
    return Trained(lr=training.lr, train_loss=loss, train_top1=top1, images_per_second=steps * batch_size / seconds)


class Training:
    """A network in training: everything that changes from step to step, and that is saved and resumed.

    Args:
        model: see `fit`.
        config: see `fit`.
        device: where the batches are.
        orthogonality: see `fit`.
        processes: see `fit`.
        saved: what `state_dict` returned, to resume from there.

    Attributes:
        moved: whether ATCD moved the kernels at the end of the epoch, so that batch norm's statistics no longer fit.
    """

    def __init__(
        self,
        model: nn.Module,
        config: TrainConfig,
        device: torch.device,
        orthogonality: float = 0.0,
        processes: Processes = ALONE,
        saved: Mapping[str, Any] | None = None,
    ) -> None:
        precision = resolve_precision(device, config.precision)
        self.model, self.config, self.processes = model, config, processes
        self.autocast = autocast_for(device, precision)
        if config.channels_last:
            model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        if saved is not None:
            model.load_state_dict(saved["model"])
        # With ATCD the dense twin is trained; at the end of an epoch it is the same function as `model`.
        self.atcd = ATCD(model, config.atcd) if config.atcd is not None else None
        trained = model if self.atcd is None else self.atcd.dense
        self._trained, self._orthogonality = trained, orthogonality
        self.moved = False
        self.optimizer = make_optimizer(trained, config, orthogonality)
        self._scaler = torch.amp.GradScaler(device.type, enabled=precision == "fp16")
        if saved is not None:
            self.optimizer.load_state_dict(saved["optimizer"])
            self._scaler.load_state_dict(saved["scaler"])
        self._shared: DistributedDataParallel | None = None
        if processes.count > 1:
            self._shared = DistributedDataParallel(trained, device_ids=[device] if device.type == "cuda" else None)
        self._forward: Callable[[Tensor], Tensor] = self._shared or trained
        self._zero = torch.zeros((), device=device)

    def state_dict(self) -> dict[str, Any]:
        """All that another `Training` needs to resume."""
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self._scaler.state_dict(),
        }

    def epoch(
        self, batches: Iterable[tuple[Tensor, Tensor]], epoch: int, steps: int, on_step: Callable[[], object]
    ) -> tuple[float, float]:
        """Train on the batches of an epoch; mean loss and top-1, see `finish_epoch`.

        Args:
            batches: inputs and labels, see `step`.
            epoch: its number, from 0.
            steps: how many batches every epoch has.
            on_step: called after every step.

        Raises:
            FloatingPointError: see `fit`.
        """
        self.start_epoch()
        for step, (x, labels) in enumerate(batches, start=epoch * steps):
            lr = lr_at(self.config, (step + 0.5) / (steps * self.config.epochs))
            self.step(x, labels, lr, step)
            on_step()
        return self.finish_epoch()

    @property
    def lr(self) -> float:
        """The learning rate of the last step."""
        return float(self.optimizer.param_groups[0]["lr"])

    def start_epoch(self) -> None:
        """Switch to training mode and reset the epoch's sums."""
        self._trained.train()
        self._loss, self._correct, self._bad_step = self._zero.clone(), self._zero.clone(), self._zero.clone()
        self._images = self._steps = 0

    def step(self, x: Tensor, labels: Tensor, lr: float, step: int) -> None:
        """One optimizer step on a process's part of a batch.

        Args:
            x: normalised images `(B, C, H, W)`.
            labels: class indices `(B,)`.
            lr: the learning rate.
            step: its number in the whole training, from 0, for messages.

        Raises:
            FloatingPointError: see `fit`.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.zero_grad()
        with self.autocast():
            logits = self._forward(x)
        loss = F.cross_entropy(logits.float(), labels, label_smoothing=self.config.label_smoothing)
        self._scaler.scale(loss + penalties(self._trained, self.config, self._orthogonality)).backward()
        self._scaler.step(self.optimizer)
        self._scaler.update()
        self._loss += loss.detach()
        self._correct += (logits.argmax(1) == labels).sum()
        self._images += len(labels)
        self._steps += 1
        fine = self._loss.isfinite() | (self._bad_step > 0)
        self._bad_step = torch.where(fine, self._bad_step, step + 1.0)  # the first such step, counted from 1
        if self._steps % CHECK_EVERY == 0:  # not every step, as it waits for the device
            self._check(lr)
        if self.atcd is not None:
            try:
                self.atcd.after_step()
            except FloatingPointError:
                raise _diverged(step + 1, lr) from None

    def finish_epoch(self) -> tuple[float, float]:
        """Mean loss, and top-1 in percent, over the epoch's batches of all processes.

        Raises:
            FloatingPointError: see `fit`.
        """
        self._check(self.lr)
        if self.atcd is not None:
            self.moved = self.atcd.after_epoch()
        self.processes.broadcast_buffers(self.model)  # batch norm's statistics
        loss, correct = self.processes.all_reduce(self._loss, self._correct)
        count = self.processes.count
        return loss.item() / (self._steps * count), 100 * correct.item() / (self._images * count)

    def recalibrate(self, inputs: Iterable[Tensor]) -> None:
        """Measure batch norm's statistics again, after ATCD moved the kernels."""
        with self.autocast():
            recalibrate(self.model, inputs)
        self.processes.broadcast_buffers(self.model)

    def network_input(self, data: Data, images: Tensor, scale: float = 1.0) -> Tensor:
        """See `network_input`."""
        return network_input(self.model, data, images, self.config.channels_last, scale)

    def evaluate(self, data: Data) -> tuple[float, float]:
        """`evaluate`, in the precision and memory layout of the training."""
        layout = self.config.channels_last
        return evaluate(self.model, data, channels_last=layout, autocast=self.autocast, processes=self.processes)

    def _check(self, lr: float) -> None:
        first = self.processes.least(torch.where(self._bad_step > 0, self._bad_step, math.inf))
        if first.isfinite():
            raise _diverged(int(first), lr)


def _diverged(step: int, lr: float) -> FloatingPointError:
    return FloatingPointError(f"the loss is not finite any more from step {step} on (learning rate {lr:g})")


@torch.no_grad()
def evaluate(
    model: nn.Module,
    data: Data,
    *,
    channels_last: bool | None = None,
    autocast: Callable[[], AbstractContextManager[object]] = nullcontext,
    processes: Processes = ALONE,
) -> tuple[float, float]:
    """Mean cross-entropy, and top-1 accuracy in percent, over one view of every image. Processes share the images.

    In channels-last layout, if `channels_last` is None where the network runs in that.
    """
    model.eval()
    zero = torch.zeros((), device=data.device)
    loss, correct, seen = zero.clone(), zero.clone(), zero.clone()
    if processes.count > 1:
        data = data.subset(slice(processes.rank, None, processes.count))
    for images, labels in data.views(EVAL_BATCH):
        if channels_last is None:
            channels_last = takes_channels_last(model, network_input(model, data, images[:1], False))
        with autocast():
            logits = model(network_input(model, data, images, channels_last))
        loss += F.cross_entropy(logits.float(), labels, reduction="sum")
        correct += (logits.argmax(1) == labels).sum()
        seen += len(labels)
    loss, correct, seen = processes.all_reduce(loss, correct, seen)
    if not seen:
        raise UnreadableError("none of the images to test on can be read: repair or replace them")
    return (loss / seen).item(), (100 * correct / seen).item()


def seed_epoch(seed: int, epoch: int, rank: int = 0) -> torch.Generator:
    """Seed the global generators (for dropout) for an epoch and a process; return the generator for the data.

    On a CPU, torch's generator takes the lowest 32 bits of a seed.
    """
    own = (seed * 1_000_003 + epoch) * 2 + 1 + (rank << 40)
    own = (own ^ own >> 32) % 2**32
    torch.manual_seed(own)
    np.random.seed(own)
    return torch.Generator().manual_seed((seed * 1_000_003 + epoch) * 2)


def validation_images(images: int, share: float) -> int:
    """How many training images are set aside.

    Raises:
        ValueError: none are although some were asked for, or all.
    """
    held_out = round(share * images)
    if held_out == images or (share and not held_out):
        raise ValueError(f"train.validation={share:g} sets {held_out} of {images} training images aside")
    return held_out


def split_validation(train: Data, share: float) -> tuple[Data, Data | None]:
    """The images to train on, and a random share of them that is set aside; None where that is none."""
    # The same images for every seed, so that seeds differ only in training.
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(0))
    held_out = validation_images(len(train), share)
    if not held_out:
        return train, None
    return train.subset(order[held_out:].sort().values), train.subset(order[:held_out].sort().values)


def check_possible(config: TrainConfig, device: torch.device, processes: Processes = ALONE) -> None:
    """Check that a training is possible here, before anything is loaded.

    Raises:
        ValueError: it is not; the message says why and what to change.
    """
    if device.type != "cuda" and config.precision == "fp16":
        raise ValueError(f"train.precision=fp16 needs a GPU, and this runs on {device.type}: say bf16 or fp32")
    if config.batch_size % processes.count:
        raise ValueError(
            f"train.batch_size={config.batch_size} can't be shared equally by {processes.count} processes: it must be "
            "a multiple of their number"
        )


def _batch_size(config: TrainConfig, images: int, processes: Processes) -> int:
    """Images per step over all processes: as many as asked for, or fewer if there are fewer."""
    batch_size = min(config.batch_size, images // processes.count * processes.count)
    if not batch_size:
        raise ValueError(f"{images} training images are too few for {processes.count} processes")
    return batch_size


def _scale_at(config: TrainConfig, epoch: int) -> float:
    return next((scale for until, scale in config.scales if (epoch + 0.5) / config.epochs < until), 1.0)


def network_input(
    model: nn.Module, data: Data, images: Tensor, channels_last: bool = True, scale: float = 1.0
) -> Tensor:
    """Images as a network takes them: normalised, in its dtype, resized by `scale`, in the layout asked for.

    Args:
        model: the network.
        data: where the images are from, which knows their mean and standard deviation.
        images: uint8, `(B, C, H, W)`.
        channels_last: the memory layout.
        scale: of height and width.
    """
    x = data.normalize(images).to(next((p.dtype for p in model.parameters()), torch.float32))
    if scale != 1:
        x = F.interpolate(x, size=scaled(x.shape[2:], scale), mode="bilinear", antialias=True)
    return x.contiguous(memory_format=torch.channels_last) if channels_last else x


def scaled(size: Sequence[int], scale: float) -> list[int]:
    """Height and width of images of which `train.scales` takes this scale."""
    return [max(1, round(side * scale)) for side in size]
