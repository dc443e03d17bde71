"""Mirror a run's record in W&B."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

from decef.training.record import read_summary

log = logging.getLogger(__name__)

MODES = ("auto", "online", "offline", "disabled")
OFFLINE = "offline-"  # begins the names of W&B's folders that are not uploaded


class Tracker:
    """Sends a run's config, metrics and summary to W&B. In mode "disabled" it does nothing and doesn't need wandb.

    Training goes on whatever goes wrong with W&B. If W&B doesn't accept a run at its start, the run is mirrored
    offline. If W&B stops accepting it later, the mirror stays on disk, where `make sync` finds it. W&B gets 30 seconds
    to answer at the start and 60 at the end; `$WANDB_INIT_TIMEOUT` and `$WANDB_FINISH_TIMEOUT` change that.

    Args:
        mode: "online", "offline", "disabled", or "auto": `$WANDB_MODE` if set, else online with an API key, else
            offline. There is never a prompt.
        run_id: the record's id; a resumed run keeps it.
        folder: where W&B writes.
        config: the part of the resolved config that is recorded.
        group: shared by runs that differ only in the seed.
        tags: shown in W&B.
        project, entity: those of W&B; entity None is the account's default.

    Raises:
        ValueError: the mode is unknown, "online" lacks an API key, or wandb is not installed.
    """

    def __init__(
        self,
        mode: str,
        *,
        run_id: str,
        folder: Path,
        config: Mapping[str, Any],
        group: str,
        tags: list[str],
        project: str,
        entity: str | None = None,
    ) -> None:
        self.mode = resolve_mode(mode)
        self._run: Any = None
        self._works = True
        if self.mode == "disabled":
            return
        import wandb

        settings = wandb.Settings(
            silent=True,
            console="off",
            init_timeout=_seconds("WANDB_INIT_TIMEOUT", 30.0),
            finish_timeout=_seconds("WANDB_FINISH_TIMEOUT", 60.0),
            finish_timeout_raises=True,
        )
        start = partial(
            wandb.init,
            project=project,
            entity=entity,
            id=run_id,
            name=run_id,
            group=group,
            tags=tags,
            config=dict(config),
            dir=folder,
            settings=settings,
        )
        if self.mode == "online":
            with self._going_on("W&B does not take this run, so it is mirrored offline"):
                self._run = start(mode="online", resume="allow")
            if not self._works:
                self.mode, self._works = "offline", True
        with self._going_on("W&B cannot be started, so this run has no mirror"):
            self._run = self._run or start(mode="offline")
            self._run.define_metric("epoch")
            self._run.define_metric("*", step_metric="epoch")

    def log(self, metrics: Mapping[str, Any]) -> None:
        """Send an epoch's metrics, unless W&B has them already."""
        if self._run is None or not self._works:
            return
        with self._going_on("W&B has stopped taking this run; it is trained and recorded all the same"):
            if metrics["epoch"] >= self._run.step:  # W&B has the first epochs of a resumed run
                known = {key: value for key, value in metrics.items() if value is not None}
                self._run.log(known, step=metrics["epoch"], commit=True)

    def finish(self, summary: Mapping[str, Any], *, failed: bool = False, checkpoint: Path | None = None) -> None:
        """Send the summary and, as the run's artifact, a checkpoint; then end the run.

        If W&B doesn't have all of the run then, it is on disk, and the log says how to upload it.
        """
        if self._run is None:
            return
        folder = Path(self._run.dir).parent
        if self._works:
            with self._going_on("W&B has not taken all of this run"):
                self._run.summary.update({key: value for key, value in summary.items() if value is not None})
                if checkpoint is not None:
                    self._run.log_artifact(checkpoint, name=self._run.name, type="model")
                self._run.finish(exit_code=int(failed))
                _check_upload(folder)
                if self.mode == "offline":
                    _end_process()  # finish() doesn't wait until the log is on disk
        self._run = None
        if self.mode == "online" and self._works:
            return
        if self.mode == "online":
            # This is W&B's own name for a folder that is not uploaded yet.
            with suppress(OSError):
                folder = folder.rename(folder.with_name(f"{OFFLINE}{folder.name}"))
        log.info("to upload this run to W&B: make sync, or wandb sync %s", os.path.relpath(folder))

    @contextmanager
    def _going_on(self, what: str) -> Iterator[None]:
        """Log whatever `wandb` raises as a warning, and stop using it: its process may have died."""
        try:
            yield
        except Exception as error:
            self._works = False
            log.warning("%s (%s)", what, " ".join(f"{type(error).__name__}: {error}".split())[:200])
            with suppress(Exception):
                _end_process()  # else it keeps the run's id, and the next run of a sweep has no W&B either


def _seconds(variable: str, default: float) -> float:
    try:
        return float(os.environ.get(variable, default))
    except ValueError:
        log.warning("%s=%s is no number of seconds: %g are taken", variable, os.environ[variable], default)
        return default


def _end_process() -> None:
    """End W&B's process and wait until it has written everything. The next run starts a new one.

    Raises:
        ChildProcessError: the process ended with an error.
    """
    import wandb

    try:
        wandb.teardown()
    except SystemExit as error:
        raise ChildProcessError(f"its process ended with status {error.code}") from None


def _check_upload(folder: Path) -> None:
    """Raise ConnectionError if W&B refused a run's data: wandb itself ends such a run as if nothing were wrong."""
    written = folder / "logs" / "debug-internal.log"
    if written.is_file() and "filestream: fatal error" in written.read_text(errors="replace"):
        raise ConnectionError(f"W&B refused the data, see {os.path.relpath(written)}")


def resolve_mode(mode: str) -> str:
    """The mode that `mode` stands for here: "auto" becomes another one, without a prompt.

    Raises:
        ValueError: see `Tracker`.
    """
    if mode not in MODES:
        raise ValueError(f"wandb.mode={mode!r} is not one of {', '.join(MODES)}")
    if mode == "auto":
        here = os.environ.get("WANDB_MODE", "").replace("dryrun", "offline")  # as it was called before
        mode = here if here in MODES else mode
    if mode == "disabled":
        return mode
    try:
        import wandb  # noqa: F401
    except ImportError:
        raise ValueError("wandb is not installed: install it, or set wandb.mode=disabled") from None
    if mode == "offline":
        return mode
    has_key = has_api_key()
    if mode == "online" and not has_key:
        raise ValueError("wandb.mode=online needs an API key: run `wandb login`, or set WANDB_API_KEY")
    return "online" if has_key else "offline"


def has_api_key() -> bool:
    """Whether there is an API key in the environment or in W&B's files. W&B is not asked whether it is valid."""
    import wandb

    return bool(os.environ.get("WANDB_API_KEY")) or wandb.login(prompt=False, verify=False)


def check_account() -> None:
    """Ask W&B whether it accepts the API key.

    Raises:
        ValueError: there is no API key, or W&B refuses it or doesn't answer.
    """
    import wandb

    if not has_api_key():
        raise ValueError("there is no W&B API key: run `wandb login`, or set WANDB_API_KEY")
    try:
        wandb.login(prompt=False, verify=True)
    except wandb.errors.Error as error:
        raise ValueError(f"W&B cannot be reached or does not take the API key: {error}") from error


def offline_runs(results: Path) -> list[Path]:
    """The folders of mirrored runs that W&B doesn't have yet: of each run the last one, which has all epochs.

    Runs that are still running, or were killed and not resumed yet, are left out: their logs are incomplete.
    """
    folders = []
    for run in sorted((results / "runs").glob("*")):
        # If the last session went to W&B as it ran, the mirror of an earlier one would overwrite it there.
        last = max(run.glob("wandb/*run-*"), key=_begun, default=None)
        if last is None or not last.name.startswith(OFFLINE) or _is_uploaded(last):
            continue
        if read_summary(run).get("status", "running") != "running":
            folders.append(last)
    return folders


def upload(folders: Sequence[Path]) -> list[Path]:
    """Upload `offline_runs` with `wandb sync`, which prints what it does; return the folders that W&B then has.

    Raises:
        ValueError: see `check_account`.
    """
    check_account()
    command = [sys.executable, "-m", "wandb", "sync"]
    subprocess.run([*command, *map(str, folders)], check=False)
    # One unreadable log keeps `wandb sync` from uploading the others, yet its exit status is 0.
    for folder in folders:
        if len(folders) > 1 and not _is_uploaded(folder):
            subprocess.run([*command, str(folder)], check=False)
    return [folder for folder in folders if _is_uploaded(folder)]


def _begun(folder: Path) -> tuple[str, bool]:
    """Sorts W&B's folders by the time in their names; where W&B refused a run, its mirror begins in the same second."""
    return folder.name.removeprefix(OFFLINE), folder.name.startswith(OFFLINE)


def _is_uploaded(folder: Path) -> bool:
    return any(folder.glob("*.wandb.synced"))
