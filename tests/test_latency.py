"""Ranks by measured time: the rule on made-up times, and the measuring of a small network."""

import itertools
import json
from dataclasses import replace

import pytest
import torch
from support import network
from torch import nn

import decef
from decef.inference import latency
from decef.inference.latency import measure_times
from decef.plans import plan
from decef.ranks import Latency
from decef.ranks.latency import LayerTimes, Times


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """The file of the times that were measured before, of which there are none."""
    monkeypatch.setenv("DECEF_CACHE", str(tmp_path / "cache"))
    return latency.cache_file()


def test_times_between_measured_ranks_are_on_lines_and_never_fall():
    times = LayerTimes(dense=10.0, at_rank={1: 2.0, 4: 5.0, 8: 4.0})
    assert [times.seconds(rank) for rank in (1, 2, 4, 6, 8)] == pytest.approx([2, 3, 5, 5, 5])
    assert LayerTimes(10.0, {2: 3.0, 4: 5.0}).seconds(6) == pytest.approx(7)
    assert LayerTimes(10.0, {2: 3.0}).seconds(5) == 3.0
    in_blocks = LayerTimes(10.0, {4: 1.0, 16: 2.0, 48: 4.0}, block=16)
    assert [in_blocks.seconds(rank) for rank in (10, 16, 17, 32, 33, 49)] == pytest.approx([1.5, 2, 3, 3, 4, 5])


def made_up(model, overhead=4.0):
    """Times in which a rank costs a tenth of the dense layer, and something costs `overhead` that no layer does."""
    layers = {}
    for i, (name, module) in enumerate(model.named_modules()):
        if isinstance(module, nn.Conv2d):
            dense = 1.0 + i % 3
            layers[name] = LayerTimes(dense, {1: 0.2 * dense, 9: dense})
    return Times(sum(times.dense for times in layers.values()) + overhead, layers)


def seconds_of(ranks, times):
    saved = sum(layer.dense - layer.seconds(ranks[name]) for name, layer in times.layers.items() if name in ranks)
    return times.total - saved


@pytest.mark.parametrize("share", [0.5, 0.7, 0.9])
def test_a_plan_keeps_within_its_time_and_uses_it(share):
    model, times = network(), made_up(network())
    ranks = plan(model, "decef", rank=Latency(share, times)).ranks
    spent = seconds_of(ranks, times)
    assert spent <= share * times.total + 1e-6
    assert spent > share * times.total - max(layer.dense for layer in times.layers.values())
    assert repr(Latency(share, times)) == f"Latency(share={share})"  # a plan's reasons name the rule


def test_nothing_is_converted_where_all_the_time_is_there():
    model, times = network(), made_up(network())
    assert plan(model, "decef", rank=Latency(1.0, times)).ranks == {}


def test_a_bound_that_says_that_all_is_kept_is_less_than_dense():
    """CPAC's is reached at rank 48 here, which is faster than dense."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(16, 16, 3, bias=False))
    assert plan(model, "cpac", rank=Latency(1.0, Times(2.0, {"0": LayerTimes(2.0, {1: 0.4, 60: 1.9})}))).ranks == {}


def test_what_is_chosen_keeps_about_as_much_as_the_best_choice():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(4, 8, 3, bias=False), nn.Conv2d(8, 8, 3, bias=False))
    times = Times(6.0, {"0": LayerTimes(2.0, {1: 0.4, 9: 2.2}), "1": LayerTimes(4.0, {1: 0.5, 8: 4.1})})
    chosen = plan(model, "decef", rank=Latency(0.6, times)).ranks

    def kept(ranks):
        parts = []
        for name in ("0", "1"):
            spectrum = decef.DeCEFConv2d.spectrum(model[int(name)].weight.detach())
            parts.append((spectrum[: ranks[name]].sum() / spectrum.sum()).item() if name in ranks else 1.0)
        return sum(parts)

    everything = ({"0": a, "1": b} for a, b in itertools.product(range(1, 9), range(1, 9)))
    best = max(kept(ranks) for ranks in everything if seconds_of(ranks, times) <= 3.6)
    assert kept(chosen) > 0.97 * best


def test_times_of_another_layer_type_or_network_are_refused():
    model, times = network(), made_up(network())
    for kind, layer in (("decef", decef.CPACConv2d), ("cpac", decef.DeCEFConv2d)):
        with pytest.raises(ValueError, match=rf"the times are of {layer.__name__}, and the layers are \w+Conv2d"):
            plan(model, kind, rank=Latency(0.5, replace(times, layer=layer)))
    assert plan(model, "decef", rank=Latency(0.5, replace(times, layer=decef.DeCEFConv2d))).ranks
    elsewhere = replace(times, layers={f"module.{name}": layer for name, layer in times.layers.items()})
    with pytest.raises(ValueError, match="the times are of another network: none of the layers that may change"):
        plan(model, "decef", rank=Latency(0.5, elsewhere))


def test_what_cannot_be_met_says_what_can():
    model, times = network(), made_up(network(), overhead=40.0)
    with pytest.raises(
        ValueError, match=r"0\.3 of the dense network's time can't be met: at the fastest ranks it has 0\.\d\d"
    ):
        plan(model, "decef", rank=Latency(0.3, times))
    with pytest.raises(ValueError, match=r"a time budget needs times: give those of decef\.inference\.latency"):
        plan(model, "decef", rank=Latency(0.5))
    with pytest.raises(ValueError, match="share=2 is not a share"):
        Latency(2)
    with pytest.raises(ValueError, match="one layer type: measure decef, basisconv, cpac, rank1, and give"):
        measure_times(model, "auto", torch.randn(1, 3, 8, 8))


def test_layers_are_measured_once_and_remembered(monkeypatch, cache):
    model, x, measured = network().eval(), torch.randn(2, 1, 8, 8), []

    busy = [1.0]

    def pretend(steps, rounds=None, reduce=None):
        measured.append(list(steps))
        return {step: busy[0] * (2.0 + i) for i, step in enumerate(steps)}

    monkeypatch.setattr(latency, "interleaved_times", pretend)

    times = measure_times(model, "decef", x, engine="eager", exclude="conv1")
    convolutions = [name for name, m in model.named_modules() if isinstance(m, nn.Conv2d) and name != "conv1"]
    assert list(times.layers) == convolutions
    assert times.layers["layer1.0.conv1"] == times.layers["layer1.0.conv2"]  # of one shape
    assert all(min(layer.at_rank) == 1 and 4 <= max(layer.at_rank) < 9 for layer in times.layers.values())
    assert len(json.loads(cache.read_text())) == 1
    busy[0] = 3.0  # what is remembered is over the dense layers' time, which is measured again
    again = measure_times(model, "decef", x, engine="eager", exclude="conv1")
    assert again.total == 3 * times.total
    for name, layer in times.layers.items():
        assert again.layers[name].dense == 3 * layer.dense
        assert again.layers[name].at_rank == pytest.approx({rank: 3 * value for rank, value in layer.at_rank.items()})
    assert measured[-1] == measured[0]
    assert latency.WHOLE in measured[0]
    assert latency.DENSE in measured[1]


def test_layers_that_share_a_weight_have_the_time_of_both(monkeypatch):
    monkeypatch.setattr(latency, "interleaved_times", lambda steps, *how: dict.fromkeys(steps, 1.0))
    torch.manual_seed(0)  # of these kernels none is better left dense
    model = nn.Sequential(*(nn.Conv2d(8, 8, 3, padding=1, bias=False) for _ in range(3)))
    model[2].weight = model[0].weight
    times = measure_times(model, "decef", torch.randn(1, 8, 8, 8), engine="eager")
    assert {name: layer.dense for name, layer in times.layers.items()} == {"0": 2.0, "1": 1.0}
    assert times.layers["0"].at_rank == {rank: 2 * value for rank, value in times.layers["1"].at_rank.items()}
    both = Times(3.0, {name: LayerTimes(layer.dense, {1: layer.dense / 10}) for name, layer in times.layers.items()})
    assert set(plan(model, "decef", rank=Latency(0.5, both)).ranks) == {"0", "1", "2"}


class Twice(nn.Module):
    """A convolution that is called for two images of different size."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(8, 8, 3, padding=1)

    def forward(self, x):
        return self.conv(x).mean() + self.conv(x[..., ::2, ::2]).mean()


def test_a_layer_that_is_called_twice_has_the_time_of_both_calls(tmp_path, monkeypatch):
    monkeypatch.setattr(latency, "interleaved_times", lambda steps, *how: dict.fromkeys(steps, 1.0))
    times = measure_times(Twice(), "decef", torch.randn(1, 8, 8, 8), engine="eager")
    assert times.layers["conv"].dense == 2.0
    assert set(times.layers["conv"].at_rank.values()) == {2.0}


def test_processes_that_share_the_cache_keep_each_others_times(tmp_path):
    one, other = (latency._Cache(tmp_path / "times.json", "here") for _ in range(2))
    one.add({"a": 0.5})
    other.add({"b": 0.7})
    latency._Cache(tmp_path / "times.json", "elsewhere").add({"a": 0.9})
    assert latency._Cache(tmp_path / "times.json", "here") == {"a": 0.5, "b": 0.7}
    (tmp_path / "times.json").write_text("[")
    assert latency._Cache(tmp_path / "times.json", "here") == {}


def test_a_cache_that_can_t_be_written_loses_no_times(tmp_path, caplog):
    (tmp_path / "file").write_text("")
    times = latency._Cache(tmp_path / "file" / "times.json", "here")
    times.add({"a": 0.5})
    assert times == {"a": 0.5}
    assert "times are not kept for later" in caplog.text


def test_a_rank_in_mid_block_is_never_worth_less_than_the_end_of_its_block():
    """Where engines compute whole blocks, the rest of a block costs nothing, so a plan takes it."""
    model = nn.Sequential(nn.Conv2d(64, 64, 3, bias=False), nn.Conv2d(64, 64, 3, bias=False))
    layers = {name: LayerTimes(2.0, {1: 0.39, 16: 0.4, 32: 0.8}, block=16) for name in ("0", "1")}
    ranks = plan(model, "basisconv", rank=Latency(0.31, Times(4.0, layers))).ranks
    assert sorted(ranks.values()) == [16, 32]


def test_measured_ranks_are_whole_blocks(monkeypatch):
    monkeypatch.setattr(latency, "interleaved_times", lambda steps, *how: dict.fromkeys(steps, 1.0))
    model, x = nn.Sequential(nn.Conv2d(64, 64, 3)).eval(), torch.randn(1, 64, 8, 8)
    layer = measure_times(model, "basisconv", x, engine="eager").layers["0"]
    assert layer.block == 16
    assert all(rank % 16 == 0 for rank in layer.at_rank if rank > 16)
    assert max(layer.at_rank) == 48  # the last block at which it costs less than dense


def test_real_times_of_a_small_network():
    model, x = network().eval(), torch.randn(1, 1, 8, 8)
    times = measure_times(model, "cpac", x, engine="eager", include="layer1.*")
    assert times.total > 0
    assert times.layer is decef.CPACConv2d
    assert all(t > 0 for layer in times.layers.values() for t in (layer.dense, *layer.at_rank.values()))
