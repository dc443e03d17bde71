"""Command lines that no other test runs, in this process, on something small."""

import dataclasses
import importlib
import json
import sys

import pandas as pd
import pytest
import torch
from support import ROOT, config

from decef.compression import Memory, Milliseconds, Size
from decef.data import DATASETS, IMAGENET_MEAN, IMAGENET_STD, Images
from decef.inference.timing import Roofline
from decef.layers import LAYERS
from decef.models import create_model
from decef.ranks import Budget, Latency
from decef.results.bench_inference import Case
from decef.results.bench_layers import Shape
from decef.training.run import run


@pytest.fixture
def main_of(monkeypatch):
    """Runs a script's `main` with arguments."""
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))

    def run_main(name, *arguments, **constants):
        script = importlib.import_module(name)
        for key, value in constants.items():
            monkeypatch.setattr(script, key, value)
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *map(str, arguments)])
        script.main()

    yield run_main
    for name in (
        "significance",
        "costs",
        "report",
        "train",
        "without_finetuning",
        "frontier",
        "bench",
        "compress",
    ):  # names that a package of ours has too, or might
        sys.modules.pop(name, None)


def test_bench(main_of, tmp_path, monkeypatch):
    case = Case("plain", 8, 2, ("conv2d", "decef"), ("eager",), ("fp32",))
    monkeypatch.setattr(Roofline, "measure", lambda *_: Roofline(1e9, 1e9))
    monkeypatch.setattr("decef.results.bench_layers.SHAPES", (Shape("test", 8, 16, 3, 2, 8),))
    monkeypatch.setattr("decef.results.bench_inference.INFERENCE", (case,))
    monkeypatch.setattr("decef.results.bench_inference.NETWORK_ROUNDS", 1)
    monkeypatch.setattr("decef.results.bench_training.TRAINING", (case,))
    loops = {"usual": 1.0, "decef": 2.0, "0.75": 3.0, "0.5": 4.0}
    monkeypatch.setattr("decef.results.bench_training.bench_loops", lambda device: loops)
    monkeypatch.setattr("decef.plans.AUTO_TYPES", ("decef",))
    main_of("bench", "layers", "networks", "training", "--out", tmp_path)
    assert {path.stem for path in tmp_path.glob("*.md")} == {"layers-cpu", "networks-cpu", "training-cpu"}


@pytest.mark.parametrize(
    ("key", "value", "budget"),
    [
        ("latency", 0.6, Latency(0.6)),
        ("milliseconds", 6.0, Milliseconds(6.0)),
        ("params", 0.5, Budget(params=0.5)),
        ("memory", 0.5, Memory(0.5)),
        ("bytes", 1000, Size(1000)),
    ],
)
def test_budgets_of_the_command_line(monkeypatch, key, value, budget):
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    compress = importlib.import_module("compress")
    monkeypatch.delitem(sys.modules, "compress")
    assert compress._budget({"flops": None, key: value}) == budget


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """A results folder with one CPAC run."""
    folder = tmp_path_factory.mktemp("results")
    model = {"name": "plain", "width": 0.1, "relu": True, "dense_stem": True}
    run(config(folder, model=model, layer={"name": "cpac", "rank": 3}))
    return folder


def test_significance(main_of, results, tmp_path):
    (folder,) = (results / "runs").iterdir()
    main_of("significance", folder, "--out", tmp_path)
    table = pd.read_csv(tmp_path / f"{folder.name}.csv")
    assert len(table) == 3 * table.layer.nunique() == 18
    assert json.loads((tmp_path / f"{folder.name}.json").read_text())["run"] == folder.name
    with pytest.raises(SystemExit, match="2"):
        main_of("significance", tmp_path, "--out", tmp_path)


def test_report(main_of, results, capsys):
    main_of("report", "--results", results)
    assert "1 runs" in capsys.readouterr().out
    assert "cpac" in (results / "report.html").read_text()


def test_costs_and_their_place_in_a_page(main_of, tmp_path):
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- costs -->\nold\n<!-- end of costs -->\nafter\n")
    main_of("costs", "--out", tmp_path / "costs", "--page", page, CIFAR=("resnet20",), IMAGENET=())
    before, _, rest = page.read_text().partition("<!-- costs -->\n")
    table, _, after = rest.partition("<!-- end of costs -->\n")
    assert (before, after) == ("before\n", "after\n")
    assert "old" not in table
    assert table in (tmp_path / "costs.md").read_text()
    assert len(pd.read_csv(tmp_path / "costs.csv")) == 6


@pytest.fixture
def trained(monkeypatch, tmp_path):
    """A file of weights for ResNet-20, and a few random images in CIFAR-10's place."""
    known = DATASETS["cifar10"]

    def read(root, **options):
        pixels = torch.randint(0, 256, (136, *known.input_size), generator=torch.Generator().manual_seed(0))
        images = Images(pixels.to(torch.uint8), torch.arange(136) % 10)
        return images.subset(slice(0, 128)), images.subset(slice(128, None))

    monkeypatch.setitem(DATASETS, "cifar10", dataclasses.replace(known, read=read))
    torch.save(create_model("resnet20", num_classes=10).state_dict(), tmp_path / "weights.pt")
    return ["resnet20", "--weights", tmp_path / "weights.pt", "--layers", "decef", "--shares", "0.5", "--images", "16"]


def test_without_finetuning(main_of, trained, tmp_path):
    main_of("without_finetuning", *trained, "--out", tmp_path / "made" / "resnet20")
    frame = pd.read_csv(tmp_path / "made" / "resnet20.csv")
    assert frame.layer.tolist() == ["conv2d", *["decef"] * 4]
    assert "weights.pt (MD5" in (tmp_path / "made" / "resnet20.md").read_text()


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        (("figures", "--network", "resnet20"), "resnet20 would have random weights: say where trained ones are"),
        (("without_finetuning", "resnet20", "--out", "small"), "resnet20 is no run's folder: say --weights FILE"),
    ],
)
def test_random_networks_are_refused(main_of, typed, said, capsys):
    with pytest.raises(SystemExit, match="2"):
        main_of(*typed)
    assert said in capsys.readouterr().err


def test_frontier(main_of, trained, tmp_path, monkeypatch, caplog, capsys):
    """With three released networks, of which one is measured too: it began so, by this schedule, on such inputs."""
    engines = {"fp32": ["eager"], "int8": []}
    monkeypatch.setattr("decef.inference.engines.available", lambda device, precision="fp32": engines[precision])
    monkeypatch.setattr("decef.results.frontier.ROUNDS", 1)
    small = {"dataset__name": "cifar10", "dataset__train_size": 64, "train__epochs": 1, "train__lr": 1e-3}
    began_so = {"name": "resnet20", "dense_stem": True, "weights": str(trained[2])}
    usual = {"dataset__mean": list(IMAGENET_MEAN), "dataset__std": list(IMAGENET_STD)}
    decef = {"model": began_so, "layer": {"name": "decef", "flops": 0.5}, **small}
    runs = [
        run(config(tmp_path / "results", **decef, **usual)),
        run(config(tmp_path / "results", **decef)),
        run(config(tmp_path / "results", layer={"name": "conv2d"}, **small)),
    ]
    for i, summary in enumerate(runs):
        folder = tmp_path / "results" / "runs" / summary["id"]
        main_of("release", folder, f"network-{i}", "--out", tmp_path / "results" / "networks")
    given = ["--precisions", "fp32", "--results", tmp_path / "results", "--out", tmp_path / "resnet20"]
    main_of("frontier", *trained, *given, "--batch", "4", "--schedule", "smoke")
    frame = pd.read_csv(tmp_path / "resnet20.csv", keep_default_na=False)
    assert frame[["layer", "budget", "stage"]].values.tolist() == [
        ["conv2d", "dense", ""],
        ["decef", "0.5 of FLOPs", "decomposed"],
        ["decef", "0.5 of FLOPs", "fine-tuned"],
    ]
    assert "network-1.safetensors is for inputs that are normalised in another way" in caplog.text
    before = (tmp_path / "resnet20.csv").read_bytes()
    for wrong, message in (
        (["--precisions", "int4"], "there is no precision 'int4'"),
        (["--precisions", "int8", "--batch", "4"], "no engine here runs in int8"),
        (["--batch", "32"], "batches of 32 need as many training images, not 16"),
        (["--layers", "decef", "low"], "unknown layer type 'low'"),
        (["--shares", "0.5", "0.01"], "0.01"),
    ):
        with pytest.raises(SystemExit, match="2"):
            main_of("frontier", *trained, *given, *wrong)
        assert message in capsys.readouterr().err
    assert (tmp_path / "resnet20.csv").read_bytes() == before
    assert not list(tmp_path.glob("*.partial.jsonl"))


def test_quickstart(call, tmp_path):
    """What `make quickstart` types, with one epoch of a few images."""
    few = ["train.epochs=1", "dataset.train_size=100", "wandb.mode=disabled"]
    done = call("train.py", "-m", "experiment=quickstart", *few, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    shown = call("tables.py", "--print", "digits-quickstart", cwd=tmp_path)
    assert shown.returncode == 0, shown.stderr
    assert all(f"| {layer} " in shown.stdout for layer in LAYERS)


@pytest.mark.parametrize(
    "script",
    ["bench", "compressions", "costs", "export", "frontier", "ranks", "release", "significance", "without_finetuning"],
)
def test_where_nothing_can_be_written_is_said_before_any_work(main_of, tmp_path, capsys, script):
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit) as end:
        main_of(script, "--out", tmp_path / "file" / "made")
    said = capsys.readouterr().err
    assert (end.value.code, said.count("\n")) == (2, 1)
    assert f"nothing can be written to {tmp_path / 'file'}" in said
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
