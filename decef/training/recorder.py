"""Write a run's record while it runs, and its mirror in W&B."""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from statistics import harmonic_mean
from typing import Any

import yaml

from decef.files import replace_file
from decef.machine import environment
from decef.training.checkpoint import load_checkpoint, save_checkpoint
from decef.training.config import BusyError, InputError, RunConfig
from decef.training.record import (
    CHECKPOINT,
    CONFIG,
    METRICS,
    SUMMARY,
    Metrics,
    Summary,
    experiment_id,
    read_metrics,
    read_summary,
    recorded,
    run_id,
    without_off,
)
from decef.training.tracking import Tracker

log = logging.getLogger(__name__)

LOCK = ".lock"
#: Errors of a disk that is full or cannot be written.
DISK = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG, errno.EIO)
KEPT = "the last whole checkpoint is kept and the same command resumes from it"
SESSION = ("started", "git_commit", "git_dirty", "python", "packages", "device", "threads", "processes", "machine")


class Recorder:
    """Writes one run's folder. Every file there is replaced as a whole or grows by whole lines.

    Inside `open`: call `start`, then `epoch` after every epoch, then `finish` or `fail`. Of several processes on a run,
    only the first may write.

    Args:
        config: the resolved config; its identity names the folder.

    Attributes:
        id: the run's id.
        path: the run's folder.
        summary: the contents of `summary.json`, written or still to be written.
    """

    def __init__(self, config: RunConfig) -> None:
        self.id = run_id(config)
        self.path = config.results / "runs" / self.id
        self.summary: Summary = {}
        self._config, self._recorded = config, recorded(config)
        self._begun = time.perf_counter()
        self._tracker: Tracker | None = None

    @property
    def checkpoint(self) -> Path:
        return self.path / CHECKPOINT

    @contextmanager
    def open(self) -> Iterator[None]:
        """Make the folder, and lock it against other processes while the context lasts.

        Raises:
            ValueError: the folder cannot be written, it holds another config, or another process has locked it.
        """
        config = self.path / CONFIG
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            lock = (self.path / LOCK).open("w")
        except OSError as error:
            raise self._cannot_write(error) from error
        with lock:
            # Not filelock: where a file system has no locks, that makes do with a file, which a killed run would leave
            # there, and a sweep would take that run for one that another process is at.
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except (BlockingIOError, PermissionError):  # the latter on some network file systems
                raise BusyError(f"another process is at this run: {self.path}") from None
            except OSError as error:
                raise ValueError(
                    f"{self.path} can't be locked ({error.strerror}): put the results elsewhere"
                ) from error
            # A config without summary and checkpoint is of a run that never began: it must not hinder this one.
            if not (config.is_file() and ((self.path / SUMMARY).is_file() or self.checkpoint.is_file())):
                try:
                    replace_file(config, yaml.safe_dump(self._recorded, sort_keys=False).encode())
                except OSError as error:
                    raise self._cannot_write(error) from error
            if differing := _differences(yaml.safe_load(config.read_text()), self._recorded):
                raise ValueError(
                    f"{config} is of the same run done otherwise ({', '.join(differing)}): go on as it says, or move "
                    f"{self.path} away to start anew"
                )
            yield

    def _cannot_write(self, error: OSError) -> ValueError:
        return ValueError(f"the results cannot be written to {self.path}: {error.strerror or error}")

    def load_checkpoint(self) -> dict[str, Any] | None:
        """The state after the last finished epoch; None if there is none yet.

        Raises:
            ValueError: the file is damaged, belongs to another config, or has lost its record.
        """
        if not self.checkpoint.is_file():
            return None
        checkpoint = load_checkpoint(self.checkpoint)
        if _differences(checkpoint["config"], self._recorded):
            raise ValueError(f"{self.checkpoint} is of another config: move it away to start anew")
        if not read_summary(self.path):
            raise ValueError(f"{self.checkpoint} has no {SUMMARY} beside it any more: move it away to start anew")
        return checkpoint

    def save_checkpoint(self, state: Mapping[str, Any]) -> None:
        """Save an epoch's state with the config. Those of `keep_checkpoints` also get a file of their own."""
        state = {**state, "config": self._recorded}
        epochs, kept = self._config.train.epochs, self._config.keep_checkpoints or 0
        if state["epoch"] in {round(epochs * (i + 1) / kept) for i in range(kept)}:
            weights = {key: value for key, value in state.items() if key not in ("optimizer", "scaler")}
            save_checkpoint(self.path / f"checkpoint-{state['epoch']:04d}.pt", weights)
        save_checkpoint(self.checkpoint, state)

    def start(self, known: Summary, epochs: int) -> None:
        """Begin the record, or resume it after `epochs` epochs.

        Args:
            known: what is known about the run before it is trained.
            epochs: how many are done. Metrics of later ones, written after the last checkpoint, are dropped.

        Raises:
            InputError: the run was begun on other data, or the disk is full or cannot be written.
        """
        previous = read_summary(self.path)
        if epochs and previous.get("images", known["images"]) != known["images"]:
            raise InputError(
                f"{self.path} was begun on {previous['images']} images, not {known['images']}: set dataset.root to the "
                "same data, or results= to another folder"
            )
        rows = [row for row in read_metrics(self.path) if row["epoch"] <= epochs]
        with self._writing():
            for kept in self.path.glob("checkpoint-*.pt") if not epochs else ():
                kept.unlink()  # of a training that was thrown away
            replace_file(self.path / METRICS, "".join(json.dumps(row) + "\n" for row in rows).encode())
        self.summary = {
            "id": self.id,
            "status": "running",
            "schedule": self._config.train.name,
            "test_top1": None,
            "test_top1_is": "the test accuracy of the last epoch; no epoch was chosen on the test set",
            "val_top1": None,
            **known,
            "epochs": epochs,
            "wall_seconds": previous.get("wall_seconds", 0.0) if epochs else 0.0,
            "images_per_second": _rate(rows),
            **environment(known["device"]),
        }
        if epochs:
            self._note_earlier_session(previous)
        self._earlier = self.summary["wall_seconds"]
        with self._writing():
            self._write()
        if epochs:
            log.info("%s goes on after epoch %d", self.id, epochs)
        else:
            params, macs = (f"{self.summary[key]:,}" for key in ("params", "macs"))
            share = self.summary["macs"] / self.summary["dense"]["macs"]
            log.info("%s: %s parameters, %s MACs (%.3f of dense)", self.id, params, macs, share)
        self._tracker = self._new_tracker()
        for row in rows:
            self._tracker.log(row)

    def _note_earlier_session(self, previous: Summary) -> None:
        """Of a resumed run: keep where and with what it began, and warn if no run can repeat it for that."""
        session = {key: previous[key] for key in SESSION if key in previous}  # type: ignore[literal-required]
        session["started"] = [previous["started"], *previous.get("resumed", [])][-1]
        self.summary["earlier_sessions"] = [*previous.get("earlier_sessions", []), session]
        self.summary["resumed"] = [*previous.get("resumed", []), self.summary["started"]]
        self.summary["started"] = previous["started"]
        for key, why in (("threads", "round differently"), ("processes", "share each batch in another way")):
            if previous.get(key, self.summary[key]) != self.summary[key]:  # type: ignore[literal-required]
                log.warning(
                    "%s began with %s %s and goes on with %s, which %s: no run can repeat it",
                    self.id, previous[key], key, self.summary[key], why,  # type: ignore[literal-required]
                )  # fmt: skip

    def _new_tracker(self) -> Tracker:
        config, wandb = self._config, self._config.wandb
        names = [config.dataset.name, config.model.name, config.layer.name, config.train.name]
        return Tracker(
            wandb.mode,
            run_id=self.id,
            folder=self.path,
            config=self._recorded,
            group=wandb.group or experiment_id(config),
            tags=[*names, *filter(None, [config.experiment])],
            project=wandb.project,
            entity=wandb.entity,
        )

    def epoch(self, metrics: Metrics) -> None:
        """Append an epoch's metrics and update the summary."""
        assert self._tracker is not None
        with (self.path / METRICS).open("a") as file:
            file.write(json.dumps(metrics) + "\n")
            file.flush()
            os.fsync(file.fileno())
        self._tracker.log(metrics)
        log.info(
            "epoch %d/%d  loss %.3f  test top-1 %.2f %%  %.0f images/s",
            metrics["epoch"], self._config.train.epochs, metrics["train_loss"], metrics["test_top1"],
            metrics["images_per_second"],
        )  # fmt: skip
        self.summary["epochs"] = metrics["epoch"]
        self.summary["wall_seconds"] = round(self._earlier + time.perf_counter() - self._begun, 1)
        self.summary["images_per_second"] = _rate(read_metrics(self.path))
        self._write()

    def fail(self, error: BaseException) -> None:
        """Write into the record why the run ended early.

        Raises:
            InputError: the error is an `OSError`: the disk is full, or a file cannot be read.
        """
        assert self._tracker is not None
        interrupted = isinstance(error, KeyboardInterrupt)
        self.summary["status"] = "interrupted" if interrupted else "failed"
        self.summary["error"] = None if interrupted else f"{type(error).__name__}: {error}"
        with suppress(OSError):  # the disk may be what went wrong
            self._write()
        self._tracker.finish(self.summary, failed=True)
        if isinstance(error, OSError):
            if error.errno not in DISK:
                raise InputError(f"{error}; {KEPT}") from error
            with self._writing():
                raise error

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise InputError(
                f"{self.path} cannot be written ({error.strerror or error}): make room or say results=FOLDER; {KEPT}"
            ) from error

    def finish(self) -> Summary:
        """Write the final results into the record; return the summary.

        Raises:
            InputError: the disk is full or cannot be written.
        """
        assert self._tracker is not None
        last = read_metrics(self.path)[-1]
        self.summary["status"] = "finished"
        self.summary["test_top1"] = last["test_top1"]
        self.summary["test_loss"] = last["test_loss"]
        self.summary["val_top1"] = last["val_top1"]
        self.summary["finished"] = datetime.now(UTC).isoformat(timespec="seconds")
        with self._writing():
            self._write()
        self._tracker.finish(self.summary, checkpoint=self.checkpoint if self._config.wandb.artifacts else None)
        log.info("%s is finished: test top-1 %.2f %%", self.id, self.summary["test_top1"])
        return self.summary

    def _write(self) -> None:
        replace_file(self.path / SUMMARY, (json.dumps(self.summary, indent=2) + "\n").encode())


def _rate(rows: Sequence[Metrics]) -> float | None:
    """Images per second over all epochs, which have the same number of images."""
    return round(harmonic_mean([row["images_per_second"] for row in rows]), 1) if rows else None


def _differences(one: Mapping[str, Any], other: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Dotted keys whose values differ between two configs. An option that is off equals one that is missing."""
    found = []
    for key in (*one, *(k for k in other if k not in one)):
        a, b = one.get(key), other.get(key)
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            found += _differences(a, b, f"{prefix}{key}.")
        elif without_off({key: a}) != without_off({key: b}) and f"{prefix}{key}" != "model.weights":  # the MD5 counts
            found.append(f"{prefix}{key}")
    return found
