"""The record that a run leaves on disk, from which tables and figures are made.

`results/runs/<run id>/` holds `config.yaml` (all that determines the result), `metrics.jsonl` (a line an epoch),
`summary.json` (status, costs, final accuracy, where and with what it ran) and, untracked, `checkpoint.pt`.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import platform
import re
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import yaml

from decef.checkpoint import replace_file

CONFIG, METRICS, SUMMARY, CHECKPOINT, LOCK = "config.yaml", "metrics.jsonl", "summary.json", "checkpoint.pt", ".lock"
#: Config keys that say where and how a run happens, not what comes out of it.
NOT_IDENTITY = ("results", "device", "threads", "wandb", "progress", "experiment", "keep_checkpoints")


def identity(config: Mapping[str, Any]) -> dict[str, Any]:
    """The part of a config that determines the result: without paths, device, logging and options that are off.

    Since an option that is off (null, false, 0, empty) does not count, a new option leaves old run ids alone.
    """
    kept = {key: value for key, value in config.items() if key not in NOT_IDENTITY}
    kept["dataset"] = {k: value for k, value in config["dataset"].items() if k not in ("root", "workers")}
    kept["model"] = {key: value for key, value in config["model"].items() if key != "weights"}
    return _without_off(kept)


def run_id(config: Mapping[str, Any]) -> str:
    """A name for a run that people can read, and a hash of its identity."""
    layer = config["layer"]
    cost = [f"{key[0]}{layer[key]:g}" for key in ("rank", "flops", "energy") if layer.get(key)]
    parts = [config["dataset"]["name"], config["model"]["name"], layer["name"], *cost, config["train"]["name"]]
    digest = hashlib.sha256(json.dumps(identity(config), sort_keys=True).encode()).hexdigest()[:8]
    name = "-".join([*parts, f"s{config['seed']}", digest])
    return re.sub(r"[^\w.-]+", "_", name)


class RunRecord:
    """One run's folder. Every file in it is replaced whole or grows by whole lines.

    Args:
        results: the results folder.
        config: the resolved config; its identity names the folder.
    """

    def __init__(self, results: Path, config: Mapping[str, Any]) -> None:
        self.id = run_id(config)
        self.path = results / "runs" / self.id
        self.config = identity(config)

    @property
    def checkpoint(self) -> Path:
        return self.path / CHECKPOINT

    def summary(self) -> dict[str, Any]:
        """What `summary.json` says, nothing when there is none yet."""
        path = self.path / SUMMARY
        return json.loads(path.read_text()) if path.is_file() else {}

    @contextmanager
    def open(self) -> Iterator[None]:
        """Make the folder and hold it against other processes.

        Raises:
            ValueError: the folder cannot be written, it holds another config, or another process is at this run.
        """
        config = self.path / CONFIG
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            lock = (self.path / LOCK).open("w")
            if not config.is_file():
                replace_file(config, yaml.safe_dump(self.config, sort_keys=False).encode())
        except OSError as error:
            raise ValueError(f"the results cannot be written to {self.path}: {error.strerror or error}") from error
        with lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise ValueError(f"another process is at this run: {self.path}") from None
            if yaml.safe_load(config.read_text()) != self.config:
                raise ValueError(f"{config} is the config of another run: move {self.path} away to start anew")
            yield

    def keep_epochs(self, epochs: int) -> None:
        """Drop the metrics of all epochs after `epochs`: what a run wrote after its last checkpoint."""
        rows = [row for row in self.metrics() if row["epoch"] <= epochs]
        replace_file(self.path / METRICS, "".join(json.dumps(row) + "\n" for row in rows).encode())

    def add_epoch(self, metrics: Mapping[str, Any]) -> None:
        """Append an epoch's metrics."""
        with (self.path / METRICS).open("a") as file:
            file.write(json.dumps(metrics) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def metrics(self) -> list[dict[str, Any]]:
        """All epochs' metrics in order: see `read_metrics`."""
        return read_metrics(self.path)

    def write_summary(self, summary: Mapping[str, Any]) -> None:
        """Replace `summary.json`."""
        replace_file(self.path / SUMMARY, (json.dumps(summary, indent=2) + "\n").encode())


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """All epochs' metrics of a run's folder in order; a last line that a kill left unfinished is not among them."""
    path = folder / METRICS
    rows = []
    for line in path.read_text().splitlines() if path.is_file() else []:
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows


def environment(device: str, threads: int) -> dict[str, Any]:
    """Commit, versions and machine, for the summary."""
    packages: dict[str, str | None] = {}
    for name in ("torch", "torchvision", "timm", "numpy", "hydra-core", "wandb"):
        try:
            packages[name] = version(name)
        except PackageNotFoundError:
            packages[name] = None
    return {
        "git_commit": _git("rev-parse", "HEAD"),
        # Results are what runs leave behind; code, configs and all the rest are what they come from.
        "git_dirty": bool(_git("status", "--porcelain", "--untracked-files=no", "--", ".", ":(exclude)results")),
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "packages": packages,
        "device": device,
        "threads": threads,
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, {cpu_name()}",
    }


def cpu_name() -> str:
    """The CPU's model name where the system tells it, with the widest vector instructions that matter here."""
    try:
        info = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor() or "unknown CPU"
    model = re.search(r"^model name\s*:\s*(.+)$", info, re.MULTILINE)
    flags = re.search(r"^flags\s*:\s*(.+)$", info, re.MULTILINE)
    known = [f for f in ("amx_bf16", "avx512_bf16", "avx512f", "avx2") if flags and f in flags.group(1).split()]
    return f"{model.group(1) if model else 'unknown CPU'} ({known[0] if known else 'no wide vectors'})"


def _git(*args: str) -> str | None:
    try:
        root = Path(__file__).resolve().parents[1]
        done = subprocess.run(["git", "-C", str(root), *args], capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _without_off(value: Any) -> Any:
    if isinstance(value, Mapping):
        kept = {key: _without_off(v) for key, v in value.items()}
        return {key: v for key, v in kept.items() if key == "seed" or not (v is None or v is False or v in (0, [], {}))}
    return list(value) if isinstance(value, tuple) else value
