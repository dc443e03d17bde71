"""The config of one run, and its groups from plain data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, TypeVar

from decef.training.config.checks import check_flag, check_whole
from decef.training.config.dataset import DatasetConfig
from decef.training.config.errors import input_errors
from decef.training.config.layer import LayerConfig
from decef.training.config.model import ModelConfig
from decef.training.config.train import TrainConfig

MAX_SEED = 2**31 - 1  # a larger one would give images in the order that a smaller one does, see `seed_epoch`

_Group = TypeVar("_Group")


@dataclass(frozen=True)
class WandbConfig:
    """Where a run is mirrored. `configs/wandb/default.yaml` explains the settings."""

    mode: str = "disabled"
    project: str = "decef"
    entity: str | None = None
    group: str | None = None
    artifacts: bool = False


GROUPS: dict[str, type] = {
    "dataset": DatasetConfig,
    "model": ModelConfig,
    "layer": LayerConfig,
    "train": TrainConfig,
    "wandb": WandbConfig,
}


@dataclass(frozen=True)
class RunConfig:
    """The config of one run, composed from `configs/train.yaml`, which explains the settings.

    Raises:
        ValueError: `seed` or `threads` is negative, not whole or, for a seed, above `MAX_SEED`.
    """

    dataset: DatasetConfig
    model: ModelConfig
    layer: LayerConfig
    train: TrainConfig
    seed: int = 0
    threads: int | None = None
    device: str = "auto"
    results: Path = Path("results")
    wandb: WandbConfig = field(default_factory=WandbConfig)
    experiment: str | None = None
    progress: bool = False
    keep_checkpoints: int = 0

    def __post_init__(self) -> None:
        for key in ("seed", "threads", "keep_checkpoints"):
            check_whole(key, getattr(self, key))
        if self.seed is None:
            raise ValueError("seed must be given: a whole number, 0 or more")
        if self.seed > MAX_SEED:
            raise ValueError(f"seed={self.seed} must be at most {MAX_SEED}")
        for key, value in (("progress", self.progress), ("wandb.artifacts", self.wandb.artifacts)):
            check_flag(key, value)

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> RunConfig:
        """Make the config from plain data, such as a composed Hydra config or a record's `config.yaml`.

        Raises:
            InputError: a setting of a group is missing, unknown or has a wrong value.
        """
        with input_errors():
            settings = {key: value for key, value in config.items() if key != "format"}
            if unknown := set(settings) - {f.name for f in fields(cls)}:
                raise ValueError(f"there is no setting {', '.join(sorted(unknown))}")
            for name, kind in GROUPS.items():
                settings[name] = group(name, kind, settings.get(name, {}))
            settings["progress"] = settings.get("progress") or False
            settings["results"] = Path(str(settings.get("results") or "results"))
            return cls(**settings)

    def resolved(self) -> RunConfig:
        """The complete config. Open settings are filled in; those that cannot have an effect are dropped or refused.

        Equal runs have equal configs, whatever the command line said.

        Raises:
            InputError: an option would do nothing or is not possible, or a file is missing.
        """
        with input_errors():
            model = self.model.resolved()
            layer = self.layer.resolved(model)
            if layer.name == "conv2d":
                same = ("weights", "weights_md5", "source_md5", "options")
                model = ModelConfig(model.name, **{key: getattr(model, key) for key in same})
            return replace(
                self, dataset=self.dataset.resolved(), model=model, layer=layer, train=self.train.resolved(layer)
            )


def group(name: str, cls: type[_Group], settings: object) -> _Group:
    """A group of settings from plain data. What has no field of its own goes to `options`, if the group has them.

    Args:
        name: the group's name, for messages.
        cls: its class, one of `GROUPS`.
        settings: the group in a composed Hydra config or in a record.

    Raises:
        ValueError: a setting is missing, unknown or has a wrong value.
    """
    own = {f.name: f for f in fields(cls)}  # type: ignore[arg-type]
    if not isinstance(settings, Mapping):
        raise ValueError(f"{name}={settings!r} must be a group of settings")
    given = {key: _frozen(value) for key, value in settings.items()}
    others = {key: given.pop(key) for key in list(given) if key not in own or key == "options"}
    if others and "options" not in own:
        raise ValueError(f"there is no setting {', '.join(f'{name}.{key}' for key in others)}")
    needed = [f.name for f in own.values() if f.default is MISSING and f.default_factory is MISSING]
    if missing := [key for key in needed if key not in given]:
        raise ValueError(f"{', '.join(f'{name}.{key}' for key in missing)} must be given")
    # null turns off what is off by default: false, 0 or empty. What has no default, MISSING, counts as true here.
    off = {key: own[key].default for key, value in given.items() if value is None and not own[key].default}
    return cls(**{**given, **off}, **({"options": others} if others else {}))


def flat(group: Any) -> dict[str, Any]:
    """A group's settings as plain data, from which `group` makes it again."""
    settings = {key: _plain_data(value) for key, value in asdict(group).items()}
    return settings | settings.pop("options", {})


def _frozen(value: Any) -> Any:
    """Lists as tuples, at every depth."""
    if isinstance(value, Mapping):
        return {key: _frozen(v) for key, v in value.items()}
    return tuple(_frozen(v) for v in value) if isinstance(value, list) else value


def _plain_data(value: Any) -> Any:
    """Tuples as lists, at every depth."""
    if isinstance(value, Mapping):
        return {key: _plain_data(v) for key, v in value.items()}
    return [_plain_data(v) for v in value] if isinstance(value, (list, tuple)) else value
