"""The record that a run leaves on disk, from which tables and figures are made.

`results/runs/<run id>/` holds `config.yaml` (the complete config but for paths and what only says where and how to
log), `metrics.jsonl` (a line an epoch), `summary.json` (status, costs, final accuracy, where and with what it ran) and,
untracked, `checkpoint.pt`. Config and summary together are what `replay` needs to do the run again.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import platform
import re
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from itertools import zip_longest
from pathlib import Path
from typing import Any

import yaml

from decef.training.checkpoint import replace_file

CONFIG, METRICS, SUMMARY, CHECKPOINT, LOCK = "config.yaml", "metrics.jsonl", "summary.json", "checkpoint.pt", ".lock"
TIMES = ("images_per_second", "seconds")  # in metrics: what no two runs have in common
FORMAT = 2  # of config.yaml; 1 left out what was off
#: Config keys that say where and how a run happens, not what comes out of it.
NOT_RECORDED = ("results", "device", "threads", "wandb", "progress", "experiment", "keep_checkpoints")


def recorded(config: Mapping[str, Any]) -> dict[str, Any]:
    """What `config.yaml` holds of a resolved config."""
    kept = {key: value for key, value in config.items() if key not in (*NOT_RECORDED, "format")}
    kept["dataset"] = {k: value for k, value in config["dataset"].items() if k not in ("root", "workers")}
    if config["model"].get("weights"):
        kept["model"] = {**config["model"], "weights": Path(config["model"]["weights"]).name}
    return {"format": FORMAT, **plain(kept)}


def identity(config: Mapping[str, Any]) -> dict[str, Any]:
    """The part of a config, resolved or recorded, that determines the result: what runs that are the same share.

    Left out is what another run may do otherwise and still be the same experiment, to rounding: how a layer is computed
    and how memory is laid out; and options that the others switch off. An option that is off (null, false, 0, empty)
    does not count, so that a new option leaves the ids of old runs alone.
    """
    kept = recorded(config)
    del kept["format"]
    kept["model"].pop("weights", None)  # its content counts, weights_md5
    kept["layer"].pop("implementation", None)
    train = kept["train"]
    idle = ["channels_last"]
    idle += ["warmup"] if train.get("schedule") == "step" else ["milestones", "gamma"]
    idle += ["momentum", "nesterov"] if train.get("adam") else []
    for key in idle:
        train.pop(key, None)
    return _without_off(kept)


def run_id(config: Mapping[str, Any]) -> str:
    """A name for a run that people can read, and a hash of its identity."""
    layer = config["layer"]
    cost = [f"{key[0]}{layer[key]:g}" for key in ("rank", "flops", "energy") if layer.get(key)]
    parts = [config["dataset"]["name"], config["model"]["name"], layer["name"], *cost, config["train"]["name"]]
    digest = hashlib.sha256(json.dumps(identity(config), sort_keys=True).encode()).hexdigest()[:8]
    name = "-".join([*parts, f"s{config['seed']}", digest])
    return re.sub(r"[^\w.-]+", "_", name)


def replay(folder: Path) -> tuple[dict[str, Any], str]:
    """The config and the precision with which `decef.training.run.run` does a recorded run again.

    Returns:
        The config, to which the caller adds where to do it (`results`, `device`, `wandb`, `progress`,
        `keep_checkpoints`, `dataset.root`), and the precision that "auto" meant.

    Raises:
        FileNotFoundError: there is no record.
        ValueError: it is of another format, or not of a finished run.
    """
    for name in (CONFIG, SUMMARY):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder} is no run's record: it has no {name}")
    config = yaml.safe_load((folder / CONFIG).read_text())
    summary = json.loads((folder / SUMMARY).read_text())
    if config.get("format") != FORMAT:
        raise ValueError(f"{folder} has format {config.get('format', 1)}, not {FORMAT}: it can't be done again exactly")
    if summary.get("status") != "finished":
        raise ValueError(f"{folder} is {summary.get('status')}, not finished: the command that began it resumes it")
    return {**config, "threads": summary["threads"]}, summary["precision"]


class RunRecord:
    """One run's folder. Every file in it is replaced whole or grows by whole lines.

    Args:
        results: the results folder.
        config: the resolved config; its identity names the folder.
    """

    def __init__(self, results: Path, config: Mapping[str, Any]) -> None:
        self.id = run_id(config)
        self.path = results / "runs" / self.id
        self.config = recorded(config)

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
            if (there := yaml.safe_load(config.read_text())) != self.config:
                differing = ", ".join(differences(there, self.config))
                raise ValueError(
                    f"{config} is of the same run done otherwise ({differing}): go on as it says, or move {self.path} "
                    "away to start anew"
                )
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
        """See `read_metrics`."""
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


def first_difference(one: Sequence[Mapping[str, Any]], other: Sequence[Mapping[str, Any]]) -> int | None:
    """The first epoch whose metrics differ between two runs, but for times; None where all are equal."""
    timeless = [[{k: v for k, v in row.items() if k not in TIMES} for row in rows] for rows in (one, other)]
    pairs = zip_longest(*timeless, fillvalue=None)
    return next((epoch for epoch, (a, b) in enumerate(pairs, start=1) if a != b), None)


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
        root = Path(__file__).resolve().parents[2]
        done = subprocess.run(["git", "-C", str(root), *args], capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def differences(one: Mapping[str, Any], other: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Dotted keys whose values differ between two configs."""
    found = []
    for key in (*one, *(k for k in other if k not in one)):
        a, b = one.get(key), other.get(key)
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            found += differences(a, b, f"{prefix}{key}.")
        elif a != b:
            found.append(f"{prefix}{key}")
    return found


def plain(value: Any) -> Any:
    """Mappings as dicts and tuples as lists, all copied: what YAML and JSON write and read back the same."""
    if isinstance(value, Mapping):
        return {key: plain(v) for key, v in value.items()}
    return [plain(v) for v in value] if isinstance(value, (list, tuple)) else value


def _without_off(value: Any) -> Any:
    if isinstance(value, Mapping):
        kept = {key: _without_off(v) for key, v in value.items()}
        return {key: v for key, v in kept.items() if key == "seed" or not (v is None or v is False or v in (0, [], {}))}
    return value
