"""The record that a run leaves on disk. Tables and figures are made from it.

`results/runs/<run id>/` holds:
    config.yaml: the complete config, without paths and without what only says where to run and how to log
    metrics.jsonl: a line per epoch
    summary.json: status, costs, final accuracy, and what it ran on and with
    checkpoint.pt: not in git
`replay` needs the config and the summary to do the run again.
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

from decef.machine import Environment
from decef.training.config import DEFAULT_DECAY, REPLACEMENT_OPTIONS, RunConfig, flat
from decef.training.distributed import launched

log = logging.getLogger(__name__)

CONFIG, METRICS, SUMMARY, CHECKPOINT = "config.yaml", "metrics.jsonl", "summary.json", "checkpoint.pt"
TIMES = ("images_per_second", "seconds")  # in metrics: they differ even between equal runs
FORMAT = 2  # of config.yaml; format 1 left out options that were off
RECORDED = ("dataset", "model", "layer", "train")  # the groups of settings that config.yaml holds
DATA_PLACES = ("root", "workers")  # the dataset's settings that it doesn't
RANK_SETTINGS = ("rank", "flops", "energy")
LAYER_TRAINING = ("atcd", "decay")  # training options of low-rank layers, which Conv2d doesn't have
#: Dataset options that make it another task, and their values in the task that the dataset's name stands for.
TASKS: dict[str, Mapping[str, Any]] = {
    "split_test": {},
    "as_published": {},
    "train_size": {},
    "size": {"imagenet": 224},
    "num_classes": {"imagenet": 1000},
}


class Metrics(TypedDict):
    """The results of one epoch. Losses are mean cross-entropies; top1 is in percent.

    `images_per_second` is of the training alone; `seconds` is the time of the whole epoch, evaluation included.
    """

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


class Summary(Environment, total=False):
    """The contents of `summary.json`. Costs are of the network as deployed; `dense` has those of its dense twin."""

    id: str
    status: str  # running, interrupted, failed, finished
    error: str | None
    schedule: str
    test_top1: float | None  # percent, of the last epoch
    test_top1_is: str
    test_loss: float
    val_top1: float | None
    params: int
    trainable_params: int
    macs: int
    flops: int
    dense: dict[str, int]
    ranks: dict[str, int]
    images: dict[str, int]  # how many there are to train and to test on
    images_md5: str  # of their names, for a part of ImageNet, see `DatasetConfig.part_md5`
    precision: str
    processes: int
    epochs: int
    wall_seconds: float
    images_per_second: float | None
    resumed: list[str]
    earlier_sessions: list[dict[str, Any]]  # of a run that was resumed: where, with which code and when each began
    finished: str


@dataclass(frozen=True)
class Record:
    """A run: its config and what came out."""

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
        top1 = self.summary["test_top1"]
        assert top1 is not None, "only finished runs are records"
        return top1

    def cost(self, key: str) -> int:
        """A cost of the network as deployed: "params", "trainable_params", "macs" or "flops"."""
        return int(self.summary[key])  # type: ignore[literal-required]

    def ratio(self, key: str) -> float:
        """A cost as a share of the dense network's."""
        return self.cost(key) / self.summary["dense"][key]

    @cached_property
    def settings(self) -> dict[str, Any]:
        """The contents of `config.yaml`."""
        return recorded(self.config)

    @cached_property
    def experiment(self) -> dict[str, Any]:
        """The run's `identity` without the seed, and which part of ImageNet it was on."""
        found = {key: value for key, value in identity(self.config).items() if key != "seed"}
        if md5 := self.summary.get("images_md5"):
            found["dataset"] = {**found["dataset"], "images_md5": md5}
        return found

    @property
    def pair(self) -> tuple[int, str | None, int]:
        """Seed, numeric precision and number of processes. Runs that are compared one to one must share all three.

        Batch norm in training sees the images of one process.
        """
        return self.config.seed, self.summary.get("precision"), self.summary.get("processes", 1)

    @property
    def hardware(self) -> str:
        """What the run was trained on: the GPU, or the machine's CPU; results differ between two by rounding."""
        device = self.summary.get("device", "cpu")
        return device if device != "cpu" else self.summary.get("machine", "")

    @property
    def task(self) -> str:
        """The dataset's name, with the options that make this another task than the name stands for."""
        return " ".join([self.config.dataset.name, *self._task_options])

    @property
    def _task_options(self) -> list[str]:
        data = self.experiment["dataset"]
        others = {key: data.get(key) for key, usual in TASKS.items() if data.get(key) != usual.get(data["name"])}
        return [key if value is True else f"{key} {value}" for key, value in others.items()]

    @property
    def model(self) -> str:
        """The network's name and its options that are on, without those about replaced layers and trained weights."""
        left_out = ("name", *REPLACEMENT_OPTIONS, "weights_md5", "source_md5", "decompose_on")
        model = self.experiment["model"]
        options = [(k, v) for k, v in model.items() if k not in left_out and (k, v) != ("shortcut", "A")]
        source = [f"of source {model['source_md5'][:8]}"] if "source_md5" in model else []
        return " ".join([model["name"], *(k if v is True else f"{k} {v}" for k, v in options), *source])

    @property
    def weights(self) -> str | None:
        """MD5 of the trained weights that the run began from, None if it began from scratch."""
        return self.config.model.weights_md5

    @property
    def layer(self) -> str:
        """The layer type."""
        return self.config.layer.name

    @property
    def rank_setting(self) -> str:
        """The rank, energy or budget that was asked for: "dense", "rank 4", "energy 0.63" or "0.667 of FLOPs"."""
        layer = self.config.layer
        if layer.name == "conv2d":
            return "dense"
        if layer.rank:
            return f"rank {layer.rank}"
        return f"energy {layer.energy:g}" if layer.energy else f"{layer.flops:g} of FLOPs"

    @property
    def setting(self) -> str:
        """`rank_setting`, and what else tells the run from others with its network, layer type and training."""
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
        """A key that is equal for runs that may share a table: same data, same training."""
        train = {key: value for key, value in self.experiment["train"].items() if key not in LAYER_TRAINING}
        return json.dumps({"dataset": self.experiment["dataset"], "train": train}, sort_keys=True)


def recorded(config: RunConfig) -> dict[str, Any]:
    """The part of a resolved config that `config.yaml` holds."""
    kept = {name: flat(getattr(config, name)) for name in RECORDED}
    for key in DATA_PLACES:
        del kept["dataset"][key]
    if config.model.weights:
        kept["model"]["weights"] = Path(config.model.weights).name
    return {"format": FORMAT, **kept, "seed": config.seed}


def identity(config: RunConfig) -> dict[str, Any]:
    """The part of a config, resolved or recorded, that determines the result. Equal runs have equal identities.

    Left out are options that change the result only by rounding: how a layer is computed and how memory is laid out.
    So are options that other options make irrelevant, and options that are off (null, false, 0, empty). Thus a new
    option leaves the ids of old runs as they are.
    """
    kept = recorded(config)
    del kept["format"]
    kept["model"].pop("weights", None)  # the content counts, which `weights_md5` stands for
    kept["layer"].pop("implementation", None)
    for key in ("channels_last", *config.train.idle):
        del kept["train"][key]
    found = without_off(_whole_as_int(kept))
    if ":" in config.model.name:  # one's own: what its options are by default is not known, so none of them is off
        found["model"].update(_whole_as_int(dict(config.model.options)))
    return found


def experiment_id(config: RunConfig) -> str:
    """A readable name for runs that differ in the seed alone: `run_id` without the seed."""
    return _named(config, [], {key: value for key, value in identity(config).items() if key != "seed"})


def run_id(config: RunConfig) -> str:
    """A readable name for a run, with a hash of its `identity` at the end."""
    return _named(config, [f"s{config.seed}"], identity(config))


def _named(config: RunConfig, more: Sequence[str], content: Mapping[str, Any]) -> str:
    layer = config.layer
    cost = [f"{key[0]}{value:g}" for key in RANK_SETTINGS if (value := getattr(layer, key))]
    parts = [config.dataset.name, config.model.name, layer.name, *cost, config.train.name]
    digest = short_hash(json.dumps(content, sort_keys=True))
    return re.sub(r"[^\w.-]+", "_", "-".join([*parts, *more, digest]))


def short_hash(text: str) -> str:
    """Eight hexadecimal digits that tell texts apart in names."""
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def _read_yaml(path: Path) -> Any:
    return yaml.load(path.read_text(), getattr(yaml, "CSafeLoader", yaml.SafeLoader))  # libyaml's is the fast one


def load_records(results: Path) -> list[Record]:
    """All finished runs in a results folder, sorted by id. Unreadable and unfinished ones are logged and left out.

    So are copies: folders that have not the name of their run.
    """
    records = []
    for folder in sorted((results / "runs").glob("*")):
        try:
            summary = json.loads((folder / SUMMARY).read_text())
            config = _read_yaml(folder / CONFIG)
        except (OSError, ValueError, yaml.YAMLError) as error:
            log.warning("left out: %s cannot be read (%s)", folder, error)
            continue
        if not isinstance(summary, Mapping) or not isinstance(config, Mapping):
            log.warning("left out: %s cannot be read (its %s or %s is empty)", folder, CONFIG, SUMMARY)
        elif summary.get("id") != folder.name:
            log.warning("left out: %s is a copy of %s", folder, summary.get("id", "something without an id"))
        elif record := finished_record(folder.name, config, summary, read_metrics(folder)):
            records.append(record)
    return records


def finished_record(
    name: str, config: Mapping[str, Any], summary: Mapping[str, Any], metrics: Sequence[Metrics] = ()
) -> Record | None:
    """A record from plain data; None, and a line in the log, if it is not a finished run of today's format."""
    if config.get("format") != FORMAT:
        log.warning("left out: %s has format %s, not %s", name, config.get("format", 1), FORMAT)
    elif summary.get("status") != "finished":
        log.info("left out: %s is %s after %s epochs", name, summary.get("status"), summary.get("epochs"))
    else:
        try:
            return to_record(config, summary, metrics)
        except ValueError as error:
            log.warning("left out: %s cannot be read (%s)", name, error)
    return None


def to_record(config: Mapping[str, Any], summary: Mapping[str, Any], metrics: Sequence[Metrics] = ()) -> Record:
    """Make a record from plain data. Whole numbers may be floats, as W&B returns them.

    Raises:
        InputError: see `RunConfig.from_dict`.
    """
    return Record(RunConfig.from_dict(_whole_as_int(config)), dict(summary), tuple(metrics))  # type: ignore[arg-type]


def load_config(folder: Path) -> RunConfig:
    """Read the config from a run's folder.

    Raises:
        FileNotFoundError: it is not the folder of a run.
        InputError: see `RunConfig.from_dict`.
    """
    if not (folder / CONFIG).is_file():
        raise FileNotFoundError(f"{folder} is no folder of a run, it has no {CONFIG}")
    return RunConfig.from_dict(_read_yaml(folder / CONFIG))


def replay(folder: Path) -> tuple[RunConfig, str]:
    """Read the config and the precision with which `decef.training.run.run` does a recorded run again.

    Returns:
        The config, in which the caller sets where to run (`results`, `device`, `dataset.root` and the like), and the
        precision that the run was trained in.

    Raises:
        FileNotFoundError: there is no record.
        ValueError: the record has another format, the run is not finished, or another number of processes trained it
            than are here.
    """
    for name in (CONFIG, SUMMARY):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder} is no run's record: it has no {name}")
    config = _read_yaml(folder / CONFIG)
    summary = read_summary(folder)
    if config.get("format") != FORMAT:
        raise ValueError(f"{folder} has format {config.get('format', 1)}, not {FORMAT}: it can't be done again exactly")
    if summary.get("status") != "finished":
        raise ValueError(f"{folder} is {summary.get('status')}, not finished: the command that began it resumes it")
    count = summary.get("processes", 1)
    if count != launched().count:
        how = f"by torchrun --nproc-per-node={count}" if count > 1 else "without torchrun"
        raise ValueError(
            f"{folder} was trained by {count} process{'es' * (count > 1)}, not {launched().count}, which share each "
            f"batch in another way: start it {how}"
        )
    return replace(RunConfig.from_dict(config), threads=summary["threads"]), summary["precision"]


def read_summary(folder: Path) -> Summary:
    """The contents of a run's `summary.json`; empty if there is none yet."""
    path = folder / SUMMARY
    return json.loads(path.read_text()) if path.is_file() else {}


def read_metrics(folder: Path) -> list[Metrics]:
    """The metrics of all epochs from a run's folder, in order. A last line that a kill cut off is left out."""
    path = folder / METRICS
    rows: list[Metrics] = []
    for line in path.read_text().splitlines() if path.is_file() else []:
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows


def first_difference(one: Sequence[Metrics], other: Sequence[Metrics]) -> int | None:
    """The first epoch whose metrics, other than times, differ between two runs; None if all are equal."""
    timeless = [[{k: v for k, v in row.items() if k not in TIMES} for row in rows] for rows in (one, other)]
    pairs = zip_longest(*timeless, fillvalue=None)
    return next((epoch for epoch, (a, b) in enumerate(pairs, start=1) if a != b), None)


def without_off(value: Any) -> Any:
    """Plain data without what is off: null, false, 0 or empty. A seed is always kept."""
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
