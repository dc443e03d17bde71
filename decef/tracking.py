"""W&B as the mirror of a run record."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

log = logging.getLogger(__name__)

MODES = ("auto", "online", "offline", "disabled")


class Tracker:
    """Sends a run's config, metrics and summary to W&B; in mode "disabled" it does nothing and needs no wandb.

    Args:
        mode: "online", "offline", "disabled", or "auto": `$WANDB_MODE` if set, else online with an API key, else
            offline. It never prompts.
        run_id: the record's id; a resumed run goes on under the same one.
        folder: where W&B writes.
        config: the resolved config.
        group: runs that differ in the seed alone share it.
        tags: shown in W&B.
        project, entity: W&B's; entity None is the account's default.

    Raises:
        ValueError: an unknown mode, online without an API key, or wandb is not installed.
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
        if self.mode == "disabled":
            return
        import wandb

        self._run = wandb.init(
            mode=self.mode,  # type: ignore[arg-type]
            project=project,
            entity=entity,
            id=run_id,
            name=run_id,
            group=group,
            tags=tags,
            config=dict(config),
            dir=folder,
            resume="allow" if self.mode == "online" else None,
            settings=wandb.Settings(silent=True, console="off"),
        )
        self._run.define_metric("epoch")
        self._run.define_metric("*", step_metric="epoch")

    def log(self, metrics: Mapping[str, Any]) -> None:
        """An epoch's metrics."""
        if self._run is not None:
            self._run.log({key: value for key, value in metrics.items() if value is not None})

    def finish(self, summary: Mapping[str, Any], *, failed: bool = False) -> None:
        """Add the summary and end the run; say how to upload it when it is offline."""
        if self._run is None:
            return
        self._run.summary.update({key: value for key, value in summary.items() if value is not None})
        folder = Path(self._run.dir).parent
        self._run.finish(exit_code=int(failed))
        self._run = None
        if self.mode == "offline":
            log.info("W&B was offline; to upload this run: wandb sync %s", os.path.relpath(folder))


def resolve_mode(mode: str) -> str:
    """What "auto" stands for, decided without a prompt.

    Raises:
        ValueError: see `Tracker`.
    """
    if mode not in MODES:
        raise ValueError(f"wandb.mode={mode!r} is not one of {', '.join(MODES)}")
    if mode == "auto" and os.environ.get("WANDB_MODE") in MODES[1:]:
        mode = os.environ["WANDB_MODE"]
    if mode == "disabled":
        return mode
    try:
        import wandb
    except ImportError:
        raise ValueError("wandb is not installed: install it, or set wandb.mode=disabled") from None
    if mode == "offline":
        return mode
    has_key = bool(os.environ.get("WANDB_API_KEY")) or wandb.login(prompt=False)
    if mode == "online" and not has_key:
        raise ValueError("wandb.mode=online needs an API key: run `wandb login`, or set WANDB_API_KEY")
    return "online" if has_key else "offline"
