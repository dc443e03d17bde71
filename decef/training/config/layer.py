"""Which layer type, and how small."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from decef.plans import AUTO, layer_type
from decef.training.config.checks import check_flag, check_whole
from decef.training.config.model import ModelConfig

DEFAULT_FLOPS = 0.667  # the DeCEF paper's "about 2/3", for a layer with neither rank, budget nor energy


@dataclass(frozen=True)
class LayerConfig:
    """Which layer type, and at what rank, budget or energy. `configs/layer/*.yaml` explains the settings.

    `options` are those of the layer type.

    Raises:
        ValueError: a value is wrong or has no effect, or more than one of `rank`, `flops` and `energy` is given.
    """

    name: str
    rank: int | None = None
    flops: float | None = None
    energy: float | None = None
    orthogonality: float = 0.0
    options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.name == "conv2d":
            return  # a sweep over layer types gives them to conv2d too
        if not isinstance(self.orthogonality, (int, float)) or self.orthogonality < 0:
            raise ValueError(f"layer.orthogonality={self.orthogonality!r} must be a number, 0 or more")
        for key, what in (("flops", "the dense network's FLOPs"), ("energy", "each kernel's squared norm")):
            share = getattr(self, key)
            good = isinstance(share, (int, float)) and not isinstance(share, bool) and 0 < share <= 1
            if share is not None and not good:
                raise ValueError(f"layer.{key}={share!r} must be a share of {what}, such as 0.667")
        check_whole("layer.rank", self.rank)
        given = [f"layer.{k}={v}" for k, v in vars(self).items() if k in ("rank", "flops", "energy") and v is not None]
        if len(given) > 1:
            raise ValueError(f"{' and '.join(given)} are both given: give one")
        if self.name == AUTO and (self.rank is not None or self.energy is not None or self.orthogonality):
            raise ValueError(f"layer=auto takes a budget, layer.flops, not {' or '.join(given) or 'orthogonality'}")
        if self.name == AUTO:
            if own := set(self.options) - {"implementation"}:
                raise ValueError(f"layer.{min(own)} is not for layer=auto: layer types have options of their own")
        else:
            usual = inspect.signature(layer_type(self.name)).parameters
            for key, value in self.options.items():
                if key not in usual or usual[key].kind != inspect.Parameter.KEYWORD_ONLY:
                    raise ValueError(f"layer.{key}={value!r} would do nothing: {self.name} has no such option")
                if isinstance(usual[key].default, bool):
                    check_flag(f"layer.{key}", value)
        if self.orthogonality and not hasattr(layer_type(self.name), "orthogonality"):
            raise ValueError(f"layer.orthogonality={self.orthogonality} would do nothing: {self.name} has no penalty")

    def resolved(self, model: ModelConfig) -> LayerConfig:
        """The config with the default budget if neither rank, budget nor energy is given.

        Raises:
            ValueError: `energy` is given, but no trained weights.
        """
        if self.name == "conv2d":
            return LayerConfig("conv2d")  # the same network, whatever a sweep gives
        if self.energy is not None and not model.weights:
            raise ValueError("layer.energy is of trained kernels: say model.weights=FILE too, or give rank or flops")
        if self.name == AUTO and not model.weights:
            raise ValueError("layer=auto compares trained kernels: say model.weights=FILE too, or give a layer type")
        if self.rank is None and self.flops is None and self.energy is None:
            return replace(self, flops=DEFAULT_FLOPS)
        return self
