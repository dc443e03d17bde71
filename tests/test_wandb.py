"""W&B from end to end: the command lines and the real wandb client against a server on the loopback."""

import itertools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import wandb
import yaml
from hydra import compose
from support import ROOT, config
from wandb.sdk.launch.sweeps.utils import create_sweep_command_args
from wandb_server import ENTITY, WandbServer

from decef.results.dashboard import spec
from decef.results.tables import load_wandb_records, write_tables
from decef.training.record import experiment_id, load_config, load_records, recorded
from decef.training.tracking import Tracker, _seconds, offline_runs

TINY = ["dataset=digits", "train=smoke", "train.batch_size=64", "dataset.train_size=128", "threads=1"]
TINY += ["model=plain", "model.width=0.1", "model.relu=true"]


def environment(folder, url):
    """What wandb sees: this server, a key that is nobody's, and folders of its own."""
    clean = {key: value for key, value in os.environ.items() if not key.startswith("WANDB_")}
    folders = {key: str(folder / key) for key in ("WANDB_CONFIG_DIR", "WANDB_CACHE_DIR", "WANDB_DATA_DIR")}
    times = {"WANDB_INIT_TIMEOUT": "3", "WANDB_FINISH_TIMEOUT": "3", "WANDB_ERROR_REPORTING": "false"}
    key = {"WANDB_API_KEY": "0123456789" * 4, "WANDB_BASE_URL": url}
    return {**clean, **folders, **times, **key, "HOME": str(folder), "NETRC": str(folder / "netrc")}


def records(env):
    folders = sorted(Path(env["HOME"], "results", "runs").iterdir())
    return {folder.name: json.loads((folder / "summary.json").read_text()) for folder in folders}


def check_mirror(server, env, name):
    """W&B has what the record has."""
    run, folder = server.runs[name], Path(env["HOME"], "results", "runs", name)
    config = {key: entry["value"] for key, entry in run["config"].items() if key != "_wandb"}
    assert config == yaml.safe_load((folder / "config.yaml").read_text())
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    sent = [{key: value for key, value in row.items() if not key.startswith("_")} for row in run["history"]]
    assert sent == [{key: value for key, value in row.items() if value is not None} for row in rows]
    summary = json.loads((folder / "summary.json").read_text())
    assert {key: run["summary"][key] for key, value in summary.items() if value is not None} == {
        key: value for key, value in summary.items() if value is not None
    }
    assert run["exit_code"] == 0


@pytest.fixture(scope="module")
def mirrored(call, tmp_path_factory):
    """Two online runs, of trainings that may not stand in one table."""
    server, folder = WandbServer(), tmp_path_factory.mktemp("online")
    env = environment(folder, server.url)
    online = ["wandb.mode=online", "wandb.artifacts=true"]
    done = call(
        "train.py", "-m", "layer=decef", "train.label_smoothing=0.0,0.1", *TINY, *online, cwd=env["HOME"], env=env
    )
    assert done.returncode == 0, done.stderr
    yield server, env
    server.stop()


def test_an_online_run_is_its_record(mirrored):
    server, env = mirrored
    assert len(records(env)) == 2
    assert set(server.runs) == set(records(env))
    assert not offline_runs(Path(env["HOME"], "results"))
    for name in server.runs:
        check_mirror(server, env, name)
        assert server.runs[name]["group"] == experiment_id(load_config(Path(env["HOME"], "results", "runs", name)))
        (artifact,) = (a for a in server.artifacts if a["artifactCollectionName"] == name)
        checkpoint = Path(env["HOME"], "results", "runs", name, "checkpoint.pt")
        assert artifact["committed"]
        assert artifact["files"] == {"checkpoint.pt": checkpoint.read_bytes()}
        assert {"digits", "plain", "smoke"} < set(server.runs[name]["tags"])


def test_tables_from_wandb_are_those_from_the_records(call, mirrored):
    _, env = mirrored
    results = Path(env["HOME"], "results")
    write_tables(load_records(results), results / "local")
    local = {path.name: path.read_bytes() for path in (results / "local").iterdir()}
    done = call("tables.py", "--source", "wandb", cwd=env["HOME"], env=env)
    assert done.returncode == 0, done.stderr
    assert len(local) == 4
    assert {path.name: path.read_bytes() for path in (results / "tables-wandb").iterdir()} == local


def test_an_outage_costs_no_training_and_sync_uploads_it_later(call, tmp_path):
    server = WandbServer()
    env = environment(tmp_path, server.url)
    server.refuse_after = "file_stream"  # the first run loses W&B on its way, the second never reaches it
    started = time.monotonic()
    done = call("train.py", "-m", "seed=0,1", *TINY, "wandb.mode=online", cwd=env["HOME"], env=env)
    assert time.monotonic() - started < 120
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("W&B has not taken all of this run") == 1
    assert done.stdout.count("W&B does not take this run, so it is mirrored offline") == 1
    assert [summary["status"] for summary in records(env).values()] == ["finished"] * 2
    server.refuse_after, server.status = None, 401
    refused = call("sync.py", cwd=env["HOME"], env=env)
    assert refused.returncode == 2
    assert "W&B cannot be reached" in refused.stderr
    server.status = 200
    unreadable = tmp_path / "results" / "runs" / "a" / "wandb" / "offline-run-1" / "run-a.wandb"
    unreadable.parent.mkdir(parents=True)
    unreadable.write_bytes(b"")
    (unreadable.parents[2] / "summary.json").write_text('{"status": "failed"}')
    done = call("sync.py", cwd=env["HOME"], env=env)
    assert done.returncode == 1
    assert done.stdout.count("uploaded digits-") == 2
    assert "1 of 3 runs could not be uploaded" in done.stderr
    unreadable.unlink()
    for name in server.runs:
        check_mirror(server, env, name)
    server.stop()


def test_a_run_that_wandb_refuses_on_its_way_is_left_for_sync(call, tmp_path):
    server = WandbServer()
    server.refuse_after, server.refuse_with = "file_stream", 401
    (tmp_path / "runs" / "a").mkdir(parents=True)
    (tmp_path / "runs" / "a" / "summary.json").write_text('{"status": "finished"}')
    script = tmp_path / "track.py"
    script.write_text(
        "from decef.training.tracking import *; import logging; logging.basicConfig(level=logging.INFO)\n"
        "t = Tracker('online', run_id='a', folder=Path('runs/a'), config={}, group='g', tags=[], project='decef')\n"
        "t.log({'epoch': 1, 'test_top1': 10.0}); t.finish({'test_top1': 10.0})\n"
    )
    done = call(script, cwd=tmp_path, env=environment(tmp_path, server.url))
    assert done.returncode == 0, done.stderr
    assert "W&B has not taken all of this run" in done.stderr
    assert [folder.parents[1].name for folder in offline_runs(tmp_path)] == ["a"]
    server.stop()


@pytest.mark.parametrize(
    ("later", "left"),
    [("run-20260102_000000-a", 0), ("offline-run-20260102_000000-a", 1), ("latest-run", 1)],
)
def test_a_mirror_that_a_session_online_has_overtaken_is_not_uploaded(tmp_path, later, left):
    for name in ("offline-run-20260101_000000-a", later):
        (tmp_path / "runs" / "a" / "wandb" / name).mkdir(parents=True)
    (tmp_path / "runs" / "a" / "summary.json").write_text('{"status": "finished"}')
    assert len(offline_runs(tmp_path)) == left


# Runs a script that is killed after the second epoch.
KILLED = """
import os, runpy, signal, sys
from decef.training.recorder import Recorder
epoch = Recorder.epoch
def dying(self, metrics):
    epoch(self, metrics)
    if metrics["epoch"] == 2:
        os.kill(os.getpid(), signal.SIGKILL)
Recorder.epoch = dying
del sys.argv[0]
sys.path.insert(0, os.path.dirname(sys.argv[0]))
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_an_offline_run_that_was_stopped_and_resumed_is_uploaded_whole_and_once(call, tmp_path):
    server = WandbServer()
    env = environment(tmp_path, server.url)
    arguments = ["train.epochs=4", *TINY, "wandb.mode=offline"]
    (tmp_path / "killed.py").write_text(KILLED)
    killed = call(tmp_path / "killed.py", ROOT / "scripts" / "train.py", *arguments, cwd=tmp_path, env=env)
    assert killed.returncode == -signal.SIGKILL
    assert not offline_runs(tmp_path / "results")  # its log isn't whole
    done = call("train.py", *arguments, cwd=env["HOME"], env=env)
    assert "goes on after epoch" in done.stdout
    assert "make sync" in done.stdout
    assert not server.asked
    done = call("sync.py", cwd=env["HOME"], env=env)
    assert done.returncode == 0, done.stderr
    assert "uploaded digits-" in done.stdout
    assert not offline_runs(tmp_path / "results")
    (name,) = server.runs
    assert len(server.runs[name]["history"]) == 4
    check_mirror(server, env, name)
    server.stop()


# W&B's process stops for a moment when it is told that the run has ended: its log isn't written yet.
SLOW = r"""
import os, signal, threading
from pathlib import Path
from wandb.sdk.lib.service.service_connection import ServiceConnection
from decef.training.tracking import Tracker, offline_runs

told = ServiceConnection.inform_finish

def stopped(self, run_id):
    process = self._proc._process.pid
    os.kill(process, signal.SIGSTOP)
    threading.Timer(1, os.kill, (process, signal.SIGCONT)).start()
    told(self, run_id)

ServiceConnection.inform_finish = stopped
for name in "ab":  # two, since the second needs a new process
    folder = Path("runs", name)
    folder.mkdir(parents=True)
    (folder / "summary.json").write_text('{"status": "finished"}')
    tracker = Tracker("offline", run_id=name, folder=folder, config={}, group="g", tags=[], project="decef")
    tracker.log({"epoch": 1, "test_top1": 10.0})
    tracker.finish({"an_end": 1})
    (log,) = offline_runs(Path("."))[-1].glob("*.wandb")
    print(b"test_top1" in log.read_bytes(), b"an_end" in log.read_bytes())
"""


def test_an_offline_log_is_whole_when_its_run_ends(call, tmp_path):
    script = tmp_path / "track.py"
    script.write_text(SLOW)
    done = call(script, cwd=tmp_path, env=environment(tmp_path, "http://127.0.0.1:9"))
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["True"] * 4


def test_a_process_of_wandb_that_fails_at_the_end_costs_no_training(monkeypatch, caplog, tmp_path):
    def exits():
        raise SystemExit(3)

    tracker = Tracker("offline", run_id="a", folder=tmp_path, config={}, group="g", tags=[], project="decef")
    with monkeypatch.context() as patch, caplog.at_level("WARNING"):
        patch.setattr("wandb.teardown", exits)
        tracker.finish({"test_top1": 10.0})
    wandb.teardown()
    assert "W&B has not taken all of this run (ChildProcessError: its process ended with status 3)" in caplog.text


def test_without_an_api_key(call, tmp_path):
    env = environment(tmp_path, "http://127.0.0.1:9")
    del env["WANDB_API_KEY"]
    (tmp_path / "results/runs/a/wandb/offline-run-1").mkdir(parents=True)
    (tmp_path / "results/runs/a/summary.json").write_text('{"status": "finished"}')
    for script, arguments in {"train.py": ["wandb.mode=online", *TINY], "sync.py": []}.items():
        done = call(script, *arguments, cwd=tmp_path, env=env)
        assert done.returncode == 2, done.stderr
        assert "API key" in done.stderr
        assert "wandb login" in done.stderr
        assert len(done.stderr.splitlines()) == 1
    assert [path.name for path in (tmp_path / "results/runs").iterdir()] == ["a"]


def test_the_dashboard_is_made_once_and_updated(call, mirrored):
    server, env = mirrored
    nowhere = {**env, "WANDB_BASE_URL": "http://127.0.0.1:9", "WANDB_API_KEY": ""}
    dry = call("dashboard.py", "--dry-run", cwd=env["HOME"], env=nowhere)
    assert dry.returncode == 0, dry.stderr
    assert not server.views
    first = call("dashboard.py", cwd=env["HOME"], env=env)
    assert first.returncode == 0, first.stderr
    (view,) = server.views.values()
    before, view["spec"] = view["spec"], view["spec"].replace("Training loss", "An old title")
    again = call("dashboard.py", cwd=env["HOME"], env=env)
    assert again.returncode == 0, again.stderr
    assert first.stdout == again.stdout == f"{server.url}/{ENTITY}/decef?nw=decefdashboard\n"
    (now,) = server.views.values()
    assert now["id"] == view["id"]
    assert panels(now["spec"]) == panels(before) == panels(json.dumps(json.loads(dry.stdout)["spec"]))


def panels(spec):
    """Every panel's type and settings."""
    sections = json.loads(spec)["section"]["panelBankConfig"]["sections"]
    return [(panel["viewType"], panel["config"]) for section in sections for panel in section["panels"]]


def test_wandb_takes_the_sweep_and_its_command_line_composes(mirrored, monkeypatch):
    server, env = mirrored
    made = subprocess.run(
        [sys.executable, "-m", "wandb", "sweep", str(ROOT / "configs" / "wandb-sweep.yaml")],
        cwd=env["HOME"], env=env, capture_output=True, text=True, timeout=120, stdin=subprocess.DEVNULL,
    )  # fmt: skip
    assert "wandb agent someone/decef/sweep" in made.stderr
    grid = server.sweep["parameters"]
    keys = set(next(iter(server.runs.values()))["config"])
    assert not keys & (set(grid) - {"seed"})  # else W&B would put the parameter in the place of the config
    for layer in grid["layer.name"]["values"]:
        point = {name: {"value": parameter["values"][-1]} for name, parameter in grid.items()}
        point["layer.name"] = {"value": layer}
        words = {**create_sweep_command_args({"args": point}), "env": [], "program": [server.sweep["program"]]}
        expanded = [[word] if word[0] != "$" else words[word[2:-1]] for word in server.sweep["command"]]
        python, script, *arguments = itertools.chain(*expanded)
        assert (python, script) == ("python", "scripts/train.py")
        monkeypatch.setattr(sys, "path", [str(ROOT / "scripts"), *sys.path])
        import cli

        arguments = cli.expand(arguments)
        cli.check_arguments(arguments)
        with cli.configs():
            config = compose("train", overrides=arguments)
        assert (config.layer.name, config.layer.flops) == (layer, 0.667)
        assert ("train_basis" in config.layer) == (layer == "basisconv")  # it comes with its own options
        assert config.seed == 2


def test_runs_of_a_sweep_are_read_though_its_parameters_stand_beside_the_config(tmp_path, monkeypatch):
    settings = {**recorded(config(tmp_path).resolved()), "layer.name": "decef", "layer.flops": 0.667}
    one = SimpleNamespace(name="one", config=settings, summary={"id": "one", "status": "finished", "test_top1": 90.0})
    monkeypatch.setattr("wandb.Api", lambda: SimpleNamespace(runs=lambda path, lazy: [one]))
    monkeypatch.setattr("decef.results.tables.check_account", lambda: None)
    assert [record.top1 for record in load_wandb_records("decef")] == [90.0]


def test_the_dashboard_without_its_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb_workspaces.reports.v2", None)
    with pytest.raises(ValueError, match=r"pip install 'decef\[results\]'"):
        spec("decef", "someone")


def test_a_timeout_that_is_no_number_is_not_taken(monkeypatch, caplog):
    monkeypatch.setenv("WANDB_INIT_TIMEOUT", "30s")
    assert _seconds("WANDB_INIT_TIMEOUT", 7.0) == 7.0
    assert "WANDB_INIT_TIMEOUT=30s is no number of seconds: 7 are taken" in caplog.text
    monkeypatch.setenv("WANDB_INIT_TIMEOUT", "12.5")
    assert _seconds("WANDB_INIT_TIMEOUT", 7.0) == 12.5
