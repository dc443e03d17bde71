"""One run, from a plain config to a finished record."""

from __future__ import annotations

import copy
import logging
import os
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from statistics import harmonic_mean
from typing import Any

import torch
from torch import nn

from decef.conversion import Plan, convert, layer_type, plan
from decef.costs import total_cost
from decef.data import Data, Dataset, Images, count_classes, dataset
from decef.data.search import stratified_subset
from decef.models import create_model, stem_name
from decef.models.weights import find_weights, load_weights, md5_of
from decef.ranks import Budget, Energy, Fixed, Rule
from decef.training.checkpoint import load_checkpoint, save_checkpoint
from decef.training.config import TrainConfig
from decef.training.distributed import Processes, joined, launched
from decef.training.loop import Metrics, State, check_possible, fit, resolve_precision
from decef.training.record import RunRecord, environment, plain
from decef.training.tracking import Tracker, resolve_mode

log = logging.getLogger(__name__)

DEFAULT_FLOPS = 0.667  # the DeCEF paper's "about 2/3", when a layer is given neither rank nor budget
DEFAULT_DECAY = "factors"
#: Model options that say which layers are replaced, and mean nothing for a dense network.
OF_REPLACEMENT = ("dense_stem", "include", "exclude", "min_kernel_size", "factorize_classifier")


class InputError(ValueError):
    """Something that the user gave cannot be used; the message says what, and what to do."""


def resolve(config: Mapping[str, Any]) -> dict[str, Any]:
    """The complete config: defaults filled in, and what cannot have an effect taken out or refused.

    Equal runs have equal configs, whatever the command line said.

    Raises:
        InputError: a value of the wrong type, rank and budget both given, or an option that would do nothing.
    """
    resolved = copy.deepcopy(dict(config))
    with _input_errors():
        _resolve_dataset(resolved["dataset"])
        _resolve_model(resolved["model"])
        _resolve_layer(resolved)
        train = plain(asdict(_train_config(resolved)))
        resolved["train"] = {key: value for key, value in train.items() if key != "orthogonality"}
        _resolve_decay(resolved)
    whole = {
        "seed": resolved["seed"],
        "threads": resolved["threads"],
        "layer.rank": resolved["layer"].get("rank"),
        "dataset.train_size": resolved["dataset"].get("train_size"),
        "dataset.crop_padding": resolved["dataset"].get("crop_padding"),
    }
    for key, value in whole.items():
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 0):
            raise InputError(f"{key}={value!r} must be a whole number, 0 or more")
    return resolved


def _resolve_dataset(settings: dict[str, Any]) -> None:
    if settings["name"] == "imagefolder" and settings.get("num_classes") is None:
        settings["num_classes"] = count_classes(Path(settings["root"]) if settings["root"] else None)
    known = dataset(settings)
    settings["mean"], settings["std"] = list(known.mean), list(known.std)


def _resolve_model(settings: dict[str, Any]) -> None:
    if settings.get("weights"):
        # The file's content belongs to the run, its place doesn't.
        settings["weights"] = str(find_weights(settings["weights"]))
        found = md5_of(Path(settings["weights"]))
        if settings.get("weights_md5", found) != found:  # of a record that is done again
            raise ValueError(f"{settings['weights']} is not the file that the run began from: its MD5 is another")
        settings["weights_md5"] = found


def _resolve_layer(config: dict[str, Any]) -> None:
    layer, model, train = config["layer"], config["model"], config["train"]
    if layer["name"] == "conv2d":
        # Sweeps over layer types have these for all; the dense network is the same run whatever they say.
        config["layer"] = {"name": "conv2d"}
        train.update(atcd=None, decay=None)
        for key in OF_REPLACEMENT:
            model.pop(key, None)
        return
    if layer.get("flops") is not None and not isinstance(layer["flops"], (int, float)):
        raise ValueError(f"layer.flops={layer['flops']!r} must be a share of the dense network's FLOPs, such as 0.667")
    given = [f"layer.{key}={layer[key]}" for key in ("rank", "flops", "energy") if layer.get(key) is not None]
    if len(given) > 1:
        raise ValueError(f"{' and '.join(given)} are both given: give one")
    if not given:
        layer["flops"] = DEFAULT_FLOPS
    if layer.get("energy") is not None and not model.get("weights"):
        raise ValueError("layer.energy is of trained kernels: say model.weights=FILE too, or give rank or flops")
    if layer.get("orthogonality") and not hasattr(layer_type(layer["name"]), "orthogonality"):
        raise ValueError(
            f"layer.orthogonality={layer['orthogonality']} would do nothing: {layer['name']} has no penalty"
        )


def _resolve_decay(config: dict[str, Any]) -> None:
    """Which decay the run has: none where nothing decays or no factor is trained, else "factors" or "kernel"."""
    layer, train = config["layer"], config["train"]
    asked = train.get("decay")
    idle = None
    if layer["name"] == "conv2d":
        return
    composes = getattr(layer_type(layer["name"]), "composes_in_training", True)
    if train.get("atcd") is not None:
        if not composes:
            raise ValueError(f"train.atcd is not possible with layer={layer['name']}: it has no kernel in training")
        idle = "train.atcd decays dense kernels"
    elif not train["weight_decay"]:
        idle = "train.weight_decay is 0"
    if idle:
        if asked is not None:
            raise ValueError(f"train.decay={asked} would do nothing: {idle}")
        return
    reason = None
    if not composes:
        reason = "it has no kernel in training"
    elif layer.get("train_basis") is False:
        reason = "its basis is frozen and orthonormal, so that both decays are the same"
    if asked == "kernel" and reason:
        raise ValueError(f"train.decay=kernel is not possible with layer={layer['name']}: {reason}")
    train["decay"] = asked or ("factors" if reason else DEFAULT_DECAY)


def _train_config(config: Mapping[str, Any]) -> TrainConfig:
    return TrainConfig(**_tuples(config["train"]), orthogonality=config["layer"].get("orthogonality") or 0.0)


def build(config: Mapping[str, Any], dataset: Dataset) -> tuple[nn.Module, Plan, dict[str, int]]:
    """The network of a config before training, the plan it follows, and the cost of its dense twin.

    It is freshly initialised, or with `model.weights` decomposed from trained ones.

    The config is a resolved one, or a record's.

    Raises:
        ValueError: an unknown model or layer type, or a rank or budget that is not possible.
    """
    settings, layer = config["model"], dict(config["layer"])
    weights = settings.get("weights")
    dense = dense_network(config, dataset)
    if weights:
        load_weights(dense, Path(weights))
    name = layer.pop("name")
    layer.pop("orthogonality", None)  # of the training
    rank, flops, energy = (layer.pop(key, None) for key in ("rank", "flops", "energy"))
    rule: Rule
    if rank is not None:
        rule = Fixed(rank)
    elif energy is not None:
        rule = Energy(energy)
    else:
        rule = Budget(flops=flops or 1.0, uniform=not weights)  # only trained kernels have spectra that say something
    exclude = settings.get("exclude") or []
    exclude = [exclude] if isinstance(exclude, str) else list(exclude)
    if settings.get("dense_stem"):
        exclude.insert(0, stem_name(dense))
    if settings.get("shortcut") == "B":
        exclude.append("*.shortcut.0")
    the_plan = plan(
        dense,
        name,
        rank=rule,
        include=settings.get("include"),
        exclude=exclude,
        min_kernel_size=settings.get("min_kernel_size") or 1,
        input_size=dataset.input_size,
        **layer,
    )
    if name != "conv2d" and not the_plan.ranks:
        reasons = Counter(row.reason for row in the_plan.rows if not row.reason.startswith("excluded"))
        most = f", mostly because: {reasons.most_common(1)[0][0]}" if reasons else ""
        raise ValueError(f"layer={name} would replace none of {settings['name']}'s convolutions{most}")
    if settings.get("factorize_classifier") and name != "conv2d" and "linear" not in the_plan.ranks:
        reason = next(row.reason for row in the_plan.rows if row.name == "linear")
        raise ValueError(f"model.factorize_classifier=true is not possible with layer={name}: {reason}")
    return convert(dense, the_plan, from_scratch=not weights), the_plan, total_cost(dense, dataset.input_size)


def dense_network(config: Mapping[str, Any], dataset: Dataset) -> nn.Module:
    """The network of a config (a resolved one, or a record's) as it is before any layer is replaced.

    Raises:
        ValueError: there is no such network, or it doesn't take these options.
    """
    left_out = (*OF_REPLACEMENT, "weights", "weights_md5")
    options = {key: value for key, value in config["model"].items() if key not in left_out}
    if config["model"].get("factorize_classifier"):
        options["conv_classifier"] = True
    channels, size, _ = dataset.input_size
    return create_model(num_classes=dataset.num_classes, in_channels=channels, image_size=size, **options)


@dataclass
class _Job:
    """A run that can start: everything in its config has been checked."""

    config: dict[str, Any]
    record: RunRecord
    train_config: TrainConfig
    dataset: Dataset
    device: torch.device
    wandb_mode: str
    model: nn.Module
    plan: Plan
    dense_cost: dict[str, int]


def run(config: Mapping[str, Any], precision: str | None = None) -> dict[str, Any]:
    """Train what `config` says, unless that has been done, and return the record's summary.

    Args:
        config: what `configs/train.yaml` composes to, or `decef.training.record.replay` returns, as plain data.
        precision: what `train.precision` "auto" is to mean; None is what is best on this device.

    Raises:
        InputError: before any long work, when something in the config cannot be used.
        FloatingPointError: the training diverged; the record says "failed".
    """
    started = time.perf_counter()
    with _input_errors():
        job = _prepare(config)
        if precision is not None:
            job.train_config = replace(job.train_config, precision=precision)
            check_possible(job.train_config, job.device, launched())
    with ExitStack() as held:
        processes = held.enter_context(joined(job.device))
        summary = processes.tell(job.record.summary())
        if summary.get("status") == "finished":
            words = job.record.id, summary["test_top1"], summary["precision"]
            log.info("%s is finished already (top-1 %.2f %%, in %s)", *words)
            return summary
        error, checkpoint, data = None, None, None
        if processes.is_first:
            try:
                with _input_errors():
                    held.enter_context(job.record.open())
                    checkpoint = _load_checkpoint(job.record)
                    data = _load_data(job)  # first here alone: it may be a download
            except InputError as refused:
                error = str(refused)
        error, checkpoint = processes.tell((error, checkpoint))
        if error:
            raise InputError(error)
        if checkpoint is not None:  # a run is of one precision, on whatever machine it goes on
            job.train_config = replace(job.train_config, precision=checkpoint["precision"])
        train, test = data or _load_data(job)
        if processes.is_first:
            return _train_and_record(job, checkpoint, train, test, started, processes)
        _fit(job, train, test, _Memory(checkpoint), lambda metrics: None, processes)
        return processes.tell()


def _prepare(config: Mapping[str, Any]) -> _Job:
    config = resolve(config)
    the_dataset = dataset(config["dataset"])
    train_config = _train_config(config)
    device = _device(config["device"])
    check_possible(train_config, device, launched())
    wandb_mode = resolve_mode(config["wandb"]["mode"])
    if config["threads"]:
        torch.set_num_threads(config["threads"])
    torch.manual_seed(config["seed"])
    model, the_plan, dense_cost = build(config, the_dataset)
    record = RunRecord(Path(config["results"]), config)
    return _Job(config, record, train_config, the_dataset, device, wandb_mode, model, the_plan, dense_cost)


def _load_checkpoint(record: RunRecord) -> dict[str, Any] | None:
    if not record.checkpoint.is_file():
        return None
    checkpoint = load_checkpoint(record.checkpoint)
    if checkpoint["config"] != record.config:
        raise ValueError(f"{record.checkpoint} is of another config: move it away to start anew")
    return checkpoint


def _load_data(job: _Job) -> tuple[Data, Data]:
    settings = job.config["dataset"]
    train, test = job.dataset.load(Path(settings["root"]) if settings["root"] else None)
    if settings["train_size"]:
        train = stratified_subset(train, settings["train_size"])
    if isinstance(train, Images):
        train = replace(train, crop_padding=settings.get("crop_padding") or 0, flip=settings["flip"])
    return train.to(job.device), test.to(job.device)


def _fit(
    job: _Job, train: Data, test: Data, state: State, on_epoch: Callable[[Metrics], None], processes: Processes
) -> None:
    fit(
        job.model.to(job.device),
        train,
        test,
        job.train_config,
        mean=torch.tensor(job.dataset.mean, device=job.device),
        std=torch.tensor(job.dataset.std, device=job.device),
        seed=job.config["seed"],
        state=state,
        on_epoch=on_epoch,
        processes=processes,
        progress=job.config["progress"],
    )


def _train_and_record(
    job: _Job,
    checkpoint: dict[str, Any] | None,
    train: Data,
    test: Data,
    started: float,
    processes: Processes,
) -> dict[str, Any]:
    record, config, train_config = job.record, job.config, job.train_config
    done = checkpoint["epoch"] if checkpoint else 0
    record.keep_epochs(done)
    summary = _first_summary(job, done, processes)
    record.write_summary(summary)
    if done:
        log.info("%s goes on after epoch %d", record.id, done)
    else:
        share = summary["macs"] / job.dense_cost["macs"]
        log.info(
            "%s: %s parameters, %s MACs (%.3f of dense)",
            record.id,
            f"{summary['params']:,}",
            f"{summary['macs']:,}",
            share,
        )
    experiment = config.get("experiment")
    tracker = Tracker(
        job.wandb_mode,
        run_id=record.id,
        folder=record.path,
        config=record.config,
        group=config["wandb"]["group"] or "-".join(filter(None, [experiment, record.id.rsplit("-s", 1)[0]])),
        tags=[*(config[key]["name"] for key in ("dataset", "model", "layer", "train")), *filter(None, [experiment])],
        project=config["wandb"]["project"],
        entity=config["wandb"]["entity"],
    )
    for row in record.metrics():  # of a resumed run
        tracker.log(row)
    earlier = summary["wall_seconds"]

    def on_epoch(metrics: Metrics) -> None:
        record.add_epoch(metrics)
        tracker.log(metrics)
        log.info(
            "epoch %d/%d  loss %.3f  test top-1 %.2f %%  %.0f images/s",
            metrics["epoch"], train_config.epochs, metrics["train_loss"], metrics["test_top1"],
            metrics["images_per_second"],
        )  # fmt: skip
        rates = [row["images_per_second"] for row in record.metrics()]
        summary.update(
            epochs=metrics["epoch"],
            wall_seconds=round(earlier + time.perf_counter() - started, 1),
            images_per_second=round(harmonic_mean(rates), 1),  # every epoch has as many images
        )
        record.write_summary(summary)

    state = _CheckpointState(job, checkpoint)
    try:
        _fit(job, train, test, state, on_epoch, processes)
    except (Exception, KeyboardInterrupt) as error:
        interrupted = isinstance(error, KeyboardInterrupt)
        summary["status"] = "interrupted" if interrupted else "failed"
        summary["error"] = None if interrupted else f"{type(error).__name__}: {error}"
        with suppress(OSError):  # what went wrong may be the disk
            record.write_summary(summary)
        tracker.finish(summary, failed=True)
        if isinstance(error, OSError):
            raise InputError(
                f"{record.path} cannot be written ({error.strerror or error}): make room or say results=FOLDER; the "
                "last whole checkpoint is kept and the same command resumes from it"
            ) from error
        raise
    last = record.metrics()[-1]
    summary.update(
        status="finished",
        test_top1=last["test_top1"],
        test_loss=last["test_loss"],
        val_top1=last["val_top1"],
        finished=datetime.now(UTC).isoformat(timespec="seconds"),
    )
    record.write_summary(summary)
    tracker.finish(summary, checkpoint=record.checkpoint if config["wandb"].get("artifacts") else None)
    log.info("%s is finished: test top-1 %.2f %%", record.id, summary["test_top1"])
    return processes.tell(summary)


def _first_summary(job: _Job, done: int, processes: Processes) -> dict[str, Any]:
    previous = job.record.summary()
    summary: dict[str, Any] = {
        "id": job.record.id,
        "status": "running",
        "schedule": job.train_config.name,
        "test_top1": None,
        "test_top1_is": "the test accuracy of the last epoch; nothing was chosen on the test set",
        "val_top1": None,
        **total_cost(job.model, job.dataset.input_size),
        "dense": job.dense_cost,
        "ranks": job.plan.ranks,
        "precision": resolve_precision(job.device, job.train_config.precision),
        "processes": processes.count,
        "epochs": done,
        "wall_seconds": previous.get("wall_seconds", 0.0),
        "images_per_second": None,
        **environment(_device_name(job.device), torch.get_num_threads()),
    }
    if done:
        summary["resumed"] = [*previous.get("resumed", []), summary["started"]]
        summary["started"] = previous["started"]
    else:
        summary["wall_seconds"] = 0.0
    return summary


@contextmanager
def _input_errors() -> Iterator[None]:
    """What is wrong with the input, as `InputError`."""
    try:
        yield
    except (ValueError, FileNotFoundError) as error:
        raise InputError(str(error)) from error


class _Memory:
    """What a process that writes nothing starts from."""

    def __init__(self, checkpoint: dict[str, Any] | None) -> None:
        self._checkpoint = checkpoint

    def load(self) -> dict[str, Any] | None:
        return self._checkpoint

    def save(self, state: dict[str, Any]) -> None:
        """The first process does."""


class _CheckpointState(_Memory):
    """The checkpoint file as `fit` sees it: what it saves, with the config and the plan that it belongs to."""

    def __init__(self, job: _Job, checkpoint: dict[str, Any] | None) -> None:
        super().__init__(checkpoint)
        self._record, self._plan, self._keep = job.record, job.plan, job.config["keep_checkpoints"]
        self._precision = resolve_precision(job.device, job.train_config.precision)

    def save(self, state: dict[str, Any]) -> None:
        extra = {"config": self._record.config, "plan": self._plan.to_dict(), "precision": self._precision}
        if self._keep:
            model = {"epoch": state["epoch"], "model": state["model"], **extra}
            save_checkpoint(self._record.path / f"checkpoint-{state['epoch']:04d}.pt", model)
        save_checkpoint(self._record.checkpoint, {**state, **extra})


def _device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"device={name!r} is no device: say auto, cpu or cuda") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device={name} was asked for, but torch sees no GPU: say device=cpu")
    if device.type == "cuda" and device.index is None and "LOCAL_RANK" in os.environ:
        return torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    return device


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def _tuples(value: Any) -> Any:
    """Lists as tuples, so that a config can be frozen."""
    if isinstance(value, Mapping):
        return {key: _tuples(v) for key, v in value.items()}
    return tuple(_tuples(v) for v in value) if isinstance(value, list) else value
