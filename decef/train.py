"""The training loop: `fit`, and below it what one epoch and one evaluation are."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol, TypedDict

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from decef.atcd import ATCD
from decef.data import Images, augmented_batches, normalize
from decef.layers import BasisConv2d, DeCEFConv2d

SCHEDULES = ("onecycle", "cosine", "step")
PRECISIONS = ("auto", "fp32", "bf16")
EVAL_BATCH = 500


class Metrics(TypedDict):
    """What an epoch leaves behind. Losses are cross-entropies, top1 is in percent, the rate in images per second."""

    epoch: int
    lr: float
    train_loss: float
    train_top1: float
    test_loss: float
    test_top1: float
    val_loss: float | None
    val_top1: float | None
    images_per_second: float
    seconds: float


class State(Protocol):
    """Where `fit` puts what it must not lose."""

    def load(self) -> dict[str, Any] | None:
        """The last saved state, None at the first start."""

    def save(self, state: dict[str, Any]) -> None:
        """Save a state, replacing the last one."""


@dataclass(frozen=True)
class TrainConfig:
    """How to train. `configs/train/*.yaml` says what each is for."""

    name: str
    epochs: int
    batch_size: int
    lr: float
    momentum: float = 0.9
    nesterov: bool = True
    weight_decay: float = 5e-4
    label_smoothing: float = 0.0
    schedule: str = "onecycle"
    warmup: float = 0.2
    milestones: tuple[float, ...] = (0.5, 0.75)
    gamma: float = 0.1
    scales: tuple[tuple[float, float], ...] = ()
    orthogonality: float = 0.0
    atcd: int | str | None = None
    validation: float = 0.0
    precision: str = "auto"
    channels_last: bool = True
    compile: bool = False

    def __post_init__(self) -> None:
        for key in ("epochs", "batch_size"):
            if not isinstance(getattr(self, key), int):
                raise ValueError(f"train.{key}={getattr(self, key)!r} must be a whole number")
        for key in (
            "lr",
            "momentum",
            "weight_decay",
            "label_smoothing",
            "warmup",
            "gamma",
            "orthogonality",
            "validation",
        ):
            if not isinstance(getattr(self, key), (int, float)):
                raise ValueError(f"train.{key}={getattr(self, key)!r} must be a number")
        checks = [
            (self.epochs >= 1, "train.epochs", "at least 1"),
            (self.batch_size >= 1, "train.batch_size", "at least 1"),
            (self.lr > 0, "train.lr", "above 0"),
            (0 <= self.momentum < 1, "train.momentum", "in [0, 1)"),
            (self.momentum > 0 or not self.nesterov, "train.nesterov", "false when momentum is 0"),
            (self.weight_decay >= 0, "train.weight_decay", "at least 0"),
            (0 <= self.label_smoothing < 1, "train.label_smoothing", "in [0, 1)"),
            (self.schedule in SCHEDULES, "train.schedule", f"one of {', '.join(SCHEDULES)}"),
            (0 <= self.warmup < 1, "train.warmup", "a share of the training, in [0, 1)"),
            (all(0 < m < 1 for m in self.milestones), "train.milestones", "shares of the training, in (0, 1)"),
            (self.gamma > 0, "train.gamma", "above 0"),
            (
                all(len(s) == 2 and 0 < s[0] < 1 and 0 < s[1] <= 1 for s in self.scales),
                "train.scales",
                "pairs [share of the training, scale of the images]",
            ),
            (self.orthogonality >= 0, "train.orthogonality", "at least 0"),
            (
                self.atcd in (None, "epoch")
                or (isinstance(self.atcd, int) and not isinstance(self.atcd, bool) and self.atcd >= 1),
                "train.atcd",
                "null, 'epoch' or a number of steps",
            ),
            (0 <= self.validation < 1, "train.validation", "a share of the training images, in [0, 1)"),
            (self.precision in PRECISIONS, "train.precision", f"one of {', '.join(PRECISIONS)}"),
        ]
        for fine, name, must in checks:
            if not fine:
                raise ValueError(f"{name}={getattr(self, name.split('.')[1])!r} must be {must}")


def fit(
    model: nn.Module,
    train: Images,
    test: Images,
    config: TrainConfig,
    *,
    mean: Tensor,
    std: Tensor,
    crop_padding: int,
    flip: bool,
    seed: int,
    state: State,
    on_epoch: Callable[[Metrics], None],
    progress: bool = False,
) -> None:
    """Train `model` in place, from where `state` left off, to the last epoch.

    Everything random in an epoch follows from the seed and the epoch's number, so a run that was interrupted goes on
    as if it had not been: on the same CPU with the same number of threads, bit for bit.

    Args:
        model: on the device of the images.
        train, test: the images; `config.validation` of the training images are set aside and only measured.
        mean, std: `(C,)`, see `normalize`.
        crop_padding, flip: see `augmented_batches`.
        seed: of data order and augmentation.
        state: loaded before the first epoch and saved after every one.
        on_epoch: called after every epoch, before the state is saved.
        progress: show a bar.

    Raises:
        FloatingPointError: the loss of an epoch is not finite.
    """
    device = train.images.device
    train, validation = _split(train, config.validation)
    batch_size = min(config.batch_size, len(train))
    steps = len(train) // batch_size
    if config.channels_last:
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    saved, first = state.load(), 0
    if saved is not None:
        model.load_state_dict(saved["model"])
        first = saved["epoch"]
    # With ATCD the dense twin is trained; at the end of an epoch it is the same function as `model`.
    atcd = ATCD(model, config.atcd) if config.atcd is not None else None
    trained = model if atcd is None else atcd.dense
    optimizer = make_optimizer(trained, config)
    if saved is not None:
        optimizer.load_state_dict(saved["optimizer"])
    forward: Callable[[Tensor], Tensor] = torch.compile(trained) if config.compile else trained
    autocast = autocast_for(device, config.precision)

    with tqdm(
        total=steps * config.epochs, initial=first * steps, disable=None if progress else True, unit="step"
    ) as bar:
        for epoch in range(first, config.epochs):
            started = time.perf_counter()
            generator = seed_epoch(seed, epoch)
            trained.train()
            scale = _scale_at(config, epoch)
            loss_sum = torch.zeros((), device=device)
            correct = torch.zeros((), device=device, dtype=torch.long)
            batches = augmented_batches(train, batch_size, generator, crop_padding=crop_padding, flip=flip)
            for step, (images, labels) in enumerate(batches, start=epoch * steps):
                for group in optimizer.param_groups:
                    group["lr"] = lr_at(config, (step + 0.5) / (steps * config.epochs))
                x = _input(images, mean, std, config.channels_last, scale)
                with autocast():
                    logits = forward(x)
                loss = F.cross_entropy(logits.float(), labels, label_smoothing=config.label_smoothing)
                total = loss
                if config.orthogonality:
                    total = loss + config.orthogonality * orthogonality(trained)
                optimizer.zero_grad()
                total.backward()
                optimizer.step()
                if atcd is not None:
                    atcd.after_step()
                loss_sum += loss.detach()
                correct += (logits.argmax(1) == labels).sum()
                bar.update()
            train_loss = loss_sum.item() / steps  # the only wait for the device in an epoch
            seconds = time.perf_counter() - started
            if not math.isfinite(train_loss):
                raise FloatingPointError(
                    f"the loss is {train_loss} in epoch {epoch + 1} (learning rate up to {config.lr:g}): try a "
                    "smaller train.lr, a longer train.warmup or train.precision=fp32"
                )
            if atcd is not None:
                atcd.after_epoch()
            measure = partial(
                evaluate, model, mean=mean, std=std, channels_last=config.channels_last, autocast=autocast
            )
            test_loss, test_top1 = measure(test)
            val_loss, val_top1 = measure(validation) if len(validation) else (None, None)
            metrics = Metrics(
                epoch=epoch + 1,
                lr=optimizer.param_groups[0]["lr"],
                train_loss=train_loss,
                train_top1=100 * correct.item() / (steps * batch_size),
                test_loss=test_loss,
                test_top1=test_top1,
                val_loss=val_loss,
                val_top1=val_top1,
                images_per_second=steps * batch_size / seconds,
                seconds=time.perf_counter() - started,
            )
            bar.set_postfix(epoch=epoch + 1, loss=f"{train_loss:.3f}", top1=f"{test_top1:.2f}")
            on_epoch(metrics)
            state.save({"epoch": epoch + 1, "model": model.state_dict(), "optimizer": optimizer.state_dict()})


@torch.no_grad()
def evaluate(
    model: nn.Module,
    data: Images,
    *,
    mean: Tensor,
    std: Tensor,
    channels_last: bool = True,
    autocast: Callable[[], AbstractContextManager[object]] = nullcontext,
) -> tuple[float, float]:
    """Mean cross-entropy and top-1 accuracy in percent, one view of every image."""
    model.eval()
    loss = torch.zeros((), device=data.images.device)
    correct = torch.zeros((), device=data.images.device, dtype=torch.long)
    for images, labels in zip(data.images.split(EVAL_BATCH), data.labels.split(EVAL_BATCH), strict=True):
        with autocast():
            logits = model(_input(images, mean, std, channels_last, 1.0))
        loss += F.cross_entropy(logits.float(), labels, reduction="sum")
        correct += (logits.argmax(1) == labels).sum()
    return loss.item() / len(data), 100 * correct.item() / len(data)


def make_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.SGD:
    """SGD over what is trainable; filters that a penalty holds orthonormal get no weight decay."""
    free: set[nn.Parameter] = set()
    if config.orthogonality:
        free = {m.eigenfilters for m in model.modules() if isinstance(m, DeCEFConv2d)}
        free |= {m.basis for m in model.modules() if isinstance(m, BasisConv2d)}
    trainable = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trainable if p not in free], "weight_decay": config.weight_decay},
        {"params": [p for p in trainable if p in free], "weight_decay": 0.0},
    ]
    return torch.optim.SGD(
        [g for g in groups if g["params"]], lr=config.lr, momentum=config.momentum, nesterov=config.nesterov
    )


def lr_at(config: TrainConfig, done: float) -> float:
    """The learning rate when a share `done` of the training is over, in [0, 1].

    "onecycle" rises linearly during the warm-up and falls linearly to 0; "cosine" rises the same way and falls as
    half a cosine; "step" is multiplied by gamma at each milestone.
    """
    if config.schedule == "step":
        return config.lr * config.gamma ** sum(done >= milestone for milestone in config.milestones)
    if done < config.warmup:
        return config.lr * done / config.warmup
    left = (1 - done) / (1 - config.warmup)
    return config.lr * (left if config.schedule == "onecycle" else (1 - math.cos(math.pi * left)) / 2)


def orthogonality(model: nn.Module) -> Tensor:
    """Sum of the layers' orthogonality penalties; layers without one, or whose filters are frozen, add nothing."""
    terms = [
        m.orthogonality()
        for m in model.modules()
        if isinstance(m, DeCEFConv2d) or (isinstance(m, BasisConv2d) and m.basis.requires_grad)
    ]
    return torch.stack(terms).sum() if terms else next(model.parameters()).new_zeros(())


def resolve_precision(device: torch.device, precision: str) -> str:
    """What "auto" means on `device`: bf16 where the hardware multiplies it, else fp32.

    On a CPU without bf16 instructions bf16 was measured ten times slower than fp32.
    """
    if precision != "auto":
        return precision
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    if device.type == "cpu":
        capabilities = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
        return "bf16" if capabilities.get("avx512_bf16") or capabilities.get("amx_bf16") else "fp32"
    return "fp32"


def autocast_for(device: torch.device, precision: str) -> Callable[[], AbstractContextManager[object]]:
    """What makes the context in which the network runs."""
    if resolve_precision(device, precision) == "fp32":
        return nullcontext
    return lambda: torch.autocast(device.type, torch.bfloat16)


def seed_epoch(seed: int, epoch: int) -> torch.Generator:
    """Seed torch's global generator (dropout) for an epoch, and return the data's own."""
    torch.manual_seed((seed * 1_000_003 + epoch) * 2 + 1)
    return torch.Generator().manual_seed((seed * 1_000_003 + epoch) * 2)


def _split(train: Images, share: float) -> tuple[Images, Images]:
    # The same images for every seed, so that seeds differ in training alone.
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(0)).to(train.labels.device)
    held_out = round(share * len(train))
    if not held_out:
        return train, train.subset(slice(0, 0))
    return train.subset(order[held_out:].sort().values), train.subset(order[:held_out].sort().values)


def _scale_at(config: TrainConfig, epoch: int) -> float:
    return next((scale for until, scale in config.scales if (epoch + 0.5) / config.epochs < until), 1.0)


def _input(images: Tensor, mean: Tensor, std: Tensor, channels_last: bool, scale: float) -> Tensor:
    x = normalize(images, mean, std)
    if scale != 1:
        size = [max(1, round(side * scale)) for side in x.shape[2:]]
        x = F.interpolate(x, size=size, mode="bilinear", antialias=True)
    return x.contiguous(memory_format=torch.channels_last) if channels_last else x
