"""One run, from its config to a finished record."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from decef.costs import input_shapes, total_cost
from decef.data import Data, Dataset, UnreadableError
from decef.data.subsets import stratified_subset
from decef.inputs import takes_channels_last
from decef.layers import FactorizedConv2d
from decef.layers.padding import pair
from decef.machine import device_name, keep_freed_memory
from decef.plans import Plan
from decef.training.build import Built, build, rebuild
from decef.training.config import InputError, RunConfig, TrainConfig, input_errors
from decef.training.distributed import Processes, joined, launched
from decef.training.loop import check_possible, fit, scaled, split_validation, validation_images
from decef.training.precision import has_bf16, resolve_precision
from decef.training.record import Metrics, Summary, read_summary
from decef.training.recorder import Recorder
from decef.training.tracking import resolve_mode

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Job:
    """A run that can start here: everything that can be checked without work has been checked."""

    config: RunConfig
    train: TrainConfig
    dataset: Dataset
    device: torch.device
    recorder: Recorder


def run(config: RunConfig, precision: str | None = None) -> Summary:
    """Train what `config` says, unless that is done already, and return the record's summary.

    Args:
        config: from `RunConfig.from_dict` or `decef.training.record.replay`.
        precision: takes the place of `train.precision`. None: as configured, where "auto" is the best on this device.

    Raises:
        InputError: something in the config cannot be used, which shows before any long work; or the results cannot be
            written, or images not be read.
        FloatingPointError: the training diverged; the record says "failed".
    """
    with input_errors():
        job = _prepare(config.resolved(), precision)
    with ExitStack() as held:
        processes = held.enter_context(joined(job.device))
        summary = processes.broadcast(read_summary(job.recorder.path))
        _check_images(job, summary)
        if _finished(job, summary):
            if job.config.keep_checkpoints and not any(job.recorder.path.glob("checkpoint-*.pt")):
                log.warning("it kept no checkpoints: to have some, train it again in another place, results=FOLDER")
            return summary
        resuming = job.recorder.checkpoint.is_file()
        # What needs neither images nor a checkpoint is built first: a rank that is not possible shows at once.
        built = None if resuming or config.model.decompose_on else _build(job)
        refused, checkpoint, data = None, None, None
        if processes.is_first:
            try:
                with input_errors():
                    held.enter_context(job.recorder.open())
                    summary = read_summary(job.recorder.path)  # again: until here another process may have been at it
                    if not _finished(job, summary):
                        checkpoint = job.recorder.load_checkpoint()
                        data = _load_data(job)  # here before the other processes: it may be a download
            except InputError as error:
                refused = error
        refused, summary, checkpoint = processes.broadcast((refused, summary, checkpoint))
        if refused is not None:
            raise refused
        if summary.get("status") == "finished":
            return summary
        if checkpoint is not None:  # a run keeps its precision, even if resumed elsewhere
            job = replace(job, train=replace(job.train, precision=checkpoint["precision"]))
        if job.train.precision == "bf16" and not has_bf16(job.device):
            log.warning("bf16 is emulated here, many times slower than fp32; it need not come out as on other hardware")
        train, test = data or _load_data(job)
        built = built or _build(job, checkpoint, train)
        if job.train.channels_last and not _takes_channels_last(job, built.model):
            log.info("in the usual memory layout: the network doesn't run in channels-last, as `view` doesn't take it")
            job = replace(job, train=replace(job.train, channels_last=False))
        if processes.is_first:
            summary = _train_and_record(job, built, checkpoint, train, test, processes)
        else:
            _fit(job, built.model, train, test, checkpoint, lambda state: None, lambda metrics: None, processes)
        return processes.broadcast(summary)


def _check_images(job: _Job, summary: Summary) -> None:
    """Raise `InputError` if the run was begun on another part of ImageNet than is here."""
    here, before = job.config.dataset.part_md5(), summary.get("images_md5")
    if here and before and here != before:
        raise InputError(
            f"{job.recorder.path} is of other images than are here: set dataset.root to those, or say results=FOLDER "
            "for a record of its own"
        )


def _finished(job: _Job, summary: Summary) -> bool:
    """Whether the run is done already; if so, the log says it."""
    if summary.get("status") != "finished":
        return False
    words = job.recorder.id, summary["test_top1"], summary["precision"]
    log.info("%s is finished already (top-1 %.2f %%, in %s)", *words)
    return True


def _prepare(config: RunConfig, precision: str | None) -> _Job:
    dataset = config.dataset.dataset()
    device = find_device(config.device)
    train = replace(config.train, precision=precision or resolve_precision(device, config.train.precision))
    check_possible(train, device, launched())
    resolve_mode(config.wandb.mode)  # raises, if W&B is asked for and can't be had
    if device.type == "cpu":
        keep_freed_memory()
    if config.threads:
        torch.set_num_threads(config.threads)
    return _Job(config, train, dataset, device, Recorder(config))


def _build(job: _Job, checkpoint: dict[str, Any] | None = None, train: Data | None = None) -> Built:
    """The network: as its checkpoint's plan says, or new; decomposed on training images where that is asked for."""
    config, seen = job.config, None
    torch.manual_seed(config.seed)
    with input_errors():
        if checkpoint is not None:
            return rebuild(config.model, job.dataset, Plan.from_dict(checkpoint["plan"]))
        if config.model.decompose_on and train is not None:
            images, _ = split_validation(train, job.train.validation)
            seen = stratified_subset(images, config.model.decompose_on)
        built = build(config.model, config.layer, job.dataset, seen)
        _check_scales(job, built.model)
        return built


def _takes_channels_last(job: _Job, network: nn.Module) -> bool:
    parameter = next(network.parameters())
    return takes_channels_last(network.train(), parameter.new_zeros(2, *job.dataset.input_size))


def _check_scales(job: _Job, network: nn.Module) -> None:
    """Raise `ValueError` if the images would be too small at one of `train.scales`: for the network, or for kernels.

    Of a 1x1 map a padded kernel sees its centre alone. Its other elements only decay, to nothing in a few epochs.
    """
    if not job.train.scales:
        return
    channels, *size = job.dataset.input_size
    convs = (nn.Conv2d, FactorizedConv2d)
    wide = {name for name, m in network.named_modules() if isinstance(m, convs) and max(pair(m.kernel_size)) > 1}
    whole = input_shapes(network, (channels, *size))
    for _, scale in job.train.scales:
        where = f"train.scales: with images at {scale:g} of their size"
        try:
            shapes = input_shapes(network, (channels, *scaled(size, scale)))
        except ValueError as error:
            raise ValueError(f"{where} {error}") from error
        names = [
            name for name in shapes if name in wide and _single_pixels(shapes[name]) and not _single_pixels(whole[name])
        ]
        if names:
            which = names[0] if len(names) == 1 else f"{len(names)} layers, from {names[0]} on,"
            raise ValueError(
                f"{where} {which} would see maps of 1x1 and train the centre of their kernels alone: take larger ones, "
                "or train.scales=[], as train=full_size has"
            )


def _single_pixels(shapes: Sequence[Sequence[int]]) -> bool:
    """Whether all maps are 1x1; `shapes` are `(B, C, H, W)`."""
    return all(height == width == 1 for *_, height, width in shapes)


def _load_data(job: _Job) -> tuple[Data, Data]:
    train, test = job.config.dataset.load()
    validation_images(len(train), job.train.validation)
    return train.to(job.device), test.to(job.device)


def _train_and_record(
    job: _Job, built: Built, checkpoint: dict[str, Any] | None, train: Data, test: Data, processes: Processes
) -> Summary:
    recorder, precision = job.recorder, job.train.precision
    known = Summary(
        **total_cost(built.model, job.dataset.input_size),  # type: ignore[typeddict-item]
        dense=built.dense_cost,
        ranks=built.plan.ranks,
        precision=precision,
        processes=processes.count,
        device=device_name(job.device),
        images={"train": len(train), "test": len(test)},
    )
    if md5 := job.config.dataset.part_md5():
        known["images_md5"] = md5
    recorder.start(known, checkpoint["epoch"] if checkpoint else 0)

    def save(state: dict[str, Any]) -> None:
        recorder.save_checkpoint({**state, "plan": built.plan.to_dict(), "precision": precision})

    try:
        _fit(job, built.model, train, test, checkpoint, save, recorder.epoch, processes)
    except FloatingPointError as error:
        advised = FloatingPointError(f"{error}: try a smaller train.lr, a longer train.warmup or train.precision=fp32")
        recorder.fail(advised)
        raise advised from error
    except (Exception, KeyboardInterrupt) as error:
        recorder.fail(error)
        if isinstance(error, UnreadableError):
            raise InputError(str(error)) from error
        raise
    return recorder.finish()


def _fit(
    job: _Job,
    model: nn.Module,
    train: Data,
    test: Data,
    saved: dict[str, Any] | None,
    save: Callable[[dict[str, Any]], object],
    on_epoch: Callable[[Metrics], None],
    processes: Processes,
) -> None:
    fit(
        model.to(job.device),
        train,
        test,
        job.train,
        seed=job.config.seed,
        orthogonality=job.config.layer.orthogonality,
        saved=saved,
        save=save,
        on_epoch=on_epoch,
        processes=processes,
        progress=job.config.progress,
    )


def find_device(name: str) -> torch.device:
    """The device by its name; "auto" is a GPU if there is one.

    Raises:
        ValueError: there is no such device here.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except (RuntimeError, TypeError):
        raise ValueError(f"device={name!r} is no device: say auto, cpu or cuda") from None
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"device={name} can't be trained on: say auto, cpu or cuda")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device={name} was asked for, but torch sees no GPU: say device=cpu")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"device={name} was asked for, but there are {torch.cuda.device_count()} GPUs, from cuda:0 on")
    if device.type == "cuda" and "LOCAL_RANK" in os.environ:
        rank, count = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
        if count == 1:  # some launchers show every process its own GPU alone
            return torch.device("cuda", 0)
        if device.index is not None and int(os.environ.get("LOCAL_WORLD_SIZE", "1")) > 1:
            raise ValueError(f"device={name} would have all processes on one GPU: say device=cuda")
        if device.index is None and rank >= count:
            raise ValueError(f"process {rank + 1} has no GPU, of which there are {count}: start as many processes")
        return device if device.index is not None else torch.device("cuda", rank)
    return device
