"""Accuracy against measured time: a row for every network and precision, and what is measured is the network."""

import pytest
import torch
from support import DIGITS, train

from decef.conversion import convert
from decef.inference.deploy import Deployer
from decef.machine import environment
from decef.results.frontier import DECOMPOSED, FINETUNED, Point, decomposed, measure, top1, write_frontier
from decef.training.loop import evaluate


def test_every_network_in_every_precision(trained, monkeypatch, tmp_path):
    monkeypatch.setattr("decef.results.frontier.ROUNDS", 1)
    monkeypatch.setattr("decef.results.frontier.need_engines", lambda device, precision: ["eager"])
    images, test = DIGITS
    points = decomposed(
        trained, ["decef", "basisconv"], [0.6], exclude="conv1", seen=images.subset(slice(0, 200)), augmented=images
    )
    points = [*points, Point("conv2d", "dense", FINETUNED, trained)]
    rows = list(measure(trained, points, test, images, batch=50, precisions=["fp32", "bf16"]))
    assert [(row["layer"], row["stage"], row["precision"]) for row in rows] == [
        (layer, stage, precision)
        for layer, stage in (("conv2d", ""), ("decef", DECOMPOSED), ("basisconv", DECOMPOSED), ("conv2d", FINETUNED))
        for precision in ("fp32", "bf16")
    ]
    _, expected = evaluate(trained, test)
    assert rows[0]["top1"] == pytest.approx(expected, abs=0.3)
    assert all(abs(a["top1"] - b["top1"]) < 3 for a, b in zip(rows[::2], rows[1::2], strict=True))
    assert rows[2]["top1"] == pytest.approx(evaluate(points[0].network, test)[1], abs=0.3)
    assert rows[2]["top1"] > 50
    assert rows[1]["bytes"] < 0.6 * rows[0]["bytes"]
    assert min(row["time"] for row in rows) > 0
    write_frontier(rows, tmp_path / "made" / "net", "a test", environment("cpu"))
    assert "| 0.6 of FLOPs | decomposed |" in (tmp_path / "made" / "net.md").read_text()


def test_networks_of_equal_shapes_run_as_the_first(trained, monkeypatch):
    monkeypatch.setattr("decef.results.frontier.ROUNDS", 1)
    monkeypatch.setattr("decef.results.frontier.need_engines", lambda device, precision: ["eager"])
    measured = []
    deploy = Deployer.deploy
    monkeypatch.setattr(Deployer, "deploy", lambda self, *given: measured.append(self) or deploy(self, *given))
    images, test = DIGITS
    before, after, other = (convert(trained, "decef", rank=rank, exclude="conv1").eval() for rank in (2, 2, 3))
    train(after, size=200)
    points = [Point("decef", "rank", stage, made) for stage, made in zip("abc", (before, after, other), strict=True)]
    rows = list(measure(trained, points, test, images, batch=50, precisions=["fp32"]))
    assert len(measured) == 3  # dense, before, other
    assert rows[1]["forms"] == rows[2]["forms"]
    assert [row["top1"] for row in rows[1:]] == [evaluate(point.network, test)[1] for point in points]


def test_accuracy_of_what_takes_batches_of_one_size():
    _, test = DIGITS
    right = test.labels.clone()
    right[-7:] += 1  # in the last, smaller batch
    seen = []

    def network(x):
        seen.append(len(x))
        labels = (right[sum(seen[:-1]) :] % 10)[: len(x)]
        logits = torch.zeros(len(x), 10)
        logits[range(len(labels)), labels] = 1
        return logits

    assert top1(network, test, 50) == pytest.approx(100 * (1 - 7 / 360))
    assert set(seen) == {50}
