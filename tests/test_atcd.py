"""ATCD: the dense twin stays in the low-rank set, and steps along it."""

import copy
import dataclasses

import pytest
import torch
from support import DIGITS, TRAIN, Memory, network, train
from torch import nn
from torch.nn.utils import parametrizations
from torch.optim.swa_utils import update_bn
from torch.testing import assert_close

from decef import ATCD
from decef.conversion import convert
from decef.layers import LAYERS, BasisConv2d, CPACConv2d, DeCEFConv2d, FactorizedConv2d, Rank1Conv2d
from decef.plans import plan
from decef.training.loop import Training

F64 = torch.float64
FACTORIZED = {name: cls for name, cls in LAYERS.items() if issubclass(cls, FactorizedConv2d)}
TYPES = [pytest.param(cls, id=name) for name, cls in FACTORIZED.items() if cls.composes_in_training]
OTHERS = [pytest.param(cls, id=name) for name, cls in FACTORIZED.items() if not cls.composes_in_training]


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def small(cls, rank=2, **kwargs):
    """A float64 network with two factorised layers and a batch norm whose statistics are not the initial ones."""
    model = nn.Sequential(
        cls(4, 8, 3, padding=1, groups=2, rank=rank, dtype=F64, **kwargs),
        nn.BatchNorm2d(8, dtype=F64),
        nn.ReLU(),
        nn.Conv2d(8, 6, 1, dtype=F64),
        cls(6, 8, (3, 2), rank=rank, dtype=F64, **kwargs),
    )
    return model.train()


def step(atcd, optimizer, images=4):
    optimizer.zero_grad()
    atcd.dense(torch.randn(images, 4, 6, 6, dtype=F64)).square().mean().backward()
    optimizer.step()
    atcd.after_step()


def unfoldings(cls, weight, groups):
    """Matrices that have rank at most r if the kernel is in the set of `cls` at rank r."""
    for block in weight.detach().chunk(groups):
        if cls is DeCEFConv2d:
            yield from (block[:, c].flatten(1) for c in range(block.shape[1]))
        elif cls is BasisConv2d:
            yield block.flatten(1)
        elif cls is CPACConv2d:
            yield from (block.movedim(k, 0).flatten(1) for k in range(4))
        else:
            yield from (f.movedim(k, 0).flatten(1) for f in block for k in range(3))


def distance(weight, cls, rank, groups):
    """Largest share of an unfolding's norm that is outside its first `rank` singular directions."""
    values = [torch.linalg.svdvals(m) for m in unfoldings(cls, weight, groups)]
    return max((v[rank:].norm() / v.norm()).item() for v in values)


# Projection -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cls", TYPES)
def test_a_projection_returns_to_the_set_and_a_second_one_moves_nothing(cls):
    atcd = ATCD(small(cls))
    convs = [(i, atcd.dense[i]) for i in (0, 4)]
    assert all(distance(conv.weight, cls, 2, conv.groups) < 1e-12 for _, conv in convs)
    with torch.no_grad():
        for _, conv in convs:
            conv.weight += 0.1 * torch.randn_like(conv.weight)
    off = [distance(conv.weight, cls, 2, conv.groups) for _, conv in convs]
    before = [conv.weight.detach().clone() for _, conv in convs]
    moved = atcd.project()
    assert min(off) > 1e-2
    errors = [((b - c.weight).norm() / b.norm()).item() for b, (_, c) in zip(before, convs, strict=True)]
    assert moved == pytest.approx(max(errors))
    for i, conv in convs:
        assert distance(conv.weight, cls, 2, conv.groups) < 1e-10
        assert_close(conv.weight, atcd.model[i].compose())
    once = [conv.weight.detach().clone() for _, conv in convs]
    assert atcd.project() < 1e-6
    for before, (_, conv) in zip(once, convs, strict=True):
        assert_close(conv.weight.detach(), before, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("cls", TYPES)
def test_at_the_start_both_networks_are_the_same_function_and_nothing_moves(cls):
    model = small(cls).eval()
    x = torch.randn(2, 4, 6, 6, dtype=F64)
    atcd = ATCD(model)
    assert atcd.model is model
    assert not any(isinstance(m, FactorizedConv2d) for m in atcd.dense.modules())
    assert_close(atcd.dense(x), model(x))
    assert atcd.project() < 1e-7


@pytest.mark.parametrize("every", [1, 2, "epoch"])
@pytest.mark.parametrize("cls", TYPES)
def test_after_an_epoch_both_networks_are_the_same_function(cls, every):
    """The rest too: biases, normalisation and its statistics, the convolution that is not factorised."""
    atcd = ATCD(small(cls), every)
    optimizer = torch.optim.SGD(atcd.dense.parameters(), lr=0.1, momentum=0.9)
    x = torch.randn(2, 4, 6, 6, dtype=F64)
    start = atcd.model.eval()(x)
    for _ in range(3):
        step(atcd, optimizer)
    atcd.after_epoch()
    atcd.dense.eval()
    assert not torch.allclose(atcd.model(x), start, rtol=1e-2)
    assert_close(atcd.model(x), atcd.dense(x))
    assert atcd.model[1].num_batches_tracked == 3
    assert distance(atcd.dense[0].weight, cls, 2, 2) < 1e-10


@pytest.mark.parametrize(
    ("every", "expected"),
    [
        (1, [[1, 2, 3, 4], [1, 2, 3, 4]]),
        (2, [[2, 4], [2, 4]]),
        (3, [[3, "end"], [3, "end"]]),  # an epoch is a new start
        (9, [["end"], ["end"]]),
        ("epoch", [["end"], ["end"]]),
    ],
)
def test_every_says_after_which_steps(every, expected, monkeypatch):
    atcd, calls = ATCD(small(DeCEFConv2d), every), []
    monkeypatch.setattr(atcd, "project", lambda: calls.append("project"))
    found = []
    for _ in expected:
        projected = []
        for after, now in [*[(atcd.after_step, step) for step in range(1, 5)], (atcd.after_epoch, "end")]:
            calls.clear()
            said = after()
            projected += [now] * len(calls)
        assert said is ("end" in projected)  # after_epoch's, by which statistics are measured again
        found.append(projected)
    assert found == expected


@pytest.mark.parametrize("every", [0, -1, True, False, "step", "3", 2.5])
def test_every_that_makes_no_sense(every):
    with pytest.raises(ValueError, match=f"every={every!r} is neither 'epoch' nor a whole number"):
        ATCD(small(DeCEFConv2d), every)


def test_a_network_without_factorised_layers():
    with pytest.raises(ValueError, match="no factorised layer"):
        ATCD(nn.Sequential(nn.Conv2d(3, 8, 3)))


@pytest.mark.parametrize("cls", OTHERS)
def test_a_layer_without_a_kernel_in_training_is_named(cls):
    for model in (small(cls), small(cls).eval()):
        with pytest.raises(ValueError, match=rf"layer '0' \({cls.__name__}\) has no kernel in training to project"):
            ATCD(model)


def test_a_layer_whose_factor_is_computed_is_named():
    model = small(DeCEFConv2d)
    parametrizations.weight_norm(model[0], "coefficients")
    with pytest.raises(ValueError, match="layer '0': its coefficients is computed before each call"):
        ATCD(model)


def test_frozen_layers_stay_frozen():
    model = small(DeCEFConv2d)
    model[0].requires_grad_(False)
    before = model[0].compose()
    atcd = ATCD(model)
    optimizer = torch.optim.SGD([p for p in atcd.dense.parameters() if p.requires_grad], lr=0.1)
    step(atcd, optimizer)
    assert_close(model[0].compose(), before)


# What a step is ---------------------------------------------------------------------------------------------------


def rank1_layer(scale=1.0, **kwargs):
    """The same kernel for every scale, which is split differently between channel and vertical filters."""
    torch.manual_seed(3)
    layer = Rank1Conv2d(5, 6, 3, bias=False, rank=1, dtype=F64, **kwargs)
    with torch.no_grad():
        layer.channel *= scale
        layer.vertical /= scale
    return layer


def tangent(weight, direction):
    """Projection of each filter's direction on the tangent space of the rank-1 tensors at it."""
    projected = torch.zeros_like(direction)
    for n, (filter_, d) in enumerate(zip(weight, direction, strict=True)):
        # Unit vectors of the three modes; a tangent is a change in one mode while the others stay.
        a, b, c = (torch.linalg.svd(filter_.movedim(k, 0).flatten(1)).U[:, 0] for k in range(3))
        inside = torch.einsum("cij,c,i,j->", d, a, b, c) * torch.einsum("c,i,j->cij", a, b, c)
        changes = [
            torch.einsum("cij,i,j,k,l->ckl", d, b, c, b, c),
            torch.einsum("cij,c,j,k,l->kil", d, a, c, a, c),
            torch.einsum("cij,c,i,k,l->klj", d, a, b, a, b),
        ]
        projected[n] = sum(changes) - 2 * inside  # the filter's own direction is in all three
    return projected


X = torch.randn(4, 5, 6, 6, dtype=F64, generator=torch.Generator().manual_seed(1))


def update(layer, lr, atcd):
    """Change of the composed kernel in one step of plain SGD, per learning rate, and the dense gradient."""
    before = layer.compose().detach().clone()
    dense = layer.to_conv2d()
    gradient = torch.autograd.grad(dense(X).sin().sum(), dense.weight)[0]
    if atcd:
        alternating = ATCD(layer, every=1)
        optimizer = torch.optim.SGD(alternating.dense.parameters(), lr=lr)
        alternating.dense(X).sin().sum().backward()
        optimizer.step()
        alternating.after_step()
    else:
        optimizer = torch.optim.SGD(layer.parameters(), lr=lr)
        layer(X).sin().sum().backward()
        optimizer.step()
    return (layer.compose().detach() - before) / lr, before, gradient


def test_a_step_is_along_the_tangent_space():
    errors = []
    for lr in (1e-4, 1e-5):
        moved, weight, gradient = update(rank1_layer(), lr, atcd=True)
        expected = -tangent(weight, gradient)
        errors.append(((moved - expected).norm() / expected.norm()).item())
    assert expected.norm() < 0.9 * gradient.norm()  # the projection takes something away
    assert_close(tangent(weight, expected), expected)
    assert_close((expected * (gradient + expected)).sum() / gradient.norm() ** 2, torch.zeros((), dtype=F64))
    assert errors[1] < 1e-3
    assert errors[1] == pytest.approx(errors[0] / 10, rel=0.2)  # what is left is of second order


def test_atcd_does_not_depend_on_how_the_norm_is_split_and_the_chain_rule_does():
    split = (1, 3)
    one, other = (update(rank1_layer(s), 1e-6, atcd=True)[0] for s in split)
    assert_close(one, other, rtol=1e-4, atol=1e-4 * one.abs().max().item())
    one, other = (update(rank1_layer(s, implementation="reconstructed"), 1e-6, atcd=False)[0] for s in split)
    assert (one - other).norm() > 0.5 * one.norm()


def test_a_frozen_basis_stays_and_a_trained_one_moves():
    for train_basis in (False, True):
        model = small(BasisConv2d, train_basis=train_basis)
        before = [model[0].basis.clone(), model[4].basis.clone()]
        atcd = ATCD(model, every=1)
        optimizer = torch.optim.SGD(atcd.dense.parameters(), lr=0.1)
        for _ in range(3):
            step(atcd, optimizer)
        for layer, basis, twin in zip((model[0], model[4]), before, (atcd.dense[0], atcd.dense[4]), strict=True):
            assert torch.equal(layer.basis, basis) != train_basis
            assert_close(twin.weight, layer.compose())
            # the nearest kernel in the span: what is left over of any other is at right angles to it
            other = torch.randn_like(twin.weight)
            layer.decompose_(other, warm_start=True)
            residual = (other - layer.compose()).reshape(layer.groups, -1, other[0].numel())
            span = layer.basis.reshape(layer.groups, layer.rank, -1)
            assert train_basis or (residual @ span.transpose(1, 2)).abs().max() < 1e-10


# A run ------------------------------------------------------------------------------------------------------------


def test_an_interrupted_run_ends_as_an_uninterrupted_one():
    config, layer = dataclasses.replace(TRAIN, epochs=3, atcd=3), "cpac"  # 4 steps an epoch; iterations start warm
    options = {"implementation": "factorized"}
    whole, state = network(layer, **options), Memory(stop_after=1)
    expected = train(whole, config, size=256)
    with pytest.raises(KeyboardInterrupt):
        train(network(layer, **options), config, state=state, size=256)
    state.stop_after = None
    resumed = network(layer, seed=99, **options)
    metrics = train(resumed, config, state=state, size=256)
    assert [m["epoch"] for m in metrics] == [2, 3]
    assert [m["test_loss"] for m in metrics] == [m["test_loss"] for m in expected[1:]]
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name
    untrained = network(layer, **options).state_dict()
    assert not any(torch.equal(v, untrained[n]) for n, v in whole.state_dict().items() if v.dim() > 1)


def test_what_fit_trains_is_not_what_it_trains_without_atcd():
    runs = []
    for atcd in (None, 1, "epoch"):
        model = network("rank1", implementation="reconstructed")
        train(model, dataclasses.replace(TRAIN, epochs=1, atcd=atcd), size=256)
        runs.append(model.layer1[0].conv1.compose())
    assert all(not torch.allclose(a, b, rtol=1e-3) for a, b in zip(runs, runs[1:] + runs[:1], strict=True))


def statistics(model):
    """Running means and standard deviations of the batch norms."""
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    return torch.cat([value for norm in norms for value in (norm.running_mean, norm.running_var.sqrt())])


def test_fit_measures_batch_norms_statistics_of_the_projected_kernels(monkeypatch):
    """Those that the dense twin gathered in the epoch are of kernels that are not in the low-rank set."""
    images, _ = DIGITS
    images = dataclasses.replace(images.subset(slice(0, 512)), crop_padding=1)  # what `train` trains on
    errors, kernels, losses = [], [], []
    for recalibrate in (Training.recalibrate, lambda self, inputs: None):
        monkeypatch.setattr(Training, "recalibrate", recalibrate)
        model = network("decef", implementation="reconstructed")
        losses.append(train(model, dataclasses.replace(TRAIN, epochs=2, atcd="epoch"))[-1]["test_loss"])
        kernels.append(model.layer3[0].conv2.compose())
        own = copy.deepcopy(model)
        again = [batch for epoch in range(4) for batch in images.batches(64, torch.Generator().manual_seed(epoch))]
        update_bn([images.normalize(batch) for batch, _ in again], own)
        errors.append((statistics(model) - statistics(own)).norm() / statistics(own).norm())
    assert torch.equal(*kernels)
    assert errors[0] < 0.3 * errors[1]
    assert losses[0] < losses[1]


def test_batch_norm_is_measured_again_at_the_size_of_the_training(monkeypatch):
    sizes = []
    monkeypatch.setattr(Training, "recalibrate", lambda self, inputs: sizes.append({x.shape[-1] for x in inputs}))
    model = network("decef", implementation="reconstructed")
    train(model, dataclasses.replace(TRAIN, epochs=2, atcd="epoch", scales=((0.5, 0.75),)))
    assert sizes == [{6}, {8}]


def test_planned_network():
    """Through `convert`, as a user has it."""
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3)).double()
    converted = convert(model, plan(model, "cpac", rank=4))
    atcd = ATCD(converted, "epoch")
    x = torch.randn(2, 3, 8, 8, dtype=F64)
    assert_close(atcd.dense(x), converted(x))
    assert [type(m) for m in atcd.dense] == [type(m) for m in model]


# The claim --------------------------------------------------------------------------------------------------------


def without_normalisation(**kwargs):
    """Five layers with nothing but ReLU between, as in arXiv 1808.04303's networks without batch norm."""
    layers, channels = [], 1
    for i, width in enumerate((16, 16, 32, 32, 32)):
        layers += [Rank1Conv2d(channels, width, 3, padding=1, bias=False, rank=1, **kwargs), nn.ReLU()]
        layers += [nn.MaxPool2d(2)] if i in (1, 3) else []
        channels = width
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 10))


@pytest.mark.parametrize(
    ("separate_init", "atcd", "trains"),
    [
        pytest.param(True, None, False, id="three separate 1-D layers"),
        pytest.param(False, 1, True, id="ATCD"),
        pytest.param(False, None, True, id="the chain, with the composed kernel's scale"),
    ],
)
def test_consecutive_1d_layers_do_not_train_where_atcd_does(separate_init, atcd, trains, request):
    """The papers' claim holds, but for the scale: drawn so that the composed kernel has He's variance, chains train.

    Three layers drawn apart shrink the signal's variance 27 times, 27^5 times in this network.
    """
    torch.set_flush_denormal(True)  # what shrinks so far becomes subnormal, which a CPU is slow with
    request.addfinalizer(lambda: torch.set_flush_denormal(False))
    options = {"implementation": "factorized" if atcd is None else "reconstructed"}
    model = without_normalisation(separate_init=separate_init, **options)
    config = dataclasses.replace(TRAIN, epochs=8, weight_decay=0.0, atcd=atcd)
    top1 = train(model, config, size=1437)[-1]["train_top1"]
    assert top1 > 35 if trains else top1 < 15


def test_buffers_that_are_in_no_state_dict_come_back():
    model = nn.Sequential(DeCEFConv2d(3, 8, 3, rank=2), nn.BatchNorm2d(8))
    model[1].register_buffer("counter", torch.zeros(1), persistent=False)
    atcd = ATCD(model)
    atcd.dense[1].counter += 1
    atcd.after_epoch()
    assert model[1].counter == 1
