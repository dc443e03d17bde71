import argparse
import dataclasses
import os
import runpy
import sys
from itertools import product
from pathlib import Path

import pandas as pd
import pytest
import torch
import yaml
from support import DIGITS, ROOT, composed, config, network, train

from decef.conversion import convert
from decef.data import DATASETS, IMAGENET_MEAN, IMAGENET_STD, dataset
from decef.layers import LAYERS, CPACConv2d
from decef.machine import environment
from decef.models import CifarResNet, create_model
from decef.models.weights import load_state_dict, load_weights
from decef.ranks import effective_rank
from decef.results.effective_ranks import kernels, rank_table
from decef.results.significance import removal_table
from decef.results.without_finetuning import without_finetuning, write_rows
from decef.training.loop import evaluate
from decef.training.networks import load_network, load_networks
from decef.training.run import run

weights = Path(os.environ.get("DECEF_DATA", "data")) / "weights" / "resnet20-12fca82f.th"


def scores(model):
    return evaluate(model, DIGITS[1])


def test_rank_table_stands_beside_random_kernels():
    torch.manual_seed(0)
    model = CifarResNet(8)
    with torch.no_grad():  # one layer of rank 1 in every channel
        model.layer2[0].conv1.weight.copy_(torch.randn(32, 16, 1, 1) * torch.randn(1, 16, 3, 3))
    table = rank_table(model, 0.2).set_index("name")
    assert list(table.index) == [name for name, _, _ in kernels(model)]
    assert table.loc["layer2.0.conv1", ["threshold", "energy", "entropy", "stable"]].tolist() == pytest.approx([1] * 4)
    for name, weight, _ in kernels(model):
        assert table.loc[name, "threshold"] == effective_rank(weight, 0.2).mean().item()
    other = table.drop("layer2.0.conv1")
    torch.testing.assert_close(
        torch.tensor(other["entropy"].values), torch.tensor(other["entropy_init"].values), rtol=0.05, atol=0
    )


@pytest.mark.parametrize("layer", LAYERS)
def test_kernels_of_a_network_in_training_are_those_of_evaluation(layer):
    model = network(layer).train()
    found = {name: weight for name, weight, _ in kernels(model)}
    assert all(module.training for module in model.modules())
    for name, weight in found.items():
        module = model.get_submodule(name).eval()
        assert torch.equal(weight, module.weight)
        assert not weight.requires_grad


def test_ranks_of_a_run_over_its_epochs(call, tmp_path, caplog):
    run(config(tmp_path, keep_checkpoints=2, train__epochs=4, layer={"name": "conv2d"}))
    (folder,) = (tmp_path / "runs").iterdir()
    out = tmp_path / "figures" / "ranks"
    done = call("ranks.py", folder, "--out", out)
    assert done.returncode == 0, done.stderr
    table = pd.read_csv(out.with_suffix(".csv"))
    assert table.network.unique().tolist() == ["epoch 2", "epoch 4"]
    assert len(table) == 2 * 19
    for ending in (".png", ".svg"):
        assert out.with_suffix(ending).stat().st_size > 1000
    state = torch.load(folder / "checkpoint.pt", weights_only=True)["model"]
    (*_, (_, last)) = load_networks(str(folder))
    for one in (last, load_network(str(folder))):
        assert all(torch.equal(value, state[name]) for name, value in one.state_dict().items())
    (folder / "checkpoint-0004.pt").unlink()  # as of a run that went on without the option
    assert [label for label, _ in load_networks(str(folder))] == ["epoch 2", "epoch 4"]
    for load, given in product((load_network, load_networks), ({"weights": tmp_path / "w.th"}, {"pretrained": True})):
        with pytest.raises(ValueError, match="has weights of its own: give no others"):
            load(str(folder), **given)
    for path in folder.glob("checkpoint-*.pt"):
        path.unlink()
    with caplog.at_level("WARNING"):
        run(config(tmp_path, keep_checkpoints=2, train__epochs=4, layer={"name": "conv2d"}))
    assert "it kept no checkpoints: to have some, train it again" in caplog.text
    (folder / "summary.json").write_text('{"status": "interrupted"}')
    for refused in (
        call("ranks.py", folder, "--out", out),
        call("significance.py", folder, "--out", tmp_path),
        call("without_finetuning.py", folder, "--out", out),
        call("figures.py", "--network", folder, "--results", tmp_path),
    ):
        assert refused.returncode == 2
        assert "is interrupted, not finished" in refused.stderr


@pytest.mark.parametrize("name", ["resnet21", "timm/no_such_model", "torchvision/no_such_model"])
def test_unknown_networks(name):
    with pytest.raises(ValueError, match=name.split("/")[-1]):
        load_networks(name)


def test_weights_of_another_network_and_no_weights(tmp_path):
    torch.save({"state_dict": {"module.conv1.weight": torch.zeros(1)}}, tmp_path / "w.th")
    with pytest.raises(ValueError, match="does not fit CifarResNet"):
        load_weights(CifarResNet(8), tmp_path / "w.th")
    state = CifarResNet(8).state_dict()
    for prefix in ("module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."):
        torch.save({prefix + key: value for key, value in state.items()}, tmp_path / "w.th")
        assert torch.equal(load_weights(CifarResNet(8), tmp_path / "w.th").conv1.weight, state["conv1.weight"])
    torch.save(state, tmp_path / "w.th")
    classifier = load_weights(CifarResNet(8, conv_classifier=True), tmp_path / "w.th").linear
    assert torch.equal(classifier.weight[:, :, 0, 0], state["linear.weight"])
    # As the training scripts of torchvision and timm write them.
    torch.save({"model": state, "args": argparse.Namespace(lr=0.1, data="images"), "epoch": 3}, tmp_path / "w.th")
    assert torch.equal(load_weights(CifarResNet(8), tmp_path / "w.th").conv1.weight, state["conv1.weight"])
    own = {"module.weight": torch.zeros(1), "bias": torch.zeros(1)}  # a part of that name
    torch.save(own, tmp_path / "w.th")
    assert load_state_dict(tmp_path / "w.th") == own
    torch.save(CifarResNet(8), tmp_path / "w.th")
    with pytest.raises(
        ValueError, match=r"saved whole \(it holds a decef\.\S+CifarResNet\): save its state_dict\(\) inst"
    ):
        load_weights(CifarResNet(8), tmp_path / "w.th")
    torch.save({"net": state}, tmp_path / "w.th")
    with pytest.raises(ValueError, match=r"no state dict, alone or under the key state_dict or model: it has 'net'$"):
        load_weights(CifarResNet(8), tmp_path / "w.th")
    whole = (tmp_path / "w.th").read_bytes()
    for damaged in (b"nothing", b"hello", whole[: len(whole) // 2], b""):
        (tmp_path / "w.th").write_bytes(damaged)
        with pytest.raises(ValueError, match="no file of weights"):
            load_weights(CifarResNet(8), tmp_path / "w.th")


def test_weights_in_safetensors(tmp_path):
    from safetensors.torch import save_file

    model, other = (create_model("resnet20", num_classes=10) for _ in range(2))
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    load_weights(other, tmp_path / "model.safetensors")
    assert all(torch.equal(value, other.state_dict()[key]) for key, value in model.state_dict().items())
    (tmp_path / "broken.safetensors").write_bytes(b"nothing")
    with pytest.raises(ValueError, match="is damaged or no file of weights"):
        load_weights(other, tmp_path / "broken.safetensors")


def test_weights_say_how_many_classes_a_network_has(tmp_path):
    torch.save(create_model("resnet20", num_classes=7).state_dict(), tmp_path / "w.th")
    ((_, model),) = load_networks("resnet20", weights=str(tmp_path / "w.th"))
    assert model(torch.zeros(1, 3, 32, 32)).shape == (1, 7)
    torch.save(create_model("resnet32", num_classes=7).state_dict(), tmp_path / "w.th")
    with pytest.raises(ValueError, match="does not fit CifarResNet"):
        load_networks("resnet20", weights=tmp_path / "w.th")


@pytest.mark.skipif(not weights.is_file(), reason="no trained weights under $DECEF_DATA or data/")
def test_published_weights_classify_cifar10():
    ((_, model),) = load_networks("resnet20", weights=weights)
    _, test = dataset("cifar10", mean=IMAGENET_MEAN, std=IMAGENET_STD).load()
    _, top1 = evaluate(model, test.subset(slice(0, 1000)))
    assert 89 < top1 < 95  # 91.73 on all of them, as published


def test_accuracy_without_finetuning_falls_with_the_budget(trained, tmp_path):
    seen, test = DIGITS
    rows = list(
        without_finetuning(
            trained,
            test,
            layers=["decef", "basisconv"],
            shares=[0.3, 0.9],
            exclude="conv1",
            seen=seen.subset(slice(0, 256)),
            augmented=dataclasses.replace(seen, crop_padding=1),
        )
    )
    dense, rest = rows[0], pd.DataFrame(rows[1:])
    assert dense["top1"] == scores(trained)[1] > 70
    assert len(rest) == 16
    by_nearest = rest.groupby("nearest").top1.mean()
    assert by_nearest["outputs"] > by_nearest["kernels"]
    small = rest[(rest.spread == "energy") & (rest.budget == "0.300")]
    assert small.recalibrated.mean() > small.top1.mean() + 1
    assert rest[rest.spread == "uniform"].recalibrated.isna().all()
    assert (rest.flops_ratio <= rest.budget.astype(float) + 1e-3).all()
    by_budget = rest.groupby("budget").agg({"top1": "mean", "mean_error": "mean"})
    assert by_budget.loc["0.900", "top1"] > by_budget.loc["0.300", "top1"]
    assert by_budget.loc["0.900", "mean_error"] < by_budget.loc["0.300", "mean_error"]
    write_rows(rows, tmp_path / "rows", "a test", environment("cpu"))
    assert len(pd.read_csv(tmp_path / "rows.csv")) == len(rows)
    text = (tmp_path / "rows.md").read_text()
    assert f"{dense['top1']:.2f}".rstrip("0") in text
    assert len(rows) == 17


@pytest.fixture
def measured(monkeypatch, tmp_path):
    """What scripts/without_finetuning.py would measure with, for a network and options on its command line."""
    asked = []

    def measure(model, test, **options):
        asked.append({"mean": list(test.mean), "std": list(test.std)})
        return []

    monkeypatch.setattr("decef.training.networks.load_network", lambda name, weights: CifarResNet(8))
    monkeypatch.setattr("decef.results.without_finetuning.without_finetuning", measure)
    monkeypatch.setattr("decef.results.pages.collect", lambda rows, *_: rows)
    monkeypatch.setattr("decef.results.without_finetuning.write_rows", lambda *_: None)
    few = dataclasses.replace(DATASETS["cifar10"], read=lambda root: DIGITS)
    monkeypatch.setitem(DATASETS, "cifar10", few)
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))

    def call(network, *options):
        monkeypatch.setattr(
            sys, "argv", ["without_finetuning.py", str(network), *options, "--out", str(tmp_path / "out")]
        )
        runpy.run_path(str(ROOT / "scripts" / "without_finetuning.py"), run_name="__main__")
        return asked.pop()

    return call


def test_images_are_normalised_as_the_network_was_trained(measured, tmp_path):
    imagenet = {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}
    (tmp_path / "w.th").touch()
    named = ["resnet20", "--weights", str(tmp_path / "w.th")]
    assert measured(*named) == imagenet
    given = {"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6]}
    options = ["--mean", "0.1", "0.2", "0.3", "--std", "0.4", "0.5", "0.6"]
    assert measured(*named, *options) == given

    def write(**settings):
        (tmp_path / "run").mkdir(exist_ok=True)
        whole = {**composed(), "dataset": settings}
        (tmp_path / "run" / "config.yaml").write_text(yaml.safe_dump(whole))
        return tmp_path / "run"

    known = DATASETS["cifar10"]
    ours = {"mean": list(known.mean), "std": list(known.std)}
    assert measured(write(name="cifar10")) == ours
    assert measured(write(name="cifar10", mean=None, std=None)) == ours
    assert measured(write(name="cifar10", **imagenet)) == imagenet
    assert measured(write(name="cifar10"), *options) == given
    digits = DATASETS["digits"]
    assert measured(write(name="digits")) == {"mean": list(digits.mean), "std": list(digits.std)}


def test_removing_insignificant_feature_maps_hurts_less_than_random_ones():
    """A quarter of every layer's components, without any fine-tuning; the mean over three networks."""

    def loss_without(choose):
        state = {k: v.clone() for k, v in model.state_dict().items()}
        for module in model.modules():
            if isinstance(module, CPACConv2d):
                module.remove_(choose(module)[:4])
        loss, _ = scores(model)
        model.load_state_dict(state)
        return loss

    generator = torch.Generator().manual_seed(0)
    least, random, most = 0.0, 0.0, 0.0
    for seed in range(3):
        torch.manual_seed(seed)
        model = CifarResNet(8, in_channels=1)
        model = convert(model, "cpac", rank=16, exclude="conv1", implementation="factorized", from_scratch=True)
        train(model, size=1437)
        random += sum(loss_without(lambda m: torch.randperm(m.rank, generator=generator)) for _ in range(8)) / 8
        least += loss_without(lambda m: m.significance().argsort())
        most += loss_without(lambda m: m.significance().argsort(descending=True))
    assert least < 0.7 * random
    assert least < 0.5 * most


def test_removal_table_is_what_each_component_is_worth():
    model = network("cpac")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    _, test = DIGITS
    table = removal_table(model, test)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    layers = {name: m for name, m in model.named_modules() if isinstance(m, CPACConv2d)}
    assert list(table.layer.unique()) == list(layers)
    row = table.iloc[-1]
    layer = layers[row.layer]
    assert row["product"] == pytest.approx(layer.significance()[row.component].item())
    loss, top1 = evaluate(model, test)
    layer.remove_(torch.tensor([row.component]))
    loss_without, top1_without = evaluate(model, test)
    assert row.loss_rise == pytest.approx(loss_without - loss)
    assert row.top1_drop == pytest.approx(top1 - top1_without)
    with pytest.raises(ValueError, match="no CPAC layer"):
        removal_table(network("decef"), test)


def test_significance_is_the_norm_of_a_component_whatever_its_factors_scale():
    torch.manual_seed(0)
    layer = CPACConv2d(4, 6, 3, groups=2, rank=3, dtype=torch.float64)
    whole = layer.compose()
    product, published = layer.significance(), layer.significance("channels")
    for component in range(6):
        state = {k: v.clone() for k, v in layer.state_dict().items()}
        layer.remove_(torch.tensor([component]))
        without = layer.compose()
        torch.testing.assert_close((whole - without).norm(), product[component])
        layer.load_state_dict(state)
        layer.remove_(torch.arange(6) == component)
        assert torch.equal(layer.compose(), without)
        layer.load_state_dict(state)
    with torch.no_grad():
        layer.channels.mul_(10)
        layer.vertical.div_(10)
    torch.testing.assert_close(layer.significance(), product)
    torch.testing.assert_close(layer.significance("channels"), 10 * published)
    with pytest.raises(ValueError, match="neither"):
        layer.significance("size")
