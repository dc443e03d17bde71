"""From a trained network and a budget to a small network: the steps, the folder, what is refused, the command line."""

import copy
import dataclasses
import json
import re

import onnxruntime
import pandas as pd
import pytest
import torch
from filelock import FileLock
from support import DIGITS, network
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import decef
from decef.compression import Compression, Memory, Milliseconds, Size, compress, loaders
from decef.compression.budgets import search
from decef.compression.report import summary
from decef.inference.memory import activation_bytes, stored_bytes
from decef.inputs import takes_channels_last
from decef.plans import Plan, PlanRow
from decef.ranks import Budget, Latency
from decef.ranks.latency import LayerTimes, Times
from decef.results.compressions import write_compressions
from decef.training.networks import input_size_of, load_networks

SIZE = (1, 8, 8)


def loader(part=0, count=1437, shuffle=True):
    data = DIGITS[part]
    images = TensorDataset(data.normalize(data.images[:count]), data.labels[:count])
    return DataLoader(images, batch_size=64, shuffle=shuffle)


@pytest.fixture(scope="module")
def options():
    return {"budget": Budget(flops=0.4), "layer": "decef", "exclude": "conv1", "engine": "eager", "images": 200}


@pytest.fixture
def unexported(monkeypatch):
    """For tests that don't look at the file for other engines, which takes a while."""
    monkeypatch.setattr("decef.compression.pipeline.export", lambda *_, **__: [])


@pytest.fixture(scope="module")
def made(trained, options, tmp_path_factory):
    out = tmp_path_factory.mktemp("small")
    given = options
    return compress(trained, loader(), test=loader(1, shuffle=False), finetune=2, out=out, **given), out, given


def test_it_keeps_the_budget_and_most_of_the_accuracy(trained, made):
    done, _, _ = made
    dense = decef.cost(trained, SIZE).attrs["macs"]
    assert decef.cost(done.network, SIZE).attrs["macs"] <= 0.4 * dense + 1
    top1 = done.numbers["top1"]
    assert list(top1) == ["dense", "converted", "recalibrated", "finetuned"]
    assert top1["finetuned"] > top1["dense"] - 5
    assert done.numbers["costs"]["small"]["flops"] <= 0.4 * done.numbers["costs"]["dense"]["flops"] + 2
    x = DIGITS[1].normalize(DIGITS[1].images[:1])
    torch.testing.assert_close(done.deployed(x), done.network(x), rtol=1e-3, atol=1e-4)


def test_the_folder_has_the_network_for_python_and_for_others(trained, made):
    done, out, _ = made
    x = DIGITS[1].normalize(DIGITS[1].images[:1])
    again = decef.load(out, model=trained)
    assert input_size_of(str(out)) == SIZE
    with pytest.raises(ValueError, match=r"made from a network of your own: give that as model= of decef\.load"):
        load_networks(str(out))
    torch.testing.assert_close(again(x), done.network(x), rtol=1e-4, atol=1e-5)
    assert again.card.top1 == done.numbers["top1"]["finetuned"]
    with pytest.raises(ValueError, match="made from a network of your own: give that as model="):
        decef.load(out / "network.safetensors")
    with pytest.raises(ValueError, match=r"doesn't fit CifarResNet|doesn't have"):
        decef.load(out / "network.safetensors", model=decef.models.CifarResNet(8))
    program = torch.export.load(out / "network.pt2").module()
    torch.testing.assert_close(program(x), done.network(x), rtol=1e-3, atol=1e-3)
    page = (out / "report.md").read_text()
    told = ("0.4 of the dense network's FLOPs", "fine-tuned", "`layer3.0.conv2`", "excluded by 'conv1'", "model=")
    assert all(words in page for words in told)
    assert "edited by hand" not in page
    assert json.loads((out / "report.json").read_text())["top1"] == done.numbers["top1"]


def test_compressions_side_by_side(made, tmp_path):
    done, out, _ = made
    write_compressions([out], tmp_path / "made" / "digits", "a small network on digits")
    frame = pd.read_csv(tmp_path / "made" / "digits.csv")
    assert frame.finetuned.tolist() == pytest.approx([done.numbers["top1"]["finetuned"]])
    assert (frame.flops <= 0.41).all()
    assert frame.layers[0] == "5 decef, 2 dense"
    assert "a small network on digits" in (tmp_path / "made" / "digits.md").read_text()
    other = tmp_path / "other"
    other.mkdir()
    (other / "report.json").write_text(json.dumps({**done.numbers, "input": [1, 1, 16, 16]}))
    with pytest.raises(ValueError, match=r"can't be compared: they have input \[1, 1, 8, 8\] and \[1, 1, 16, 16\]"):
        write_compressions([out, other], tmp_path / "digits", "")
    with pytest.raises(FileNotFoundError, match=r"there is no .*report.json: scripts/compress.py writes it"):
        write_compressions([tmp_path], tmp_path / "digits", "")


def test_what_is_done_is_not_done_again(trained, made, monkeypatch):
    done, out, given = made
    monkeypatch.setattr("decef.compression.reach.planner", None)
    monkeypatch.setattr("decef.compression.pipeline.measure_top1", None)
    again = compress(trained, loader(), test=loader(1, shuffle=False), finetune=2, out=out, **given)
    assert again.network.state_dict().keys() == done.network.state_dict().keys()
    assert all(torch.equal(v, done.network.state_dict()[k]) for k, v in again.network.state_dict().items())
    with pytest.raises(ValueError, match=r"holds another compression \(finetune 2, not 3\): give another folder"):
        compress(trained, loader(), test=loader(1, shuffle=False), finetune=3, out=out, **given)
    with pytest.raises(ValueError, match=r"holds another compression \(data '23 batches .*, not '7 batches of "):
        compress(trained, loader(count=400), test=loader(1, shuffle=False), finetune=2, out=out, **given)


@pytest.mark.usefixtures("unexported")
def test_an_edited_plan_is_followed_until_the_network_is_converted_by_it(trained, options, tmp_path):
    given = {**options, "out": tmp_path, "finetune": 0, "test": loader(1, count=100)}
    plan = Compression(trained, loader(), **given).plan()
    row = max((row for row in plan.rows if row.action == "convert"), key=lambda row: row.rank)
    row.rank -= 1
    plan.save(tmp_path / "plan.yaml")
    (tmp_path / "forms.json").write_text('{"engine": "eager", "precision": "fp32", "forms": {"gone": "factorized"}}')
    done = compress(trained, loader(), **given)
    assert done.plan.ranks[row.name] == row.rank
    (costs,) = (one for one in done.numbers["layers"] if one["name"] == row.name)
    for what in ("macs_after", "params_after"):
        assert costs[what] == getattr(row, what) * row.rank // (row.rank + 1)
    assert "when it was made; then it was edited by hand." in (tmp_path / "report.md").read_text()
    row.rank = 1
    plan.save(tmp_path / "plan.yaml")
    with pytest.raises(ValueError, match=r"plan\.yaml was changed after the network was converted by it: put back"):
        compress(trained, loader(), **given)
    (tmp_path / "checkpoint.pt").unlink()  # as that says; what was measured of the first network goes with it
    again = compress(trained, loader(), **given).numbers["top1"]
    assert again["dense"] == done.numbers["top1"]["dense"]
    assert again["converted"] != done.numbers["top1"]["converted"]


def test_without_a_folder_nothing_is_written(trained, options, monkeypatch):
    monkeypatch.setattr("decef.compression.pipeline.export", None)
    assert compress(trained, loader(), **options, finetune=0).numbers["files"] == {}


def test_two_processes_are_not_at_one_compression(trained, options, tmp_path):
    job = Compression(trained, loader(), **options, out=tmp_path)
    with FileLock(tmp_path / ".lock"):
        for at_it in (job.plan, job.run):
            with pytest.raises(ValueError, match="another process is at this compression"):
                at_it()


@pytest.mark.usefixtures("unexported")
def test_another_compression_begun_in_the_folder_is_not_taken_for_this_one(trained, options, tmp_path):
    given = {**options, "out": tmp_path, "finetune": 0}
    larger, smaller = (Compression(trained, loader(), **{**given, "budget": Budget(flops=f)}) for f in (0.6, 0.4))
    ranks = larger.plan().ranks
    Compression(trained, loader(), **{**given, "budget": Budget(flops=0.5)})  # which only looks
    assert (tmp_path / "plan.yaml").is_file()
    assert smaller.plan().ranks != ranks
    assert larger.run().plan.ranks == ranks
    with pytest.raises(ValueError, match=r"another compression \(budget .0\.6 of .*, not .0\.4 of"):
        smaller.run()


def test_a_plan_outlives_another_way_of_fine_tuning(trained, options, tmp_path, monkeypatch):
    made = Compression(trained, loader(), **options, out=tmp_path, finetune=3).plan()
    monkeypatch.setattr("decef.compression.reach.planner", None)
    given = {**options, "images": 100, "seed": 1, "finetune": 1, "lr": 0.001}  # none of which it depends on
    assert Compression(trained, loader(), **given, out=tmp_path).plan().ranks == made.ranks


@pytest.mark.usefixtures("unexported")
def test_what_is_only_planned_may_be_planned_anew(trained, options, tmp_path):
    given = {**options, "out": tmp_path, "finetune": 0}
    with pytest.raises(ValueError, match="can't be met"):
        Compression(trained, loader(), **{**given, "budget": Budget(flops=0.05)}).plan()
    (tmp_path / "forms.json").write_text("of a budget of time")
    first = Compression(trained, loader(), **given).plan()
    assert not (tmp_path / "forms.json").exists()
    assert not (tmp_path / "plan-before.yaml").exists()
    first.rows[-1].rank = 1
    first.save(tmp_path / "plan.yaml")
    again = Compression(trained, loader(), **{**given, "budget": Budget(flops=0.6)})
    assert again.plan().ranks != first.ranks
    assert Plan.load(tmp_path / "plan-before.yaml").ranks == first.ranks
    assert again.run().plan.ranks == again.plan().ranks


@pytest.mark.usefixtures("unexported")
def test_a_stopped_fine_tuning_goes_on_as_if_nothing_was(trained, options, tmp_path, monkeypatch):
    given = {**options, "finetune": 3, "progress": False}
    whole = compress(trained, loader(count=400), out=tmp_path / "whole", **given)
    real, epochs = Compression._save, []

    def stop(self, network, training):
        real(self, network, training)
        if training is not None:
            epochs.append(training["epoch"])
            if epochs == [1, 2]:
                raise KeyboardInterrupt

    monkeypatch.setattr(Compression, "_save", stop)
    with pytest.raises(KeyboardInterrupt):
        compress(trained, loader(count=400), out=tmp_path / "part", **given)
    again = compress(trained, loader(count=400), out=tmp_path / "part", **given)
    assert epochs == [1, 2, 3]
    for key, value in whole.network.state_dict().items():
        assert torch.equal(value, again.network.state_dict()[key]), key


@pytest.mark.usefixtures("unexported")
def test_auto_gives_every_layer_its_type(trained, options):
    given = {**options, "layer": "auto", "include": "layer1*", "budget": Budget(flops=0.85), "finetune": 0}
    done = compress(trained, loader(count=400), **{**given, "images": 100})
    types = {row.name: row.layer for row in done.plan.rows if row.action == "convert"}
    assert types
    for name, layer in types.items():
        assert type(done.network.get_submodule(name)) is decef.LAYERS[layer]
    assert {row["name"]: row["layer"] for row in done.numbers["layers"] if row["action"] == "convert"} == types
    assert decef.cost(done.network, SIZE).attrs["macs"] <= 0.85 * decef.cost(trained, SIZE).attrs["macs"] + 1
    assert done.plan.layer == "auto"


def test_in_onnx_runtime_where_that_is_installed(tmp_path):
    torch.manual_seed(0)
    layers = nn.Conv2d(1, 16, 3), nn.ReLU(), nn.Conv2d(16, 24, 3), nn.Flatten(), nn.Linear(24 * 16, 10)
    given = {"budget": Budget(flops=0.6), "layer": "decef", "finetune": 0, "out": tmp_path}
    done = compress(nn.Sequential(*layers), loader(count=400), **given)
    assert done.deployed.engine == done.numbers["asked"]["engine"] == "onnxruntime"
    x = DIGITS[1].normalize(DIGITS[1].images[:1])
    (logits,) = onnxruntime.InferenceSession(str(tmp_path / "network.onnx")).run(None, {"input": x.numpy()})
    torch.testing.assert_close(torch.from_numpy(logits), done.network(x).detach(), rtol=1e-3, atol=1e-3)


def test_memory_is_of_what_is_alive_at_once():
    model = nn.Sequential(nn.Conv2d(1, 4, 1), nn.ReLU(), nn.Conv2d(4, 2, 1), nn.Flatten())
    model[1].inplace = True
    assert activation_bytes(model, (3, 1, 8, 8)) == 4 * 3 * 64 * (4 + 2)
    model[1].inplace = False
    assert activation_bytes(model, (3, 1, 8, 8)) == 4 * 3 * 64 * (4 + 4)


@pytest.mark.usefixtures("unexported")
def test_memory_and_size(trained, options):
    dense = stored_bytes(trained)
    given = {**options, "finetune": 0}
    small = decef.compress(trained, loader(count=400), **{**given, "budget": Size(dense // 2)})
    assert small.folder is None
    assert 0.95 * (dense // 2) <= stored_bytes(small.network) <= dense // 2
    assert stored_bytes(small.network) == small.numbers["bytes"]["small"]
    assert set(small.deployed.forms.values()) == {"factorized"}  # the fastest form may be dense
    assert small.deployed.bytes < 0.6 * dense
    small = compress(trained, loader(count=400), **{**given, "budget": Memory(0.6)})
    memory = small.numbers["memory"]
    assert 0.94 * 0.6 <= memory["small"] / memory["dense"] <= 0.6


def made_up_times(model):
    layers = {
        name: LayerTimes(1.0, {1: 0.1, 9: 1.0})
        for name, module in model.named_modules()
        if isinstance(module, nn.Conv2d)
    }
    return Times(len(layers) + 1.0, layers)


@pytest.mark.parametrize("budget", [Latency(0.6), Milliseconds(6.0)])
def test_a_budget_of_time_is_met_as_measured(trained, options, monkeypatch, budget):
    """The layers' times promise too much, so that the first plan is too slow; the second is corrected."""
    module = "decef.compression.reach"
    tries, kept, dense = [], [], decef.cost(trained, SIZE).attrs["macs"]

    def measured(_, small, x):
        tries.append(0.15 + 0.85 * decef.cost(small, SIZE).attrs["macs"] / dense)
        return tries[-1]

    def deployed(model, *_, **__):
        number = len(tries)
        model.save = lambda path: kept.append(number)
        return model

    monkeypatch.setattr(f"{module}.measure_times", lambda model, *_, **__: made_up_times(model))
    monkeypatch.setattr(f"{module}.deploy", deployed)
    monkeypatch.setattr(f"{module}.interleaved_times", lambda steps, **_: dict.fromkeys(steps, 0.01))
    monkeypatch.setattr(f"{module}.time_share", measured)
    Compression(trained, loader(), **{**options, "budget": budget}).plan()
    assert abs(tries[0] / 0.6 - 1) > 0.05
    assert abs(tries[-1] / 0.6 - 1) <= 0.05
    assert kept == [len(tries) - 1]  # the forms in which it was met


@pytest.mark.parametrize("share", [0.9, 1.1])
def test_the_network_runs_in_the_forms_that_met_the_budget_unless_others_are_faster(
    trained, options, tmp_path, monkeypatch, share
):
    job = Compression(trained, loader(), finetune=0, out=tmp_path, **options)
    network = decef.convert(trained, job.plan(), from_scratch=True)
    kept = decef.deploy(network, loader().dataset[:1][0], engines=["eager"])
    kept.forms = dict.fromkeys(kept.forms, "branches")
    kept.save(tmp_path / "forms.json")
    monkeypatch.setattr("decef.compression.pipeline.time_share", lambda anew, before, x: share)
    monkeypatch.setattr("decef.compression.pipeline.deploy", lambda *_, **__: "deployed anew")
    chosen = job._deployed(network)
    assert chosen.forms == kept.forms if share < 1 else chosen == "deployed anew"


def as_plan(share):
    return Plan("decef", [PlanRow("a", "convert", "", round(1000 * share), 1000, None, 1, 1, 1, 1)])


def value_of(made, slope, offset):
    return offset + slope * made.rows[0].rank / 1000


@pytest.mark.parametrize(("slope", "offset"), [(1.0, 0.0), (0.5, 0.4), (1.6, -0.1), (0.3, 0.45)])
def test_the_search_ends_within_its_tolerance(slope, offset):
    found = search(as_plan, lambda made: value_of(made, slope, offset), 0.6)
    assert abs(found.off) <= 0.05
    limited = search(as_plan, lambda made: value_of(made, slope, offset), 0.6, over=0)
    assert -0.05 <= limited.off <= 0


def test_the_search_finds_its_way_between_too_small_and_too_large():
    """As layers whose dense kernels don't fit into the cache: a small share of low-rank ones saves most of the time."""
    steep = lambda share: 0.4 if share < 0.94 else 0.4 + 10 * (share - 0.94)  # noqa: E731
    found = search(as_plan, lambda made: steep(value_of(made, 1.0, 0.0)), 0.6)
    assert abs(found.off) <= 0.05


def test_the_search_says_what_can_be_reached():
    with pytest.raises(ValueError, match=r"the budget, 0\.3 of .*, can't be met: the least that was found is 0\.5"):
        search(as_plan, lambda made: value_of(made, 0.5, 0.5), 0.3)

    def too_small(share):
        if share < 0.7:
            raise ValueError("not below 0.7")
        return as_plan(share)

    assert abs(search(too_small, lambda made: value_of(made, 0.5, 0.0), 0.4).off) <= 0.05
    with pytest.raises(ValueError, match=r"is 0\.\d+ of it \(not below 0\.7\)"):
        search(too_small, lambda made: value_of(made, 1.0, 0.0), 0.4)


def test_the_search_does_not_take_a_network_that_does_not_run_for_one_that_is_too_small():
    def broken(made):
        raise ValueError("no engine could run it")

    with pytest.raises(ValueError, match=r"^no engine could run it$"):
        search(as_plan, broken, 0.6)


@pytest.mark.parametrize("name", ["plan.yaml", "forms.json", "checkpoint.pt", "report.md", "network.onnx"])
def test_a_folder_with_files_of_something_else_is_refused(trained, options, tmp_path, name):
    (tmp_path / name).write_text("mine")
    with pytest.raises(ValueError, match=f"has a {name} that is not of a compression: give another folder"):
        Compression(trained, loader(), out=tmp_path, **options)
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [(name, "mine")]


@pytest.mark.usefixtures("unexported")
def test_no_epoch_is_done_again_with_another_rate_but_a_diverged_one(trained, options, tmp_path):
    given = {**options, "out": tmp_path, "finetune": 1}
    with pytest.raises(FloatingPointError, match=r"not finite .*: try a learning rate \(lr\) below 1e\+08"):
        compress(trained, loader(count=400), lr=1e8, **given)
    made = (tmp_path / "plan.yaml").stat().st_mtime_ns
    compress(trained, loader(count=400), lr=1e-3, **given)
    assert (tmp_path / "plan.yaml").stat().st_mtime_ns == made
    with pytest.raises(ValueError, match=r"holds another compression \(lr 0\.001, not 0\.01\)"):
        compress(trained, loader(count=400), **given)


def test_generators_are_left_as_they_were(trained, options):
    data = [*loader(count=300, shuffle=False)]
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    compress(trained, data, finetune=1, **options)
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.usefixtures("unexported")
def test_accuracies_are_of_the_test_images_given(trained, options, tmp_path):
    given = {**options, "out": tmp_path, "finetune": 0}
    Compression(trained, loader(), **given).plan()
    done = compress(trained, loader(), test=loader(1, shuffle=False), **given)  # only planned before: anew
    assert list(done.numbers["top1"]) == ["dense", "converted", "recalibrated"]
    assert done.numbers["top1"]["recalibrated"] > 50
    Compression(trained, loader(), test=loader(1), **given)  # the same in another order
    with pytest.raises(ValueError, match=r"holds another compression \(test '360 images of classes .*', not '100 im"):
        Compression(trained, loader(), test=loader(1, count=100), **given)
    with pytest.raises(ValueError, match=r"holds another compression \(test '360 images of classes .*', not None"):
        Compression(trained, loader(), **given)


def test_a_last_batch_of_one_image_and_labels_of_any_integer_type(options):
    images, labels = next(iter(loader(count=33, shuffle=False)))
    narrow = nn.Sequential(
        nn.Conv2d(1, 16, 3, 2), nn.BatchNorm2d(16), nn.Conv2d(16, 24, 3), nn.BatchNorm2d(24), nn.Flatten()
    )
    data = [(images[:32], labels[:32].int()), (images[32:], labels[32:].int())]
    done = compress(nn.Sequential(*narrow, nn.Linear(24, 10)), data, **{**options, "exclude": None, "finetune": 1})
    assert all(value.isfinite().all() for value in done.network.state_dict().values())


class Auxiliary(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 16, 3)
        self.more = nn.Conv2d(16, 10, 3)

    def forward(self, x):
        y = self.more(self.conv(x)).mean((2, 3))
        return (y, y) if self.training else y


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda net: Auxiliary(), "in training mode it gives tuple: turn off auxiliary heads"),
        (lambda net: net.requires_grad_(False), r"are frozen: model.requires_grad_\(\) lets them train"),
        (lambda net: nn.Flatten(), "the network has no parameters"),
        (lambda net: net.bfloat16(), r"the network is in torch.bfloat16: give it as model.float\(\)"),
    ],
)
def test_networks_that_can_t_be_fine_tuned_are_refused_first(options, change, message):
    with pytest.raises(ValueError, match=message):
        Compression(change(network()), loader(), **{**options, "exclude": None})


def test_frozen_convolutions_are_warned_of_where_fine_tuning_would_not_change_them(options, caplog):
    model = network()
    model.layer1.requires_grad_(False)
    Compression(model, loader(), finetune=0, **options)
    assert not caplog.records
    job = Compression(model, loader(), finetune=1, **options)
    frozen = sum(isinstance(part, nn.Conv2d) for part in model.layer1.modules())
    assert f"{frozen} of 7 convolutions are frozen and stay so in fine-tuning" in caplog.text
    small = decef.convert(model, job.plan())
    assert not any(p.requires_grad for p in small.layer1.parameters())


def test_a_test_set_is_told_apart_by_its_labels_without_reading_images(trained, options, monkeypatch):
    data = DIGITS[1]
    asked = Compression(trained, loader(), test=loader(1, shuffle=False), **options)._state.asked["test"]
    read = []
    monkeypatch.setattr(
        type(data), "views", lambda self, size: read.append(1) or iter([(data.images[:2], data.labels[:2])])
    )
    assert Compression(trained, loader(), test=loaders.TestBatches(data), **options)._state.asked["test"] == asked
    assert len(read) == 1  # a batch, for the size of the images
    wrong = dataclasses.replace(data, labels=data.labels + 1)
    with pytest.raises(ValueError, match="the labels go from 1 to 10, but the network has 10 outputs"):
        Compression(trained, loader(), test=loaders.TestBatches(wrong), **options)


class Views(nn.Module):
    """Flattens by `view`, which doesn't take channels-last layout."""

    def __init__(self):
        super().__init__()
        self.conv1, self.conv2, self.linear = nn.Conv2d(1, 16, 3), nn.Conv2d(16, 16, 3), nn.Linear(16 * 16, 10)

    def forward(self, x):
        return self.linear(self.conv2(self.conv1(x).relu()).relu().view(len(x), -1))


def test_only_what_runs_otherwise_is_kept_out_of_channels_last_layout():
    x = torch.randn(2, 1, 8, 8)
    assert takes_channels_last(network(), x)
    assert not takes_channels_last(Views(), x)
    with pytest.raises(RuntimeError, match="expected input"):
        takes_channels_last(network(), x.expand(2, 3, 8, 8))


def test_a_network_that_flattens_by_view(options, tmp_path):
    job = Compression(Views(), loader(), **{**options, "exclude": None, "finetune": 1, "out": tmp_path})
    assert job.estimate() > 0
    done = job.run()
    x = DIGITS[1].normalize(DIGITS[1].images[:1])
    torch.testing.assert_close(done.deployed(x), done.network(x), rtol=1e-3, atol=1e-4)
    assert (tmp_path / "network.pt2").is_file()


class OwnDevice(nn.Module):
    """Adds a tensor that is on the CPU wherever its input is."""

    def __init__(self):
        super().__init__()
        self.conv, self.linear = nn.Conv2d(1, 16, 3), nn.Linear(16, 10)

    def forward(self, x):
        y = self.conv(x)
        return self.linear(y.mean((2, 3)) + torch.zeros(16))


class Random(nn.Module):
    """Drops features in evaluation mode, too."""

    def __init__(self):
        super().__init__()
        self.conv, self.linear = nn.Conv2d(1, 16, 3), nn.Linear(16, 10)

    def forward(self, x):
        return self.linear(nn.functional.dropout(self.conv(x).mean((2, 3))))


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (Random(), "the network doesn't run in eager, or not with the same output every time"),
        (
            OwnDevice(),
            r"does not run on an input of size \(1, 8, 8\): .*\(it was run without values, on the meta",
        ),
        (nn.DataParallel(network()), "is in a DataParallel: give it as model.module"),
    ],
)
def test_networks_whose_costs_can_t_be_counted_are_refused_first(options, monkeypatch, model, message):
    monkeypatch.setattr("decef.compression.pipeline.measure_top1", None)
    with pytest.raises(ValueError, match=message):
        Compression(model, loader(), test=loader(1), **{**options, "exclude": None})


@pytest.mark.usefixtures("unexported")
def test_it_is_made_for_inputs_of_the_size_of_the_test_images(trained, options):
    larger = [(nn.functional.interpolate(x, scale_factor=1.5), y) for x, y in loader(1, shuffle=False)]
    done = compress(trained, loader(), test=larger, finetune=0, **options)
    assert done.numbers["input"] == [1, 1, 12, 12]
    assert done.numbers["costs"]["dense"]["macs"] == decef.cost(trained, (1, 12, 12)).attrs["macs"]
    assert done.deployed(larger[0][0][:1]).shape == (1, 10)


def float_labels():
    return [(images, labels.float()) for images, labels in loader()]


def labels_too_large():
    return [(images, labels + 5) for images, labels in loader(shuffle=False)]


def colour_images():
    return [(images.expand(-1, 3, -1, -1), labels) for images, labels in loader()]


@pytest.mark.parametrize(
    ("data", "changes", "message"),
    [
        (list, {}, "the data yields no batch"),
        (lambda: [torch.ones(2, 1, 8, 8)], {}, r"must yield batches \(images, labels\)"),
        (float_labels, {}, "one class index for each image, not torch.float32"),
        (labels_too_large, {}, "labels go from 5 to 14, but the network has 10 outputs"),
        (colour_images, {}, r"doesn't run on images of \(1, 3, 8, 8\)"),
        (loader, {"budget": 0.5}, "budget=0.5 is no budget"),
        (loader, {"layer": "conv2d"}, "would change nothing"),
        (loader, {"layer": "tucker"}, "unknown layer type 'tucker'"),
        (loader, {"finetune": -1}, "finetune=-1 must be a whole number, at least 0"),
        (loader, {"lr": 0}, "^lr=0 must be"),
        (lambda: iter(loader()), {}, "can be iterated once only: give a list or a DataLoader"),
        (loader, {"layer": "auto", "budget": Budget(params=0.5, uniform=True)}, "which uniform=True doesn't"),
        (loader, {"seed": "a"}, "seed='a' must be a whole number, at least 0"),
        (loader, {"seed": 2**31}, "seed=2147483648 must be at most 2147483647"),
        (loader, {"engine": "tensorrt"}, "there is no engine 'tensorrt'"),
        (loader, {"budget": Budget(flops=0.01)}, r"0\.01 of the dense network's FLOPs can't be met"),
        (
            loader,
            {"budget": Budget(flops=1.0)},
            r"no less than what the dense network takes, \d+ MACs: there is nothing",
        ),
        (loader, {"budget": Budget(params=1.0)}, r"no less than what the dense network takes, \d+ parameters"),
        (loader, {"budget": Size(10**9)}, "no less than what the dense network takes"),
        (loader, {"budget": Latency(0.5, made_up_times(network()))}, "say Latency.share. without times"),
    ],
)
def test_bad_input_is_said_in_a_sentence(trained, options, data, changes, message):
    with pytest.raises(ValueError, match=message):
        Compression(trained, data(), **{**options, **changes}).plan()


@pytest.mark.parametrize("budget", [Latency(1.0), Milliseconds(1e6)])
def test_a_budget_of_time_that_is_none_is_refused_before_layers_are_timed(trained, options, monkeypatch, budget):
    monkeypatch.setattr("decef.compression.reach.measure_times", None)
    with pytest.raises(ValueError, match="no less than what the dense network takes"):
        Compression(trained, loader(), **{**options, "budget": budget}).plan()


def test_a_plan_that_was_edited_to_convert_nothing_is_refused(trained, options, tmp_path):
    job = Compression(trained, loader(), **{**options, "out": tmp_path})
    made = job.plan()
    for row in made.rows:
        row.action = "keep"
    made.save(tmp_path / "plan.yaml")
    with pytest.raises(ValueError, match=r"plan\.yaml converts nothing: there is nothing to do"):
        job.run()


@pytest.mark.usefixtures("unexported")
def test_every_option_has_its_effect(trained, options):
    def made(**changes):
        done = compress(trained, loader(count=256), **{**options, "finetune": 0, **changes})
        return done.network.state_dict()

    def same(one, other):
        return all(torch.equal(value, other[key]) for key, value in one.items())

    before = made()
    assert same(made(), before)
    for change in ({"images": 100}, {"seed": 1}, {"layer": "cpac"}, {"budget": Budget(flops=0.5)}):
        changed = made(**change)
        assert changed.keys() != before.keys() or not same(changed, before), change
    only = made(include="layer2.*", exclude=None, budget=Budget(flops=0.8))
    assert {key.split(".")[0] for key in only.keys() - trained.state_dict().keys()} == {"layer2"}
    slow, fast = (made(finetune=1, lr=lr) for lr in (0.001, 0.01))
    moved = [sum((state[key] - value).double().norm() for key, value in before.items()) for state in (slow, fast)]
    assert 0 < moved[0] < moved[1]


def test_the_estimate_is_of_all_steps_of_all_epochs(trained, options, monkeypatch):
    monkeypatch.setattr("decef.compression.pipeline.step_seconds", lambda *_: 2.0)
    for epochs in (0, 3):
        job = Compression(trained, loader(count=256), **{**options, "finetune": epochs})
        assert job.estimate() == epochs * 4 * 2.0


class Unsized:
    """A loader that doesn't say how many batches it has, and counts how often it is asked for them."""

    def __init__(self):
        self.asked = 0

    def __iter__(self):
        self.asked += 1
        return iter(loader(count=256))


@pytest.mark.usefixtures("unexported")
def test_a_loader_without_a_length_is_counted_once(trained, options):
    data, known = Unsized(), loader(count=256)
    done = compress(trained, data, finetune=2, **options)
    same = compress(trained, known, finetune=2, **options)
    assert all(torch.equal(value, same.network.state_dict()[key]) for key, value in done.network.state_dict().items())
    assert data.asked <= 8  # first batch, count, labels' check, images, batch norm, two epochs


def test_a_network_no_better_than_chance_is_warned_of(trained, options, caplog):
    for model, warned in ((network(), True), (trained, False)):
        caplog.clear()
        Compression(model, loader(), test=loader(1, shuffle=False), **options).plan()
        assert ("are its weights trained, and the images normalised" in caplog.text) == warned


def test_labels_that_only_later_don_t_fit_stop_the_fine_tuning(trained, options, tmp_path):
    bad = [*loader(shuffle=False), *labels_too_large()]
    with pytest.raises(ValueError, match="but the network has 10 outputs"):
        compress(trained, bad, out=tmp_path, **options)
    assert (tmp_path / "plan.yaml").is_file()  # what was done is kept


def test_a_pattern_that_matches_nothing_is_refused_before_accuracy_is_measured(trained, options, monkeypatch):
    monkeypatch.setattr("decef.compression.pipeline.measure_top1", None)
    with pytest.raises(ValueError, match="'stem' matches no convolution"):
        Compression(trained, loader(), **{**options, "exclude": "stem", "test": loader()})


def test_layers_that_all_run_dense_are_said_to(made):
    numbers = copy.deepcopy(made[0].numbers)
    for row in numbers["layers"]:
        row["form"] = "reconstructed" if row["action"] == "convert" else ""
    assert "is no faster: all of them run as dense convolutions here" in summary(numbers)
    next(row for row in numbers["layers"] if row["action"] == "convert")["form"] = "wide"
    assert "dense convolutions" not in summary(numbers)


@pytest.mark.parametrize("limit", [0, -1, True, "x"])
def test_limits_are_positive(limit):
    with pytest.raises(ValueError, match="must be a number above 0"):
        Milliseconds(limit)


OWN = """
from decef.models import CifarResNet
def make(): return CifarResNet(8, in_channels=1)
"""


def test_the_command_line(call, trained, tmp_path):
    torch.save(trained.state_dict(), tmp_path / "weights.pt")
    (tmp_path / "mynets.py").write_text(OWN)
    given = ["model=mynets:make", "model.weights=weights.pt", "dataset=digits", "layer=decef", "model.exclude=conv1"]
    given += ["budget.flops=0.5", "finetune.epochs=1", "finetune.batch_size=64", "engine=eager", "images=200"]
    (tmp_path / "small").mkdir()
    (tmp_path / "small" / "network.pth").touch()  # not ours
    dry = call("compress.py", *given, "dry_run=true", cwd=tmp_path)
    assert dry.returncode == 0, dry.stderr
    assert "layer3.0.conv2" in dry.stdout
    assert "fine-tuning would take 0." in dry.stdout
    assert not (tmp_path / "small" / "checkpoint.pt").exists()
    done = call("compress.py", *given, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert re.search(r"of the FLOPs, and (takes \d\.\d\d of the time|is no faster)", done.stdout)
    assert "wrote small/: network.safetensors, network.pt2, plan.yaml, report.md" in done.stdout
    assert decef.load(tmp_path / "small" / "network.safetensors", model=network()).card.dataset == "digits"
    assert "model=YOUR_DENSE_NETWORK" in (tmp_path / "small" / "report.md").read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["budget.flops=0.5"], "say model.weights=FILE"),
        (["budget.flops=0.5", "model.weights=w.pt", "out=null"], "say out=FOLDER"),
        (["budget.flops=0.5", "budget.latency=0.5", "model.weights=w.pt"], "say one budget"),
        (["budget=0.5", "model.weights=w.pt"], "say one budget, such as budget.latency=0.6"),
        (["budget.flop=0.5"], "there is no key 'budget.flop'; did you mean 'budget.flops'?"),
        (["-m", "budget.flops=0.5,0.6"], "one network is shrunk at a time: leave out -m"),
        (["budget.flops=0.5,0.6"], "budget.flops=0.5,0.6 gives several values: say one"),
        (["layer=decf"], "there is no layer 'decf'; did you mean 'decef'?"),
        (["layer=decef", "layer.rank=3"], "layer.rank=3 would do nothing here"),
        (["layer=decef", "++layer.rank=3"], "layer.rank=3 would do nothing here"),
        (["budget.flops=0.5", "model.weights=w.pt", "threads=0"], "threads=0 must be a whole number, at least 1"),
        (
            ["budget.flops=0.5", "model.weights=w.pt", "finetune.batch_size=null"],
            "finetune.batch_size=None must be a whole number, at least 1",
        ),
        (["model.dense_stem=false"], "model.dense_stem=false would do nothing here"),
        (["model=nowhere:make", "model.weights=w.pt", "budget.flops=0.5"], "importable from here: No module named"),
    ],
)
def test_what_the_command_line_refuses(call, trained, tmp_path, arguments, message):
    torch.save(trained.state_dict(), tmp_path / "w.pt")
    said = call("compress.py", "dataset=digits", *arguments, cwd=tmp_path)
    assert (said.returncode, message in said.stderr) == (2, True), said.stderr
    assert said.stderr.count("\n") == 1
    assert not (tmp_path / "small").exists()


def test_a_full_disk_is_said_and_nothing_is_lost(trained, options, tmp_path, monkeypatch):
    Compression(trained, loader(), out=tmp_path, **options).plan()
    before = sorted(path.name for path in tmp_path.iterdir())

    def full(path, data):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("decef.training.checkpoint.replace_file", full)
    with pytest.raises(OSError, match="No space left"):
        compress(trained, loader(), out=tmp_path, **options)
    assert sorted(path.name for path in tmp_path.iterdir()) == before
