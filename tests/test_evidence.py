"""The queue of runs: what is wanted once is run once, stops in time, goes on, and says what failed."""

import dataclasses
import functools
import json
import os
import re
import signal
import sys
import threading
import time

import pytest
import torch
import yaml
from support import ROOT, config

from decef.costs import total_cost
from decef.results.claims import load_claims
from decef.results.selectors import chosen, selects
from decef.training.build import build
from decef.training.evidence import (
    Entry,
    Job,
    for_gpu,
    for_other_hardware,
    gpu_hours,
    is_done,
    list_jobs,
    load_entries,
    missing,
)
from decef.training.precision import resolve_precision
from decef.training.queue import Queue, interruptible
from decef.training.record import Record

sys.path.insert(0, str(ROOT / "scripts"))
from cli import run_config

composed = functools.cache(run_config)  # composing takes longer than all else here
TINY = "dataset=digits model=plain model.width=0.1 train=smoke train.batch_size=64 dataset.train_size=192"

FEWER = "train.epochs=1"


def write(path, *entries):
    path.write_text(yaml.safe_dump(list(entries)))
    return ["--list", path, "--results", path.parent / "results"]


def test_a_queue_runs_each_run_once_most_valuable_first_and_names_what_fails(call, tmp_path):
    first = {"name": "first", "decides": "this", "overrides": TINY, "seeds": 1, "minutes": 1, "release": "tiny"}
    first["sweep"] = {"layer": ["conv2d"], "layer.flops": [0.5, 0.667]}
    second = {**first, "name": "second", "overrides": f"{TINY} train.lr=1e20", "sweep": {"layer": ["conv2d"]}}
    dense = {**first, "name": "dense", "overrides": f"{TINY} train.lr=0.05", "sweep": {"layer": ["conv2d"]}}
    paired = {**dense, "name": "paired", "sweep": {"layer": ["decef"], "layer.rank": [1]}}
    del dense["release"], paired["release"]
    tiles = {**dense, "name": "tiles", "overrides": f"dataset=magnetic_tile dataset.root={tmp_path}", "seeds": 2}
    there = write(tmp_path / "list.yaml", tiles, first, second, dense, paired)
    jobs, _ = list_jobs(load_entries(tmp_path / "list.yaml"), lambda given: run_config([*given, FEWER]).resolved())
    ids = {job.entry.name: job.run_id for job in jobs}
    elsewhere = tmp_path / "results" / "runs" / ids["dense"]
    elsewhere.mkdir(parents=True)
    (elsewhere / "summary.json").write_text('{"status": "finished", "precision": "fp16", "wall_seconds": 60}')
    environment = {**os.environ, "WANDB_MODE": "offline", "DECEF_DATA": str(tmp_path)}  # where there are no tiles
    done = call("evidence.py", "run", *there, "--processes", 1, FEWER, "wandb.mode=disabled", env=environment)
    assert done.returncode == 1
    assert re.findall(r"(\S+) can't start here: .* magnetic-tile", done.stdout) == ["tiles"]
    assert call("evidence.py", "run", *there, "--only", "tiles", FEWER, env=environment).returncode == 0
    assert re.findall(r"begins: (\S+)", done.stdout) == [ids["first"], ids["second"]]  # dense: one at both budgets
    assert "1 run waits for hardware that trains in fp16" in done.stdout
    assert "the training failed: the loss is not finite any more" in done.stderr
    summaries = [json.loads(p.read_text()) for p in (tmp_path / "results" / "runs").glob("*/summary.json")]
    assert sorted(s["status"] for s in summaries) == ["failed", "finished", "finished"]
    assert [p.stem for p in (tmp_path / "results" / "networks").iterdir()] == ["tiny-conv2d"]
    status = call("evidence.py", "status", *there, FEWER).stdout
    assert "| first        | 1/1" in status
    assert "| second       | 0/1" in status
    assert "| first        | 0/1" in call("evidence.py", "status", *there).stdout  # without that it is another run
    again = call("evidence.py", "run", *there, "--only", "first", FEWER)
    assert (again.returncode, again.stdout) == (0, "")


WAITS = """
import os, sys, time
try:
    assert os.getpgrp() == os.getpid()  # or Ctrl-C in a terminal would come twice
    open(sys.argv[1] + ".begun", "w")
    time.sleep(60)
except KeyboardInterrupt:
    open(sys.argv[1] + ".interrupted", "w")
"""


@pytest.mark.parametrize(
    ("hours", "interrupt"), [(4 / 3600, None), (1.0, signal.SIGINT), (1.0, signal.SIGTERM), (1.0, signal.SIGHUP)]
)
def test_when_time_is_up_or_by_ctrl_c_runs_stop_so_that_they_go_on(tmp_path, hours, interrupt):
    """What runs is interrupted as by Ctrl-C, which leaves a run that goes on, and nothing new begins."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    entry = Entry("e", "", "", 3, 1.0)
    jobs = [Job(entry, (f"seed={seed}",), f"run-{seed}", config("results", seed=seed)) for seed in range(3)]
    said, began = [], time.monotonic()
    command = lambda job: [sys.executable, "-c", WAITS, str(tmp_path / job.run_id)]  # noqa: E731
    queue = Queue(jobs, tmp_path, command=command, after=lambda job: [], report=said.append)
    interruptible()
    if interrupt:

        def press():
            while len(list(tmp_path.glob("run-*.begun"))) < 2:
                time.sleep(0.1)
            os.kill(os.getpid(), interrupt)

        threading.Thread(target=press).start()
        with pytest.raises(KeyboardInterrupt):
            queue.run(hours, 2)
    else:
        assert queue.run(hours, 2) == []
    for number, handler in before.items():
        signal.signal(number, handler)
    assert time.monotonic() - began < 30
    assert sorted(said) == [
        *(f"begins: run-{i}" for i in (0, 1)),
        *(f"stopped, to go on later: run-{i}" for i in (0, 1)),
    ]
    assert sorted(path.name for path in tmp_path.glob("*.interrupted")) == ["run-0.interrupted", "run-1.interrupted"]


def test_what_cannot_start_is_said(call, tmp_path):
    good = {"name": "good", "decides": "this", "overrides": TINY, "seeds": 1, "minutes": 1}
    there = write(tmp_path / "list.yaml", {**good, "name": "bad", "overrides": f"{TINY} model.weights=none.th"}, good)
    status = call("evidence.py", "status", *there)
    assert status.returncode == 0
    assert "bad can't start here: there is no file of weights none.th" in status.stdout
    assert "Not in the table, finished runs neither, as they can't start here: bad." in status.stdout
    assert "| good " in status.stdout
    device = call("evidence.py", "status", *there, "--device", "auto")
    assert (device.returncode, "--device auto must be cpu or cuda" in device.stderr) == (2, True)
    unknown = call("evidence.py", "run", *there, "--only", "goood")
    assert (unknown.returncode, "no entry goood; there are bad, good" in unknown.stderr) == (2, True)


def test_entries_that_cannot_be_read(tmp_path):
    write(tmp_path / "list.yaml", {"name": "a", "decide": "typo"})
    with pytest.raises(ValueError, match=r"entry a cannot be read: .*decide"):
        load_entries(tmp_path / "list.yaml")
    one = {"name": "a", "decides": "", "overrides": "", "seeds": 1, "minutes": 1}
    write(tmp_path / "list.yaml", one, one)
    with pytest.raises(ValueError, match="entry a stands there twice"):
        load_entries(tmp_path / "list.yaml")


@pytest.mark.parametrize(
    ("wanted", "made"), [({"release": "net"}, "networks/net-conv2d.safetensors"), ({"after": "ranks"}, "ranks/run.csv")]
)
def test_a_finished_run_that_is_to_be_released_or_measured_is_done_only_then(tmp_path, wanted, made):
    entry = Entry("e", "", "", 1, 1.0, **wanted)
    job = Job(entry, (), "run", config("results", layer={"name": "conv2d"}))
    folder = tmp_path / "runs" / "run"
    folder.mkdir(parents=True)
    (folder / "summary.json").write_text('{"status": "finished"}')
    assert is_done(tmp_path, job)  # without its checkpoint it can't be
    (folder / "checkpoint.pt").touch()
    assert not is_done(tmp_path, job)
    (tmp_path / made).parent.mkdir()
    (tmp_path / made).touch()
    assert is_done(tmp_path, job)


def test_a_run_begins_only_in_the_precision_of_those_it_is_paired_with(tmp_path):
    """Else it would have no pair, and the one that could have is not run any more. A new seed is as the others are."""
    dense = {"name": "dense", "decides": "this", "overrides": f"{TINY} layer=conv2d", "seeds": 2, "minutes": 1}
    decef = {**dense, "name": "decef", "overrides": f"{TINY} layer=decef layer.rank=1"}
    write(tmp_path / "list.yaml", dense, decef)
    jobs, _ = list_jobs(load_entries(tmp_path / "list.yaml"), lambda given: run_config(given).resolved())
    here = resolve_precision(torch.device("cpu"), "auto")

    def finish(job, precision):
        folder = tmp_path / "results" / "runs" / job.run_id
        folder.mkdir(parents=True)
        (folder / "summary.json").write_text(json.dumps({"status": "finished", "precision": precision}))

    finish(jobs[0], "fp16")
    assert for_other_hardware(jobs, tmp_path / "results", "cpu") == {job.run_id: "fp16" for job in jobs[1:]}
    finish(jobs[1], here)
    assert for_other_hardware(jobs, tmp_path / "results", "cpu") == {jobs[2].run_id: "fp16"}


def test_what_is_begun_goes_on_before_what_is_new(tmp_path):
    one, other = Entry("a", "", "", 3, 1.0), Entry("b", "", "", 1, 1.0)
    names = ((one, "a-1"), (one, "a0"), (one, "a1"), (one, "a2"), (other, "b0"))
    jobs = [Job(entry, (), name, config("results")) for entry, name in names]
    for name, status in (("a-1", "failed"), ("a0", "finished"), ("a2", "interrupted"), ("b0", "interrupted")):
        (tmp_path / "runs" / name).mkdir(parents=True)
        (tmp_path / "runs" / name / "summary.json").write_text(json.dumps({"status": status}))
    assert [job.run_id for job in missing(jobs, tmp_path)] == ["a2", "a1", "a-1", "b0"]


def test_what_is_to_be_done_to_a_run_is_said_where_it_is_listed_first():
    plain, ranks = Entry("a", "", "", 1, 1.0), Entry("b", "", "", 2, 1.0, after="ranks")
    one = config("results")
    assert len(list_jobs([ranks, plain], lambda arguments: one)[0]) == 2
    with pytest.raises(ValueError, match=r"b wants after=ranks of .*, which a runs without: say it there"):
        list_jobs([plain, ranks], lambda arguments: one)


def test_what_an_entry_says_it_decides_its_runs_are_evidence_for():
    """Runs as they would be recorded: the claim selects them, at their costs."""
    claims, checked = {claim.id: claim for claim in load_claims()}, set()
    for entry in load_entries(ROOT / "configs" / "evidence.yaml"):
        named = [word for word in re.findall(r"[a-z0-9-]+", entry.decides) if word in claims]
        asked = [claims[name] for name in named if "runs" in claims[name].asks]
        if not asked:
            continue
        configs = [without_weights(composed(given)) for one in each_value(entry) for given in one.settings()]
        for claim in asked:
            asks = claim.asks
            resolved = {"model.weights": None, "train.decay": None}  # what the plain configs don't have yet
            fits = [one for one in configs if selects({**asks["runs"], **resolved}, Record(one, {}))]
            assert fits, (entry.name, claim.id)
            shares = {key: asks[key] for key in ("flops", "params") if key in asks}
            if shares and fits[0].layer.flops:
                record = Record(fits[0], costs_of(fits[0]))
                assert list(chosen([record], {}, None, shares)), (entry.name, claim.id)
                checked.add(claim.id)
    assert {f"decef-two-thirds-{where}" for where in ("resnet", "vgg", "mobilenet")} <= checked


def each_value(entry):
    """The entry once for every value in its sweep, not for every combination."""
    return [
        dataclasses.replace(
            entry, name=f"{entry.name} {i}", sweep={key: [v[i % len(v)]] for key, v in entry.sweep.items()}
        )
        for i in range(max(map(len, entry.sweep.values()), default=1))
    ]


def without_weights(config):
    """The files need not be there."""
    return dataclasses.replace(config, model=dataclasses.replace(config.model, weights=None, decompose_on=None))


def costs_of(config):
    config = config.resolved()
    data = config.dataset.dataset()
    with torch.device("meta"):
        model, _, dense = build(config.model, config.layer, data)
    return {**total_cost(model, data.input_size), "dense": dense}


def test_seeds_come_after_settings():
    entry = Entry("e", "", "a=1", 2, 1.0, {"b": [True, None, 1], "c": ["x"]})
    given = []
    jobs, _ = list_jobs([entry], lambda arguments: named(arguments, given))
    assert [" ".join(job.arguments) for job in jobs] == [
        *("a=1 b=true c=x seed=0", "a=1 b=null c=x seed=0", "a=1 b=1 c=x seed=0"),
        *("a=1 b=true c=x seed=1", "a=1 b=null c=x seed=1", "a=1 b=1 c=x seed=1"),
    ]


def test_the_network_of_the_first_seed_is_released_by_layer_and_budget():
    def release(seed, prefix="net", **layer):
        return Job(
            Entry("e", "", "", 1, 1.0, release=prefix), (), "", config("results", layer=layer, seed=seed)
        ).release

    assert release(0, name="decef", flops=0.5) == "net-decef-0.5"
    assert release(0, name="cpac", rank=3) == "net-cpac-3"
    assert release(0, name="conv2d") == "net-conv2d"
    assert release(1, name="decef", flops=0.5) is None
    assert release(0, None, name="decef", flops=0.5) is None


def named(arguments, given):
    """A config for each setting, which is another run than those of the others."""
    given.append(arguments)
    return config("results", train__epochs=len(given))


def test_every_entry_of_the_list_can_start():
    entries = [one for entry in load_entries(ROOT / "configs" / "evidence.yaml") for one in each_value(entry)]
    jobs, blocked = list_jobs(entries, lambda given: composed(given).resolved())
    assert all("file of weights" in reason for reason in blocked.values())
    assert len(jobs) > 100


def test_on_a_gpu_the_same_entries_have_its_schedule():
    entries = [
        Entry("a", "", f"{TINY} train=standard layer=conv2d", 1, 1.0),
        Entry("b", "", "train=full_size dataset=cifar10 layer=conv2d", 2, 1.0),
    ]
    released = [dataclasses.replace(entry, release="net") for entry in entries]
    assert [entry.release for entry in for_gpu(released)] == ["net-paper", "net-paper"]
    assert for_gpu([Entry("c", "", "train=recover", 1, 1.0, release="net")])[0].release == "net"
    given = []
    jobs, _ = list_jobs(for_gpu(entries), lambda arguments: named(arguments, given))
    assert [arguments[-2:] for arguments in given] == [
        ("train=paper", "layer=conv2d"),
        ("dataset=cifar10", "layer=conv2d"),
    ]
    assert gpu_hours(jobs) == 0  # digits are too few to count


def test_hours_on_a_gpu_are_those_of_the_arithmetic():
    one = config("results", dataset={"name": "cifar10"}, layer={"name": "conv2d"}, train__epochs=10)
    macs = total_cost(build(one.model, one.layer, one.resolved().dataset.dataset()).model, (3, 32, 32))["macs"]
    hours = gpu_hours([Job(Entry("e", "", "", 1, 1.0), (), "", one)])
    assert hours == pytest.approx(3 * 2 * macs * 50_000 * 10 / (989e12 / 50) / 3600)
