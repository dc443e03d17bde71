import json

import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from decef.inference.engines import Loadable
from decef.inference.profiling import time_by_operator
from decef.inference.timing import Roofline, interleaved_times, peak_memory, times_beside
from decef.plans import plan
from decef.ranks import Budget
from decef.results.bench_inference import Case, at_dense_speed, bench_inference, plans, write_inference
from decef.results.bench_layers import Shape, auto_score, bench_layers, layer_times, write_layers
from decef.results.bench_operators import bench_operators, write_operators
from decef.results.bench_training import bench_loops, bench_steps, write_training
from decef.results.pages import collect, write_bench

TINY = Shape("test", 8, 16, 3, 2, 8)
CPU = torch.device("cpu")
ROOFLINE = Roofline(flops=1e9, bandwidth=1e9)
MADE = {
    "git_commit": "0" * 40,
    "git_dirty": False,
    "started": "now",
    "dtype": "float32",
    "device": "cpu",
    "machine": "a test",
    "share": 0.5,
}


def test_times_of_a_layer(tmp_path, monkeypatch):
    monkeypatch.setattr("decef.results.bench_layers.SHAPES", (TINY,))
    rows = list(bench_layers(["decef", "basisconv2021"], 0.5, [2], CPU))
    assert [(row["layer"], row["pass"]) for row in rows] == [
        (layer, which) for layer in ("decef", "basisconv2021") for which in ("inference", "training")
    ]
    for row in rows:
        assert 0 < row["flops_ratio"] <= 0.5
        assert min(row["dense"], row["factorized"]) > 0
        if (row["layer"], row["pass"]) == ("basisconv2021", "training"):  # no kernel that could be composed
            assert (row["reconstructed"], row["auto"]) == (None, "factorized")
        else:
            assert row["reconstructed"] > 0
        assert row["auto"] in ("factorized", "reconstructed")
        assert row["bound"] > 0
        assert row["memory"] > 0
    write_layers(rows, tmp_path / "bench", MADE)
    assert json.loads((tmp_path / "bench.json").read_text())["rows"] == rows
    assert "8 to 16, 3x3/2, 8 px" in (tmp_path / "bench.md").read_text()


@pytest.mark.parametrize("layer", ["decef", "rank1"])
def test_a_layer_type_with_nothing_to_offer(layer):
    shape = Shape("test", 8, 16, 1, 1, 8)
    assert layer_times(shape, layer, 0.5, batch=1, backward=False, roofline=ROOFLINE, device=CPU) is None


def test_steps_run_in_turn():
    calls = []
    times = interleaved_times({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, rounds=3)
    assert set(times) == {"a", "b"}
    turns = "".join(calls)
    while "aa" in turns or "bb" in turns:
        turns = turns.replace("aa", "a").replace("bb", "b")
    assert turns == "abababab"  # to see how long it takes, and three rounds


def test_a_ratio_is_that_of_a_round(monkeypatch):
    """Rounds that are slowed down slow both steps; the fastest of each need not be of one round."""
    rounds = {"one": [4.0, 1.0, 2.0], "other": [8.0, 3.0, 2.0]}
    monkeypatch.setattr("decef.inference.timing._rounds", lambda steps, number: rounds)
    assert times_beside(print, print, 3) == (2.0, 2.0)


def test_score_of_auto():
    frame = pd.DataFrame(
        {
            "factorized": [1.0, 2.0, 1.0, 1.0],
            "reconstructed": [2.0, 1.0, 1.02, 4.0],
            "auto": ["factorized", "reconstructed", "reconstructed", "reconstructed"],
        }
    )
    score = auto_score(frame)
    assert score.right.to_dict() == {"auto": 0.75, "factorized": 0.75, "reconstructed": 0.5}
    assert score.loc["factorized", "time"] == pytest.approx(2 ** (1 / 4))
    chain_alone = pd.DataFrame({"factorized": [1.0], "reconstructed": [None], "auto": ["factorized"]})
    score = auto_score(pd.concat([frame.astype({"reconstructed": object}), chain_alone]))
    assert score.right.to_dict() == {"auto": 0.8, "factorized": 0.8, "reconstructed": 0.5}


def test_roofline_takes_the_longer_of_arithmetic_and_traffic():
    x, weight = torch.randn(2, 4, 8, 8), torch.randn(8, 4, 3, 3)
    flops = 2 * 2 * 8 * 4 * 9 * 6 * 6
    moved = 4 * (2 * 4 * 8 * 8 + 8 * 4 * 9 + 2 * 8 * 6 * 6)

    def step():
        return torch.conv2d(x, weight).relu()

    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            assert Roofline(flops=1.0, bandwidth=1e9).seconds(step) == pytest.approx(flops)
            assert Roofline(flops=1e12, bandwidth=1.0).seconds(step) == pytest.approx(moved)
    measured = Roofline.measure(CPU)
    assert measured.flops > 1e8
    assert measured.bandwidth > 1e8


def test_peak_memory_is_what_is_alive_at_once():
    x = torch.zeros(2**20)

    def three_in_turn():
        y = x + 1
        z = y + 1
        del y
        return z + 1

    assert peak_memory(three_in_turn, CPU) == pytest.approx(2 * 4 * 2**20, rel=0.01)


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("convolution", [F.conv2d, F.conv_transpose2d])
def test_roofline_of_a_training_step_counts_all_passes(convolution, groups):
    x = torch.randn(2, 4, 8, 8, requires_grad=True)
    weight = torch.randn(4, 4 // groups, 3, 3, requires_grad=True)
    roofline = Roofline(flops=1.0, bandwidth=1e9)
    forward = roofline.seconds(lambda: convolution(x, weight, groups=groups))
    assert forward == 2 * weight.numel() * 2 * (36 if convolution is F.conv2d else 64)
    for wanted, passes in ((True, 3), (False, 2)):
        x.requires_grad_(wanted)
        both = roofline.seconds(lambda: convolution(x, weight, groups=groups).sum().backward())
        assert both == pytest.approx(passes * forward)


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_time_by_operator(precision):
    """Each convolution is found again in what the engine makes of it: fused, with padded channels, in 8 bits."""
    pytest.importorskip("onnxruntime")
    model = nn.Sequential(
        nn.Conv2d(3, 24, 3), nn.ReLU(), nn.Conv2d(24, 40, 1), nn.Conv2d(40, 40, 3, groups=40), nn.Sigmoid()
    )
    times = time_by_operator(Loadable(model, torch.randn(1, 3, 32, 32)), precision)
    assert {key for key in times if isinstance(key, tuple)} == {(24, 3, 3, 3), (40, 24, 1, 1), (40, 1, 3, 3)}
    assert ("QuantizeLinear" in times) == (precision == "int8")
    assert all(0 <= seconds < 1 for seconds in times.values())


def test_where_the_time_goes(tmp_path):
    pytest.importorskip("onnxruntime")
    case = Case("plain", 32, 8, ("conv2d", "decef", "basisconv"), precisions=("int8",))
    rows = list(bench_operators([case], 0.5))
    made = [(row["precision"], row["layer"], row["form"]) for row in rows]
    forms = [("conv2d", "reconstructed"), ("decef", "factorized"), ("decef", "branches"), ("decef", "wide")]
    forms += [("basisconv", "factorized"), ("basisconv", "aligned")]
    assert made == [("int8", *one) for one in forms]
    dense, chain, branches, wide, basis, aligned = rows
    assert set(dense["macs"]) == {"kxk"}
    assert set(chain["macs"]) == {"kxk", "1x1", "depthwise"}  # the first convolution stays dense
    assert set(basis["macs"]) == {"kxk", "1x1"}
    assert aligned["macs"]["kxk"] > basis["macs"]["kxk"]  # zeros count
    assert chain["macs"] == branches["macs"] == wide["macs"]
    assert sum(chain["macs"].values()) < sum(dense["macs"].values())
    assert "copies and sums" not in chain["seconds"]
    assert wide["seconds"]["copies and sums"] > 0
    assert all(row["seconds"]["conversions"] > 0 for row in rows)
    write_operators(rows, tmp_path / "bench", MADE)
    page = (tmp_path / "bench.md").read_text()
    assert "| int8        | decef     | wide" in page
    assert json.loads((tmp_path / "bench.json").read_text())["rows"] == rows


def test_bound_at_the_speed_of_the_dense_layers():
    model = nn.Sequential(nn.Conv2d(4, 8, 3), nn.Conv2d(8, 8, 3), nn.Conv2d(8, 16, 3))
    made = plan(model, "decef", rank=Budget(flops=0.7, uniform=True), exclude="0", input_size=(4, 8, 8))
    (one, other) = ((row.macs_after / row.macs_before) for row in made.rows[1:])
    times = {(8, 4, 3, 3): 0.3, (8, 8, 3, 3): 0.4, (16, 8, 3, 3): 0.2, "Add": 0.1}
    bound = at_dense_speed(made, model, times)
    assert bound == pytest.approx(0.4 + 0.4 * one + 0.2 * other)


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr("decef.results.bench_inference.NETWORK_ROUNDS", 1)


def test_whole_networks(tmp_path, quick):
    case = Case("plain", 8, 2, ("conv2d", "basisconv2021"), ("eager",), ("fp32", "bf16"))
    rows = list(bench_inference([case], 0.5, CPU))
    dense, basis, half, _ = rows
    assert (dense["layer"], dense["flops_ratio"], dense["bound"], dense["forms"]) == ("conv2d", 1, 1, {})
    assert [row["precision"] for row in rows] == ["fp32", "fp32", "bf16", "bf16"]
    assert half["bytes"] == pytest.approx(dense["bytes"] / 2, rel=0.01)
    assert dense["error"] < 1e-5 < half["error"] < 0.1
    assert 0 < basis["flops_ratio"] <= 0.5
    assert sum(basis["forms"].values()) > 0
    assert basis["engine"] == "eager"
    write_inference(rows, tmp_path / "networks", MADE)
    assert json.loads((tmp_path / "networks.json").read_text())["rows"] == rows
    assert "| plain" in (tmp_path / "networks.md").read_text()

    rows = list(bench_steps([case], 0.5, CPU))
    assert [row["layer"] for row in rows] == ["conv2d", "basisconv2021"]
    assert all(row["seconds"] > 0 and row["memory"] > 0 for row in rows)
    dense, basis = (row["bound"] for row in rows)
    assert 0 < basis < dense  # a frozen basis has no gradient
    loops = bench_loops(CPU, batch=4, steps=1, rounds=1)
    assert set(loops) == {"usual", "decef", "0.75", "0.5"}
    assert all(rate > 0 for rate in loops.values())
    write_training(rows, loops, tmp_path / "training", MADE)
    assert "the usual script" in (tmp_path / "training.md").read_text()


def test_types_that_cannot_be_so_small_are_left_out(caplog):
    case = Case("resnet20", 32, 1)
    assert set(plans(case, case.dense(), 0.15)) == {"basisconv", "cpac"}
    assert "left out: decef in resnet20: " in caplog.text


def test_what_was_measured_is_kept_until_the_page_is_written(tmp_path):
    out, shown = tmp_path / "made" / "speed-0.5-cpu", []

    def measured():
        yield {"seconds": 1.0}
        yield {"seconds": 2.0}
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        collect(measured(), out, shown.append)
    assert shown == [{"seconds": 1.0}, {"seconds": 2.0}]
    partial = out.with_name("speed-0.5-cpu.partial.jsonl")
    assert [json.loads(line) for line in partial.read_text().splitlines()] == shown
    with pytest.raises(KeyboardInterrupt):
        collect(measured(), out, lambda row: None)
    assert [json.loads(line) for line in partial.read_text().splitlines()] == 2 * shown
    rows = collect(shown, out, lambda row: None)
    write_bench("bench_operators", rows, out, MADE, table="a table")
    assert [path.name for path in sorted(out.parent.iterdir())] == ["speed-0.5-cpu.json", "speed-0.5-cpu.md"]
    assert "0.5 of the FLOPs" in out.with_name("speed-0.5-cpu.md").read_text()
    with pytest.raises(ValueError, match="nothing of what was asked for can be measured"):
        collect([], out, shown.append)


def test_what_the_command_refuses(call, tmp_path):
    for arguments, message in (
        (["speed"], "there is no benchmark speed; there are layers, networks, operators, training"),
        (["layers", "--share", "2"], "--share 2 must be above 0"),
        (["layers", "--device", "cuda:99"], "torch sees no GPU"),
        (["networks", "--batches", "4"], "--batches is for the benchmark layers"),
        (["networks", "--dtype", "bfloat16"], "--dtype bfloat16 is for the benchmark layers alone"),
    ):
        done = call("bench.py", *arguments, "--out", tmp_path)
        assert done.returncode == 2
        assert message in done.stderr
        assert "Traceback" not in done.stderr
