"""Which network, and which of its convolutions are replaced."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from decef.models import MODELS, source_file
from decef.models.weights import find_weights, md5_of
from decef.training.config.checks import check_flag, check_whole

#: Model options that say which layers are replaced. They mean nothing for a dense network.
REPLACEMENT_OPTIONS = ("dense_stem", "include", "exclude", "min_kernel_size", "factorize_classifier")


@dataclass(frozen=True)
class ModelConfig:
    """Which network, and which of its convolutions are replaced. `configs/model/*.yaml` explains the settings.

    `options` are those of the architecture.

    Raises:
        ValueError: a number is negative or not whole, a flag is neither true nor false, or there is no name.
    """

    name: str
    dense_stem: bool = False
    include: str | tuple[str, ...] | None = None
    exclude: str | tuple[str, ...] | None = None
    min_kernel_size: int | None = None
    factorize_classifier: bool = False
    weights: str | None = None
    weights_md5: str | None = None
    source_md5: str | None = None
    decompose_on: int | None = None
    options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not self.name:
            raise ValueError(f"model.name={self.name!r} must be the name of a network")
        for key in ("decompose_on", "min_kernel_size"):
            check_whole(f"model.{key}", getattr(self, key))
        for key in ("dense_stem", "factorize_classifier"):
            check_flag(f"model.{key}", getattr(self, key))
        for key in ("include", "exclude"):
            value = getattr(self, key)
            names = value if isinstance(value, tuple) else (value,)
            if value is not None and not all(isinstance(name, str) for name in names):
                raise ValueError(f"model.{key}={value!r} must be a name of layers, or a list of names")
        # In the architecture's order, wherever they come from: W&B returns them sorted by name.
        usual = inspect.signature(MODELS[self.name]).parameters if self.name in MODELS else {}
        for key, value in self.options.items():
            kind = str(usual[key].annotation) if key in usual and value is not None else ""
            if kind == "bool":
                check_flag(f"model.{key}", value)
            elif kind.startswith("float") and (isinstance(value, bool) or not isinstance(value, (int, float))):
                raise ValueError(f"model.{key}={value!r} must be a number")
        known = [*usual]
        order = sorted(self.options, key=lambda key: (known.index(key) if key in known else len(known), key))
        object.__setattr__(self, "options", {key: self.options[key] for key in order})

    def resolved(self) -> ModelConfig:
        """The config with the path and the MD5 of the file of weights, and the MD5 of the user's own network's code.

        The MD5s are part of a run's identity, the path is not.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: an MD5 is given and the file has another, or there are no weights to decompose.
        """
        config = self
        if source := source_file(self.name):
            config = replace(self, source_md5=md5_of(source))
            if self.source_md5 not in (None, config.source_md5):
                raise ValueError(f"{source} is not what it was when the run began: its MD5 is another")
        if not self.weights:
            if self.decompose_on:
                raise ValueError(
                    f"model.decompose_on={self.decompose_on} is for trained weights: say model.weights=FILE"
                )
            return config
        path = find_weights(self.weights)
        found = md5_of(path)
        if self.weights_md5 not in (None, found):
            raise ValueError(f"{path} is not the file that the run began from: its MD5 is another")
        return replace(config, weights=str(path), weights_md5=found)
