"""Do runs side by side in processes of their own, until all are done or time is up."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from decef.training.evidence import Job
from decef.training.record import read_summary

GRACE = 60  # seconds that a run gets to write its record when time is up
Command = Sequence[str]


class Queue:
    """Jobs that are done side by side, in their order. Those that are stopped can be resumed.

    Args:
        jobs: see `decef.training.evidence.missing`.
        results: the results folder; logs go to `<results>/.evidence`.
        command: gives the command line that runs a job.
        after: gives the command lines that measure and release a finished run, as its entry asks for.
        report: called with a line of text whenever a job begins or ends.
    """

    def __init__(
        self,
        jobs: Sequence[Job],
        results: Path,
        *,
        command: Callable[[Job], Command],
        after: Callable[[Job], Sequence[Command]],
        report: Callable[[str], None],
    ) -> None:
        self._waiting, self._next = iter(jobs), threading.Lock()
        self._results, self._command, self._after, self._report = results, command, after, report
        self._failed: list[str] = []
        self._time_is_up = threading.Event()

    def run(self, hours: float, processes: int) -> list[str]:
        """Do the jobs, `processes` at a time, until time is up. Ctrl-C stops them too, and is raised again.

        Returns:
            A line for every job that failed.
        """
        timer = threading.Timer(3600 * hours, self._time_is_up.set)
        timer.start()
        with ThreadPoolExecutor(processes) as pool:
            workers = [pool.submit(self._work) for _ in range(processes)]
            try:
                for worker in workers:
                    worker.result()
            finally:  # by Ctrl-C too, which stops the runs as the end of the time does
                timer.cancel()
                self._time_is_up.set()
        return self._failed

    def _work(self) -> None:
        while not self._time_is_up.is_set():
            with self._next:
                job = next(self._waiting, None)
            if job is None:
                return
            self._do(job)

    def _do(self, job: Job) -> None:
        self._report(f"begins: {job.run_id}")
        log = self._results / ".evidence" / f"{job.run_id}.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        code = self._call(self._command(job), log)
        for more in self._after(job):
            code = self._call(more, log) if code == 0 else code
        if code is None:
            self._report(f"stopped, to go on later: {job.run_id}")
        elif code:
            last = log.read_text().strip().splitlines()[-1:] or ["no output"]
            self._failed.append(f"{job.run_id}: {last[0]}")
            self._report(f"failed: {self._failed[-1]}")
        else:
            top1 = read_summary(self._results / "runs" / job.run_id)["test_top1"]
            self._report(f"finished: {job.run_id}, top-1 {top1:.2f} %")

    def _call(self, command: Command, log: Path) -> int | None:
        """The exit status, or None if time was up."""
        with log.open("a") as file:
            # In a group of its own, as a terminal would send Ctrl-C to it too, in the midst of its coming to an end.
            process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, process_group=0)
            while not self._time_is_up.is_set():
                with contextlib.suppress(subprocess.TimeoutExpired):
                    return process.wait(1.0)
            process.send_signal(signal.SIGINT)
            try:
                process.wait(GRACE)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            return None


def interruptible() -> None:
    """Let Ctrl-C stop this process and those that it starts, even if a shell started it in the background.

    To be killed, or to lose its terminal, then does the same, unless it is told to survive that (nohup).
    """
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
        signal.signal(signal.SIGHUP, signal.default_int_handler)


def one_thread_each() -> None:
    """Let the processes started from here use one thread each, at low priority."""
    os.nice(10)
    os.environ.update(OMP_NUM_THREADS="1", MKL_NUM_THREADS="1")
