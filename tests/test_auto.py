"""Layer "auto": a type for every convolution, under one budget."""

import pytest
import torch
from support import DIGITS, config, network
from torch import nn

import decef
from decef.layers import LAYERS, FactorizedConv2d
from decef.moments import input_moments
from decef.plans import AUTO_TYPES, Plan, plan
from decef.ranks import Budget, Candidate, Latency
from decef.ranks.latency import LayerTimes, Times
from decef.ranks.steps import ENERGY_POINTS, Step, frontier, measured_energy, spaced, spread
from decef.results.tables import summarize
from decef.training.config import InputError
from decef.training.loop import evaluate
from decef.training.networks import load_networks
from decef.training.record import load_records
from decef.training.run import run

SIZE = (1, 8, 8)


@pytest.fixture(scope="module", autouse=True)
def _measured_once():
    """The same kernels are decomposed at the same ranks for many plans here."""
    known = {}

    def remembered(c, most):
        data = c.moments is not None
        key = (c.layer, c.name, c.weight.data_ptr(), data, most)
        if key not in known:
            known[key] = c.weight, measured_energy(c, most)  # kept, or another's could have its address
        return known[key][1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("decef.plans.measured_energy", remembered)
        yield


@pytest.fixture(scope="module")
def images():
    return [DIGITS[0].normalize(DIGITS[0].images[:256])]


def kept(model, made):
    """Energy that a plan keeps, over all convolutions that could be converted; a layer that stays dense keeps 1."""
    if all(row.error is None for row in made.rows):
        decef.convert(model, made)
    errors = {row.name: row.error for row in made.rows if row.action == "convert"}
    return sum(1 - errors.get(row.name, 0.0) ** 2 for row in made.rows)


WITHOUT_LARGE = {"exclude": ["conv1", "layer3.*"], "input_size": SIZE}  # whose solves take nearly all of the time


@pytest.mark.parametrize("share", [0.55, 0.7])
def test_it_keeps_at_least_what_the_best_single_type_keeps(trained, share):
    options = {"rank": Budget(flops=share), **WITHOUT_LARGE}
    made = plan(trained, "auto", **options)
    small = decef.convert(trained, made)
    assert decef.cost(small, SIZE).attrs["macs"] <= share * decef.cost(trained, SIZE).attrs["macs"] + 1
    types = {row.layer for row in made.rows if row.action == "convert"}
    assert types <= set(AUTO_TYPES)
    assert {type(small.get_submodule(row.name)) for row in made.rows if row.layer} == {LAYERS[name] for name in types}
    best = max(kept(trained, plan(trained, layer, **options)) for layer in AUTO_TYPES)
    assert kept(trained, made) > best - 0.02  # energies between measured ranks are interpolated


def test_each_kernel_gets_the_type_that_it_is_of():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(8, 16, 3, bias=False), nn.Conv2d(16, 16, 3, bias=False))
    with torch.no_grad():
        model[0].weight.copy_(LAYERS["decef"](8, 16, 3, rank=2).compose())
        model[1].weight.copy_(LAYERS["cpac"](16, 16, 3, rank=1).compose())
    made = plan(model, "auto", rank=Budget(params=0.2))
    assert [(row.layer, row.rank) for row in made.rows] == [("decef", 2), ("cpac", 1)]


def test_energies_are_measured_at_a_few_ranks_and_geometric_between(monkeypatch):
    torch.manual_seed(0)
    conv, x = nn.Conv2d(8, 16, 3, bias=False), torch.randn(8, 8, 9, 9).cumsum(2).cumsum(3)
    found = []
    for moments in (None, input_moments(conv, [""], [x])[""]):
        energy = measured_energy(Candidate("c", LAYERS["decef"], conv.weight.detach(), 1, 9, 0, 0, 0, 0, moments), 8)
        assert list(energy) == list(range(1, 9))
        assert list(energy.values()) == sorted(energy.values())
        for rank in spaced(8, ENERGY_POINTS):
            error = LAYERS["decef"].like(conv, rank).decompose_(conv.weight, moments=moments)
            assert energy[rank] == pytest.approx(1 - error**2)
        assert 1 - energy[5] == pytest.approx(((1 - energy[4]) * (1 - energy[6])) ** 0.5)
        found.append(energy)
    assert found[0] != found[1]
    seen = []
    monkeypatch.setattr(
        "decef.plans.measured_energy", lambda c, most: seen.append(c.moments) or measured_energy(c, most)
    )
    plan(nn.Sequential(conv), "auto", rank=Budget(params=0.5), data=[x])
    assert len(seen) == len(AUTO_TYPES)
    assert all(moments is not None for moments in seen)


def test_on_data_it_loses_little(trained, images):
    options = {"rank": Budget(flops=0.65), **WITHOUT_LARGE, "data": images}
    _, dense = evaluate(trained, DIGITS[1])
    _, auto = evaluate(decef.convert(trained, "auto", **options), DIGITS[1])
    others = [evaluate(decef.convert(trained, layer, **options), DIGITS[1])[1] for layer in ("decef", "basisconv")]
    assert auto > max(others) - 3
    assert auto > dense - 15


def test_a_plan_of_several_types_is_saved_loaded_and_replayed(trained, tmp_path):
    made = plan(trained, "auto", rank=Budget(flops=0.7), **WITHOUT_LARGE)
    made.save(tmp_path / "plan.yaml")
    again = Plan.load(tmp_path / "plan.yaml")
    assert again.to_dict() == made.to_dict()
    assert "layer" in made.to_frame()
    assert "layer" not in plan(trained, "decef", rank=2, exclude="conv1").to_frame()
    small, same = decef.convert(trained, made), decef.convert(network(), again, from_scratch=True)
    same.load_state_dict(small.state_dict())
    x = torch.randn(2, *SIZE)
    torch.testing.assert_close(same.eval()(x), small.eval()(x), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(decef.fold(small).eval()(x), small.eval()(x), rtol=1e-3, atol=1e-4)


def test_by_time_every_layer_has_the_type_that_is_fast_there(trained):
    names = [name for name, m in trained.named_modules() if isinstance(m, nn.Conv2d)]
    fast, slow = LayerTimes(1.0, {1: 0.01, 60: 0.5}), LayerTimes(1.0, {1: 0.9, 60: 50.0})
    first, second = names[1:3], names[3:5]
    times = {
        layer: Times(
            float(len(names)), {name: fast if (name in first) == (layer == "decef") else slow for name in names}
        )
        for layer in AUTO_TYPES
    }
    made = plan(trained, "auto", rank=Latency(0.6, times), **WITHOUT_LARGE)
    chosen = {row.name: row.layer for row in made.rows if row.action == "convert"}
    assert {chosen[name] for name in first if name in chosen} == {"decef"}
    assert "decef" not in {chosen[name] for name in second if name in chosen}
    with pytest.raises(ValueError, match="needs times by layer type, here for rank1"):
        plan(trained, "auto", rank=Latency(0.5, {k: v for k, v in times.items() if k != "rank1"}), input_size=SIZE)
    with pytest.raises(ValueError, match="needs times by layer type, here for decef"):  # those of one type
        plan(trained, "auto", rank=Latency(0.5, times["decef"]), input_size=SIZE)
    with pytest.raises(ValueError, match="times by layer type are for layer 'auto'"):
        plan(trained, "decef", rank=Latency(0.5, times), input_size=SIZE)
    some = {layer: Times(one.total, {name: one.layers[name] for name in first}) for layer, one in times.items()}
    made = plan(trained, "auto", rank=Latency(0.99, some), **WITHOUT_LARGE)
    assert {row.reason for row in made.rows if row.name in second} == {"left dense by Latency(share=0.99)"}


def test_a_budget_of_parameters_is_spread_the_same_whether_or_not_macs_are_known():
    """With stride 2 a 1x1 convolution before the stride costs MACs that it doesn't cost in parameters."""
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Conv2d(a, b, 3, 2, 1, bias=False) for a, b in ((16, 32), (32, 32), (32, 32))))
    plans = [plan(model, "auto", rank=Budget(params=0.5), input_size=size).rows for size in (None, (16, 32, 32))]
    chosen = [[(row.name, row.layer, row.rank) for row in rows] for rows in plans]
    assert chosen[0] == chosen[1]
    share = sum(row.params_after for row in plans[0]) / sum(row.params_before for row in plans[0])
    assert 0.48 < share <= 0.5


def test_what_the_budget_leaves_dense_is_not_said_to_be_impossible():
    model = nn.Sequential(nn.Conv2d(32, 32, 1), nn.Conv2d(32, 32, 3, padding=1), nn.Conv2d(32, 2, 3, groups=2))
    made = plan(model, "auto", rank=Budget(params=0.999), exclude="2")
    assert [row.reason for row in made.rows] == [f"left dense by {Budget(params=0.999)!r}", "", "excluded by '2'"]


def test_what_a_rule_lacks_is_said_before_the_data_are_looked_at(trained):
    data = (pytest.fail("looked at the data") for _ in range(1))
    for layer in ("auto", "cpac"):
        with pytest.raises(ValueError, match="needs the input size"):
            plan(trained, layer, rank=Budget(flops=0.5), data=data)
        with pytest.raises(ValueError, match="a time budget needs times"):
            plan(trained, layer, rank=Latency(0.5), data=data)


def test_a_dense_layer_that_was_faster_when_another_type_was_measured_saves_no_time(trained):
    names = [name for name, m in trained.named_modules() if isinstance(m, nn.Conv2d)]
    dense = {layer: 0.9 if layer == "rank1" else 1.0 for layer in AUTO_TYPES}
    times = {
        layer: Times(float(len(names)), dict.fromkeys(names, LayerTimes(time, {1: 2.0, 60: 3.0})))
        for layer, time in dense.items()
    }
    with pytest.raises(ValueError, match="can't be met"):
        plan(trained, "auto", rank=Latency(0.95, times), **WITHOUT_LARGE)


@pytest.mark.parametrize(
    ("rank", "message"),
    [
        (3, "rank must be a Budget or a Latency, not 3"),
        (Budget(flops=0.5, uniform=True), "rank must be a Budget or a Latency, not Budget"),
        (Budget(flops=0.01), r"0\.01 of the dense network's FLOPs can't be met: at the smallest ranks it has 0\.\d+"),
    ],
)
def test_what_it_refuses_before_kernels_are_decomposed(trained, monkeypatch, rank, message):
    monkeypatch.setattr("decef.plans.measured_energy", None)
    with pytest.raises(ValueError, match=message):
        plan(trained, "auto", rank=rank, **WITHOUT_LARGE)


def test_shared_weights_become_shared_factors():
    model = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1))
    model[1].weight = model[0].weight
    made = plan(model, "auto", rank=Budget(flops=0.5), input_size=(4, 6, 6))
    assert made.rows[0].layer == made.rows[1].layer
    small = decef.convert(model, made)
    assert decef.cost(small, (4, 6, 6)).attrs["macs"] <= 0.5 * decef.cost(model, (4, 6, 6)).attrs["macs"] + 1


def test_the_frontier_and_the_choice_on_it():
    steps = [Step(4, 1.0), Step(1, 0.5, 1), Step(2, 0.6, 2), Step(3, 0.95, 3), Step(5, 0.9, 4)]
    assert [step.cost for step in frontier(steps)] == [1, 3, 4]
    assert spread({"a": steps}, whole=5.0, limit=1.5) == 2.0
    assert spread({"a": steps, "b": [Step(1, 1.0)], "c": []}, whole=5.0, limit=4.0)["a"].rank == 3


def test_ranks_at_even_ratios():
    assert spaced(1) == [1]
    assert spaced(9) == [1, 2, 3, 5, 9]
    assert spaced(569)[-1] == 569


def test_a_run_that_starts_from_trained_weights(tmp_path):
    small = {"name": "plain", "width": 0.1, "dense_stem": True}
    first = run(config(tmp_path, model=small, layer={"name": "conv2d"}, train__epochs=1, train__lr=0.01))
    weights = str(tmp_path / "runs" / first["id"] / "checkpoint.pt")
    given = {"train__epochs": 1, "train__lr": 0.01, "model": {**small, "weights": weights, "decompose_on": 64}}
    options = {"flops": 0.5, "implementation": "reconstructed"}
    summary = run(config(tmp_path, layer={"name": "auto", **options}, **given))
    assert summary["flops"] <= 0.5 * summary["dense"]["flops"]
    assert summary["ranks"]
    (name, network), *_ = load_networks(str(tmp_path / "runs" / summary["id"]))
    kinds = {type(m) for m in network.modules() if isinstance(m, FactorizedConv2d)}
    assert kinds <= {LAYERS[name] for name in AUTO_TYPES}, name
    (row,) = [row for row in summarize(load_records(tmp_path)).to_dict("records") if row["layer"] == "auto"]
    assert row["setting"].startswith("0.5 of FLOPs")


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        ({"rank": 2}, "layer=auto takes a budget, layer.flops, not layer.rank=2"),
        ({"energy": 0.5}, "layer=auto takes a budget, layer.flops, not layer.energy=0.5"),
        ({"orthogonality": 0.1}, "layer=auto takes a budget, layer.flops, not orthogonality"),
        ({"train_basis": True}, "layer.train_basis is not for layer=auto"),
        ({"flops": 0.5}, "layer=auto compares trained kernels: say model.weights=FILE"),
    ],
)
def test_what_a_run_refuses(tmp_path, layer, message):
    with pytest.raises(InputError, match=message):
        config(tmp_path, layer={"name": "auto", **layer}).resolved()
