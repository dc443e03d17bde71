"""Runs that are killed at the worst moments, full disks, two sweeps at once: for real, in processes of their own."""

import json

import pytest
import torch
from support import settings

from decef.training.record import first_difference, load_records, read_metrics

# Every moment is a process of its own, which dies as kill -9 and a full disk have it.
MOMENT = r"""
import json, os, resource, signal, sys
import torch
import decef.training.checkpoint, decef.training.record, decef.training.run, decef.results.tables, decef.training.loop
from pathlib import Path

def die():
    os.kill(os.getpid(), signal.SIGKILL)

def dying(function, call, first=lambda *args: None):
    "`function`, which dies at its n-th call."
    def patched(*args, **kwargs):
        patched.calls += 1
        if patched.calls == call:
            first(*args)
            die()
        return function(*args, **kwargs)
    patched.calls = 0
    return patched

def in_a_step():
    decef.training.loop.Training.step = dying(decef.training.loop.Training.step, 2)

def in_evaluation():
    decef.training.loop.evaluate = dying(decef.training.loop.evaluate, 1)

def in_a_checkpoint():
    def half(path, data):
        path.with_name(path.name + ".partial").write_bytes(bytes(data)[: len(data) // 2])
    decef.training.checkpoint.replace_file = dying(decef.training.checkpoint.replace_file, 1, half)

def before_the_checkpoint_is_in_place():
    real = os.replace
    def replace(source, target):
        if str(target).endswith("checkpoint.pt"):
            die()
        real(source, target)
    os.replace = replace

def in_the_metrics():
    def half(record, metrics):
        with (record.path / "metrics.jsonl").open("a") as file:
            file.write(json.dumps(metrics)[:20])
    decef.training.recorder.Recorder.epoch = dying(decef.training.recorder.Recorder.epoch, 1, half)

def in_the_summary():
    real = os.replace
    def replace(source, target):
        if str(target).endswith("summary.json") and '"epochs": 3' in Path(source).read_text():
            die()
        real(source, target)
    os.replace = replace

def with_a_full_disk():
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))

def never():
    pass

def beside_another():
    "Another process does the same in the other order."
    global other
    other = os.fork()
    if not other:
        configs.reverse()

torch.set_num_threads(1)
other, configs, status = None, json.loads(sys.argv[1]), 0
try:
    globals()[sys.argv[2]]()
    for config in configs:
        decef.training.run.run(decef.training.config.RunConfig.from_dict(config))
except decef.training.config.InputError as error:
    print("refused:", error, flush=True)
    status = 2
if other:
    print("other", os.waitstatus_to_exitcode(os.waitpid(other, 0)[1]), flush=True)
os._exit(status)
"""


def config(results, **changes):
    small = {"name": "plain", "width": 0.1, "relu": True, "dense_stem": True}
    return settings(results, model=small, threads=1, train__epochs=4, dataset__train_size=128, **changes)


@pytest.fixture
def drive(call, tmp_path):
    """Runs configs up to each of the moments, one after the other; returns what was said, with every exit status."""
    script = tmp_path / "moment.py"
    script.write_text(MOMENT)

    def drive(configs, *moments):
        said = []
        for moment in moments:
            done = call(script, json.dumps(configs), moment)
            said += [*done.stdout.splitlines(), f"{moment} {done.returncode}"]
        return said

    return drive


def test_killed_at_every_moment_a_run_ends_as_if_nothing_had_happened(drive, tmp_path):
    killed = (
        "in_a_step",
        "in_a_checkpoint",
        "before_the_checkpoint_is_in_place",
        "in_evaluation",
        "in_the_metrics",
        "in_the_summary",
    )
    assert drive([config(tmp_path / "whole")], "never")[-1] == "never 0"
    said = drive([config(tmp_path / "killed")], *killed, "never")
    assert [line for line in said if line.split()[0] in killed] == [f"{moment} -9" for moment in killed]
    assert said[-1] == "never 0"
    whole, again = (next((tmp_path / part / "runs").iterdir()) for part in ("whole", "killed"))
    assert whole.name == again.name
    states = [torch.load(folder / "checkpoint.pt", weights_only=True) for folder in (whole, again)]
    flat = [torch.utils._pytree.tree_leaves({k: s[k] for k in ("epoch", "model", "optimizer")}) for s in states]
    assert len(flat[0]) == len(flat[1]) > 20
    for one, other in zip(*flat, strict=True):
        assert torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other
    assert len(read_metrics(whole)) == 4
    assert first_difference(read_metrics(whole), read_metrics(again)) is None
    assert not list(again.glob("*.partial"))


def test_a_full_disk_leaves_the_last_checkpoint_and_says_so(drive, tmp_path):
    run = [config(tmp_path)]
    assert drive(run, "in_the_summary")[-1] == "in_the_summary -9"
    (folder,) = (tmp_path / "runs").iterdir()
    assert json.loads((folder / "summary.json").read_text())["status"] == "running"
    before = (folder / "checkpoint.pt").read_bytes()
    said = drive(run, "with_a_full_disk")
    assert said[-1] == "with_a_full_disk 2"
    assert any("cannot be written (File too large)" in line and "same command resumes" in line for line in said)
    assert (folder / "checkpoint.pt").read_bytes() == before
    assert json.loads((folder / "summary.json").read_text())["status"] == "failed"
    assert drive(run, "never")[-1] == "never 0"
    assert json.loads((folder / "summary.json").read_text())["status"] == "finished"


def test_two_sweeps_at_once_leave_whole_records(drive, tmp_path):
    configs = [config(tmp_path, seed=seed) for seed in range(3)]
    said = drive(configs, "beside_another")
    statuses = [int(line.split()[-1]) for line in said if line.startswith(("other ", "beside_another "))]
    refused = [line for line in said if line.startswith("refused")]
    assert len(statuses) == 2
    assert set(statuses) <= {0, 2}
    assert len(refused) == statuses.count(2)
    assert all("another process is at this run" in line for line in refused)
    drive(configs, "never")  # what one left out because the other was at it
    records = load_records(tmp_path)
    assert sorted(r.config.seed for r in records) == [0, 1, 2]
    for record in records:
        assert [row["epoch"] for row in record.metrics] == [1, 2, 3, 4]
