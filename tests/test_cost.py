"""Costs: known totals of known networks, the papers' formulas, and budgets that are kept and used up."""

import copy
import math
import random
import re

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from decef.conversion import convert
from decef.costs import cost, input_shapes, layer_macs, total_cost
from decef.layers import LAYERS, BasisConv2d, DeCEFConv2d
from decef.models import create_model
from decef.plans import plan
from decef.ranks import Budget, Candidate, Totals

FACTORIZED = [name for name in LAYERS if name != "conv2d"]
CIFAR = (3, 32, 32)

# (parameters, weights of convolutions, MACs, MACs of convolutions)
DENSE = {
    ("resnet20", "A"): (269_722, 267_696, 40_551_040, 40_550_400),
    ("resnet32", "A"): (464_154, 461_232, 68_862_592, 68_861_952),
    ("resnet44", "A"): (658_586, 654_768, 97_174_144, 97_173_504),
    ("resnet56", "A"): (853_018, 848_304, 125_485_696, 125_485_056),
    ("resnet110", "A"): (1_727_962, 1_719_216, 252_887_680, 252_887_040),
    ("resnet20", "B"): (272_474, 270_256, 40_813_184, 40_812_544),
    ("resnet32", "B"): (466_906, 463_792, 69_124_736, 69_124_096),
    ("resnet56", "B"): (855_770, 850_864, 125_747_840, 125_747_200),
}


def network(name="resnet20", shortcut="A", num_classes=10):
    return create_model(name, num_classes=num_classes, in_channels=3, shortcut=shortcut)


# Known totals -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "shortcut"), DENSE)
def test_dense_cifar_resnet(name, shortcut):
    frame = cost(network(name, shortcut), CIFAR)
    convolutions = frame[frame["type"] == "Conv2d"]
    totals = frame.attrs["params"], convolutions["params"].sum(), frame.attrs["macs"], convolutions["macs"].sum()
    assert totals == DENSE[name, shortcut]
    assert frame.attrs["flops"] == 2 * frame.attrs["macs"]
    assert frame.attrs["trainable_params"] == frame.attrs["params"]


@pytest.mark.parametrize(("name", "params", "million_macs"), [("resnet20", 35_898, 6.46), ("resnet32", 60_986, 10.29)])
def test_rank1_cifar_resnet(name, params, million_macs):
    model = network(name)
    totals = total_cost(convert(model, plan(model, "rank1", rank=1), from_scratch=True), CIFAR)
    assert totals["params"] == params
    assert round(totals["macs"] / 1e6, 2) == million_macs


@pytest.mark.parametrize(("rank", "params", "macs"), [(1, 14, 16), (3, 40, 45), (5, 66, 74), (9, 119, 133)])
def test_decef_cifar_resnet(rank, params, macs):
    """Percent of the dense ResNet-20, every convolution but the first replaced."""
    model = network()
    new = convert(model, plan(model, "decef", rank=rank, exclude="conv1"), from_scratch=True)
    dense, totals = total_cost(model, CIFAR), total_cost(new, CIFAR)
    assert round(100 * totals["params"] / dense["params"]) == params
    assert round(100 * totals["macs"] / dense["macs"]) == macs


# The papers' formulas ---------------------------------------------------------------------------------------------


def formula(name, shape, rank, groups, size_in, size_out):
    """(parameters, MACs) without bias of a kernel `(N, C / groups, kh, kw)`, C = all input channels."""
    n, per_group, kh, kw = shape
    c, (h, w), (ho, wo) = per_group * groups, size_in, size_out
    if name == "conv2d":
        return n * per_group * kh * kw, ho * wo * n * per_group * kh * kw
    if name == "decef":
        params = c * rank * kh * kw + n * per_group * rank
        return params, ho * wo * params
    if name.startswith("basisconv"):
        params = groups * rank * per_group * kh * kw + rank * n
        norm = 2 * groups * rank if name == "basisconv2021" else 0
        return params + norm, ho * wo * params
    terms = rank * (groups if name == "cpac" else n)
    mix = rank * n if name == "cpac" else 0
    params = terms * (per_group + kh + kw) + mix
    return params, h * w * terms * per_group + ho * w * terms * kh + ho * wo * terms * kw + ho * wo * mix


CONVOLUTIONS = [
    {"kernel_size": 3, "padding": 1},
    {"kernel_size": 3, "padding": 1, "stride": 2},
    {"kernel_size": (3, 5), "stride": (1, 2), "padding": (0, 2)},
    {"kernel_size": 3, "padding": 1, "groups": 4},
    {"kernel_size": 3, "dilation": 2, "stride": (2, 1), "groups": 2},
]


@pytest.mark.parametrize("args", CONVOLUTIONS, ids=str)
@pytest.mark.parametrize("name", LAYERS)
def test_formulas(name, args):
    conv = nn.Conv2d(8, 12, **args)
    layer = conv if name == "conv2d" else LAYERS[name].like(conv, 2)
    size_out = conv(torch.zeros(1, 8, 11, 14)).shape[2:]
    params, macs = formula(name, conv.weight.shape, 2, conv.groups, (11, 14), size_out)
    assert layer_macs(layer, (1, 8, 11, 14)) == macs
    assert sum(p.numel() for p in layer.parameters()) - conv.bias.numel() == params
    assert total_cost(layer, (8, 11, 14)) == {
        "params": params + 12,
        "trainable_params": params + 12 - (layer.basis.numel() if name == "basisconv" else 0),
        "macs": macs,
        "flops": 2 * macs,
    }


@pytest.mark.parametrize("name", FACTORIZED)
def test_cost_is_linear_in_the_rank(name):
    """`decef.ranks.Candidate` relies on it."""
    conv = nn.Conv2d(8, 12, (3, 5), stride=2, padding=1, groups=2, bias=False)
    costs = {}
    for rank in (1, 2, 3, 5):
        layer = LAYERS[name].like(conv, rank)
        costs[rank] = layer_macs(layer, (1, 8, 11, 14)), sum(p.numel() for p in layer.parameters())
    assert costs == {rank: (rank * costs[1][0], rank * costs[1][1]) for rank in costs}


@pytest.mark.parametrize("implementation", ["auto", "reconstructed", "factorized"])
def test_costs_are_those_of_the_chain(implementation):
    layer = DeCEFConv2d(8, 12, 3, padding=1, rank=2, implementation=implementation)
    assert layer_macs(layer, (1, 8, 4, 4)) == 16 * 8 * 2 * (9 + 12)


# The frame --------------------------------------------------------------------------------------------------------


class Crops(nn.Module):
    """Sees four views of every input in one batch."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.conv2 = nn.Conv2d(8, 16, 3, padding=1)

    def forward(self, x):
        views = torch.cat([x, x.flip(-1), x.flip(-2), x.flip(-1, -2)])
        return self.conv2(self.conv(views)).mean((2, 3)).unflatten(0, (4, -1)).mean(0)


def test_views_that_a_network_puts_into_the_batch_count():
    model = Crops()
    made = plan(model, "decef", rank=Budget(flops=0.5), input_size=(3, 8, 8))
    dense = total_cost(model, (3, 8, 8))["macs"]
    assert dense == 4 * 64 * 9 * (3 * 8 + 8 * 16) == sum(row.macs_before for row in made.rows)
    small = total_cost(convert(model, made), (3, 8, 8))["macs"]
    assert small == sum(row.macs_after for row in made.rows)
    assert 0.35 * dense < small <= 0.5 * dense


def test_an_input_size_that_is_none():
    with pytest.raises(ValueError, match=r"input_size=32 must be the shape of one input, such as \(3, 32, 32\)"):
        cost(network(), 32)


def test_rows_sum_to_the_network():
    model = network(shortcut="B").eval()
    frame = cost(model, (3, 16, 16))
    with FlopCounterMode(display=False) as counter:
        model(torch.zeros(1, 3, 16, 16))
    assert frame["flops"].sum() == frame.attrs["flops"] == counter.get_total_flops()
    assert frame["params"].sum() == frame.attrs["params"] == sum(p.numel() for p in model.parameters())
    shapes = input_shapes(model, (3, 16, 16))
    assert set(shapes) == set(frame.index[frame["type"] == "Conv2d"])
    for name, (shape,) in shapes.items():
        assert frame.loc[name, "macs"] == layer_macs(model.get_submodule(name), shape)
    assert frame.loc["linear", ["type", "params", "macs"]].tolist() == ["Linear", 650, 640]
    assert frame.loc["bn1", ["type", "params", "macs"]].tolist() == ["BatchNorm2d", 32, 0]


def test_frozen_basis_is_no_trainable_parameter():
    layer = BasisConv2d(8, 12, 3, rank=4)
    totals = total_cost(layer, (8, 6, 6))
    assert totals["params"] - totals["trainable_params"] == layer.basis.numel() == 4 * 72
    trained = total_cost(BasisConv2d(8, 12, 3, rank=4, train_basis=True), (8, 6, 6))
    assert trained["trainable_params"] == trained["params"] == totals["params"]


def test_cost_leaves_the_model_alone():
    torch.manual_seed(0)
    model = nn.Sequential(DeCEFConv2d(3, 8, 3, rank=2, implementation="reconstructed"), nn.BatchNorm2d(8)).train()
    before, random_state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    parameters = list(model.parameters())
    cost(model, (3, 8, 8))
    input_shapes(model, (3, 8, 8))
    assert model[0].implementation == "reconstructed"
    assert model[1].training
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())
    assert torch.equal(torch.get_rng_state(), random_state)
    assert all(p.device.type == "cpu" and p.grad is None for p in parameters)


def test_shared_parameters_count_once():
    model = nn.Sequential(nn.Linear(5, 5), nn.Linear(5, 5, bias=False))
    model[1].weight = model[0].weight
    frame = cost(model, (5,))
    assert frame["params"].tolist() == [30, 0]
    assert frame["macs"].tolist() == [25, 25]


def test_a_module_that_runs_twice_costs_its_macs_twice():
    conv = nn.Conv2d(4, 4, 3, padding=1, bias=False)
    assert total_cost(nn.Sequential(conv, nn.ReLU(), conv), (4, 8, 8)) == {
        "params": 144,
        "trainable_params": 144,
        "macs": 2 * 64 * 144,
        "flops": 4 * 64 * 144,
    }


def test_a_module_under_two_parents_costs_its_macs_twice():
    conv = nn.Conv2d(4, 4, 3, padding=1, bias=False)
    frame = cost(nn.Sequential(nn.Sequential(conv, nn.ReLU()), nn.Sequential(conv)), (4, 8, 8))
    assert frame.attrs["params"] == 144
    assert frame.attrs["macs"] == 2 * 64 * 144
    assert (frame["macs"] >= 0).all()


def test_input_that_does_not_fit():
    for measure in (cost, total_cost, input_shapes):
        with pytest.raises(ValueError, match=r"does not run on an input of size \(5, 8, 8\)"):
            measure(nn.Conv2d(3, 8, 3), (5, 8, 8))


@pytest.mark.parametrize("size", [(3, 100, 100), (1, 224, 224), (3, 224)])
def test_input_that_does_not_fit_a_network_of_timm(size):
    """A vision transformer asserts its image's height and width, and unpacks its shape."""
    model = create_model("timm/vit_tiny_patch16_224", num_classes=10)
    for measure in (cost, total_cost, input_shapes):
        with pytest.raises(ValueError, match=rf"the network does not run on an input of size {re.escape(str(size))}: "):
            measure(model, size)
    with pytest.raises(ValueError, match="the network does not run on an input of size"):
        plan(model, "decef", rank=1, input_size=size)
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())


def test_input_with_too_few_dimensions():
    class LastSize(nn.Module):
        def forward(self, x):
            return x.mean(dim=x.shape[3])

    with pytest.raises(ValueError, match=r"the network does not run on an input of size \(3, 8\)"):
        cost(LastSize(), (3, 8))


# Budgets ----------------------------------------------------------------------------------------------------------


def candidates_of(seed):
    """Layers of random cost, and a network with something besides them."""
    rng = random.Random(seed)
    candidates = []
    for i in range(rng.randint(1, 8)):
        params, macs = rng.randint(50, 2000), rng.randint(1000, 90_000)
        max_rank = rng.randint(1, 30)
        shares = (math.ceil(cost * rng.uniform(1, 2) / max_rank) for cost in (params, macs))
        params_per_rank, macs_per_rank = shares
        candidates.append(
            Candidate(f"c{i}", DeCEFConv2d, torch.empty(0), 1, max_rank, params, params_per_rank, macs, macs_per_rank)
        )
    kept = rng.randint(0, 500)
    return candidates, Totals(kept + sum(c.params for c in candidates), kept + sum(c.macs for c in candidates))


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("what", ["params", "flops"])
def test_budget_is_kept_and_used_up(what, seed):
    candidates, totals = candidates_of(seed)
    key = "params" if what == "params" else "macs"
    total = getattr(totals, key)
    per_rank = {c.name: getattr(c, f"{key}_per_rank") for c in candidates}
    dense = {c.name: getattr(c, key) for c in candidates}
    # what costs no less at rank 1 stays dense
    most = {c.name: min(c.max_rank, (dense[c.name] - 1) // per_rank[c.name]) for c in candidates}
    most = {name: rank for name, rank in most.items() if rank}
    kept = total - sum(dense[name] for name in most)
    smallest = (kept + sum(per_rank[name] for name in most)) / total
    for share in (0.3, 0.5, 2 / 3, 0.9, 1.0):
        budget = Budget(**{what: share}, uniform=True)
        if share < smallest:
            with pytest.raises(ValueError, match=f"budget of {share:g} .*can't be met.*{smallest:.3f}"):
                budget(candidates, totals)
            continue
        ranks = budget(candidates, totals)
        assert set(ranks) == set(most)
        used = kept + sum(ranks[name] * per_rank[name] for name in most)
        assert all(1 <= ranks[name] <= most[name] for name in most)
        assert used <= share * total + 0.5
        for name in most:
            assert ranks[name] == most[name] or used + per_rank[name] > share * total


@pytest.mark.parametrize("what", ["params", "flops"])
@pytest.mark.parametrize("layer", FACTORIZED)
def test_network_meets_its_budget(layer, what):
    """The plan's promise holds for the network that `cost` measures, and one more rank anywhere breaks it."""
    model, size = network(), (3, 16, 16)
    dense = total_cost(model, size)
    row_plan = plan(model, layer, rank=Budget(**{what: 0.5}, uniform=True), exclude="conv1", input_size=size)
    totals = total_cost(convert(model, row_plan, from_scratch=True), size)
    assert totals[what] <= 0.5 * dense[what] + 1
    after, before = ("params_after", "params_before") if what == "params" else ("macs_after", "macs_before")
    unit = 1 if what == "params" else 2
    saved = sum(getattr(row, before) - getattr(row, after) for row in row_plan.rows)
    assert dense[what] - totals[what] == unit * saved
    for row in row_plan.rows:
        if row.action == "convert":
            step = unit * getattr(row, after) // row.rank
            assert row.rank == row.max_rank or totals[what] + step > 0.5 * dense[what]


def test_budget_of_equal_layers_is_shared_evenly():
    candidates = [Candidate(f"c{i}", DeCEFConv2d, torch.empty(0), 1, 9, 900, 100, 0, 0) for i in range(3)]
    assert Budget(params=0.5, uniform=True)(candidates, Totals(2700, 0)) == {"c0": 5, "c1": 4, "c2": 4}


def test_budget_arguments():
    for wrong in ({}, {"flops": 0.5, "params": 0.5}):
        with pytest.raises(ValueError, match="give one of the two"):
            Budget(**wrong)
    for share in (0, -0.1, 1.5):
        with pytest.raises(ValueError, match=f"flops={share}"):
            Budget(flops=share)
    with pytest.raises(ValueError, match="input size"):
        plan(nn.Conv2d(3, 8, 3), "decef", rank=Budget(flops=0.5))


def test_flops_budget_of_a_network_with_an_idle_layer():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.idle = nn.Conv2d(4, 8, 3), nn.Conv2d(4, 8, 3)

        def forward(self, x):
            return self.used(x)

    ranks = plan(Net(), "decef", rank=Budget(flops=0.7), input_size=(4, 8, 8)).ranks
    assert ranks["used"] == 2


def test_a_network_that_calls_its_layers_by_name_and_one_that_takes_two_tensors():
    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)

        def forward(self, x):
            return self.norm(input=self.conv(input=x))

    assert total_cost(Named(), (3, 8, 8))["macs"] == 8 * 3 * 9 * 36
    with pytest.raises(ValueError, match=r"does not run on an input of size \(3, 8, 8\): .*missing 1 required"):
        total_cost(nn.Bilinear(3, 3, 3), (3, 8, 8))
