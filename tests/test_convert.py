"""Plan a conversion, carry it out, fold it back."""

import copy
import dataclasses
import functools
import math
from collections import deque
from typing import NamedTuple

import numpy as np
import pytest
import torch
from test_layers import used
from torch import nn
from torch.nn.utils import prune
from torch.optim.swa_utils import update_bn
from torch.testing import assert_close

import decef
from decef.conversion import convert, fold, norms_inside_measured, recalibrate
from decef.costs import cost
from decef.inference.forms import to_convolutions
from decef.layers import LAYERS, Basis2021Conv2d, BasisConv2d, DeCEFConv2d, FactorizedConv2d
from decef.models import MODELS, CifarResNet, create_model
from decef.moments import _collect as collect
from decef.moments import input_moments
from decef.plans import Plan, plan, planner
from decef.ranks import Budget, EffectiveRank, Energy, Fixed, Latency, PerLayer, Share
from decef.results.effective_ranks import rank_table

FACTORIZED = [name for name in LAYERS if name != "conv2d"]
#: Every network but the deeper CIFAR ResNets, in every form that changes its convolutions.
STARTS = [
    ("resnet20", {}),
    ("vgg16_bn", {"width": 0.25}),
    *(
        (name, {"width": 0.25, "dense_pairs": pairs})
        for name in ("mobilenetv1", "mobilenetv2")
        for pairs in (False, True)
    ),
    *(("plain", {"width": 0.1, "relu": relu}) for relu in (False, True)),
    *(("cpacnet", {"two": two}) for two in (False, True)),
    ("rank1net", {"image_size": 8}),
]


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def network(depth=8, shortcut="A"):
    """A float64 ResNet in eval mode whose batch norms do something."""
    model = CifarResNet(depth, shortcut=shortcut).double()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias)
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
    return model.eval()


def with_biases(model, names):
    """`model` with a zero bias in the named convolutions, for repr: batch norm inside a layer is folded into one."""
    model = copy.deepcopy(model)
    for name in names:
        conv = model.get_submodule(name)
        conv.bias = nn.Parameter(conv.weight.new_zeros(conv.out_channels)) if conv.bias is None else conv.bias
    return model


def images():
    return torch.randn(2, 3, 8, 8, dtype=torch.float64)


def of_type(model, cls):
    return {name for name, module in model.named_modules() if isinstance(module, cls)}


def actions(made):
    return {row.name: row.action for row in made.rows}


def reasons(made):
    return {row.name: row.reason for row in made.rows if row.action == "keep"}


# Plan -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layer", FACTORIZED)
def test_plan_changes_nothing(layer):
    model = network().train()
    before, text, random_state = copy.deepcopy(model.state_dict()), repr(model), torch.get_rng_state()
    plan(model, layer, rank=2, input_size=(3, 8, 8))
    assert repr(model) == text
    assert model.training
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random_state)


def test_plan_says_ranks_and_costs():
    made = plan(network(), "decef", rank=3, exclude="conv1", input_size=(3, 8, 8))
    rows = {row.name: row for row in made.rows}
    assert list(rows) == ["conv1", *(f"layer{i}.0.conv{j}" for i in (1, 2, 3) for j in (1, 2))]
    assert made.ranks == dict.fromkeys(list(rows)[1:], 3)
    row = rows["layer2.0.conv1"]  # 16 -> 32 channels, 8 x 8 -> 4 x 4
    assert (row.action, row.rank, row.max_rank, row.error) == ("convert", 3, 9, None)
    assert (row.params_before, row.params_after) == (32 * 16 * 9, 16 * 3 * (9 + 32))
    assert (row.macs_before, row.macs_after) == (16 * row.params_before, 16 * row.params_after)
    kept = rows["conv1"]
    assert (kept.action, kept.rank, kept.params_after, kept.macs_after) == ("keep", None, 16 * 27, 64 * 16 * 27)
    frame = made.to_frame()
    assert frame["name"].tolist() == list(rows)
    assert "layer2.0.conv1" in str(made)


def test_without_an_input_size_there_are_no_macs():
    assert all(row.macs_before is row.macs_after is None for row in plan(network(), "decef", rank=1).rows)


def test_include_and_exclude():
    model = network()
    made = plan(model, "basisconv", rank=2, include=["layer2.*", "conv1"], exclude="*.conv2")
    assert set(made.ranks) == {"conv1", "layer2.0.conv1"}
    assert reasons(made)["layer2.0.conv2"] == "excluded by '*.conv2'"
    assert reasons(made)["layer1.0.conv1"] == "not included"
    assert of_type(convert(model, made), FactorizedConv2d) == {"conv1", "layer2.0.conv1"}


@pytest.mark.parametrize("argument", ["include", "exclude"])
def test_a_pattern_that_matches_nothing(argument):
    for pattern in ("layer9.*", ["conv1", "layer9.*"], "bn1"):
        with pytest.raises(ValueError, match=r"pattern '(layer9\.\*|bn1)' matches no convolution"):
            plan(network(), "decef", rank=1, **{argument: pattern})


def test_reasons_to_keep():
    class Special(nn.Conv2d):
        pass

    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 1), Special(8, 8, 3), DeCEFConv2d(8, 8, 3, rank=2))
    made = plan(model, "decef", rank=2)
    assert actions(made) == {"0": "convert", "1": "keep", "2": "keep", "3": "keep"}
    assert "1x1" in reasons(made)["1"]
    assert reasons(made)["2"] == "Special is not a plain Conv2d"
    assert reasons(made)["3"] == "DeCEFConv2d is not a plain Conv2d"
    assert reasons(plan(model, "cpac", rank=2, min_kernel_size=2))["1"] == "kernel smaller than 2"
    assert set(plan(model, "conv2d", rank=2).ranks) == set()
    assert set(reasons(plan(model, "conv2d", rank=2)).values()) == {"conv2d keeps every convolution"}


def test_kernels_are_small_that_are_so_in_both_directions():
    kernels = (1, (1, 3), (3, 1), 3, (1, 5))
    model = nn.Sequential(*(nn.Conv2d(8, 8, kernel) for kernel in kernels))
    converted = {least: set(plan(model, "cpac", rank=1, min_kernel_size=least).ranks) for least in (1, 2, 3, 4)}
    assert converted == {1: set("01234"), 2: set("1234"), 3: set("1234"), 4: {"4"}}


def test_unknown_layer_type():
    with pytest.raises(ValueError, match=r"unknown layer type 'decaf'.*decef"):
        plan(network(), "decaf", rank=1)


def test_options_of_a_layer_type():
    model = nn.Sequential(nn.Conv2d(3, 8, 3))
    made = plan(model, "basisconv", rank=2, train_basis=True, implementation="factorized")
    layer = convert(model, made)[0]
    assert layer.basis.requires_grad
    assert layer.implementation == "factorized"


def test_a_wrong_option_is_an_error():
    with pytest.raises(ValueError, match="implementation='fast'"):
        plan(network(), "decef", rank=1, implementation="fast")


# Ranks ------------------------------------------------------------------------------------------------------------


def test_ranks_by_rule():
    model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.Conv2d(16, 4, 3))  # at most 9 and 4
    assert plan(model, "decef", rank=3).ranks == plan(model, "decef", rank=Fixed(3)).ranks == {"0": 3, "1": 3}
    assert plan(model, "decef", rank=Share(0.5)).ranks == {"0": 4, "1": 2}
    assert plan(model, "decef", rank=Share(0.01)).ranks == {"0": 1, "1": 1}
    assert plan(model, "decef", rank=Share(1)).ranks == {"0": 9, "1": 4}
    assert plan(model, "decef", rank={"0": 7, "1": 2}).ranks == {"0": 7, "1": 2}
    # a rule of one's own weighs costs: what would save nothing stays dense
    by_rule = plan(model, "decef", rank=lambda candidates, totals: {c.name: c.max_rank - 2 for c in candidates})
    assert by_rule.ranks == {"1": 2}
    assert by_rule.rows[0].reason == "rank 7 would cost no less than dense"
    assert plan(model, "decef", rank=lambda candidates, totals: {"1": 1}).ranks == {"1": 1}  # not named: stays dense


def test_a_rule_of_ones_own_may_say_that_its_ranks_are_final():
    def most(candidates, totals):
        return {c.name: c.max_rank for c in candidates}

    model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.Conv2d(16, 4, 3))
    assert plan(model, "decef", rank=most).ranks == {}
    most.ranks_are_final = True
    assert plan(model, "decef", rank=most).ranks == {"0": 9, "1": 4}


def test_only_a_rule_that_names_layers_is_called_where_there_is_no_candidate():
    def dearest(candidates, totals):
        return {max(candidates, key=lambda c: c.params).name: 1}

    model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.Conv2d(16, 4, 3))
    assert plan(model, "decef", rank=dearest).ranks == {"1": 1}
    assert plan(model, "conv2d", rank=dearest).ranks == plan(model, "conv2d", rank=Budget(params=0.1)).ranks == {}
    with pytest.raises(ValueError, match="'0' has a rank, but is kept: conv2d keeps every convolution"):
        plan(model, "conv2d", rank={"0": 1})


def test_a_budget_that_cannot_be_met_where_nothing_can_be_converted():
    model = nn.Sequential(nn.Conv2d(3, 16, 1))
    with pytest.raises(
        ValueError, match=r"0.1 of the dense network's parameters can't be met: there is no convolution"
    ):
        plan(model, "decef", rank=Budget(params=0.1))
    with pytest.raises(ValueError, match="a time budget needs times"):
        plan(model, "decef", rank=Latency(0.1))
    assert plan(model, "decef", rank=Budget(params=1.0)).ranks == {}


def test_ranks_of_a_rule_of_ones_own_are_checked():
    model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.Conv2d(16, 4, 3))
    made = plan(model, "decef", rank=lambda candidates, totals: {"0": np.int64(2)})
    assert made.ranks == plan(model, "decef", rank={"0": np.int32(2)}, exclude="1").ranks == {"0": 2}
    assert type(made.ranks["0"]) is int
    for ranks, says in (({"0": 0}, "rank 0 is not possible in layer '0'"), ({"0": 10}, "rank 10"), ({"2": 1}, "to 2,")):
        with pytest.raises(ValueError, match=says):
            plan(model, "decef", rank=lambda candidates, totals, ranks=ranks: ranks)


def test_patterns_may_be_generators():
    model = network()
    for layer, rank in (("decef", 1), ("auto", Budget(params=0.95))):
        made = plan(
            model, layer, rank=rank, include=(n for n in ["layer1.*", "layer2.*"]), exclude=(n for n in ["*conv2"])
        )
        assert made.ranks
        assert (
            made.to_dict()
            == plan(model, layer, rank=rank, include=["layer1.*", "layer2.*"], exclude="*conv2").to_dict()
        )
        assert all(name.startswith(("layer1", "layer2")) and name.endswith("conv1") for name in made.ranks)
        assert {row.reason for row in made.rows if row.name.startswith("layer3") and "conv1" in row.name} == {
            "not included"
        }


def test_ranks_of_a_plan_are_ranks_of_another_where_weights_are_shared():
    model = nn.Sequential(nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 3), nn.Conv2d(4, 8, 3))
    model[1].weight = model[0].weight
    made = plan(model, "decef", rank=2)
    assert made.ranks == {"0": 2, "1": 2, "2": 2}
    assert plan(model, "decef", rank=made.ranks) == plan(model, "decef", rank={"0": 2, "2": 2}) == made
    with pytest.raises(ValueError, match="'1' shares its weight with '0': both must have the same rank"):
        plan(model, "decef", rank={**made.ranks, "1": 1})


def test_per_layer_ranks_that_do_not_fit():
    model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.Conv2d(16, 4, 3))
    with pytest.raises(ValueError, match="no rank for 1; no such layer: 2"):
        plan(model, "decef", rank=PerLayer({"0": 1, "2": 1}))
    with pytest.raises(ValueError, match=r"rank 5 is not possible in layer '1'.* 1 to 4"):
        plan(model, "decef", rank={"0": 5, "1": 5})
    with pytest.raises(ValueError, match="'0' has a rank, but is kept: excluded by '0'"):
        plan(model, "decef", rank={"0": 1, "1": 1}, exclude="0")


def test_wrong_ranks():
    with pytest.raises(ValueError, match="rank 0 is not possible in layer 'conv1'"):
        plan(network(), "decef", rank=0)
    for rank in (True, 2.5, "3", None):
        with pytest.raises(TypeError, match="neither a whole number"):
            plan(network(), "decef", rank=rank)
    with pytest.raises(ValueError, match=r"share=1\.5"):
        Share(1.5)


@pytest.mark.parametrize(
    ("layer", "there"), [("decef", "progress, implementation"), ("conv2d", "progress"), ("auto", "data")]
)
def test_a_misspelt_argument_is_named(layer, there):
    with pytest.raises(TypeError, match=rf"plan has no argument exlude, .*there are rank, include, exclude.*{there}"):
        plan(network(), layer, rank=Budget(params=0.5), exlude="conv1")


def test_a_pattern_that_matches_nothing_is_answered_with_names():
    with pytest.raises(ValueError, match=r"'stem' matches no convolution of the network; there are: conv1, layer1.0"):
        plan(network(), "decef", rank=1, exclude="stem")


def test_a_budget_of_flops_without_an_input_size_uses_up_no_data():
    data = iter([torch.randn(2, 1, 8, 8)])
    with pytest.raises(ValueError, match="a FLOPs budget needs the input size"):
        plan(network(), "decef", rank=Budget(flops=0.5), data=data)
    assert len(list(data)) == 1


# Save and load ----------------------------------------------------------------------------------------------------


def test_plan_round_trip(tmp_path):
    model = network()
    made = plan(model, "basisconv", rank=Share(0.4), exclude="conv1", input_size=(3, 8, 8), implementation="factorized")
    made.save(tmp_path / "planned.yaml")
    assert Plan.load(tmp_path / "planned.yaml") == made
    converted = convert(model, made)
    made.save(tmp_path / "done.yaml")
    loaded = Plan.load(tmp_path / "done.yaml")
    assert loaded == made
    assert all(row.error > 0 for row in loaded.rows if row.action == "convert")
    again, x = convert(network(), loaded, from_scratch=True), images()
    again.load_state_dict(converted.state_dict())
    assert torch.equal(again.eval()(x), converted(x))


def test_a_plan_of_nothing_and_a_file_that_is_no_yaml(tmp_path):
    made = plan(nn.Sequential(nn.Linear(2, 2)), "decef", rank=2)
    assert len(made.to_frame()) == 0
    assert "decef" in str(made)
    (tmp_path / "plan.yaml").write_text("rows: [")
    with pytest.raises(ValueError, match=r"plan\.yaml is no plan, as it is not YAML"):
        Plan.load(tmp_path / "plan.yaml")
    (tmp_path / "plan.yaml").write_text("rows: []")
    with pytest.raises(ValueError, match=r"plan\.yaml: this is no plan: it has no 'layer'"):
        Plan.load(tmp_path / "plan.yaml")
    with pytest.raises(FileNotFoundError, match=r"there is no plan .*other\.yaml"):
        Plan.load(tmp_path / "other.yaml")


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({"action": "Convert"}, "'layer1.0.conv1' has the action 'Convert'"),
        ({"rank": None}, "'layer1.0.conv1' is converted at rank None"),
        ({"rank": "2"}, "at rank '2'"),
        ({"ranks": 2}, "this is no plan"),
    ],
)
def test_an_edited_plan_that_says_nothing_clear(row, says):
    data = plan(network(), "decef", rank=2).to_dict()
    next(r for r in data["rows"] if r["name"] == "layer1.0.conv1").update(row)
    with pytest.raises(ValueError, match=says):
        Plan.from_dict(data)
    with pytest.raises(ValueError, match="'conv1' is converted, but has no layer"):
        Plan.from_dict({**plan(network(), "decef", rank=2).to_dict(), "layer": "auto"})


def test_convert_says_what_it_cannot_do():
    model, made = network(), plan(network(), "decef", rank=2)
    with pytest.raises(TypeError, match="how must be a plan or the name of a layer type, not Budget"):
        convert(model, Budget(flops=0.5))
    with pytest.raises(ValueError, match="data would do nothing with from_scratch"):
        convert(model, made, from_scratch=True, data=[images()])
    with pytest.raises(ValueError, match="to conv2d, no low-rank layer"):
        convert(model, dataclasses.replace(made, layer="conv2d"))
    on_meta = copy.deepcopy(model).to("meta")
    with pytest.raises(ValueError, match=r"layer 'conv1': its weight is on the meta device, which has no values"):
        convert(on_meta, made)
    assert convert(on_meta, made, from_scratch=True).conv1.weight.is_meta


@pytest.mark.parametrize("rank", [Budget(params=0.5), Fixed(2), EffectiveRank(), Energy(0.9)])
def test_a_weight_that_is_not_finite_is_named(rank):
    model = network()
    model.layer2[0].conv1.weight.data[0, 0, 0, 0] = math.nan
    with pytest.raises(ValueError, match=r"layer 'layer2\.0\.conv1': its weight has NaN"):
        convert(model, "decef", rank=rank)


# Convert and fold -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layer", FACTORIZED)
def test_full_rank_conversion_and_its_fold_are_the_network(layer):
    model, x = network(8, shortcut="B"), images()
    before, expected = copy.deepcopy(model.state_dict()), model(x)
    made = plan(model, layer, rank=Share(1))
    new = convert(model, made)
    assert len(of_type(new, FactorizedConv2d)) == len(made.ranks) >= 7
    assert_close(new(x), expected, rtol=1e-9, atol=1e-9)
    assert max(row.error for row in made.rows if row.action == "convert") < 1e-10
    folded = fold(new)
    assert repr(folded) == repr(model if LAYERS[layer].composes_in_training else with_biases(model, made.ranks))
    assert_close(folded(x), expected, rtol=1e-9, atol=1e-9)
    assert of_type(model, FactorizedConv2d) == set()
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("layer", FACTORIZED)
def test_low_rank_conversion_approximates_and_folds_exactly(layer):
    model, x = network(), images()
    made = plan(model, layer, rank=3)
    new = convert(model, made)
    for row in made.rows:
        weight, approximation = model.get_submodule(row.name).weight, new.get_submodule(row.name).compose()
        assert row.error == pytest.approx(((weight - approximation).norm() / weight.norm()).item())
        assert 0 < row.error < 1
        used(new.get_submodule(row.name))
    assert not torch.allclose(new(x), model(x), rtol=1e-3)
    folded = fold(new)
    assert of_type(folded, FactorizedConv2d) == set()
    assert_close(folded(x), new(x))
    assert of_type(new, FactorizedConv2d) == set(made.ranks)


@pytest.mark.parametrize("training", [True, False])
def test_training_mode_is_kept(training):
    model = network().train(training)
    model.layer2.train(not training)
    new = convert(model, plan(model, "decef", rank=2))
    for network_ in (new, fold(new)):
        assert {n: m.training for n, m in network_.named_modules()} == {n: m.training for n, m in model.named_modules()}


def test_device_dtype_and_bias_are_kept():
    model = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.Conv2d(8, 8, 3, dtype=torch.bfloat16))
    new = convert(model, plan(model, "cpac", rank=2))
    assert new[0].bias is None
    assert torch.equal(new[1].bias, model[1].bias)
    assert [layer.filters.dtype for layer in new] == [torch.float32, torch.bfloat16]


@pytest.mark.parametrize("layer", FACTORIZED)
def test_from_scratch_draws_new_factors(layer):
    model = network()
    made = plan(model, layer, rank=3)
    one, two = (convert(model, made, from_scratch=True) for _ in range(2))
    assert all(row.error is None for row in made.rows)
    for name in made.ranks:
        weight = model.get_submodule(name).weight
        kernels = [new.get_submodule(name).compose() for new in (one, two)]
        assert (weight - kernels[0]).norm() > weight.norm()
        assert not torch.allclose(*kernels)
    assert torch.equal(one.linear.weight, model.linear.weight)
    model.conv1.weight.data[0] = torch.nan
    with pytest.raises(ValueError, match="layer 'conv1': std=nan must be finite"):
        convert(model, made, from_scratch=True)


def rms(kernel):
    return kernel.square().mean().sqrt().item()


@pytest.mark.parametrize(
    ("name", "options", "layer"),
    [
        (name, options, layer)
        for i, (name, options) in enumerate(STARTS)
        for layer in (FACTORIZED if name == "resnet20" else [FACTORIZED[i % 5], FACTORIZED[(i + 2) % 5]])
    ],
    ids=str,
)
def test_from_scratch_every_network_starts_at_the_scale_of_its_dense_twin(name, options, layer):
    model = create_model(name, num_classes=10, **options)
    made = plan(model, layer, rank=1)
    assert made.ranks
    for row in made.rows:
        if row.action == "convert":
            row.rank = min(3, row.max_rank)  # depthwise kernels have rank 1 in some types
    new = convert(model, made, from_scratch=True).eval()
    for key in made.ranks:
        assert rms(new.get_submodule(key).compose()) == pytest.approx(rms(model.get_submodule(key).weight), rel=1e-3)


def test_every_network_is_asked_how_it_starts():
    assert {name for name, _ in STARTS} == {name for name in MODELS if not name.startswith("resnet")} | {"resnet20"}


def test_a_plan_for_another_network():
    made = plan(network(), "decef", rank=9, include="layer2.*")
    with pytest.raises(ValueError, match=r"converts 'layer2\.0\.conv1', but the network has no such module"):
        convert(nn.Sequential(nn.Conv2d(3, 8, 3)), made)
    with pytest.raises(ValueError, match=r"'layer2\.0\.conv1', but DeCEFConv2d is not a plain Conv2d"):
        convert(convert(network(), made), made)
    made.rows[3].rank = 99
    with pytest.raises(ValueError, match=rf"converts '{made.rows[3].name}', but rank=99"):
        convert(network(), made)


def test_a_module_in_two_places_stays_one():
    conv = nn.Conv2d(4, 4, 3, padding=1, dtype=torch.float64)
    model = nn.ModuleDict({"a": nn.Sequential(conv, nn.ReLU()), "b": nn.Sequential(nn.Conv2d(4, 4, 3), conv)})
    made = plan(model, "decef", rank=4)
    assert set(made.ranks) == {"a.0", "b.0"}
    new = convert(model, made)
    assert isinstance(new["a"][0], DeCEFConv2d)
    assert new["a"][0] is new["b"][1]
    folded = fold(new)
    assert type(folded["a"][0]) is nn.Conv2d
    assert folded["a"][0] is folded["b"][1]
    assert_close(folded["a"][0].weight, conv.weight)


def test_a_network_that_is_one_convolution():
    conv = nn.Conv2d(4, 8, 3)
    made = plan(conv, "basisconv", rank=8, input_size=(4, 6, 6))
    new = convert(conv, made)
    assert isinstance(new, BasisConv2d)
    assert type(fold(new)) is nn.Conv2d
    assert_close(fold(new).weight, conv.weight)


def test_plan_and_convert_at_once():
    model = network()
    at_once = convert(model, "decef", rank=Budget(flops=0.6), exclude="conv1", input_size=(3, 16, 16))
    planned = convert(model, plan(model, "decef", rank=Budget(flops=0.6), exclude="conv1", input_size=(3, 16, 16)))
    assert all(torch.equal(v, planned.state_dict()[k]) for k, v in at_once.state_dict().items())
    with pytest.raises(TypeError, match="say rank=: a number, ranks by layer name, or a rule"):
        convert(model, "decef", exclude="conv1")
    with pytest.raises(TypeError, match="a plan already says all that exclude could"):
        convert(model, plan(model, "decef", rank=2), exclude="conv1")


def test_hooks_of_a_convolution_go_over_to_its_layer_and_back():
    conv = nn.Conv2d(4, 6, 3)
    calls = []
    conv.register_forward_pre_hook(lambda module, args: calls.append(("before", type(module))))
    conv.register_forward_hook(lambda module, args, kwargs, y: calls.append(("after", y.shape)), with_kwargs=True)
    conv.register_full_backward_hook(lambda module, inputs, outputs: calls.append(("backward", outputs[0].shape)))
    layer = convert(nn.Sequential(conv), "decef", rank=3)
    for model, cls in ((layer, DeCEFConv2d), (fold(layer), nn.Conv2d)):
        calls.clear()
        model(torch.randn(2, 4, 5, 5, requires_grad=True)).sum().backward()
        assert calls == [("before", cls), ("after", (2, 6, 3, 3)), ("backward", (2, 6, 3, 3))]


def pruned(conv):
    return prune.l1_unstructured(conv, "weight", 0.3)


def with_pruned_bias(conv):
    return prune.l1_unstructured(conv, "bias", 0.5)


@pytest.mark.parametrize(
    "wrap", [nn.utils.spectral_norm, nn.utils.parametrizations.weight_norm, pruned, with_pruned_bias]
)
def test_a_computed_weight_is_kept(wrap):
    model = nn.Sequential(wrap(nn.Conv2d(4, 8, 3)), nn.Conv2d(8, 8, 3))
    made = plan(model, "decef", rank=2)
    assert set(made.ranks) == {"1"}
    assert "computed" in made.rows[0].reason or "not a plain Conv2d" in made.rows[0].reason
    x = torch.randn(2, 4, 8, 8)
    assert_close(convert(model, made)[0](x), model[0](x))


def test_a_plan_leaves_a_weight_with_spectral_norm_as_it_was():
    """To ask for it in training mode is a step of its power iteration."""
    model = nn.Sequential(nn.utils.parametrizations.spectral_norm(nn.Conv2d(4, 8, 3))).train()
    before = copy.deepcopy(model.state_dict())
    made = plan(model, "decef", rank=2, input_size=(4, 8, 8))
    rank_table(model)
    assert (made.rows[0].action, made.rows[0].params_before) == ("keep", 4 * 8 * 9)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize(("layer", "name"), [("cpac", "channels"), ("rank1", "vertical"), ("decef", "rank")])
def test_a_convolution_with_an_attribute_of_the_layer_s_name_stays_dense(layer, name):
    model = nn.Sequential(nn.Conv2d(4, 8, 3), nn.Conv2d(8, 8, 3))
    setattr(model[0], name, 3)
    model[1].index = 4
    made = plan(model, layer, rank=1)
    assert (
        reasons(made)["0"] == f"it was given an attribute '{name}', and {LAYERS[layer].__name__} has one of that name"
    )
    small = convert(model, made)
    assert (getattr(small[0], name), small[1].index, type(small[1])) == (3, 4, LAYERS[layer])


def test_complex_weights_stay_dense():
    model = nn.Sequential(nn.Conv2d(4, 8, 3, bias=False, dtype=torch.complex64))
    assert reasons(plan(model, "decef", rank=1))["0"] == "its weight is not of real numbers"


@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch.*")
def test_a_network_inside_something_else_is_refused():
    model = nn.Sequential(nn.Conv2d(4, 8, 3))
    for given, message in (
        (torch.jit.script(model), "is in TorchScript, which can't be changed: give the one that it was made from"),
        (torch.compile(model), r"is compiled: give it as model\._orig_mod"),
        (nn.DataParallel(model), r"is in a DataParallel: give it as model\.module"),
    ):
        for how in ({"how": "decef", "rank": 2}, {"how": plan(model, "decef", rank=2)}):
            with pytest.raises(ValueError, match=message):
                convert(given, **how)
        with pytest.raises(ValueError, match=message):
            cost(given, (4, 8, 8))


class OnMPS(torch.Tensor):
    """A tensor on a device that needn't be here; it has no values."""

    @staticmethod
    def __new__(cls, *size):
        return torch.Tensor._make_wrapper_subclass(cls, size, device=torch.device("mps"))

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        return cls(*args[0].shape)


def test_networks_without_float64_are_sent_to_the_cpu():
    model = nn.Sequential(nn.Conv2d(4, 8, 3))
    made = plan(model, "decef", rank=2)
    model[0].weight = nn.Parameter(OnMPS(8, 4, 3, 3))
    for call in (lambda: plan(model, "decef", rank=2), lambda: convert(model, made)):
        with pytest.raises(ValueError, match=r"is on MPS, which has no float64.*\(model\.cpu\(\)\)"):
            call()


def test_a_pruned_factor_has_to_be_made_permanent_before_folding():
    model = nn.Sequential(DeCEFConv2d(4, 8, 3, rank=2))
    prune.l1_unstructured(model[0], "coefficients", 0.5)
    for fold_or_arrange in (fold, to_convolutions):
        with pytest.raises(ValueError, match=r"computes its coefficients before each call.*prune\.remove"):
            fold_or_arrange(model)
    prune.remove(model[0], "coefficients")
    x = torch.randn(2, 4, 8, 8)
    assert_close(fold(model)(x), model(x))


def test_layers_that_share_a_weight_become_one_type():
    model = nn.Sequential(nn.Conv2d(8, 8, 3), nn.Conv2d(8, 8, 3))
    model[1].weight = model[0].weight
    made = plan(model, "decef", rank=2)
    made.rows[1].layer = "cpac"
    with pytest.raises(ValueError, match="share one weight: the plan must convert both to one type at the same rank"):
        convert(model, made)


# Batch norm's statistics ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layer", FACTORIZED)
def test_recalibrated_at_full_rank_a_network_is_the_dense_one_recalibrated(layer):
    model = network()
    batches = [torch.randn(16, 3, 8, 8, dtype=torch.float64) for _ in range(3)]
    whole = convert(model, layer, rank=Share(1), implementation="factorized")
    kernels = {name: m.compose() for name, m in whole.named_modules() if isinstance(m, FactorizedConv2d)}
    dense = recalibrate(copy.deepcopy(model), [(x, "labels") for x in batches])
    update_bn(batches, model)
    x = images()
    assert_close(dense(x), model.eval()(x), rtol=1e-9, atol=1e-9)
    assert_close(recalibrate(whole, batches)(x), dense(x), rtol=1e-4, atol=1e-4)
    for name, kernel in kernels.items():
        assert_close(whole.get_submodule(name).compose(), kernel)
    assert not any(module.training for module in whole.modules())
    assert {m.momentum for m in whole.modules() if isinstance(m, nn.BatchNorm2d)} == {0.1}


def test_norms_inside_layers_are_measured_so_that_a_network_trains_on_from_what_it_computes():
    x = torch.randn(64, 3, 8, 8, dtype=torch.float64)
    small = convert(recalibrate(network(), [x]), "basisconv2021", rank=3, data=[x]).eval()
    kernels = {name: m.compose() for name, m in small.named_modules() if isinstance(m, Basis2021Conv2d)}

    def off():
        trained = copy.deepcopy(small).train()
        return (trained(x) - small(x)).norm() / small(x).norm()

    before = off()
    recalibrate(small, [x])
    assert off() < 0.01 < 0.1 < before
    for name, kernel in kernels.items():
        assert_close(small.get_submodule(name).compose(), kernel)


def test_a_layer_whose_norm_was_measured_is_in_training_mode_what_it_is_in_evaluation_mode():
    for shape, options in (((6, 4, 9, 10), {"groups": 2}), ((6, 4, 9, 10), {"padding_mode": "reflect"})):
        layer = Basis2021Conv2d(4, 8, 3, 2, 1, rank=3, dtype=torch.float64, **options).eval()
        x = torch.randn(*shape, dtype=torch.float64) * 3 + 1
        expected = layer(x)
        assert not torch.allclose(copy.deepcopy(layer).train()(x), expected, rtol=0.1, atol=0.1)
        with norms_inside_measured(layer), torch.no_grad():
            layer(x[:2]), layer(x[2:])
        assert_close(layer(x), expected)
        assert_close(layer.train()(x), expected)


def test_recalibrate_uses_as_many_batches_as_it_is_told_and_needs_one():
    model = network()
    before = copy.deepcopy(model.state_dict())
    batches = [images() for _ in range(3)]
    for data, count, says in (
        ([], 50, "no batch"),
        (iter([]), 50, "no batch"),
        (batches, 0, "count=0"),
        (images(), 1, "not one tensor"),
        ((images(), torch.zeros(len(images()))), 1, "not one batch of images and labels"),
        ((images(), torch.zeros(len(images()), 8, 8)), 1, "not one batch of images and labels"),
    ):
        with pytest.raises(ValueError, match=says):
            recalibrate(model, data, count)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    two, first_two = recalibrate(copy.deepcopy(model), batches, 2), recalibrate(model, batches[:2])
    assert torch.equal(two(batches[2]), first_two(batches[2]))


def test_recalibrate_uses_fifty_batches_if_not_told():
    batches = iter([images().float()] * 60)
    recalibrate(nn.Sequential(nn.BatchNorm2d(3)), batches)
    assert len(list(batches)) == 10


def test_recalibrate_leaves_the_statistics_if_a_batch_fails():
    model = network()
    before = copy.deepcopy(model.state_dict())
    for bad, error, says in (
        ({"image": images()}, ValueError, r"must be a tensor, or a tuple .* not dict"),
        (images().to(torch.uint8), ValueError, "uint8 images, as they are stored: normalise them"),
        (torch.randn(4, 5, 8, 8), RuntimeError, "channels"),
        (images() * torch.nan, ValueError, "the data has NaN or infinite values"),
    ):
        with pytest.raises(error, match=says):
            recalibrate(model, [images().double(), bad])
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
        assert {m.momentum for m in model.modules() if isinstance(m, nn.BatchNorm2d)} == {0.1}


def test_recalibrate_leaves_a_norm_that_the_forward_does_not_use():
    model = network()
    model.other_head = nn.BatchNorm1d(4).double()
    model.other_head.running_mean.fill_(5)
    before = model.bn1.running_mean.clone()
    recalibrate(model, [images()])
    assert model.other_head.running_mean.tolist() == [5] * 4
    assert not torch.equal(model.bn1.running_mean, before)


class Frozen(nn.BatchNorm2d):
    """A norm that stays in evaluation mode, as one is written to be frozen."""

    def train(self, mode=True):
        return super().train(False)


class Borrowing(nn.Module):
    """Normalises by the statistics of a norm that it doesn't call."""

    def __init__(self, norm):
        super().__init__()
        self.norm = norm

    def forward(self, x):
        return nn.functional.batch_norm(x, self.norm.running_mean, self.norm.running_var)


@pytest.mark.parametrize("wrap", [nn.Identity, Borrowing])
def test_recalibrate_measures_what_comes_after_a_norm_that_stays_as_it_is(wrap):
    kind = Frozen if wrap is nn.Identity else nn.BatchNorm2d
    first = kind(4)
    torch.nn.init.normal_(first.running_mean, 5.0)
    first.running_var.fill_(9.0)
    before = copy.deepcopy(first.state_dict())
    middle = first if wrap is nn.Identity else wrap(first)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), middle, nn.BatchNorm2d(4)).eval()
    x = images().float()
    recalibrate(model, [x])
    assert all(torch.equal(value, before[name]) for name, value in first.state_dict().items())
    assert_close(model[2].running_mean, model[:2](x).mean((0, 2, 3)), rtol=1e-3, atol=1e-4)


class FrozenBatchNorm2d(nn.Module):
    """As detectors have it: no batch norm, but statistics."""

    def __init__(self, channels):
        super().__init__()
        self.register_buffer("running_mean", torch.ones(channels))

    def forward(self, x):
        return x - self.running_mean[:, None, None]


def test_recalibrate_says_which_norms_keep_their_statistics(caplog):
    images = torch.randn(8, 2, 4, 4)
    model = nn.Sequential(nn.Conv2d(2, 3, 1), FrozenBatchNorm2d(3), nn.BatchNorm2d(3))
    recalibrate(model, [images])
    assert "1 norms (FrozenBatchNorm2d) keep their statistics" in caplog.text
    assert_close(model[2].running_mean, model[:2](images).mean((0, 2, 3)))
    caplog.clear()
    recalibrate(model[:1], [images])
    assert not caplog.records


def test_recalibrate_heals_statistics_that_are_not_finite():
    model = nn.Sequential(nn.BatchNorm2d(3)).eval()
    model[0].running_mean.fill_(torch.nan)
    x = images().float()
    recalibrate(model, [x, x])
    assert_close(model[0].running_mean, x.mean((0, 2, 3)), rtol=1e-3, atol=1e-4)


def test_recalibrate_runs_nothing_where_there_is_no_batch_norm():
    calls = []
    model = nn.Sequential(nn.Conv2d(3, 4, 3))
    model.register_forward_hook(lambda *args: calls.append(1))
    assert not recalibrate(model.train(), [images().float()]).training
    assert not calls


def test_recalibrate_leaves_out_a_single_image_that_is_left_over():
    model = nn.Sequential(nn.Conv2d(3, 4, 8), nn.BatchNorm2d(4))  # its maps are 1x1
    x = images().float()
    left, whole = (recalibrate(copy.deepcopy(model), data) for data in ([x, x[:1]], [x]))
    assert torch.equal(left[1].running_var, whole[1].running_var)


# Networks that hold their parts in other ways ---------------------------------------------------------------------


class InLists(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3)
        self.order, self.named, self.pair = [self.a], {"b": [self.b]}, (self.a, "a")

    def forward(self, x):
        return self.named["b"][0](self.order[0](x))


def test_convolutions_that_stand_in_lists_and_dicts_too_are_converted_there():
    model = InLists()
    small = convert(model, "decef", rank=1)
    assert small.order == [small.a]
    assert small.named == {"b": [small.b]}
    assert small.pair == (small.a, "a")
    assert isinstance(small.order[0], DeCEFConv2d)
    assert model.order == [model.a]
    x = images().float()
    assert not torch.allclose(small(x), model(x))
    assert_close(fold(small)(x), small(x), rtol=1e-4, atol=1e-4)


class Pair(NamedTuple):
    first: nn.Module
    second: nn.Module


class InOthers(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3)
        self.pair, self.queue, self.partial = Pair(self.a, self.b), deque([self.a]), functools.partial(self.b)

    def forward(self, x):
        return self.partial(self.queue[0](x)) + self.pair.second(self.pair.first(x))


def test_convolutions_that_are_in_anything_that_can_be_copied_are_converted_there():
    model = InOthers()
    small = convert(model, "decef", rank=1)
    assert isinstance(small.a, DeCEFConv2d)
    assert small.pair == Pair(small.a, small.b)
    assert (list(small.queue), small.partial.func) == ([small.a], small.b)
    assert (model.pair, model.partial.func) == (Pair(model.a, model.b), model.b)
    x = images().float()
    assert_close(fold(small)(x), small(x), rtol=1e-4, atol=1e-4)
    assert_close(to_convolutions(small)(x), small.eval()(x), rtol=1e-4, atol=1e-4)


class Keeps(nn.Module):
    """Keeps a constant that is no buffer, and its last activations, which have gradients."""

    def __init__(self):
        super().__init__()
        self.mean, self.conv, self.seen = [torch.full((3, 1, 1), 0.5)], nn.Conv2d(3, 8, 3), None
        self.all = {"seen": []}

    def forward(self, x):
        self.seen = self.conv(x - self.mean[0])
        self.all["seen"].append(self.seen)
        return self.seen


def test_networks_that_keep_tensors_are_planned_converted_and_left_alone():
    model = Keeps()
    x = images().float()
    seen = model(x)
    small = convert(model, "decef", rank=4, input_size=(3, 8, 8))
    assert model.seen is seen
    assert model.all["seen"] == [seen]
    assert small(x).shape == seen.shape
    assert small.mean[0].device == model.mean[0].device


def test_data_come_to_the_precision_of_the_network():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)).double()
    small = convert(model, "decef", rank=2, data=[images().float()])
    assert recalibrate(small, [images().float()])(images().double()).dtype == torch.float64


class ByName(nn.Module):
    """A network that names the argument of its convolution, and keeps a dict that holds itself."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(4, 8, 3, padding=1)
        self.parts = {"conv": self.conv}
        self.parts["all"] = self.parts

    def forward(self, x):
        return self.parts["conv"](input=x)


def test_a_convolution_may_be_called_by_the_name_of_its_argument():
    torch.manual_seed(0)
    model, x = ByName(), torch.randn(2, 4, 8, 8)
    small = convert(model, "decef", rank=8, input_size=(4, 8, 8), data=[x])
    assert small.parts["conv"] is small.conv
    torch.testing.assert_close(small(x), model(x), rtol=1e-4, atol=1e-5)
    assert decef.cost(small, (4, 8, 8)).attrs["macs"] > 0
    torch.testing.assert_close(decef.deploy(small, x, engines=["eager"])(x), model(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("data", [{}, {"module.conv1": torch.eye(9)[None]}])
def test_moments_of_other_layers_are_refused(data):
    model = network()
    for how in (convert, plan):
        with pytest.raises(ValueError, match="data would do nothing: it holds moments of none of the layers"):
            how(model, "decef", rank=Energy(0.9), data=data)
    with pytest.raises(ValueError, match="data would do nothing: it holds moments of none of the layers"):
        convert(model, plan(model, "decef", rank=1), data=data)


def test_moments_of_other_kernels_are_refused():
    with pytest.raises(ValueError, match=r"'conv1': moments of shape \(1, 4, 4\) are of another network"):
        convert(network(), "decef", rank=Energy(0.9), data={"conv1": torch.eye(4)[None]})


def test_new_factors_have_the_scale_of_small_weights_in_half_precision():
    conv = nn.Conv2d(8, 8, 3, bias=False)
    with torch.no_grad():
        conv.weight.mul_(5e-5 / conv.weight.square().mean().sqrt())  # its square is 0 in half precision
    small = convert(nn.Sequential(conv).half(), "decef", rank=4, from_scratch=True)
    assert small[0].weight.float().square().mean().sqrt().item() == pytest.approx(5e-5, rel=0.1)


class Masked(nn.Conv2d):
    """A convolution that takes a mask too, as partial convolutions do."""

    def forward(self, x, mask):
        return super().forward(x * mask)


class WithMasked(nn.Module):
    def __init__(self):
        super().__init__()
        self.masked, self.conv = Masked(3, 8, 3), nn.Conv2d(8, 8, 3)

    def forward(self, x):
        return self.conv(self.masked(x, mask=torch.ones_like(x)))


def test_a_convolution_that_takes_more_than_one_tensor_is_kept_and_counted():
    model = WithMasked()
    rows = {row.name: row for row in plan(model, "decef", rank=2, input_size=(3, 8, 8)).rows}
    assert (rows["masked"].action, rows["masked"].reason) == ("keep", "Masked is not a plain Conv2d")
    assert rows["masked"].macs_before == 8 * 3 * 9 * 36
    assert rows["conv"].action == "convert"


def own_forward(conv):
    conv.forward = lambda x: nn.functional.conv2d(x, conv.weight - conv.weight.mean(), conv.bias)


def own_conv_forward(conv):
    """As it is done to make images without seams."""
    conv._conv_forward = lambda x, weight, bias: nn.functional.conv2d(x.roll(1, 3), weight, bias)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (own_forward, "its forward was replaced, so it computes something else"),
        (own_conv_forward, "its forward was replaced, so it computes something else"),
        (lambda conv: conv.register_buffer("gain", torch.ones(1)), "it has more than a weight and a bias: gain"),
        (lambda conv: conv.add_module("lora", nn.Linear(2, 2)), "it has more than a weight and a bias: lora"),
    ],
)
def test_a_convolution_that_is_more_than_its_kernel_is_kept(change, reason):
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3))
    change(model[0])
    made = plan(model, "decef", rank=2)
    assert [(row.action, row.reason) for row in made.rows] == [("keep", reason), ("convert", "")]
    made.rows[0].action, made.rows[0].rank = "convert", 2  # as somebody might edit it, or of another network
    with pytest.raises(ValueError, match=f"the plan converts '0', but {reason}"):
        convert(model, made)


def test_only_a_kernel_that_is_all_of_a_convolution_is_taken():
    for other in (nn.ConvTranspose2d(8, 8, 3), Masked(8, 8, 3), nn.Linear(8, 8)):
        with pytest.raises(ValueError, match=f"{type(other).__name__} is not a plain Conv2d"):
            DeCEFConv2d.from_conv2d(other, 2)
    edited = plan(WithMasked(), "decef", rank=2)
    edited.rows[0].action, edited.rows[0].rank = "convert", 2
    with pytest.raises(ValueError, match="converts 'masked', but Masked is not a plain Conv2d"):
        convert(WithMasked(), edited)
    edited.rows[0].action, edited.rows[1].rank = "keep", None
    with pytest.raises(ValueError, match="converts 'conv', but has no rank for it"):
        convert(WithMasked(), edited)


def test_a_convolution_that_keeps_its_output_is_planned():
    model = nn.Sequential(nn.Conv2d(3, 8, 3))
    model[0].register_forward_hook(lambda module, args, output: setattr(module, "seen", output))
    model(torch.randn(1, 3, 8, 8))
    assert plan(model, "decef", rank=2, input_size=(3, 8, 8)).ranks == {"0": 2}


def test_it_is_said_why_nothing_is_converted(caplog):
    convert(nn.Sequential(nn.Conv2d(3, 8, 1), nn.Linear(2, 2)), "decef", rank=2)
    convert(nn.Linear(2, 2), "decef", rank=2)
    convert(nn.Conv2d(3, 8, 3), "conv2d", rank=2)
    assert [record.getMessage() for record in caplog.records] == [
        "nothing is converted: 1 x a 1x1 kernel has no eigen-filters: DeCEF needs a kernel of more than one element",
        "nothing is converted: the network has no convolution",
    ]


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda made: setattr(made.rows[-1], "rank", 999), "rank=999 is not possible"),
        (lambda made: made.options.update(train_bases=True), "unexpected keyword argument 'train_bases'"),
    ],
)
def test_an_edited_plan_is_refused_before_any_image_is_seen(edit, message):
    model = network()
    made = plan(model, "basisconv", rank=2)
    edit(made)
    unseen = (pytest.fail("an image was asked for") for _ in range(1))
    with pytest.raises(ValueError, match=rf"the plan converts '.+', but .*{message}"):
        convert(model, made, data=unseen)


def test_folding_draws_no_random_numbers():
    small, random_state = convert(network(), "decef", rank=2), torch.get_rng_state()
    fold(small)
    to_convolutions(small.eval())
    assert torch.equal(torch.get_rng_state(), random_state)


def test_a_plan_of_another_network_that_fits_in_part_is_said_to(caplog):
    made = plan(CifarResNet(8), "decef", rank=2)
    convert(CifarResNet(8), made)
    assert not caplog.records
    convert(CifarResNet(14), made)
    (record,) = caplog.records
    assert "made for another network: of 6 convolutions here, such as 'layer1.1.conv1', it says" in record.getMessage()


@pytest.mark.parametrize("layer", ["cpac", "rank1"])
def test_the_default_device_does_not_matter(layer):
    with torch.device("meta"):
        made = convert(nn.Sequential(nn.Conv2d(3, 8, 3, device="cpu")), layer, rank=5)
    assert {p.device.type for p in made.parameters()} == {"cpu"}


def test_under_autocast_kernels_keep_their_precision():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3))
    batches = [torch.randn(20, 3, 8, 8)]
    how = {"rank": 3, "data": batches}
    expected = [p for layer in ("decef", "cpac") for p in fold(convert(model, layer, **how)).parameters()]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = [p for layer in ("decef", "cpac") for p in fold(convert(model, layer, **how)).parameters()]
    for one, other in zip(found, expected, strict=True):
        assert_close(one, other, rtol=0.05, atol=0.02)  # what the convolutions put out was rounded, the kernels not
        assert one.dtype == torch.float32
    plain = fold(convert(model, "decef", rank=3))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_close(list(fold(convert(model, "decef", rank=3)).parameters()), list(plain.parameters()))


@pytest.mark.parametrize("rank", [2, {"0": 2}, Share(0.5), Budget(flops=0.7, uniform=True)])
def test_data_for_ranks_that_do_not_depend_on_them_are_refused(rank):
    model, batches = nn.Sequential(nn.Conv2d(3, 8, 3)), [torch.randn(4, 3, 8, 8)]
    with pytest.raises(ValueError, match="data would do nothing: these ranks"):
        plan(model, "decef", rank=rank, data=batches, input_size=(3, 8, 8))
    with pytest.raises(ValueError, match="data would do nothing: these ranks"):
        plan(model, "decef", rank=rank, data=input_moments(model, ["0"], batches), input_size=(3, 8, 8))
    convert(model, "decef", rank=rank, data=batches, input_size=(3, 8, 8))  # there they are for the factors


@pytest.mark.parametrize(("layer", "rank"), [("decef", 2), ("decef", Energy(0.9)), ("auto", Budget(params=0.5))])
def test_moments_are_collected_once_and_only_of_layers_that_may_change(layer, rank, monkeypatch):
    asked = []
    monkeypatch.setattr(
        "decef.moments._collect",
        lambda model, wanted, *rest: asked.append(list(wanted)) or collect(model, wanted, *rest),
    )
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 3)).double()
    batches = iter([images()])
    small = convert(model, layer, rank=rank, include="2", data=batches)
    assert isinstance(small[2], FactorizedConv2d)
    assert asked == [["2"]]


def test_plans_by_several_rules_decompose_each_kernel_once(monkeypatch):
    spectrum, calls = DeCEFConv2d.spectrum, []
    monkeypatch.setattr(DeCEFConv2d, "spectrum", lambda *args, **named: calls.append(1) or spectrum(*args, **named))
    model, where = network(), {"exclude": "conv1", "input_size": (3, 8, 8)}
    plans = planner(model, "decef", **where)
    rules = [Budget(flops=0.5), Budget(params=0.7), Energy(0.8), Budget(flops=0.5)]
    found = [plans(rule) for rule in rules]
    assert len(calls) == len(found[0].rows) - 1
    assert [made.to_dict() for made in found] == [plan(model, "decef", rank=rule, **where).to_dict() for rule in rules]
