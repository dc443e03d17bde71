"""The runs that the claims need: which are wanted, which are done, which come next. `queue` does them.

`configs/evidence.yaml` is the list. Runs are told apart by their ids: a run that two entries want, or that a sweep
reaches twice, is run once. Finished runs are skipped, and stopped ones are resumed.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import yaml

from decef.costs import total_cost
from decef.training.build import dense_network
from decef.training.config import DatasetConfig, RunConfig
from decef.training.precision import resolve_precision
from decef.training.record import CHECKPOINT, Record, Summary, read_summary, run_id

if TYPE_CHECKING:
    import pandas as pd

CPU_SCHEDULES, GPU_SCHEDULE = ("standard", "full_size"), "paper"  # the same entry on a CPU and on a GPU
#: Assumed, not measured: FLOP/s of one H100 that trains ten small networks at once, a fiftieth of its peak in bf16.
H100 = 989e12 / 50
CIFAR_IMAGES = 50_000


@dataclass(frozen=True)
class Entry:
    """Runs that answer one question. `configs/evidence.yaml` explains the fields."""

    name: str
    decides: str
    overrides: str
    seeds: int
    minutes: float
    sweep: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    after: str | None = None
    release: str | None = None

    def settings(self) -> Iterator[tuple[str, ...]]:
        """Arguments of scripts/train.py for every combination of the sweep, without the seed."""
        for values in itertools.product(*self.sweep.values()):
            chosen = (f"{key}={_word(value)}" for key, value in zip(self.sweep, values, strict=True))
            yield (*self.overrides.split(), *chosen)


@dataclass(frozen=True)
class Job:
    """One run of an entry."""

    entry: Entry
    arguments: tuple[str, ...]
    run_id: str
    config: RunConfig

    @property
    def twins(self) -> tuple[Any, ...]:
        """A key that is equal for runs that are compared with each other, over all their seeds."""
        record = Record(self.config, {})
        return record.comparison, record.model, record.weights

    @property
    def wants(self) -> set[str]:
        """What is done once the run is finished."""
        wanted = {f"after={self.entry.after}"} if self.entry.after else set()
        return wanted | ({f"release={self.release}"} if self.release else set())

    @property
    def release(self) -> str | None:
        """What the run's network is released as; None if it isn't: of every setting, that of seed 0 is."""
        if self.entry.release is None or self.config.seed:
            return None
        layer = self.config.layer
        budget = next((f"-{value:g}" for value in (layer.flops, layer.energy, layer.rank) if value is not None), "")
        return f"{self.entry.release}-{layer.name}{budget}"


def load_entries(path: Path) -> list[Entry]:
    """The entries in the file's order, most valuable first.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: an entry cannot be read, or two have the same name.
    """
    entries: dict[str, Entry] = {}
    for fields in yaml.safe_load(path.read_text()):
        try:
            entry = Entry(**fields)
        except TypeError as error:
            raise ValueError(f"{path}: entry {fields.get('name')} cannot be read: {error}") from error
        if entry.name in entries:
            raise ValueError(f"{path}: entry {entry.name} stands there twice")
        entries[entry.name] = entry
    return list(entries.values())


def for_gpu(entries: Sequence[Entry]) -> list[Entry]:
    """The same entries with the schedule for a GPU."""
    cpu = "|".join(CPU_SCHEDULES)
    found = []
    for entry in entries:
        overrides, changed = re.subn(rf"\btrain=({cpu})(?!\S)", f"train={GPU_SCHEDULE}", entry.overrides)
        # its networks are others, beside those of the schedule for a CPU
        release = f"{entry.release}-{GPU_SCHEDULE}" if entry.release and changed else entry.release
        found.append(replace(entry, overrides=overrides, release=release))
    return found


def list_jobs(
    entries: Sequence[Entry], resolved: Callable[[tuple[str, ...]], RunConfig]
) -> tuple[list[Job], dict[str, str]]:
    """List every run once, in order: entry by entry, and within an entry all settings of a seed before the next seed.

    Args:
        entries: see `load_entries`.
        resolved: makes the resolved config from arguments of scripts/train.py. Raises ValueError if such a run can't
            start here.

    Returns:
        The runs; and for each entry that can't start here the reason, by the entry's name.

    Raises:
        ValueError: an entry wants more done to a finished run than an earlier entry with the same run.
    """
    jobs: dict[str, Job] = {}
    blocked: dict[str, str] = {}
    for entry in entries:
        try:
            configs = {arguments: resolved(arguments) for arguments in entry.settings()}
        except ValueError as error:
            blocked[entry.name] = str(error)
            continue
        for seed in range(entry.seeds):
            for arguments, config in configs.items():
                seeded = replace(config, seed=seed)
                job = Job(entry, (*arguments, f"seed={seed}"), run_id(seeded), seeded)
                first = jobs.setdefault(job.run_id, job)
                if job.wants - first.wants:
                    raise ValueError(
                        f"{entry.name} wants {', '.join(sorted(job.wants - first.wants))} of {job.run_id}, which "
                        f"{first.entry.name} runs without: say it there"
                    )
    return list(jobs.values()), blocked


def without_data(jobs: Sequence[Job]) -> dict[str, str]:
    """The entries whose data are not here and can't be downloaded, each with the reason.

    Reads every dataset once, which downloads it if need be: two runs that begin together would both do that.
    """
    failed: dict[DatasetConfig, str | None] = {}
    for job in jobs:
        data = job.config.dataset
        if data not in failed:
            try:
                data.load()
                failed[data] = None
            except (ValueError, FileNotFoundError, ImportError) as error:
                failed[data] = str(error)
    return {job.entry.name: reason for job in jobs if (reason := failed[job.config.dataset]) is not None}


def status_table(jobs: Sequence[Job], results: Path, processes: int) -> pd.DataFrame:
    """A row per entry: runs done, wanted and begun, what they decide, and the hours left with `processes` at a time.

    Hours are based on the mean wall time of the entry's finished runs, else on the list's estimate, marked by ~. The
    last row is the sum.
    """
    import pandas as pd

    rows = []
    for name, group in itertools.groupby(jobs, key=lambda job: job.entry.name):
        wanted = list(group)
        summaries = [_summary(results, job) for job in wanted]
        done = [s for s, job in zip(summaries, wanted, strict=True) if is_done(results, job)]
        minutes = [s["wall_seconds"] / 60 for s in done]
        each = sum(minutes) / len(minutes) if minutes else wanted[0].entry.minutes
        left = (len(wanted) - len(done)) * each / 60 / processes
        rows.append(
            {
                "experiment": name,
                "done": f"{len(done)}/{len(wanted)}",
                "begun": sum(s.get("status") in ("running", "interrupted") for s in summaries),
                "minutes a run": f"{'' if minutes else '~'}{each:.1f}",
                "hours left": round(left, 1),
                "decides": wanted[0].entry.decides,
            }
        )
    finished = sum(is_done(results, job) for job in jobs)
    rows.append(
        {
            "experiment": "all",
            "done": f"{finished}/{len(jobs)}",
            "begun": sum(row["begun"] for row in rows),
            "minutes a run": "",
            "hours left": round(sum(row["hours left"] for row in rows), 1),
            "decides": "",
        }
    )
    return pd.DataFrame(rows)


def gpu_hours(jobs: Sequence[Job]) -> float:
    """Hours that the runs on CIFAR-10 would take on one H100, by their arithmetic; the others are too small to count.

    Forward and backward of the dense network, on images of full size, at the speed `H100`.
    """
    flops = 0.0
    for job in jobs:
        if job.config.dataset.name == "cifar10":
            flops += 3 * _dense_flops(job.config) * CIFAR_IMAGES * job.config.train.epochs
    return flops / H100 / 3600


def is_done(results: Path, job: Job) -> bool:
    """Whether a job's run is finished, and measured and released if its entry asks for that.

    A finished run without a checkpoint, as in a fresh clone, can't be measured or released any more.
    """
    if _summary(results, job).get("status") != "finished":
        return False
    wanted = [results / job.entry.after / f"{job.run_id}.csv"] if job.entry.after else []
    wanted += [results / "networks" / f"{job.release}.safetensors"] if job.release else []
    return all(path.is_file() for path in wanted) or not (results / "runs" / job.run_id / CHECKPOINT).is_file()


def missing(jobs: Sequence[Job], results: Path) -> list[Job]:
    """The jobs that are not done, in order. Within an entry, those already begun come first, those that failed last."""
    open_jobs = [job for job in jobs if not is_done(results, job)]
    order = {name: i for i, name in enumerate(dict.fromkeys(job.entry.name for job in jobs))}

    def turn(job: Job) -> int:
        status = _summary(results, job).get("status")
        return 2 if status == "failed" else int(status is None)

    return sorted(open_jobs, key=lambda job: (order[job.entry.name], turn(job)))


def for_other_hardware(jobs: Sequence[Job], results: Path, device: str) -> dict[str, str]:
    """The missing runs that would have nothing to be compared with if they began here.

    Runs of different precision are not paired, and the precision depends on the hardware: see `resolve_precision`. So a
    run has to begin where it is the same as that of those it is paired with: same network, data, training and seed. If
    none of that seed is finished, as that of the other seeds, which it is to be averaged with.

    Args:
        jobs: all of the list, those that are done too.
        results: the results folder.
        device: on which runs would begin.

    Returns:
        By run id the precision that it needs; the first by name, if the others have several.
    """
    if device.startswith("cuda") and not torch.cuda.is_available():  # asked elsewhere what a GPU would run
        return {}
    found: dict[tuple[Any, ...], set[str]] = {}
    for job in jobs:
        if (summary := _summary(results, job)).get("status") == "finished":
            for seed in (job.config.seed, None):
                found.setdefault((job.twins, seed), set()).add(summary["precision"])
    needed = {}
    for job in jobs:
        precisions = found.get((job.twins, job.config.seed)) or found.get((job.twins, None), set())
        here = resolve_precision(torch.device(device), job.config.train.precision)
        if precisions and here not in precisions and not _summary(results, job):
            needed[job.run_id] = min(precisions)
    return needed


def _dense_flops(config: RunConfig) -> int:
    key = config.model.name, tuple(config.model.options.items())
    if key not in _FLOPS:
        data = config.dataset.dataset()
        with torch.device("meta"):
            _FLOPS[key] = total_cost(dense_network(config.model, data), data.input_size)["flops"]
    return _FLOPS[key]


_FLOPS: dict[tuple[Any, ...], int] = {}


def _summary(results: Path, job: Job) -> Summary:
    return read_summary(results / "runs" / job.run_id)


def _word(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    return "null" if value is None else str(value)
