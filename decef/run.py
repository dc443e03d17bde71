"""One run from a plain config to a finished record: `run`. `prepare` is all that can be wrong with a config."""

from __future__ import annotations

import copy
import logging
import time
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch import nn

from decef.checkpoint import load_checkpoint, save_checkpoint
from decef.convert import Plan, convert, plan
from decef.cost import total_cost
from decef.data import DATASETS, Dataset
from decef.layers import LAYERS
from decef.models import CIFAR_RESNETS, create_model
from decef.ranks import Budget, Fixed
from decef.record import RunRecord, environment, identity
from decef.tracking import Tracker, resolve_mode
from decef.train import Metrics, TrainConfig, fit, resolve_precision

log = logging.getLogger(__name__)

DEFAULT_FLOPS = 0.667  # the DeCEF paper's "about 2/3", when a layer is given neither rank nor budget


class InputError(ValueError):
    """Something that the user gave cannot be used; the message says what, and what to do."""


def resolve(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config with defaults filled in and what does not apply taken out, so that equal runs have equal configs.

    Raises:
        InputError: rank and budget are both given.
    """
    resolved = copy.deepcopy(dict(config))
    layer = resolved["layer"]
    if layer["name"] == "conv2d":
        resolved["layer"] = {"name": "conv2d"}
    elif layer.get("rank") is not None and layer.get("flops") is not None:
        raise InputError(f"layer.rank={layer['rank']} and layer.flops={layer['flops']} are both given: give one")
    elif layer.get("rank") is None and layer.get("flops") is None:
        layer["flops"] = DEFAULT_FLOPS
    if not any(hasattr(LAYERS.get(layer["name"]), name) for name in ("orthogonality",)):
        resolved["train"].pop("orthogonality", None)
    return resolved


def build(config: Mapping[str, Any], dataset: Dataset) -> tuple[nn.Module, Plan, dict[str, int]]:
    """The freshly initialised network of a resolved config, the plan it follows, and the cost of its dense twin.

    Raises:
        ValueError: an unknown model or layer type, or a rank or budget that is not possible.
    """
    settings, layer = config["model"], dict(config["layer"])
    dense = create_model(
        settings["name"],
        num_classes=dataset.num_classes,
        in_channels=dataset.input_size[0],
        shortcut=settings["shortcut"],
    )
    name, rank, flops = layer.pop("name"), layer.pop("rank", None), layer.pop("flops", None)
    the_plan = plan(
        dense,
        name,
        rank=Fixed(rank) if rank is not None else Budget(flops=flops or 1.0),
        exclude="conv1" if settings["dense_stem"] else None,
        min_kernel_size=2,
        input_size=dataset.input_size,
        **layer,
    )
    return convert(dense, the_plan, from_scratch=True), the_plan, total_cost(dense, dataset.input_size)


def run(config: Mapping[str, Any]) -> dict[str, Any]:
    """Train what `config` says, unless that has been done, and return the record's summary.

    Args:
        config: what `configs/train.yaml` composes to, as plain data.

    Raises:
        InputError: before any long work, when something in the config cannot be used.
        FloatingPointError: the training diverged; the record says "failed".
    """
    started = time.perf_counter()
    config = resolve(config)
    try:
        train_config = TrainConfig(**_tuples(config["train"]))
        dataset = DATASETS[config["dataset"]["name"]]
        mode = resolve_mode(config["wandb"]["mode"])
        device = _device(config["device"])
        if config["threads"]:
            torch.set_num_threads(config["threads"])
        torch.manual_seed(config["seed"])
        model, the_plan, dense_cost = build(config, dataset)
    except ValueError as error:
        raise InputError(str(error)) from error

    record = RunRecord(Path(config["results"]), config)
    summary = record.summary()
    if summary.get("status") == "finished":
        log.info("%s is finished already (top-1 %.2f %%)", record.id, summary["test_top1"])
        return summary
    try:
        with record.open():
            return _run(config, record, model, the_plan, dense_cost, train_config, dataset, device, mode, started)
    except OSError as error:
        if isinstance(error, FileNotFoundError):
            raise
        raise InputError(f"the results cannot be written to {record.path}: {error.strerror or error}") from error


def _run(
    config: dict[str, Any],
    record: RunRecord,
    model: nn.Module,
    the_plan: Plan,
    dense_cost: dict[str, int],
    train_config: TrainConfig,
    dataset: Dataset,
    device: torch.device,
    mode: str,
    started: float,
) -> dict[str, Any]:
    try:
        checkpoint = load_checkpoint(record.checkpoint) if record.checkpoint.is_file() else None
        if checkpoint is not None and checkpoint["config"] != record.config:
            raise ValueError(f"{record.checkpoint} is of another config: move it away to start anew")
        root = config["dataset"]["root"]
        train, test = dataset.load(Path(root) if root else None)
    except (ValueError, FileNotFoundError) as error:
        raise InputError(str(error)) from error
    limit = config["dataset"]["train_size"]
    if limit:
        train = train.subset(slice(0, limit))

    cost = total_cost(model, dataset.input_size)
    done = checkpoint["epoch"] if checkpoint else 0
    record.keep_epochs(done)
    previous = record.summary()
    summary: dict[str, Any] = {
        "id": record.id,
        "status": "running",
        "schedule": train_config.name,
        "test_top1": None,
        "test_top1_is": "the test accuracy of the last epoch; nothing was chosen on the test set",
        "val_top1": None,
        **cost,
        "dense": dense_cost,
        "ranks": the_plan.ranks,
        "precision": resolve_precision(device, train_config.precision),
        "implementation": config["layer"].get("implementation"),
        "epochs": done,
        "wall_seconds": previous.get("wall_seconds", 0.0),
        "images_per_second": None,
        **environment(_device_name(device), torch.get_num_threads()),
    }
    if previous.get("started"):
        summary["resumed"] = [*previous.get("resumed", []), summary["started"]]
        summary["started"] = previous["started"]
    record.write_summary(summary)
    if done:
        log.info("%s goes on after epoch %d", record.id, done)
    else:
        ratio = cost["macs"] / dense_cost["macs"]
        log.info("%s: %s parameters, %s MACs (%.3f of dense)", record.id, f"{cost['params']:,}", f"{cost['macs']:,}", ratio)

    tracker = Tracker(
        mode,
        run_id=record.id,
        folder=record.path,
        config=identity(config),
        group=config["wandb"]["group"] or record.id.rsplit("-s", 1)[0],
        tags=[config["dataset"]["name"], config["model"]["name"], config["layer"]["name"], train_config.name],
        project=config["wandb"]["project"],
        entity=config["wandb"]["entity"],
    )
    earlier, wall = summary["wall_seconds"], started

    def on_epoch(metrics: Metrics) -> None:
        record.add_epoch(metrics)
        tracker.log(metrics)
        log.info(
            "epoch %d/%d  loss %.3f  test top-1 %.2f %%  %.0f images/s",
            metrics["epoch"], train_config.epochs, metrics["train_loss"], metrics["test_top1"], metrics["images_per_second"],
        )  # fmt: skip
        rows = record.metrics()
        summary.update(
            epochs=metrics["epoch"],
            wall_seconds=round(earlier + time.perf_counter() - wall, 1),
            images_per_second=round(sum(r["images_per_second"] * r["seconds"] for r in rows) / sum(r["seconds"] for r in rows), 1),
        )
        record.write_summary(summary)

    try:
        fit(
            model.to(device),
            train.to(device),
            test.to(device),
            train_config,
            mean=torch.tensor(dataset.mean, device=device),
            std=torch.tensor(dataset.std, device=device),
            crop_padding=config["dataset"]["crop_padding"],
            flip=config["dataset"]["flip"],
            seed=config["seed"],
            state=_CheckpointState(record, checkpoint, the_plan),
            on_epoch=on_epoch,
            progress=config["progress"],
        )
    except (Exception, KeyboardInterrupt) as error:
        interrupted = isinstance(error, KeyboardInterrupt)
        summary["status"] = "interrupted" if interrupted else "failed"
        summary["error"] = None if interrupted else f"{type(error).__name__}: {error}"
        record.write_summary(summary)
        tracker.finish(summary, failed=True)
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
    tracker.finish(summary)
    log.info("%s is finished: test top-1 %.2f %%", record.id, summary["test_top1"])
    return summary


class _CheckpointState:
    """The checkpoint file as `fit` sees it: what it saves, with the config and the plan that it belongs to."""

    def __init__(self, record: RunRecord, checkpoint: dict[str, Any] | None, the_plan: Plan) -> None:
        self._record, self._checkpoint, self._plan = record, checkpoint, the_plan

    def load(self) -> dict[str, Any] | None:
        return self._checkpoint

    def save(self, state: dict[str, Any]) -> None:
        extra = {"config": self._record.config, "plan": self._plan.to_dict()}
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
    return device


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def _tuples(value: Any) -> Any:
    """Lists as tuples, so that a config can be frozen."""
    if isinstance(value, Mapping):
        return {key: _tuples(v) for key, v in value.items()}
    return tuple(_tuples(v) for v in value) if isinstance(value, list) else value


__all__ = ["CIFAR_RESNETS", "InputError", "build", "resolve", "run"]
