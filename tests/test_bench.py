import json

import pandas as pd
import pytest
import torch

from decef.bench import Shape, auto_score, bench_layers, interleaved, layer_times, write_bench

TINY = Shape("test", 8, 16, 3, 2, 8)
CPU = torch.device("cpu")


def test_times_of_a_layer(tmp_path, monkeypatch):
    monkeypatch.setattr("decef.bench.SHAPES", (TINY,))
    monkeypatch.setattr("decef.bench.ROUND_SECONDS", 0.001)
    rows = list(bench_layers(["decef", "basisconv"], [0.5], [2], CPU))
    assert [(row["layer"], row["pass"]) for row in rows] == [
        (layer, which) for layer in ("decef", "basisconv") for which in ("inference", "training")
    ]
    for row in rows:
        assert 0 < row["flops_ratio"] <= 0.5
        assert min(row["dense"], row["factorized"], row["reconstructed"]) > 0
        assert row["auto"] in ("factorized", "reconstructed")
    write_bench(rows, tmp_path / "bench", "cpu")
    assert json.loads((tmp_path / "bench.json").read_text())["rows"] == rows
    assert "8 to 16, 3x3/2, 8 px" in (tmp_path / "bench.md").read_text()


@pytest.mark.parametrize("layer", ["decef", "rank1"])
def test_a_layer_type_with_nothing_to_offer(layer):
    assert layer_times(Shape("test", 8, 16, 1, 1, 8), layer, 0.5, batch=1, backward=False, device=CPU) is None


def test_steps_run_in_turn():
    calls = []
    times = interleaved({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, rounds=3)
    assert set(times) == {"a", "b"}
    turns = "".join(calls)
    while "aa" in turns or "bb" in turns:
        turns = turns.replace("aa", "a").replace("bb", "b")
    assert turns == "abababab"  # warm-up and three rounds


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
