"""What holds for every test, and the command lines, whose slow imports all tests share."""

import gc
import json
import os
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]  # not from support, which imports torch
# Before torch is imported: several workers of pytest-xdist would else use every core each, and so would their children.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")


def pytest_collection_finish():
    """What was imported stays; looking through it at every collection of garbage takes a quarter of a second."""
    gc.collect()
    gc.freeze()


# Every command line is a process of its own, with its own environment and folder, forked off where all that is slow to
# import is there. It ends without taking that apart again, which would cost more than most command lines do. One that
# hangs says where after five minutes, and ends.
DRIVER = r"""
import atexit, faulthandler, gc, json, os, runpy, sys, threading, traceback
import hydra, pandas, sklearn.datasets, torch, wandb
import decef.inference.export, decef.results.dashboard, decef.results.figures, decef.results.tables, decef.training.run
torch.relu(torch.empty(1, device="meta"))  # imports torch._dynamo
decef.inference.timing.ROUND_SECONDS, decef.inference.timing.SETTLE = 0.001, 0
gc.collect()
gc.freeze()
for line in sys.stdin:
    command, environment, folder, out = json.loads(line)
    child = os.fork()
    if child == 0:
        os.environ.clear()
        os.environ.update(environment)
        os.chdir(folder)
        for descriptor, path in enumerate((os.devnull, f"{out}/stdout", f"{out}/stderr")):
            os.dup2(os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC), descriptor)
        faulthandler.dump_traceback_later(300, exit=True)
        sys.argv = command
        sys.path.insert(0, os.path.dirname(command[0]))
        status = 0
        try:
            runpy.run_path(command[0], run_name="__main__")
        except SystemExit as end:
            status = end.code or 0
            if isinstance(status, str):
                status = print(status, file=sys.stderr) or 1
        except BaseException:
            status = traceback.print_exc() or 1
        threading._shutdown()
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


@pytest.fixture(scope="session", autouse=True)
def _short_rounds():
    """Times are measured, but no test rests on how exact they are."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("decef.inference.timing.ROUND_SECONDS", 0.001)
        patch.setattr("decef.inference.timing.SETTLE", 0)
        yield


@pytest.fixture(scope="session", autouse=True)
def _no_network():
    """No test downloads anything, on whatever machine it runs."""
    connect = socket.socket.connect

    def local(self, address):
        if self.family in (socket.AF_INET, socket.AF_INET6) and address[0] not in ("127.0.0.1", "::1", "localhost"):
            raise OSError(f"tests don't use the network, and this one asks for {address[0]}")
        return connect(self, address)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.socket, "connect", local)
        yield


@pytest.fixture(scope="session")
def trained():
    """A small ResNet trained on digits, which no test changes."""
    from support import network, train  # slow to import, and not needed by all workers

    model = network()
    train(model, size=1437)
    return model


@pytest.fixture(scope="session")
def call():
    """Runs a script of scripts/, or another by its path, as somebody would type it who has no W&B account."""
    start = [sys.executable, "-c", DRIVER]
    plain = {**os.environ, "WANDB_MODE": "offline", "NETRC": "/nonexistent"}
    with (
        tempfile.TemporaryDirectory() as out,
        subprocess.Popen(start, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT) as driver,
    ):

        def run(script, *arguments, cwd=ROOT, env=None):
            command = [str(ROOT / "scripts" / script), *map(str, arguments)]
            print(json.dumps([command, env or plain, str(cwd), out]), file=driver.stdin, flush=True)
            status = int(driver.stdout.readline())
            said = [Path(out, name).read_text() for name in ("stdout", "stderr")]
            return subprocess.CompletedProcess(command, status, *said)

        yield run
