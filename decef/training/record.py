"""The record that a run leaves on disk, from which tables and figures are made.

`results/runs/<run id>/` holds `config.yaml` (the complete config but for paths and what only says where and how to
log), `metrics.jsonl` (a line an epoch), `summary.json` (status, costs, final accuracy, where and with what it ran) and,
untracked, `checkpoint.pt`. Config and summary together are what `replay` needs to do the run again.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import zip_longest
from pathlib import Path
from typing import Any, TypedDict

import yaml

from decef.training.config import DEFAULT_DECAY, REPLACEMENT_OPTIONS, RunConfig

log = logging.getLogger(__name__)

CONFIG, METRICS, SUMMARY, CHECKPOINT = "config.yaml", "metrics.jsonl", "summary.json", "checkpoint.pt"
TIMES = ("images_per_second", "seconds")  # in metrics: what no two runs have in common
FORMAT = 2  # of config.yaml; 1 left out what was off
RANK_SETTINGS = ("rank", "flops", "energy")
LAYER_TRAINING = ("atcd", "decay")  # training options that belong to a low-rank layer, which Conv2d has not
#: Dataset options that make another task of it, and what they are in the task that the dataset's name stands for.
TASKS: dict[str, Mapping[str, Any]] = {
    "split_test": {},
    "as_published": {},
    "train_size": {},
    "size": {"imagenet": 224},
    "num_classes": {"imagenet": 1000},
}


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


class Summary(TypedDict, total=False):
    """What `summary.json` says. Costs are of the network as deployed; `dense` are those of its dense twin."""

    id: str
    status: str  # running, interrupted, failed, finished
    error: str | None
    schedule: str
    test_top1: float  # percent, of the last epoch
    test_top1_is: str
    test_loss: float
    val_top1: float | None
    params: int
    trainable_params: int
    macs: int
    flops: int
    dense: dict[str, int]
    ranks: dict[str, int]
    precision: str
    processes: int
    epochs: int
    wall_seconds: float
    images_per_second: float | None
    git_commit: str | None
    git_dirty: bool
    started: str
    resumed: list[str]
    finished: str
    python: str
    packages: dict[str, str | None]
    device: str
    threads: int
    machine: str


@dataclass(frozen=True)
class Record:
    """A run: what it was and what came out."""

    config: RunConfig
    summary: Summary
    metrics: tuple[Metrics, ...] = ()

    @property
    def id(self) -> str:
        """The run's id."""
        return self.summary["id"]

    @property
    def top1(self) -> float:
        """Test top-1 of the last epoch, in percent."""
        return self.summary["test_top1"]

    def cost(self, key: str) -> int:
        """params, trainable_params, macs or flops of the network as deployed."""
        return int(self.summary[key])  # type: ignore[literal-required]

    def ratio(self, key: str) -> float:
        """A cost as a share of the dense network's."""
        return self.cost(key) / self.summary["dense"][key]

    @cached_property
    def settings(self) -> dict[str, Any]:
        """The config as `config.yaml` has it."""
        return recorded(self.config)

    @cached_property
    def experiment(self) -> dict[str, Any]:
        """What the run is but for its seed: its config without what cannot have an effect, see `identity`."""
        return {key: value for key, value in identity(self.config).items() if key != "seed"}

    @property
    def pair(self) -> tuple[int, str | None]:
        """What a run that it may be compared with one to one has in common: seed and numeric precision."""
        return self.config.seed, self.summary.get("precision")

    @property
    def task(self) -> str:
        """The dataset, and what makes this another task than the one that its name stands for."""
        return " ".join([self.config.dataset.name, *self._task_options])

    @property
    def _task_options(self) -> list[str]:
        data = self.experiment["dataset"]
        others = {key: data.get(key) for key, usual in TASKS.items() if data.get(key) != usual.get(data["name"])}
        return [key if value is True else f"{key} {value}" for key, value in others.items()]

    @property
    def model(self) -> str:
        """The network's name and its options that are on, but for those that say which layers are replaced."""
        left_out = ("name", *REPLACEMENT_OPTIONS, "weights_md5", "decompose_on")
        model = self.experiment["model"]
        options = [(k, v) for k, v in model.items() if k not in left_out and (k, v) != ("shortcut", "A")]
        return " ".join([model["name"], *(k if v is True else f"{k} {v}" for k, v in options)])

    @property
    def weights(self) -> str | None:
        """MD5 of the trained weights that the run began from."""
        return self.config.model.weights_md5

    @property
    def layer(self) -> str:
        """The layer type."""
        return self.config.layer.name

    @property
    def rank_setting(self) -> str:
        """How much of the layer was asked for: "dense", "rank 4", "energy 0.63" or "0.667 of FLOPs"."""
        layer = self.config.layer
        if layer.name == "conv2d":
            return "dense"
        if layer.rank:
            return f"rank {layer.rank}"
        return f"energy {layer.energy:g}" if layer.energy else f"{layer.flops:g} of FLOPs"

    @property
    def setting(self) -> str:
        """`rank_setting`, and all else that sets a run apart from others of its network, layer type and training."""
        model, layer, train = (self.experiment[group] for group in ("model", "layer", "train"))
        words = [self.rank_setting]
        if self.layer != "conv2d":
            words += [f"{k} {v}" for k, v in layer.items() if k not in ("name", *RANK_SETTINGS)]
            words += [f"{key} {train[key]}" for key in LAYER_TRAINING if key in train and train[key] != DEFAULT_DECAY]
            words += ["stem too"] if not model.get("dense_stem") else []
            words += [f"{key} {model[key]}" for key in REPLACEMENT_OPTIONS if key != "dense_stem" and key in model]
            words += [f"decomposed on {model['decompose_on']} images"] if "decompose_on" in model else []
        words += [f"from weights {self.weights[:8]}"] if self.weights else []
        return ", ".join([*words, *self._task_options])

    @property
    def comparison(self) -> str:
        """Equal for runs that may stand in one table: same data, same training."""
        train = {key: value for key, value in self.experiment["train"].items() if key not in LAYER_TRAINING}
        return json.dumps({"dataset": self.experiment["dataset"], "train": train}, sort_keys=True)


def recorded(config: RunConfig) -> dict[str, Any]:
    """What `config.yaml` holds of a resolved config."""
    whole = config.to_dict()
    kept = {group: whole[group] for group in ("dataset", "model", "layer", "train")}
    for key in ("root", "workers"):
        del kept["dataset"][key]
    if config.model.weights:
        kept["model"]["weights"] = Path(config.model.weights).name
    return {"format": FORMAT, **kept, "seed": config.seed}


def identity(config: RunConfig) -> dict[str, Any]:
    """The part of a config, resolved or recorded, that determines the result: what runs that are the same share.

    Left out is what another run may do otherwise and still be the same experiment, to rounding: how a layer is computed
    and how memory is laid out; and options that the others switch off. An option that is off (null, false, 0, empty)
    does not count, so that a new option leaves the ids of old runs alone.
    """
    kept = recorded(config)
    del kept["format"]
    kept["model"].pop("weights", None)  # its content counts, weights_md5
    kept["layer"].pop("implementation", None)
    idle = ["channels_last"]
    idle += ["warmup"] if config.train.schedule == "step" else ["milestones", "gamma"]
    idle += ["momentum", "nesterov"] if config.train.adam else []
    for key in idle:
        del kept["train"][key]
    return without_off(kept)


def run_id(config: RunConfig) -> str:
    """A name for a run that people can read, and a hash of its identity."""
    layer = config.layer
    cost = [f"{key[0]}{value:g}" for key in RANK_SETTINGS if (value := getattr(layer, key))]
    parts = [config.dataset.name, config.model.name, layer.name, *cost, config.train.name]
    digest = hashlib.sha256(json.dumps(identity(config), sort_keys=True).encode()).hexdigest()[:8]
    name = "-".join([*parts, f"s{config.seed}", digest])
    return re.sub(r"[^\w.-]+", "_", name)


def load_records(results: Path) -> list[Record]:
    """All finished runs in a results folder, by id. What is unreadable or not finished is logged and left out."""
    records = []
    for folder in sorted((results / "runs").glob("*")):
        try:
            summary = json.loads((folder / SUMMARY).read_text())
            config = yaml.safe_load((folder / CONFIG).read_text())
            if config.get("format") != FORMAT:
                log.warning("left out: %s has format %s, not %s", folder, config.get("format", 1), FORMAT)
            elif summary.get("status") == "finished":
                records.append(to_record(config, summary, read_metrics(folder)))
            else:
                log.info(
                    "left out: %s is %s after %s epochs", folder.name, summary.get("status"), summary.get("epochs")
                )
        except (OSError, ValueError, yaml.YAMLError) as error:
            log.warning("left out: %s cannot be read (%s)", folder, error)
    return records


def to_record(config: Mapping[str, Any], summary: Mapping[str, Any], metrics: Sequence[Metrics] = ()) -> Record:
    """A record from plain data, wherever they come from: W&B returns whole numbers as floats.

    Raises:
        ValueError: the config makes no sense.
    """
    return Record(RunConfig.from_dict(_whole_as_int(config)), dict(summary), tuple(metrics))  # type: ignore[arg-type]


def load_config(folder: Path) -> RunConfig:
    """The config of a run's folder.

    Raises:
        FileNotFoundError: the folder is no run's.
    """
    if not (folder / CONFIG).is_file():
        raise FileNotFoundError(f"{folder} is no folder of a run, it has no {CONFIG}")
    return RunConfig.from_dict(yaml.safe_load((folder / CONFIG).read_text()))


def replay(folder: Path) -> tuple[RunConfig, str]:
    """The config and the precision with which `decef.training.run.run` does a recorded run again.

    Returns:
        The config, in which the caller says where to do it (`results`, `device`, `dataset.root` and the like), and the
        precision that "auto" meant.

    Raises:
        FileNotFoundError: there is no record.
        ValueError: it is of another format, or not of a finished run.
    """
    for name in (CONFIG, SUMMARY):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder} is no run's record: it has no {name}")
    config = yaml.safe_load((folder / CONFIG).read_text())
    summary: Summary = json.loads((folder / SUMMARY).read_text())
    if config.get("format") != FORMAT:
        raise ValueError(f"{folder} has format {config.get('format', 1)}, not {FORMAT}: it can't be done again exactly")
    if summary.get("status") != "finished":
        raise ValueError(f"{folder} is {summary.get('status')}, not finished: the command that began it resumes it")
    return replace(RunConfig.from_dict(config), threads=summary["threads"]), summary["precision"]


def read_metrics(folder: Path) -> list[Metrics]:
    """All epochs' metrics of a run's folder in order; a last line that a kill left unfinished is not among them."""
    path = folder / METRICS
    rows: list[Metrics] = []
    for line in path.read_text().splitlines() if path.is_file() else []:
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows


def first_difference(one: Sequence[Metrics], other: Sequence[Metrics]) -> int | None:
    """The first epoch whose metrics differ between two runs, but for times; None where all are equal."""
    timeless = [[{k: v for k, v in row.items() if k not in TIMES} for row in rows] for rows in (one, other)]
    pairs = zip_longest(*timeless, fillvalue=None)
    return next((epoch for epoch, (a, b) in enumerate(pairs, start=1) if a != b), None)


def without_off(value: Any) -> Any:
    """Plain data without what is off: null, false, 0 or empty; a seed always counts."""
    if isinstance(value, Mapping):
        kept = {key: without_off(v) for key, v in value.items()}
        return {key: v for key, v in kept.items() if key == "seed" or not (v is None or v is False or v in (0, [], {}))}
    return value


def _whole_as_int(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _whole_as_int(v) for key, v in value.items()}
    if isinstance(value, list):
        return [_whole_as_int(v) for v in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value
