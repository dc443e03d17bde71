"""The config of a run: dataset, network, layer type and training. Values are checked on construction."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import MISSING, asdict, dataclass, field, fields, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeVar

from decef.data import FOLDERS, Data, Dataset, dataset, folder_identity
from decef.data.subsets import stratified_subset
from decef.models import MODELS, source_file
from decef.models.weights import find_weights, md5_of
from decef.plans import AUTO, has_training_kernel, layer_type

SCHEDULES = ("onecycle", "cosine", "step")
PRECISIONS = ("auto", "fp32", "bf16", "fp16")
DECAYS = ("factors", "kernel")
DEFAULT_FLOPS = 0.667  # the DeCEF paper's "about 2/3", for a layer with neither rank, budget nor energy
DEFAULT_DECAY = "factors"
MAX_SEED = 2**31 - 1  # a larger one would give images in the order that a smaller one does, see `seed_epoch`
#: Model options that say which layers are replaced. They mean nothing for a dense network.
REPLACEMENT_OPTIONS = ("dense_stem", "include", "exclude", "min_kernel_size", "factorize_classifier")

_Group = TypeVar("_Group")


class InputError(ValueError):
    """The user's input cannot be used. The message says what is wrong and what to do."""


class BusyError(InputError):
    """Another process is at the run."""


@contextmanager
def input_errors() -> Iterator[None]:
    """Turn `ValueError` and `FileNotFoundError` into `InputError`."""
    try:
        yield
    except InputError:
        raise
    except (ValueError, FileNotFoundError) as error:
        raise InputError(str(error)) from error


@dataclass(frozen=True)
class DatasetConfig:
    """Which images. `configs/dataset/*.yaml` explains the settings.

    Raises:
        ValueError: a number is negative or not whole, a flag is neither true nor false, or a mean is no list.
    """

    name: str
    root: str | None = None
    workers: int = 0
    train_size: int | None = None
    crop_padding: int | None = None
    flip: bool = False
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    size: int | None = None
    num_classes: int | None = None
    split_test: bool = False
    as_published: bool = False
    images_md5: str | None = None

    def __post_init__(self) -> None:
        for key in ("train_size", "crop_padding", "workers"):
            _check_whole(f"dataset.{key}", getattr(self, key))
        for key in ("flip", "split_test", "as_published"):
            _check_flag(f"dataset.{key}", getattr(self, key))
        for key in ("mean", "std"):
            value = getattr(self, key)
            if value is not None and not (isinstance(value, tuple) and all(isinstance(v, (int, float)) for v in value)):
                raise ValueError(f"dataset.{key}={value!r} must be a list with a number for every channel")
        if self.std is not None and min(self.std, default=1) <= 0:
            raise ValueError(f"dataset.std={list(self.std)} must be above 0 in every channel: images are divided by it")

    @property
    def folder(self) -> Path | None:
        """The folder to look in first, if one is given."""
        return Path(self.root) if self.root else None

    def dataset(self) -> Dataset:
        """The configured dataset; nothing is read.

        Raises:
            ValueError: see `decef.data.dataset`.
        """
        if self.crop_padding and self.name in FOLDERS:
            raise ValueError(
                f"dataset.crop_padding={self.crop_padding} would do nothing: {self.name} has its own crops"
            )
        return dataset(
            self.name,
            mean=self.mean,
            std=self.std,
            size=self.size,
            num_classes=self.num_classes,
            split_test=self.split_test,
            as_published=self.as_published,
        )

    def load(self, root: Path | None = None) -> tuple[Data, Data]:
        """The training and the test images, from `root` or the configured folder.

        Raises:
            ValueError, FileNotFoundError, ImportError: see `Dataset.load`.
        """
        folder = self.folder if root is None else root
        train, test = self.dataset().load(
            folder, crop_padding=self.crop_padding or 0, flip=self.flip, workers=self.workers
        )
        return stratified_subset(train, self.train_size) if self.train_size else train, test

    def resolved(self) -> DatasetConfig:
        """The config with the settings filled in that follow from the dataset or its folder.

        The MD5 of the images' names is part of a run's identity, as one's own folders have nothing else that tells them
        apart.

        Raises:
            FileNotFoundError: there is no folder of images.
            ValueError: `images_md5` is given and the folder has another; or see `decef.data.dataset`.
        """
        config = self
        if self.name == "imagefolder":
            classes, md5 = folder_identity(self.folder)
            if self.images_md5 not in (None, md5):
                raise ValueError(f"dataset.root={self.root} has not the images that the run began with")
            config = replace(self, num_classes=self.num_classes or classes, images_md5=md5)
        known = config.dataset()
        return replace(config, mean=known.mean, std=known.std)

    def part_md5(self) -> str | None:
        """MD5 of the images' names in a part of ImageNet; None if it is whole, not here or another dataset.

        It stands in a record's summary, not in its config as `images_md5` does: older records keep their ids.
        """
        if self.name != "imagenet" or self.num_classes == 1000:
            return None
        try:
            return folder_identity(self.folder, self.name)[1]
        except FileNotFoundError:
            return None


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
            _check_whole(f"model.{key}", getattr(self, key))
        for key in ("dense_stem", "factorize_classifier"):
            _check_flag(f"model.{key}", getattr(self, key))
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
                _check_flag(f"model.{key}", value)
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
        _check_whole("layer.rank", self.rank)
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
                    _check_flag(f"layer.{key}", value)
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
            _check_whole(key, getattr(self, key))
        if self.seed is None:
            raise ValueError("seed must be given: a whole number, 0 or more")
        if self.seed > MAX_SEED:
            raise ValueError(f"seed={self.seed} must be at most {MAX_SEED}")
        for key, value in (("progress", self.progress), ("wandb.artifacts", self.wandb.artifacts)):
            _check_flag(key, value)

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


def _check_whole(key: str, value: Any) -> None:
    if value is not None and not (_is_whole(value) and value >= 0):
        raise ValueError(f"{key}={value!r} must be a whole number, 0 or more")


def _check_flag(key: str, value: Any) -> None:
    if not isinstance(value, bool):
        raise ValueError(f"{key}={value!r} must be true or false")


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_share(value: float) -> bool:
    return 0 <= value < 1


_POSITIVE = (lambda v: v > 0, "a number above 0")
_NOT_NEGATIVE = (lambda v: v >= 0, "a number, 0 or more")
_FLAG = (lambda v: isinstance(v, bool), "true or false")
_MUST: dict[str, tuple[Callable[[Any], bool], str]] = {
    "name": (lambda v: re.fullmatch(r"[\w.-]+", v) is not None, "a name of letters, digits, '.', '_' and '-'"),
    "epochs": (lambda v: _is_whole(v) and v >= 1, "a whole number, at least 1"),
    "batch_size": (lambda v: _is_whole(v) and v >= 1, "a whole number, at least 1"),
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
    "atcd": (lambda v: v in (None, "epoch") or (_is_whole(v) and v >= 1), "null, 'epoch' or a number of steps"),
    "validation": (_is_share, "a share of the training images, in [0, 1)"),
    "precision": (lambda v: v in PRECISIONS, f"one of {', '.join(PRECISIONS)}"),
    "channels_last": _FLAG,
    "adam": _FLAG,
}
