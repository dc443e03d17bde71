"""Released networks: written from a run, loaded by name, the same network again."""

import dataclasses
import functools
import json

import pytest
import torch
from support import DIGITS, ROOT, config

import decef
from decef.data import dataset
from decef.layers import FactorizedConv2d
from decef.models.released import RELEASED, halved, read, save
from decef.training.loop import evaluate
from decef.training.networks import card_of, load_networks
from decef.training.run import run


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    results = tmp_path_factory.mktemp("results")
    summary = run(config(results, layer={"name": "decef", "flops": 0.5}, train__epochs=4, dataset__train_size=768))
    return results / "runs" / summary["id"], summary


def test_a_run_is_released_and_loaded_by_name(call, finished, tmp_path):
    folder, summary = finished
    done = call("release.py", folder, "digits-decef", "--out", tmp_path)
    assert done.returncode == 0, done.stderr
    network = decef.load("digits-decef", folder=tmp_path)
    assert not network.training
    assert decef.cost(network, network.card.input_size).attrs["macs"] == summary["macs"]
    assert (network.card.dataset, network.card.run) == ("digits", folder.name)
    _, top1 = evaluate(network, DIGITS[1])
    assert top1 == pytest.approx(network.card.top1, abs=0.3)  # an image of 360
    assert top1 == pytest.approx(summary["test_top1"], abs=1.5)  # the run was in bf16, perhaps
    ((_, original),) = load_networks(str(folder))
    x = DIGITS[1].normalize(DIGITS[1].images[:4])
    torch.testing.assert_close(network(x), original.eval()(x), rtol=0.02, atol=0.02)  # half precision
    _, whole = evaluate(original, DIGITS[1])
    _, rounded = evaluate(halved(original), DIGITS[1])
    stored = torch.half if rounded >= whole - 0.05 else torch.float32  # half where that costs nothing
    assert {value.dtype for value in read("digits-decef", folder=tmp_path)[1].values()} == {stored, torch.int64}
    assert (tmp_path / "digits-decef.safetensors").stat().st_size < 1e6


def test_networks_that_are_not_there_or_damaged(call, finished, tmp_path):
    (tmp_path / "broken.safetensors").write_bytes(b"nothing")
    with pytest.raises(FileNotFoundError, match=r"there is no released network .*; the nearest in .*: broken$"):
        decef.load("resnet20", folder=tmp_path)
    with pytest.raises(FileNotFoundError, match=r"networks have names in a clone of the repository only$"):
        decef.load("resnet20", folder=tmp_path / "nowhere")
    with pytest.raises(ValueError, match="damaged or no released network"):
        decef.load("broken", folder=tmp_path)
    (tmp_path / "weights.pt").write_bytes(b"nothing")
    with pytest.raises(ValueError, match=r"weights\.pt is no \.safetensors file of decef\.compress"):
        decef.load(tmp_path / "weights.pt")
    folder, summary = finished
    copied = tmp_path / "run"
    copied.mkdir()
    for name in ("config.yaml", "checkpoint.pt"):
        (copied / name).write_bytes((folder / name).read_bytes())
    (copied / "summary.json").write_text(json.dumps({**summary, "status": "interrupted"}))
    refused = call("release.py", copied, "x", "--out", tmp_path)
    assert (refused.returncode, "is interrupted, not finished" in refused.stderr) == (2, True)
    (copied / "summary.json").write_text(json.dumps({**summary, "test_top1": 1.0}))
    refused = call("release.py", copied, "x", "--out", tmp_path)
    assert (refused.returncode, "it is not of this run's end" in refused.stderr) == (2, True)


def test_a_file_calls_no_function(finished, tmp_path):
    """Whoever writes a card chooses the name in it."""
    card, _ = card_of(finished[0], "digits-decef")
    ((_, network),) = load_networks(str(finished[0]))
    save(network, dataclasses.replace(card, model="os:_exit", options={"status": 7}), tmp_path, half=False)
    with pytest.raises(ValueError, match="made from a network of your own: give that as model="):
        decef.load("digits-decef", folder=tmp_path)


def test_the_released_networks_are_what_their_records_say(monkeypatch):
    """Every one loads, is small and costs what its run's record says; with the data there, its accuracy on a slice."""
    # Loading overwrites what is drawn, which takes most of the time.
    monkeypatch.setattr(FactorizedConv2d, "reset_parameters", lambda self, std=None: None)
    paths = sorted(RELEASED.glob("*.safetensors"))
    assert paths
    for path in paths:
        network = decef.load(path)
        card = network.card
        results = ROOT / "results"
        kept = [folder / "runs" / card.run / "summary.json" for folder in (results, results / "set_aside")]
        summary = json.loads(next(path for path in kept if path.is_file()).read_text())
        assert (card.name, path.stat().st_size < 2e6) == (path.stem, True)
        assert decef.cost(network, card.input_size).attrs["macs"] == summary["macs"]
        assert card.top1 == pytest.approx(summary["test_top1"], abs=0.15)
        test = first_images(card.dataset, card.mean, card.std)
        if test is not None:
            _, top1 = evaluate(network, test)
            assert top1 == pytest.approx(card.top1, abs=18)  # of 32 images; other weights have 10 %


@functools.cache
def first_images(name, mean, std, count=32):
    """The first test images of a dataset, or None where it isn't."""
    try:
        _, test = dataset(name, mean=mean, std=std).load()
    except FileNotFoundError:
        return None
    return test.subset(slice(0, count))
