"""How to train: the settings of `configs/train`, checked."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

SCHEDULES = ("onecycle", "cosine", "step")
PRECISIONS = ("auto", "fp32", "bf16", "fp16")
DECAYS = ("factors", "kernel")


@dataclass(frozen=True)
class TrainConfig:
    """How to train. `configs/train/*.yaml` says what each setting is; `orthogonality` is the layer's, in configs/layer.

    Raises:
        ValueError: a setting that makes no sense; the message says what it must be.
    """

    name: str
    epochs: int
    batch_size: int
    lr: float
    momentum: float = 0.9
    nesterov: bool = True
    weight_decay: float = 5e-4
    decay: str | None = None
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
    adam: bool = False

    def __post_init__(self) -> None:
        for key, (fine, must) in _MUST.items():
            value = getattr(self, key)
            try:
                good = fine(value)
            except TypeError:  # a value of another kind, which doesn't compare
                good = False
            if not good:
                raise ValueError(f"train.{key}={value!r} must be {must}")
        if self.nesterov and not self.momentum:
            raise ValueError("train.nesterov=True must be false when momentum is 0")
        if self.atcd is not None and self.orthogonality:
            raise ValueError("train.atcd trains dense kernels, so that layer.orthogonality would do nothing: give one")


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _share(value: float) -> bool:
    return 0 <= value < 1


_POSITIVE = (lambda v: v > 0, "a number above 0")
_NOT_NEGATIVE = (lambda v: v >= 0, "a number, 0 or more")
_FLAG = (lambda v: isinstance(v, bool), "true or false")
_MUST: dict[str, tuple[Callable[[Any], bool], str]] = {
    "epochs": (lambda v: _whole(v) and v >= 1, "a whole number, at least 1"),
    "batch_size": (lambda v: _whole(v) and v >= 1, "a whole number, at least 1"),
    "lr": _POSITIVE,
    "momentum": (_share, "a number in [0, 1)"),
    "nesterov": _FLAG,
    "weight_decay": _NOT_NEGATIVE,
    "decay": (lambda v: v is None or v in DECAYS, f"null or one of {', '.join(DECAYS)}"),
    "label_smoothing": (_share, "a number in [0, 1)"),
    "schedule": (lambda v: v in SCHEDULES, f"one of {', '.join(SCHEDULES)}"),
    "warmup": (_share, "a share of the training, in [0, 1)"),
    "milestones": (lambda v: all(0 < m < 1 for m in v), "shares of the training, in (0, 1)"),
    "gamma": _POSITIVE,
    "scales": (
        lambda v: all(len(s) == 2 and 0 < s[0] < 1 and 0 < s[1] <= 1 for s in v),
        "pairs [share of the training, scale of the images]",
    ),
    "orthogonality": _NOT_NEGATIVE,
    "atcd": (lambda v: v in (None, "epoch") or (_whole(v) and v >= 1), "null, 'epoch' or a number of steps"),
    "validation": (_share, "a share of the training images, in [0, 1)"),
    "precision": (lambda v: v in PRECISIONS, f"one of {', '.join(PRECISIONS)}"),
    "channels_last": _FLAG,
    "adam": _FLAG,
}
