"""The command lines, as a user types them."""

import fcntl
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from support import ROOT

TINY = ["dataset=digits", "train=smoke", "train.batch_size=64", "dataset.train_size=192", "wandb.mode=disabled"]
SMALL = [*TINY, "model=plain", "model.width=0.1", "model.relu=true"]  # where the network doesn't matter


def records(results):
    return {p.parent.name: json.loads(p.read_text()) for p in sorted(Path(results, "runs").glob("*/summary.json"))}


def test_a_sweep_a_failed_job_a_rerun_and_the_table(call, tmp_path):
    sweep = ["-m", "layer=conv2d,decef", "seed=0", "layer.flops=0.3,0.01", *SMALL]
    first = call("train.py", *sweep, cwd=tmp_path)
    assert first.returncode == 1, first.stderr
    assert "1 of the sweep's jobs failed" in first.stderr
    assert "layer=decef seed=0 layer.flops=0.01" in first.stderr.split("failed:")[1]  # the others can, this one can't
    runs = records(tmp_path / "results")
    finished = {name for name, summary in runs.items() if summary["status"] == "finished"}
    assert len(finished) == len(runs)
    table = call("tables.py", "--print", "all", cwd=tmp_path)
    assert table.returncode == 0, table.stderr
    for layer in ("conv2d", "decef"):
        assert f"| {layer} " in table.stdout
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "results" / "runs").glob("*/*.json*")}
    again = call("train.py", *sweep, cwd=tmp_path)
    assert again.stdout.count("is finished already") >= len(finished)
    assert {p: p.stat().st_mtime_ns for p in before} == before


# Runs a script that gets a signal, as by Ctrl-C, after the first epoch.
INTERRUPTED = """
import os, runpy, signal, sys
number = signal.Signals[sys.argv.pop(1)]
from decef.training.recorder import Recorder
signal.signal(signal.SIGINT, signal.default_int_handler)
epoch = Recorder.epoch
def pressing(self, metrics):
    epoch(self, metrics)
    if metrics["epoch"] == 1:
        Recorder.epoch = epoch
        os.kill(os.getpid(), number)
Recorder.epoch = pressing
del sys.argv[0]
sys.path.insert(0, os.path.dirname(sys.argv[0]))
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_an_interrupted_run_says_so_and_the_same_command_resumes(call, tmp_path, name):
    (tmp_path / "interrupted.py").write_text(INTERRUPTED)
    command = ["layer=decef", "layer.rank=2", *SMALL]
    done = call(tmp_path / "interrupted.py", name, ROOT / "scripts" / "train.py", *command, cwd=tmp_path)
    assert (done.returncode, "interrupted; the same command resumes" in done.stderr) == (1, True)
    (summary,) = records(tmp_path / "results").values()
    assert summary["status"] == "interrupted"
    again = call("train.py", *command, cwd=tmp_path)
    assert again.returncode == 0, again.stderr
    (summary,) = records(tmp_path / "results").values()
    assert summary["status"] == "finished"


def test_an_interrupted_sweep_says_too_what_failed(call, tmp_path):
    (tmp_path / "interrupted.py").write_text(INTERRUPTED)
    sweep = ["-m", "layer=decef", "layer.flops=0.01,0.3", *SMALL]
    done = call(tmp_path / "interrupted.py", "SIGINT", ROOT / "scripts" / "train.py", *sweep, cwd=tmp_path)
    assert done.returncode == 1
    assert "1 of the sweep's jobs failed:\nlayer=decef layer.flops=0.01" in done.stderr
    assert "interrupted; the same command resumes" in done.stderr


def test_a_record_is_done_again(call, tmp_path):
    assert call("train.py", "layer=cpac", "threads=1", *SMALL, cwd=tmp_path).returncode == 0
    (name,) = records(tmp_path / "results")
    again = call("train.py", "--from", f"results/runs/{name}", cwd=tmp_path)
    assert again.returncode == 0, again.stderr
    assert "the same in all 2 epochs" in again.stdout
    assert list(records(tmp_path / "replayed")) == [name]
    metrics = tmp_path / "results" / "runs" / name / "metrics.jsonl"
    rows = [json.loads(line) for line in metrics.read_text().splitlines()]
    rows[1]["train_loss"] += 1e-6
    metrics.write_text("".join(json.dumps(row) + "\n" for row in rows))
    there = call("train.py", "--from", f"results/runs/{name}", cwd=tmp_path)
    assert there.returncode == 2
    assert f"replayed/runs/{name} is there already: remove it, or say results=FOLDER" in there.stderr
    other = call("train.py", "--from", f"results/runs/{name}", "results=other", cwd=tmp_path)
    assert (other.returncode, "not the same from epoch 2 on" in other.stderr) == (1, True)
    workers = call("train.py", "--from", f"results/runs/{name}", "dataset.workers=many", cwd=tmp_path)
    assert (workers.returncode, "dataset.workers=many must be a whole number" in workers.stderr) == (2, True)
    refused = call("train.py", "--from", f"results/runs/{name}", "seed=1", cwd=tmp_path)
    assert refused.returncode == 2
    assert "seed=1: with --from only the place can be said, by results=, device=" in refused.stderr
    missing = call("train.py", "--from", "results/runs/none", cwd=tmp_path)
    assert (missing.returncode, "is no run's record" in missing.stderr) == (2, True)


@pytest.mark.parametrize(
    "launcher",
    [
        ["hydra/launcher=joblib", "hydra.launcher.n_jobs=2"],
        pytest.param(["hydra/launcher=submitit_local", "hydra.launcher.timeout_min=5"], marks=pytest.mark.grid),
    ],
)
def test_other_launchers_name_what_failed(call, tmp_path, launcher):
    sweep = ["-m", "layer=decef", "layer.flops=0.3,0.01", "train.epochs=1", *SMALL, *launcher]
    done = call("train.py", *sweep, cwd=tmp_path)
    assert done.returncode == 1, done.stderr
    assert "1 of the sweep's jobs failed" in done.stderr
    assert "layer=decef layer.flops=0.01" in done.stderr.split("jobs failed:")[1]
    assert [summary["status"] for summary in records(tmp_path / "results").values()] == ["finished"]


def test_any_network_of_timm(call, tmp_path):
    shown = call("train.py", "model=timm/resnet10t", "layer=decef", *TINY, "--cfg", "job", cwd=tmp_path)
    assert "name: timm/resnet10t" in shown.stdout
    done = call("train.py", "-m", "model=timm/resnet10t,resnet20", *TINY, cwd=tmp_path)
    assert done.returncode == 2
    assert "mixes models of timm with others" in done.stderr


def test_several_networks_of_ones_own(call, tmp_path):
    (tmp_path / "mynets.py").write_text(
        "from decef.models import CifarResNet\n"
        "def one(): return CifarResNet(8, in_channels=1)\n"
        "def other(): return CifarResNet(14, in_channels=1)\n"
    )
    given = ["layer=decef", "layer.rank=2", "train.epochs=1", *TINY]
    done = call("train.py", "-m", "model=mynets:one,mynets:other", *given, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert len(records(tmp_path / "results")) == 2
    assert "are drawn anew; to decompose trained ones, say model.weights=FILE" in done.stdout
    mixed = call("train.py", "-m", "model=mynets:one,resnet20", *given, cwd=tmp_path)
    assert (mixed.returncode, "mixes networks of your own with others" in mixed.stderr) == (2, True)


def test_a_sweep_leaves_a_run_to_the_process_that_is_at_it(call, tmp_path):
    given = ["layer=conv2d", "train.epochs=1", *SMALL]
    assert call("train.py", *given, cwd=tmp_path).returncode == 0
    (name,) = records(tmp_path / "results")
    folder = tmp_path / "results" / "runs" / name
    (folder / "summary.json").write_text('{"status": "running"}')
    with (folder / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        done = call("train.py", "-m", *given, cwd=tmp_path)
        alone = call("train.py", *given, cwd=tmp_path)
    assert (done.returncode, "left to the process that is at it" in done.stdout) == (0, True), done.stderr
    assert (alone.returncode, "another process is at this run" in alone.stderr) == (2, True)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["layer=dcef"], "there is no layer 'dcef'; did you mean 'decef'"),
        (["layer=null"], "there is no layer 'null'"),
        (["train.validation=0.0001"], "train.validation=0.0001 sets 0 of"),
        (["train.validation=0.9999"], "training images aside"),
        (["-m", "layer=conv2d,decef,cpca"], "there is no layer 'cpca'; did you mean 'cpac'"),
        (["layer=conv2d,decef"], "add -m"),
        (["model=resnet21"], "there is no model 'resnet21'"),
        (["layer=decef", "rank=4"], "there is no key 'rank'; did you mean 'layer.rank'"),
        (["layer.rnk=3"], "there is no key 'layer.rnk'; did you mean 'layer.rank'"),
        (["dataset=cifar10", "dataset.root=cifar"], "data_batch_1 is missing"),
        (["results=file"], "cannot be written"),
        (["layer", "decef"], "layer is no setting: those are given as key=value"),
        (["-m", "++results=a,b"], "results=a,b may give several folders: say one"),
        (["-m", "train.lr=interval(0.01,0.1)"], "can't be swept here"),
        (["-m", "seed=range(3,3)"], "seed=range(3,3) gives no value"),
        (["layer.rank=[1"], "cannot read the arguments: "),
    ],
)
def test_bad_input_is_one_sentence_and_status_2(call, tmp_path, arguments, message):
    (tmp_path / "cifar" / "cifar-10-batches-py").mkdir(parents=True)
    (tmp_path / "file").write_text("")
    done = call("train.py", "dataset=digits", "train=smoke", "wandb.mode=disabled", *arguments, cwd=tmp_path)
    assert done.returncode == 2, done.stderr
    assert message in done.stderr
    assert done.stderr.startswith("error: ")
    assert len(done.stderr.strip().splitlines()) == 1


def test_what_repeating_and_releasing_refuse(call, tmp_path):
    for command, message in (
        (["train.py", "--from"], "--from needs a run's folder: --from results/runs/<run id>"),
        (["train.py", "--from", "run", "layer=decef"], "layer=decef: with --from only the place can be said"),
        (["train.py", "--from", "run", "dataset.workers=few"], "dataset.workers=few must be a whole number"),
        (["release.py", "run", "a/b"], "'a/b' can't be a network's name: use letters, digits"),
    ):
        done = call(*command, cwd=tmp_path)
        assert (done.returncode, message in done.stderr) == (2, True), done.stderr


def test_a_sweep_over_all_choices_by_hydras_glob(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "scripts")
    from cli import check_arguments

    check_arguments(["-m", "layer=glob(*)", "layer.rank=1"])
    with pytest.raises(SystemExit):
        check_arguments(["layer=glob(*)", "layer.rank=1"])


@pytest.mark.parametrize("given", ["a b", "'a b'", '"a b"'])
def test_a_value_is_what_hydra_reads(monkeypatch, given):
    monkeypatch.syspath_prepend(ROOT / "scripts")
    from cli import given_value

    assert given_value("results", ["results=x", f"++results={given}", "seed=1"]) == "a b"
    assert given_value("device", ["results=x"]) is None


def test_help_comes_without_torch(tmp_path):
    code = f"""
import runpy, sys
sys.argv = ["train.py", "--help"]
sys.path.insert(0, {str(ROOT / "scripts")!r})
try: runpy.run_path({str(ROOT / "scripts" / "train.py")!r}, run_name="__main__")
except SystemExit: pass
assert "torch" not in sys.modules, "torch was imported"
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "layer: auto, basisconv, basisconv2021, conv2d, cpac, decef, rank1" in done.stdout


def test_importing_the_package_imports_nothing_heavy_but_torch():
    heavy = ["torchvision", "timm", "pandas", "matplotlib", "wandb", "hydra", "onnx", "onnxruntime", "sklearn", "scipy"]
    code = f"import decef, sys; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "[]", done.stdout + done.stderr


def test_tables_without_runs_say_what_to_do(call, tmp_path):
    done = call("tables.py", cwd=tmp_path)
    assert done.returncode == 2
    assert "make quickstart" in done.stderr


def test_every_make_target_names_scripts_that_are_there():
    targets = re.findall(r"^([a-z-]+):.*## ", (ROOT / "Makefile").read_text(), re.MULTILINE)
    done = subprocess.run(
        ["make", "-n", "-B", *targets, "DATA=folder"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    scripts = set(re.findall(r"scripts/\w+\.py", done.stdout))
    assert len(scripts) >= 10
    assert not [script for script in scripts if not (ROOT / script).is_file()]


def test_make_help_lists_every_target():
    command = ["make", "--no-print-directory", "help"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    phony = re.search(r"^\.PHONY:((?:.*\\\n)*.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE).group(1)
    assert {line.split()[1] for line in done.stdout.splitlines()} == set(phony.replace("\\", "").split())
