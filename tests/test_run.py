import dataclasses
import importlib
import json
import platform
import shutil
import subprocess
import sys

import pytest
import torch
import yaml
from support import DIGITS, config

from decef.data import DATASETS
from decef.machine import environment
from decef.models.weights import find_weights
from decef.ranks import Fixed
from decef.results.pages import made_on
from decef.training.build import build
from decef.training.checkpoint import load_checkpoint, save_checkpoint
from decef.training.config import InputError, TrainConfig
from decef.training.loop import evaluate
from decef.training.networks import load_networks
from decef.training.record import first_difference, read_metrics, recorded, replay, run_id
from decef.training.recorder import Recorder
from decef.training.run import find_device, run
from decef.training.tracking import resolve_mode


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    results = tmp_path_factory.mktemp("results")
    return results, run(config(results))


def test_a_run_leaves_its_record(finished):
    results, summary = finished
    folder = results / "runs" / summary["id"]
    assert summary == json.loads((folder / "summary.json").read_text())
    assert summary["status"] == "finished"
    assert summary["dense"]["params"] == 269_434
    assert summary["macs"] < 0.4 * summary["dense"]["macs"]
    assert summary["flops"] == 2 * summary["macs"]
    assert set(summary["ranks"].values()) == {2}
    assert "conv1" not in summary["ranks"]
    assert summary["images"] == {"train": 256, "test": 360}
    for key in ("git_commit", "git_dirty", "packages", "machine", "wall_seconds", "started", "finished", "schedule"):
        assert summary[key] is not None
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [row["epoch"] for row in rows] == [1, 2]
    assert rows[-1]["test_top1"] == summary["test_top1"]
    written = yaml.safe_load((folder / "config.yaml").read_text())
    assert written == recorded(config(results).resolved())
    assert written["format"] == 2
    assert {f.name for f in dataclasses.fields(TrainConfig)} == set(written["train"])
    assert written["dataset"]["mean"] == [0.2874]


def test_the_commit_is_not_that_of_a_repository_that_the_package_is_installed_in(tmp_path, monkeypatch):
    for command in ("init -q", "-c user.name=me -c user.email=me@here commit -q --allow-empty -m first"):
        subprocess.run(["git", "-C", str(tmp_path), *command.split()], check=True)
    monkeypatch.setattr("decef.machine.__file__", str(tmp_path / "decef" / "machine.py"))
    here = environment("cpu")
    assert (len(here["git_commit"]), here["git_dirty"]) == (40, False)
    monkeypatch.setattr("decef.machine.__file__", str(tmp_path / "lib" / "decef" / "machine.py"))
    there = environment("cpu")
    assert (there["git_commit"], there["git_dirty"]) == (None, None)


def test_a_run_that_starts_anew_leaves_no_checkpoints_of_the_one_before(tmp_path):
    settings = config(tmp_path)
    folder = tmp_path / "runs" / run_id(settings.resolved())
    folder.mkdir(parents=True)
    (folder / "checkpoint-0009.pt").write_bytes(b"of a training that went on for longer")
    run(settings)
    assert [path.name for path in folder.glob("checkpoint*.pt")] == ["checkpoint.pt"]


def test_a_finished_run_is_not_run_again(finished, monkeypatch):
    results, summary = finished
    monkeypatch.setattr("decef.training.run.fit", lambda *a, **k: pytest.fail("trained again"))
    assert run(config(results, device="cpu", wandb__project="other")) == summary


def test_a_stopped_run_goes_on_where_it_was(finished, tmp_path, monkeypatch, caplog):
    _, expected = finished
    save = save_checkpoint

    def save_then_stop(path, state):
        save(path, state)
        raise KeyboardInterrupt

    monkeypatch.setattr("decef.training.recorder.save_checkpoint", save_then_stop)
    with pytest.raises(KeyboardInterrupt):
        run(config(tmp_path))
    folder = tmp_path / "runs" / expected["id"]
    assert json.loads((folder / "summary.json").read_text())["status"] == "interrupted"
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"epoch": 2, "test_top1": 0.0}\n{"epo')  # logged, then killed before the checkpoint
    monkeypatch.setattr("decef.training.recorder.save_checkpoint", save)
    stopped = json.loads((folder / "summary.json").read_text())
    (folder / "summary.json").write_text(json.dumps({**stopped, "images": {"train": 9, "test": 9}}))
    with pytest.raises(InputError, match=r"was begun on .*9, .*not .*: set dataset.root to the same data"):
        run(config(tmp_path))
    (folder / "summary.json").write_text(
        json.dumps({**stopped, "threads": 99, "processes": 8, "git_commit": "of another day", "wall_seconds": 1000.0})
    )
    summary = run(config(tmp_path))
    assert 1000 < summary["wall_seconds"] < 1000 + 100 * stopped["wall_seconds"]  # of all sessions
    assert (summary["test_top1"], summary["test_loss"]) == (expected["test_top1"], expected["test_loss"])
    (session,) = summary["earlier_sessions"]
    assert (session["threads"], session["git_commit"], session["started"]) == (99, "of another day", stopped["started"])
    commits = made_on([{**summary, "git_commit": "of this day"}])["commits"]
    assert [commit.rstrip("+") for commit in commits] == ["of another", "of this da"]
    assert session["processes"] == 8
    assert "began with 99 threads and goes on with" in caplog.text
    assert "began with 8 processes and goes on with 1" in caplog.text
    assert [json.loads(x)["epoch"] for x in (folder / "metrics.jsonl").read_text().splitlines()] == [1, 2]
    assert len(summary["resumed"]) == 1


def test_a_checkpoint_of_another_config_is_refused(tmp_path):
    record = Recorder(config(tmp_path).resolved())
    record.path.mkdir(parents=True)
    save_checkpoint(record.checkpoint, {"epoch": 1, "config": {"seed": 5}, "model": {}, "optimizer": {}})
    with pytest.raises(InputError, match="of another config: move it away"):
        run(config(tmp_path))
    save_checkpoint(
        record.checkpoint, {"epoch": 1, "config": recorded(config(tmp_path).resolved()), "model": {}, "optimizer": {}}
    )
    with pytest.raises(InputError, match=r"has no summary\.json beside it any more: move it away"):
        run(config(tmp_path))
    record.checkpoint.write_bytes(b"not a checkpoint")
    with pytest.raises(InputError, match="damaged or no checkpoint"):
        run(config(tmp_path))


def test_a_checkpoint_is_replaced_whole(tmp_path, monkeypatch):
    path = tmp_path / "checkpoint.pt"
    save_checkpoint(path, {"epoch": 1})
    monkeypatch.setattr(
        torch, "save", lambda state, file: (file.write(b"half"), (_ for _ in ()).throw(OSError("full")))
    )
    with pytest.raises(OSError, match="full"):
        save_checkpoint(path, {"epoch": 2})
    assert load_checkpoint(path) == {"epoch": 1}


def test_a_run_goes_on_with_the_plan_that_it_began_with(tmp_path, monkeypatch):
    """Whatever ranks a rule would choose now, on another machine say."""
    save = save_checkpoint

    def save_then_stop(path, state):
        save(path, state)
        raise KeyboardInterrupt

    monkeypatch.setattr("decef.training.recorder.save_checkpoint", save_then_stop)
    asked = config(tmp_path, layer={"name": "decef", "flops": 0.5})
    with pytest.raises(KeyboardInterrupt):
        run(asked)
    monkeypatch.setattr("decef.training.recorder.save_checkpoint", save)
    begun = json.loads(next((tmp_path / "runs").glob("*/summary.json")).read_text())["ranks"]
    monkeypatch.setattr("decef.training.build.rank_rule", lambda layer, trained: Fixed(1))
    assert run(asked)["ranks"] == begun != dict.fromkeys(begun, 1)


def test_a_failed_run_says_why_in_its_record(tmp_path):
    with pytest.raises(FloatingPointError):
        run(config(tmp_path, train__lr=1e20))
    (folder,) = (tmp_path / "runs").iterdir()
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["status"] == "failed"
    assert "the loss is not finite any more from step" in summary["error"]


def test_two_processes_cannot_be_at_one_run(tmp_path):
    record = Recorder(config(tmp_path).resolved())
    with record.open(), pytest.raises(InputError, match="another process is at this run"):
        run(config(tmp_path))


def test_a_run_that_another_process_finishes_meanwhile_is_left_as_it_is(tmp_path, monkeypatch):
    """Between the first look and the lock."""
    asked, real = config(tmp_path), build
    finished = []

    def build_late(*arguments):
        monkeypatch.setattr("decef.training.run.build", real)
        finished.append(run(asked))
        return real(*arguments)

    monkeypatch.setattr("decef.training.run.build", build_late)
    assert run(asked) == finished[0]
    assert "resumed" not in finished[0]


def test_a_run_that_never_began_hinders_none(tmp_path):
    """As when there were no data. One that did begin goes on as it began."""
    first, other = (Recorder(config(tmp_path, layer__implementation=i).resolved()) for i in ("factorized", "auto"))
    assert first.path == other.path
    with first.open():
        pass
    with other.open():
        other.summary = {"status": "running"}
        (other.path / "summary.json").write_text('{"status": "running"}')
    with pytest.raises(ValueError, match="is of the same run done otherwise"), first.open():
        pass


def test_an_unwritable_results_folder(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot be written to"):
        run(config(tmp_path / "file"))


def test_a_run_id_follows_from_what_determines_the_result(tmp_path):
    def name(**changes):
        return run_id(config(tmp_path, **changes).resolved())

    first = name()
    assert first.startswith("digits-resnet20-decef-r2-smoke-s0-")
    for same in (
        {"device": "cuda"}, {"threads": 3}, {"wandb__mode": "online"}, {"dataset__root": "/elsewhere"},
        {"train__validation": 0.0}, {"train__decay": "factors"}, {"train__channels_last": False},
        {"train__milestones": [0.9]}, {"layer__implementation": "factorized"}, {"layer__orthogonality": 0.0},
        {"dataset__mean": [0.2874], "dataset__std": [0.354]},
    ):  # fmt: skip
        assert name(**same) == first
    others = [
        {"seed": 1}, {"layer__rank": 3}, {"train__epochs": 3}, {"model__shortcut": "B"}, {"dataset__flip": True},
        {"train__decay": "kernel"}, {"train__momentum": 0.0, "train__nesterov": False}, {"train__weight_decay": 0.0},
        {"layer__orthogonality": 0.1}, {"train__precision": "fp32"}, {"model__dense_stem": False},
    ]  # fmt: skip
    assert len({first, *(name(**other) for other in others)}) == 1 + len(others)
    assert name(layer__rank=None) == name(layer__rank=None, layer__flops=0.667)
    assert name(train__lr=1) == name(train__lr=1.0) != first
    assert name(layer__rank=None, layer__flops=1) == name(layer__rank=None, layer__flops=1.0)
    step = {"train__schedule": "step"}
    assert name(**step) == name(**step, train__warmup=0.0) != name(**step, train__milestones=[0.9])
    for idle in (step | {"train__warmup": 0.5}, {"train__milestones": [0.9], "train__gamma": 0.2}):
        usual = {key: value for key, value in idle.items() if key == "train__schedule"}
        assert config(tmp_path, **idle).resolved() == config(tmp_path, **usual).resolved()
    adam = {"train__adam": True}
    assert name(**adam) == name(**adam, train__momentum=0.5, train__nesterov=False)


def test_a_dense_run_is_one_run_whatever_its_layers_options_say(tmp_path):
    dense = {"name": "conv2d", "rank": None, "flops": None, "energy": None}
    names = {
        run_id(config(tmp_path, layer={**dense, **layer}, **changes).resolved())
        for layer, changes in (
            ({}, {}), ({"flops": 0.667}, {}), ({"rank": 3}, {}), ({}, {"model__dense_stem": False}),
            ({}, {"model__exclude": "layer1*"}), ({}, {"model__min_kernel_size": 3}), ({}, {"train__decay": "kernel"}),
            ({}, {"train__atcd": 1}), ({}, {"model__factorize_classifier": True}),
        )
    }  # fmt: skip
    assert len(names) == 1


def test_a_record_is_done_again_to_the_bit(finished, tmp_path):
    results, summary = finished
    folder = results / "runs" / summary["id"]
    again, precision = replay(folder)
    assert run(dataclasses.replace(again, results=tmp_path, device="cpu"), precision)["id"] == summary["id"]
    one, other = (read_metrics(r / "runs" / summary["id"]) for r in (results, tmp_path))
    assert first_difference(one, other) is None
    other[1]["test_loss"] += 1e-9
    assert first_difference(one, other) == 2
    assert first_difference(one, one[:1]) == 2


def test_what_cannot_be_done_again(finished, tmp_path):
    results, summary = finished
    with pytest.raises(FileNotFoundError, match=r"is no run's record: it has no config\.yaml"):
        replay(tmp_path)
    copied = tmp_path / "copy"
    shutil.copytree(results / "runs" / summary["id"], copied)
    (copied / "summary.json").write_text(json.dumps({**summary, "status": "interrupted"}))
    with pytest.raises(ValueError, match="is interrupted, not finished: the command that began it resumes it"):
        replay(copied)
    (copied / "summary.json").write_text(json.dumps({**summary, "processes": 8}))
    with pytest.raises(ValueError, match=r"was trained by 8 processes, not 1.*torchrun --nproc-per-node=8"):
        replay(copied)
    old = yaml.safe_load((copied / "config.yaml").read_text())
    del old["format"]
    (copied / "config.yaml").write_text(yaml.safe_dump(old))
    with pytest.raises(ValueError, match="has format 1, not 2"):
        replay(copied)


def test_a_run_goes_on_as_it_began(tmp_path, monkeypatch):
    """In its precision, whatever is best where it goes on; and not in another implementation without a word."""
    save = save_checkpoint

    def save_then_stop(path, state):
        save(path, state)
        raise KeyboardInterrupt

    monkeypatch.setattr("decef.training.recorder.save_checkpoint", save_then_stop)
    monkeypatch.setattr("decef.training.run.resolve_precision", lambda device, asked: "fp32")
    with pytest.raises(KeyboardInterrupt):
        run(config(tmp_path))
    monkeypatch.setattr("decef.training.recorder.save_checkpoint", save)
    monkeypatch.setattr("decef.training.run.resolve_precision", lambda device, asked: "bf16")
    with pytest.raises(InputError, match=r"same run done otherwise \(layer\.implementation\): go on as it says"):
        run(config(tmp_path, layer__implementation="factorized"))
    assert run(config(tmp_path))["precision"] == "fp32"


def test_images_per_second_are_of_training_alone(finished):
    results, summary = finished
    rows = read_metrics(results / "runs" / summary["id"])
    images = 256  # an epoch's
    seconds = sum(images / row["images_per_second"] for row in rows)
    assert summary["images_per_second"] == pytest.approx(len(rows) * images / seconds, rel=1e-3, abs=0.06)  # rounded


def test_every_process_has_a_gpu_of_its_own(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    for rank in (0, 1):
        monkeypatch.setenv("LOCAL_RANK", str(rank))
        assert find_device("cuda") == torch.device("cuda", rank)
    with pytest.raises(ValueError, match="device=cuda:1 would have all processes on one GPU: say device=cuda"):
        find_device("cuda:1")
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(ValueError, match="process 3 has no GPU, of which there are 2: start as many processes"):
        find_device("cuda")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)  # as where each process sees its own alone
    assert find_device("cuda") == torch.device("cuda", 0)


def test_a_file_of_weights_is_found_by_name(tmp_path, monkeypatch):
    (tmp_path / "weights").mkdir()
    (tmp_path / "weights" / "some.th").write_bytes(b"")
    monkeypatch.setenv("DECEF_DATA", str(tmp_path))
    assert find_weights("some.th") == tmp_path / "weights" / "some.th"
    with pytest.raises(FileNotFoundError, match=r"no file of weights other\.th or .*weights/other\.th"):
        find_weights("other.th")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layer__rank": 0}, r"rank 0 is not possible in layer 'layer1\.0\.conv1'.*from 1 to 9"),
        ({"layer__rank": 10}, "rank 10 is not possible"),
        ({"layer__rank": 2.5}, "layer.rank=2.5 must be a whole number"),
        ({"layer__flops": 0.5}, "both given"),
        (
            {"layer__rank": None, "layer__flops": 0.1},
            r"0\.1 of the dense network's FLOPs can't be met.*it has 0\.1\d\d",
        ),
        ({"layer__rank": None, "layer__flops": 2}, "layer.flops=2 must be a share of the dense network's FLOPs"),
        ({"layer__rank": None, "layer__flops": 0}, "layer.flops=0 must be a share"),
        ({"layer__rank": None, "layer__flops": True}, "layer.flops=True must be a share"),
        ({"layer__rank": None, "layer__energy": "most"}, "layer.energy='most' must be a share of each kernel's"),
        ({"dataset__flip": "no"}, "dataset.flip='no' must be true or false"),
        ({"dataset__mean": 0.5}, "dataset.mean=0.5 must be a list"),
        ({"dataset__mean": [0.5] * 3}, r"dataset.mean=\[0.5, 0.5, 0.5\] must have a number for every channel"),
        ({"model__exclude": ["layer*"]}, "layer=decef would replace none of resnet20's convolutions$"),
        (
            {"model__min_kernel_size": 5},
            "replace none of resnet20's convolutions, mostly because: kernel smaller than 5",
        ),
        ({"model__dense_stem": "off"}, "model.dense_stem='off' must be true or false"),
        ({"model": {"name": "mobilenetv2", "dense_pairs": "no"}}, "model.dense_pairs='no' must be true or false"),
        ({"model": {"name": "mobilenetv2", "width": "half"}}, "model.width='half' must be a number"),
        ({"wandb": {"mode": "disabled", "artifacts": "no"}}, "wandb.artifacts='no' must be true or false"),
        ({"model__min_kernel_size": "3x3"}, "model.min_kernel_size='3x3' must be a whole number"),
        ({"model__name": None}, "model.name=None must be the name of a network"),
        ({"model__exclude": 5}, "model.exclude=5 must be a name of layers, or a list of names"),
        ({"layer__bogus": False}, "layer.bogus=False would do nothing: decef has no such option"),
        ({"train__name": "a/b"}, "train.name='a/b' must be a name of letters"),
        ({"layer": {"name": "rank1", "rank": 2, "separate_init": "no"}}, "layer.separate_init='no' must be true or"),
        ({"train__scales": [[0.75, 0.75], [0.4, 0.5]]}, "in order of the shares"),
        (
            {"model": {"name": "plain"}, "train__scales": [[0.5, 0.25]]},
            r"train.scales: with images at 0.25 of their size the network does not run on an input of size \(1, 2, 2\)",
        ),
        (
            {"train__scales": [[0.5, 0.5]]},
            r"at 0.5 of their size 5 layers, from layer3\.0\.conv2 on, would see maps of 1x1 and train the centre",
        ),
        ({"seed": None}, "seed must be given"),
        ({"device": None}, "device=None is no device"),
        ({"device": "mps"}, "device=mps can't be trained on"),
        ({"dataset__size": 64}, "dataset.size=64 would do nothing: digits has its own"),
        (
            {"dataset": {"name": "imagenet", "size": 64, "num_classes": 10, "crop_padding": 4}},
            "dataset.crop_padding=4 would do nothing",
        ),
        ({"seed": 2**31}, "seed=2147483648 must be at most"),
        ({"layer__implementation": "fast"}, "implementation='fast'"),
        ({"layer__name": "decaf"}, "unknown layer type 'decaf'"),
        ({"model__name": "resnet21"}, "unknown model"),
        ({"model__shortcut": "C"}, "shortcut='C'"),
        ({"model__factorize_classifier": True}, "not possible with layer=decef: a 1x1 kernel"),
        ({"seed": -1}, "seed=-1"),
        ({"train__precision": "fp16"}, "train.precision=fp16 needs a GPU"),
        ({"layer": {"name": "cpac", "rank": 2, "orthogonality": 0.1}}, "would do nothing: cpac has no penalty"),
        (
            {"layer": {"name": "basisconv", "rank": 2, "orthogonality": 0.1, "train_basis": False}},
            "would do nothing: basisconv has no penalty",
        ),
        ({"layer__orthogonality": 0.1, "train__atcd": 1}, "layer.orthogonality would do nothing"),
        ({"train__decay": "kernel", "train__atcd": 1}, "train.decay=kernel would do nothing: train.atcd"),
        ({"train__decay": "factors", "train__weight_decay": 0.0}, "would do nothing: train.weight_decay is 0"),
        (
            {"train__decay": "kernel", "layer": {"name": "basisconv", "rank": 2, "train_basis": False}},
            "not possible with layer=basisconv: its basis is frozen",
        ),
        (
            {"train__decay": "kernel", "layer": {"name": "basisconv2021", "rank": 2}},
            "not possible with layer=basisconv2021: it has no kernel in training",
        ),
        ({"train__atcd": 1, "layer": {"name": "basisconv2021", "rank": 2}}, "train.atcd is not possible with layer"),
        ({"dataset__name": "cifar11"}, "unknown dataset 'cifar11'"),
        ({"device": "gpu"}, "device='gpu' is no device"),
        ({"colour": "red"}, "there is no setting colour"),
        ({"train__colour": "red"}, r"there is no setting train\.colour"),
        ({"model": None}, "model=None must be a group of settings"),
        ({"dataset": {}}, r"dataset\.name must be given"),
        ({"layer__orthogonality": -1}, "layer.orthogonality=-1 must be a number"),
        ({"wandb__mode": "on"}, "wandb.mode='on'"),
    ],
)
def test_bad_input_is_refused_before_data_is_loaded(tmp_path, monkeypatch, changes, message):
    monkeypatch.setattr("decef.training.run._load_data", lambda job: pytest.fail("data was loaded"))
    with pytest.raises(InputError, match=message):
        run(config(tmp_path, **changes))
    assert not (tmp_path / "runs").exists()


OWN = """
from torch import nn

class Pair(nn.Sequential):
    def forward(self, x):
        return super().forward(x), None

def make(channels=1, classes=10, kind=nn.Sequential):
    return kind(nn.Conv2d(channels, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, classes))

def pair():
    return make(kind=Pair)

class Heads(nn.Sequential):
    def forward(self, x):
        return (super().forward(x), None) if self.training else super().forward(x)

def heads():
    return make(kind=Heads)

def few():
    return make(classes=5)

def colours():
    return make(channels=3)

def needs(width):
    return make()

class Views(nn.Module):
    def __init__(self):
        super().__init__()
        self.convs, self.linear = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Conv2d(4, 4, 3)), nn.Linear(4 * 16, 10)

    def forward(self, x):
        return self.linear(self.convs(x).view(len(x), -1))
"""


@pytest.mark.parametrize(
    ("function", "message"),
    [
        ("pair", r"must give logits of shape \(2, 10\) for two images of 1 x 8 x 8, not tuple"),
        ("heads", r"must give logits of shape \(2, 10\) for two images of 1 x 8 x 8, not tuple, in training"),
        ("few", r"must give logits of shape \(2, 10\) for two images of 1 x 8 x 8, not \(2, 5\)"),
        ("colours", "doesn't run on images of 1 x 8 x 8, in evaluation: .*channels"),
        ("needs", "can't be called with the options of the model: missing a required argument: 'width'"),
    ],
)
def test_a_network_of_ones_own_that_is_none_for_these_images(tmp_path, monkeypatch, function, message):
    (tmp_path / "own_for_digits.py").write_text(OWN)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(InputError, match=message):
        run(config(tmp_path, model={"name": f"own_for_digits:{function}"}))


def test_a_network_that_flattens_by_view_is_trained_in_the_usual_memory_layout(tmp_path, monkeypatch, caplog):
    caplog.set_level("INFO")
    (tmp_path / "own_views.py").write_text(OWN)
    monkeypatch.syspath_prepend(tmp_path)
    own = {"model": {"name": "own_views:Views"}, "layer": {"name": "conv2d"}, "train__scales": []}
    summary = run(config(tmp_path, **own, train__epochs=1))
    assert (summary["status"], "doesn't run in channels-last" in caplog.text) == ("finished", True)
    (_, network), *_ = load_networks(str(tmp_path / "runs" / summary["id"]))
    assert evaluate(network, DIGITS[1])[1] == pytest.approx(summary["test_top1"], abs=1.5)  # the run may be in bf16
    caplog.clear()
    run(config(tmp_path, train__epochs=1, dataset__train_size=64))
    assert "channels-last" not in caplog.text


def test_emulated_bf16_is_said_to_be(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr("decef.training.run.has_bf16", lambda device: False)
    model = {"name": "plain", "width": 0.05, "relu": True}
    run(config(tmp_path, model=model, train__precision="bf16", train__epochs=1, dataset__train_size=64))
    assert "bf16 is emulated here" in caplog.text


def test_wandb_offline_without_a_key(tmp_path, monkeypatch):
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    assert resolve_mode("auto") == "offline"
    with pytest.raises(ValueError, match="needs an API key"):
        resolve_mode("online")
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    assert resolve_mode("auto") == "online"
    monkeypatch.setenv("WANDB_MODE", "dryrun")  # an older name of offline
    assert resolve_mode("auto") == "offline"


def test_disabled_needs_no_wandb(monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)  # importing it fails
    monkeypatch.delitem(sys.modules, "decef.training.tracking")
    tracking = importlib.import_module("decef.training.tracking")
    tracker = tracking.Tracker("disabled", run_id="x", folder=None, config={}, group="", tags=[], project="p")
    tracker.log({"a": 1})
    tracker.finish({})
    with pytest.raises(ValueError, match="wandb is not installed"):
        tracking.resolve_mode("offline")


def test_stem_and_classifier_are_factorised_when_asked(tmp_path):
    for stem, classifier in ((True, False), (False, True)):
        for shortcut in "AB":
            model = {"name": "resnet20", "shortcut": shortcut, "dense_stem": stem, "factorize_classifier": classifier}
            given = config(tmp_path, model=model, layer={"name": "cpac", "rank": 5})
            network, plan, _ = build(given.model, given.layer, DATASETS["digits"])
            assert ("conv1" in plan.ranks, "linear" in plan.ranks) == (not stem, classifier)
            assert len(plan.ranks) == 18 + (not stem) + classifier
            assert network(torch.zeros(2, 1, 8, 8)).shape == (2, 10)


PAGE_FAULTS = """
import resource, torch
from decef.machine import keep_freed_memory

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10):
        torch.ones(10 * 2**20)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

faults()
usual, kept = faults(), keep_freed_memory() and (faults(), faults())[1]
print(usual, kept)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the C library is not glibc")
def test_freed_memory_is_kept(call, tmp_path):
    (tmp_path / "faults.py").write_text(PAGE_FAULTS)
    done = call(tmp_path / "faults.py")
    usual, kept = map(int, done.stdout.split())
    assert usual > 1000  # 10 times 40 MiB; pages are mostly of 4 KiB
    assert kept < usual / 100


def test_a_file_that_cannot_be_read_is_no_full_disk(tmp_path, monkeypatch):
    def missing(*_, **__):
        raise FileNotFoundError(2, "No such file or directory", "images/7.png")

    monkeypatch.setattr("decef.training.run._fit", missing)
    with pytest.raises(InputError, match=r"No such file .*images/7\.png.*; the last whole checkpoint is kept") as said:
        run(config(tmp_path))
    assert "make room" not in str(said.value)


@pytest.mark.parametrize(
    ("mean", "std", "message"),
    [
        ([0.5], [0.0], r"dataset\.std=\[0\.0\] must be above 0 in every channel"),
        ([0.5], [-1.0], r"dataset\.std=\[-1\.0\] must be above 0 in every channel"),
        ([127.5], [0.5], r"dataset\.mean=\[127\.5\] is not of pixels from 0 to 1, as images are here: divide by 255"),
        ([0.5], [127.5], r"dataset\.std=\[127\.5\] is not of pixels from 0 to 1"),
    ],
)
def test_images_are_normalised_as_pixels_from_0_to_1(tmp_path, mean, std, message):
    with pytest.raises(InputError, match=message):
        run(config(tmp_path, dataset__mean=mean, dataset__std=std))
    assert not list(tmp_path.iterdir())
