"""How to train."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from itertools import pairwise
from typing import Any

from decef.plans import has_training_kernel
from decef.training.config.checks import is_whole
from decef.training.config.layer import LayerConfig

SCHEDULES = ("onecycle", "cosine", "step")
PRECISIONS = ("auto", "fp32", "bf16", "fp16")
DECAYS = ("factors", "kernel")
DEFAULT_DECAY = "factors"


@dataclass(frozen=True)
class TrainConfig:
    """How to train. `configs/train/*.yaml` explains the settings.

    Raises:
        ValueError: a setting has a wrong value; the message says what it must be.
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
            except TypeError:  # the type is wrong, so the value cannot be compared
                good = False
            if not good:
                raise ValueError(f"train.{key}={value!r} must be {must}")
        if self.nesterov and not self.momentum:
            raise ValueError("train.nesterov=True must be false when momentum is 0")

    @property
    def idle(self) -> tuple[str, ...]:
        """The settings that others make irrelevant."""
        of_schedule = ("warmup",) if self.schedule == "step" else ("milestones", "gamma")
        return (*of_schedule, *(("momentum", "nesterov") if self.adam else ()))

    def resolved(self, layer: LayerConfig) -> TrainConfig:
        """The config with what is idle at its default, and with the decay that the run uses.

        That is None if nothing decays or no factor is trained.

        Raises:
            ValueError: the decay would do nothing, or it or ATCD is not possible with this layer type.
        """
        defaults: dict[str, Any] = {f.name: f.default for f in fields(self) if f.name in self.idle}
        return replace(self, **defaults)._with_decay(layer)

    def _with_decay(self, layer: LayerConfig) -> TrainConfig:
        if layer.name == "conv2d":
            return replace(self, atcd=None, decay=None)
        if self.atcd is not None and layer.orthogonality:
            raise ValueError("train.atcd trains dense kernels, so that layer.orthogonality would do nothing: give one")
        composes = has_training_kernel(layer.name)
        if self.atcd is not None and not composes:
            raise ValueError(f"train.atcd is not possible with layer={layer.name}: it has no kernel in training")
        idle = "train.atcd decays dense kernels" if self.atcd is not None else None
        idle = idle or ("train.weight_decay is 0" if not self.weight_decay else None)
        if idle:
            if self.decay is not None:
                raise ValueError(f"train.decay={self.decay} would do nothing: {idle}")
            return self
        reason = None
        if not composes:
            reason = "it has no kernel in training"
        elif layer.options.get("train_basis") is False:
            reason = "its basis is frozen and orthonormal, so that both decays are the same"
        if self.decay == "kernel" and reason:
            raise ValueError(f"train.decay=kernel is not possible with layer={layer.name}: {reason}")
        return replace(self, decay=self.decay or ("factors" if reason else DEFAULT_DECAY))


def _is_share(value: float) -> bool:
    return 0 <= value < 1


_POSITIVE = (lambda v: v > 0, "a number above 0")
_NOT_NEGATIVE = (lambda v: v >= 0, "a number, 0 or more")
_FLAG = (lambda v: isinstance(v, bool), "true or false")
_MUST: dict[str, tuple[Callable[[Any], bool], str]] = {
    "name": (lambda v: re.fullmatch(r"[\w.-]+", v) is not None, "a name of letters, digits, '.', '_' and '-'"),
    "epochs": (lambda v: is_whole(v) and v >= 1, "a whole number, at least 1"),
    "batch_size": (lambda v: is_whole(v) and v >= 1, "a whole number, at least 1"),
    "lr": _POSITIVE,
    "momentum": (_is_share, "a number in [0, 1)"),
    "nesterov": _FLAG,
    "weight_decay": _NOT_NEGATIVE,
    "decay": (lambda v: v is None or v in DECAYS, f"null or one of {', '.join(DECAYS)}"),
    "label_smoothing": (_is_share, "a number in [0, 1)"),
    "schedule": (lambda v: v in SCHEDULES, f"one of {', '.join(SCHEDULES)}"),
    "warmup": (_is_share, "a share of the training, in [0, 1)"),
    "milestones": (lambda v: all(0 < m < 1 for m in v), "shares of the training, in (0, 1)"),
    "gamma": _POSITIVE,
    "scales": (
        lambda v: (
            all(len(s) == 2 and 0 < s[0] < 1 and 0 < s[1] <= 1 for s in v) and all(a[0] < b[0] for a, b in pairwise(v))
        ),
        "pairs [share of the training until when, scale of the images], in order of the shares",
    ),
    "atcd": (lambda v: v in (None, "epoch") or (is_whole(v) and v >= 1), "null, 'epoch' or a number of steps"),
    "validation": (_is_share, "a share of the training images, in [0, 1)"),
    "precision": (lambda v: v in PRECISIONS, f"one of {', '.join(PRECISIONS)}"),
    "channels_last": _FLAG,
    "adam": _FLAG,
}
