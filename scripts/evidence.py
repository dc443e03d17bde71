"""Do the runs that the claims rest on, listed in configs/evidence.yaml.

python scripts/evidence.py run --hours 2.5        # the missing runs, most valuable first; stops when time is up
python scripts/evidence.py status                 # what is done, what is missing, and how long it would take
"""

from __future__ import annotations

import argparse
import re
import sys
from collections import Counter
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from cli import CONFIGS, fail, run_config

if TYPE_CHECKING:
    from decef.training.config import RunConfig
    from decef.training.evidence import Job


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["run", "status"])
    parser.add_argument("--hours", type=float, default=2.5, help="time limit")
    parser.add_argument("--processes", type=int, default=2, help="runs at a time, each with one CPU thread")
    parser.add_argument("--device", default="cpu", help="cpu; or cuda, with schedule paper for standard, full_size")
    parser.add_argument("--only", action="append", metavar="NAME", help="an entry, again for each; default: all")
    parser.add_argument("--list", type=Path, default=CONFIGS / "evidence.yaml", help="file with the entries")
    parser.add_argument("--results", type=Path, default=Path("results"), help="the results folder")
    parser.add_argument("overrides", nargs="*", help="of scripts/train.py, for every run, such as wandb.mode=disabled")
    arguments = parser.parse_intermixed_args()
    if not arguments.hours > 0 or arguments.processes < 1:
        fail("--hours must be above 0 and --processes at least 1")
    if not re.fullmatch(r"cpu|cuda(:\d+)?", arguments.device):
        fail(f"--device {arguments.device} must be cpu or cuda: which it is decides on the schedule too")

    from decef.training.evidence import (
        for_gpu,
        for_other_hardware,
        gpu_hours,
        list_jobs,
        load_entries,
        missing,
        status_table,
        without_data,
    )
    from decef.training.run import find_device

    try:
        entries = load_entries(arguments.list)
        unknown = set(arguments.only or ()) - {entry.name for entry in entries}
        if unknown:
            fail(f"no entry {', '.join(sorted(unknown))}; there are {', '.join(entry.name for entry in entries)}")
        entries = for_gpu(entries) if arguments.device.startswith("cuda") else entries
        chosen = [entry for entry in entries if not arguments.only or entry.name in arguments.only]

        @cache
        def resolved(given: Sequence[str]) -> RunConfig:
            return run_config([*given, *arguments.overrides]).resolved()

        jobs, blocked = list_jobs(chosen, resolved)
        if arguments.what == "run":
            find_device(arguments.device)
        elsewhere = for_other_hardware(list_jobs(entries, resolved)[0], arguments.results, arguments.device)
        on_gpu = [] if arguments.what == "run" else list_jobs(for_gpu(chosen), resolved)[0]
    except (ValueError, FileNotFoundError) as error:
        fail(str(error))
    for name, reason in blocked.items():
        print(f"{name} can't start here: {reason}")
    for precision, n in Counter(elsewhere[job.run_id] for job in jobs if job.run_id in elsewhere).items():
        run = "1 run waits" if n == 1 else f"{n} runs wait"
        print(f"{run} for hardware that trains in {precision}, as those did that they are to be paired with")
    if arguments.what == "run":
        wanted = [job for job in missing(jobs, arguments.results) if job.run_id not in elsewhere]
        unreadable = without_data(wanted)
        for name, reason in unreadable.items():
            print(f"{name} can't start here: {reason}", flush=True)
        _run([job for job in wanted if job.entry.name not in unreadable], arguments)
    print(status_table(jobs, arguments.results, arguments.processes).to_markdown(index=False))
    if blocked:
        print(f"Not in the table, finished runs neither, as they can't start here: {', '.join(blocked)}.")
    hours = gpu_hours(missing(on_gpu, arguments.results))
    print(f"With --device cuda, at schedule paper: about {hours:.0f} hours on one H100 (an estimate, not measured).")


def _run(jobs: Sequence[Job], arguments: argparse.Namespace) -> NoReturn:
    from decef.training.queue import Queue, interruptible, one_thread_each

    interruptible()
    one_thread_each()
    here = [f"results={arguments.results}", f"device={arguments.device}", "threads=1", "progress=false"]
    here += arguments.overrides
    scripts = Path(__file__).parent
    try:
        queue = Queue(
            jobs,
            arguments.results,
            command=lambda job: [sys.executable, str(scripts / "train.py"), *job.arguments, *here],
            after=lambda job: _measure(arguments.results, job),
            report=lambda line: print(f"{line}\n", end="", flush=True),  # in one piece, whichever thread says it
        )
        failed = queue.run(arguments.hours, arguments.processes)
    except KeyboardInterrupt:
        sys.exit("stopped: the same command goes on with these runs")
    sys.exit("\n".join(failed) or None)


def _measure(results: Path, job: Job) -> list[list[str]]:
    """The commands for a finished run: its effective ranks, or the significance of its components; its release."""
    run, commands = results / "runs" / job.run_id, []
    root = [] if job.config.dataset.root is None else ["--root", job.config.dataset.root]
    if job.entry.after is not None:
        out = results / "ranks" / job.run_id if job.entry.after == "ranks" else results / job.entry.after
        needs_data = root if job.entry.after == "significance" else []
        commands.append([f"{job.entry.after}.py", str(run), "--out", str(out), *needs_data])
    if job.release is not None:
        commands.append(["release.py", str(run), job.release, "--out", str(results / "networks"), *root])
    return [[sys.executable, str(Path(__file__).with_name(script)), *rest] for script, *rest in commands]


if __name__ == "__main__":
    main()
