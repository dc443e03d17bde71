"""The papers' experiments as configs, trained weights as a start, and the table of costs."""

import contextlib
import dataclasses
import importlib
import json
import sys

import pytest
import torch
import yaml
from PIL import Image
from support import ROOT, composed, config

from decef.data import DATASETS, Images
from decef.layers import LAYERS, BasisConv2d
from decef.models import create_model
from decef.plans import plan
from decef.ranks import Energy
from decef.results.costs import cost_table, write_costs
from decef.results.overview import overview_table
from decef.training.build import build
from decef.training.config import InputError, RunConfig
from decef.training.networks import load_networks
from decef.training.record import (
    Record,
    first_difference,
    identity,
    load_config,
    load_records,
    read_metrics,
    replay,
    run_id,
)
from decef.training.recorder import Recorder
from decef.training.run import run

EXPERIMENTS = sorted(path.stem for path in (ROOT / "configs" / "experiment").glob("*.yaml"))


def sweep_of(name):
    """The grid of an experiment, values by key."""
    content = yaml.safe_load((ROOT / "configs" / "experiment" / f"{name}.yaml").read_text())
    return content.get("hydra", {}).get("sweeper", {}).get("params", {})


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_experiment_can_start(name, tmp_path):
    sweep = sweep_of(name)
    for position in (0, -1) if sweep else (0,):  # both ends of the grid
        overrides = [f"{key}={str(values).split(',')[position]}" for key, values in sweep.items()]
        if name == "basisconv_resnet56":
            torch.save(create_model("resnet56", num_classes=10).state_dict(), tmp_path / "weights.pt")
            overrides.append(f"model.weights={tmp_path / 'weights.pt'}")
        given = RunConfig.from_dict(composed(f"experiment={name}", *overrides)).resolved()
        with torch.device("cpu" if given.model.weights else "meta"):
            _, made, _ = build(given.model, given.layer, given.dataset.dataset())
        assert bool(made.ranks) == (given.layer.name != "conv2d")


#: They differ from another experiment in numbers, layer types or networks alone: with the grid.
ALIKE = ("cifar10", "cpac_mnist_two", "cpac_tile_as_published", "decef_cifar10", "imagenette")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.grid] if name in ALIKE else []) for name in EXPERIMENTS]
)
def test_the_record_of_an_experiment_is_done_again_to_the_bit(name, tmp_path, monkeypatch):
    """Two epochs of the last run of its grid, on a few random images of the dataset's shape."""
    sweep = sweep_of(name)
    overrides = [f"{key}={str(values).split(',')[-1]}" for key, values in sweep.items()]
    given = composed(f"experiment={name}", *overrides)
    data, model = given["dataset"], given["model"]
    # The same code in less time; test_every_experiment_can_start has the networks as they are.
    smaller = {
        "torchvision/resnet50": "torchvision/squeezenet1_1",
        "torchvision/resnet18": "torchvision/squeezenet1_1",
        "resnet110": "resnet20",
        "resnet56": "resnet20",
    }
    model["name"] = smaller.get(model["name"], model["name"])
    if model["name"] in ("vgg16_bn", "mobilenetv2"):
        model["width"] = 0.25
    if data["name"] in DATASETS:
        known = DATASETS[data["name"]]
        generator = torch.Generator().manual_seed(0)

        def read(root, **options):
            pixels = torch.randint(0, 256, (24, *known.input_size), generator=generator.manual_seed(0))
            images = Images(pixels.to(torch.uint8), torch.arange(24) % known.num_classes)
            return images.subset(slice(0, 16)), images.subset(slice(16, None))

        monkeypatch.setitem(DATASETS, data["name"], dataclasses.replace(known, read=read))
    else:
        for part in ("train", "val"):
            for label in ("a", "b"):
                (tmp_path / part / label).mkdir(parents=True)
                for i in range(4):
                    pixels = torch.randint(0, 256, (40, 40, 3), dtype=torch.uint8).numpy()
                    Image.fromarray(pixels).save(tmp_path / part / label / f"{i}.jpeg")
        data |= {"root": str(tmp_path), "num_classes": 2, "size": 32, "workers": 0}
    if given["model"].get("weights") is None and given["layer"].get("energy"):
        torch.save(create_model(model["name"], num_classes=10).state_dict(), tmp_path / "weights.pt")
        model["weights"] = str(tmp_path / "weights.pt")
    given["train"] |= {"epochs": 2, "batch_size": min(given["train"]["batch_size"], 8)}
    here = {"wandb": {"mode": "disabled"}, "device": "cpu", "progress": False, "experiment": None}
    summary = run(RunConfig.from_dict({**given, **here, "results": tmp_path / "one"}))
    again, precision = replay(tmp_path / "one" / "runs" / summary["id"])
    again = dataclasses.replace(
        again,
        dataset=dataclasses.replace(again.dataset, root=data["root"]),
        model=dataclasses.replace(again.model, weights=given["model"].get("weights")),
        device="cpu",
        results=tmp_path / "other",
    )
    run(again, precision)
    one, other = (read_metrics(tmp_path / part / "runs" / summary["id"]) for part in ("one", "other"))
    assert len(one) == 2
    assert first_difference(one, other) is None


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    results = tmp_path_factory.mktemp("dense")
    summary = run(config(results, layer={"name": "conv2d"}, train__epochs=5, dataset__train_size=768))
    return results / "runs" / summary["id"] / "checkpoint.pt", summary


def test_trained_weights_are_decomposed_and_trained_on(weights, tmp_path):
    path, dense = weights
    layer = {"name": "basisconv", "energy": 0.7, "implementation": "reconstructed", "train_basis": True}
    options = {"layer": layer, "train__epochs": 1, "train__lr": 1e-6}
    summary = run(config(tmp_path / "a", model__weights=str(path), **options))
    assert "-e0.7-" in summary["id"]
    assert summary["macs"] < dense["macs"]
    assert dense["test_top1"] > 50
    assert summary["test_top1"] > 25  # chance is 10, and one epoch at this rate learns nothing

    dense_model = create_model("resnet20", num_classes=10, in_channels=1)
    dense_model.load_state_dict(torch.load(path, weights_only=True)["model"])
    expected = plan(dense_model, "basisconv", rank=Energy(0.7), exclude="conv1", input_size=(1, 8, 8))
    assert summary["ranks"] == expected.ranks

    elsewhere = tmp_path / "elsewhere.pt"
    elsewhere.write_bytes(path.read_bytes())
    again = run(config(tmp_path / "b", model__weights=str(elsewhere), **options))
    assert again["id"] == summary["id"]  # what is in the file counts, not where it is
    assert again["test_loss"] == summary["test_loss"]
    with Recorder(config(tmp_path / "a", model__weights=str(elsewhere), **options).resolved()).open():
        pass  # nor what it is called
    record = yaml.safe_load((tmp_path / "a" / "runs" / summary["id"] / "config.yaml").read_text())
    assert record["model"]["weights"] == "checkpoint.pt"  # its name, not its place
    assert len(record["model"]["weights_md5"]) == 32

    path.rename(path.with_suffix(".gone"))  # a run is read back without them
    ((_, model),) = load_networks(str(tmp_path / "a" / "runs" / summary["id"]))
    path.with_suffix(".gone").rename(path)
    ranks = {name: m.rank for name, m in model.named_modules() if isinstance(m, BasisConv2d)}
    assert ranks == summary["ranks"]


def test_weights_are_decomposed_on_images(weights, tmp_path):
    path, _ = weights
    options = {
        "layer": {"name": "decef", "flops": 0.4},
        "train__epochs": 1,
        "train__lr": 1e-6,
        "train__weight_decay": 0.0,
    }
    by_kernels, by_outputs = (
        run(config(tmp_path, model__weights=str(path), model__decompose_on=images, **options)) for images in (None, 128)
    )
    assert by_kernels["id"] != by_outputs["id"]
    assert by_outputs["test_loss"] < 0.9 * by_kernels["test_loss"]
    settings = {record.id: record.setting for record in load_records(tmp_path)}
    assert "decomposed on 128 images" in settings[by_outputs["id"]]
    assert "decomposed" not in settings[by_kernels["id"]]
    with pytest.raises(InputError, match=r"model\.decompose_on=128 is for trained weights: say model\.weights=FILE"):
        run(config(tmp_path, model__decompose_on=128, **options))


def test_fine_tuning_begins_at_the_network_that_was_decomposed_on_images(weights, tmp_path, monkeypatch):
    losses = {}
    for measured in (True, False):
        if not measured:  # as if the norms inside the layers were left as they are
            monkeypatch.setattr("decef.training.build.norms_inside_measured", contextlib.nullcontext)
        given = {"model__weights": str(weights[0]), "model__decompose_on": 128, "train__epochs": 1, "train__lr": 1e-6}
        results = tmp_path / str(measured)
        summary = run(config(results, layer={"name": "basisconv2021", "flops": 0.8}, **given))
        losses[measured] = json.loads((results / "runs" / summary["id"] / "metrics.jsonl").read_text())["train_loss"]
    assert losses[True] < 0.9 * losses[False]


def test_weights_and_energy_that_do_not_fit(weights, tmp_path):
    energy = {"name": "decef", "energy": 0.9}
    with pytest.raises(InputError, match=r"layer\.energy is of trained kernels: say model\.weights=FILE"):
        run(config(tmp_path, layer=energy))
    with pytest.raises(InputError, match="there is no file of weights"):
        run(config(tmp_path, layer=energy, model__weights=str(tmp_path / "none.pt")))
    with pytest.raises(InputError, match=r"layer\.rank=2 and layer\.energy=0\.9 are both given"):
        run(config(tmp_path, layer={**energy, "rank": 2}, model__weights=str(weights[0])))
    again = {"model__weights": str(weights[0]), "model__weights_md5": "0" * 32}
    with pytest.raises(InputError, match="is not the file that the run began from"):
        run(config(tmp_path, layer=energy, **again))
    with pytest.raises(InputError, match="does not fit CifarResNet"):
        run(config(tmp_path, layer=energy, model__name="resnet32", model__weights=str(weights[0])))


def test_the_table_of_costs(tmp_path):
    model, mobile = (RunConfig.from_dict(composed(f"model={name}")).model for name in ("resnet20", "mobilenetv1"))
    networks = [("resnet20", model, DATASETS["cifar10"]), ("mobilenetv1", mobile, DATASETS["cifar10"])]
    rows = list(cost_table(networks, ["conv2d", "decef"], 0.667))
    assert rows[0]["params"] == 269_722
    assert rows[1]["macs_ratio"] <= 0.667
    assert rows[3]["macs"] is None
    assert "can't be met" in rows[3]["note"]
    shown = write_costs(rows, tmp_path / "costs", 0.667)
    assert "mobilenetv1 decef: a budget of 0.667" in (tmp_path / "costs.md").read_text()
    cells = cells_of(shown, "resnet20")
    page = between(ROOT / "docs" / "layers.md", "costs")
    assert cells_of(page, "resnet20")[:3] == cells
    assert page in (ROOT / "results" / "costs.md").read_text()


def test_the_readmes_table_is_made_from_the_results():
    ours, made = (
        between(ROOT / "README.md", "results"),
        overview_table(load_records(ROOT / "results"), ROOT / "results"),
    )
    for layer in LAYERS:
        assert cells_of(ours, f"`{layer}`") == cells_of(made, f"`{layer}`")


def between(path, name):
    return path.read_text().partition(f"<!-- {name} -->\n")[2].partition(f"<!-- end of {name} -->")[0]


def cells_of(table, first):
    rows = ([cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines())
    return next(row for row in rows if row[0] == first)


def test_an_edited_network_of_ones_own_is_another_run(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    file = tmp_path / "a_net_to_edit.py"
    ids = []
    for width in (4, 4, 8):
        monkeypatch.delitem(sys.modules, "a_net_to_edit", raising=False)  # as in another process
        importlib.invalidate_caches()
        file.write_text(f"from torch import nn\ndef net():\n    return nn.Sequential(nn.Conv2d(1, {width}, 3))\n")
        resolved = config(tmp_path, model={"name": "a_net_to_edit:net"}).resolved()
        ids.append(run_id(resolved))
    assert ids[0] == ids[1] != ids[2]
    began = {"name": "a_net_to_edit:net", "source_md5": "0" * 32}
    with pytest.raises(InputError, match=r"a_net_to_edit.py is not what it was when the run began"):
        config(tmp_path, model=began).resolved()
    file.write_text(file.read_text() + "# edited while a sweep runs\n")
    with pytest.raises(InputError, match=r"a_net_to_edit.py was changed after it was imported: start again"):
        config(tmp_path, model={"name": "a_net_to_edit:net"}).resolved()


def test_an_option_of_ones_own_network_that_is_off_makes_another_run(tmp_path, monkeypatch):
    """Whether it is off by default is not known."""
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "a_net_with_options.py").write_text(
        "from torch import nn\ndef net(norm=True, drop=0.5):\n    return nn.Sequential(nn.Conv2d(1, 4, 3))\n"
    )
    given = [{}, {"norm": False}, {"drop": 0}, {"norm": False, "drop": 0}]
    configs = [config(tmp_path, model={"name": "a_net_with_options:net", **one}).resolved() for one in given]
    assert len(set(map(run_id, configs))) == 4
    other = dataclasses.replace(configs[0].model, source_md5="0" * 32)
    models = [Record(one, {}).model for one in (configs[0], dataclasses.replace(configs[0], model=other))]
    assert models[0] != models[1] == "a_net_with_options:net of source 00000000"


def test_records_in_the_repository_are_found_again():
    """A new option must not change the ids of what was run, or the plans that were followed."""
    built = {}  # a plan doesn't depend on the seed
    for folder in sorted((ROOT / "results" / "runs").iterdir()):
        if not (folder / "summary.json").is_file() or folder.name.startswith("digits-resnet"):
            continue
        config = load_config(folder)
        summary = json.loads((folder / "summary.json").read_text())
        assert run_id(config) == folder.name
        if config.model.weights or ":" in config.model.name:
            continue  # its ranks are those of weights, or its network one, that is not in the repository
        key = json.dumps([identity(config)[group] for group in ("dataset", "model", "layer")])
        if key not in built:
            with torch.device("meta"):
                _, made, dense = build(config.model, config.layer, config.dataset.dataset())
            built[key] = made.ranks, dense
        assert built[key] == (summary["ranks"], summary["dense"])
