"""The layers under what torch offers: copies, checkpoints, transforms, export, compilation, several processes."""

import copy
import os
import pickle
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from support import ROOT
from test_layers import used
from torch import nn
from torch.func import functional_call, grad, vmap
from torch.nn.utils import parametrize, prune
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

from decef import Plan, cost, fold
from decef.conversion import convert
from decef.layers import LAYERS, Basis2021Conv2d, FactorizedConv2d
from decef.plans import plan
from decef.ranks import Budget, Share

F64 = torch.float64
FACTORIZED = [name for name, cls in LAYERS.items() if issubclass(cls, FactorizedConv2d)]
IMPLEMENTATIONS = ("factorized", "reconstructed", "auto")


@pytest.fixture(autouse=True)
def _fresh(monkeypatch):
    """The same numbers in every test, and nothing that "auto" has measured before."""
    torch.manual_seed(0)
    monkeypatch.setattr("decef.layers.choice.MEASURED", {})


def make(name, implementation="auto", **kwargs):
    """A layer with all arguments off their defaults, from 4 to 8 channels, in evaluation mode."""
    args = {"stride": (2, 1), "padding": (1, 2), "dilation": (1, 2), "groups": 2, "padding_mode": "circular"}
    layer = used(LAYERS[name](4, 8, (3, 2), **{**args, **kwargs}, rank=2))
    layer.implementation = implementation
    return layer


def network(implementation="auto", **kwargs):
    """One layer of every type, a batch norm and a classifier."""
    layers = [layer for name in FACTORIZED for layer in (make(name, implementation, **kwargs), nn.Conv2d(8, 4, 1))]
    return nn.Sequential(*layers, nn.BatchNorm2d(4), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3))


def images(batch=3, channels=4):
    return torch.randn(batch, channels, 12, 9)


def dense_network():
    """Convolutions in every kind of container."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem = nn.Conv2d(3, 8, 3, padding=1)
            self.norm = nn.BatchNorm2d(8)
            self.steps = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.ReLU())
            self.branches = nn.ModuleDict({"wide": nn.Conv2d(8, 8, (1, 3), padding=(0, 1)), "none": nn.Identity()})
            self.tail = nn.ModuleList([nn.ModuleList([nn.Conv2d(8, 6, 3, groups=2), nn.ReLU()])])

        def forward(self, x):
            x = self.steps(self.norm(self.stem(x)))
            x = self.branches["wide"](x) + self.branches["none"](x)
            for module in self.tail[0]:
                x = module(x)
            return x

    return Net()


CONVOLUTIONS = ["stem", "steps.0", "branches.wide", "tail.0.0"]


# Copies and checkpoints -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("again", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
def test_a_copy_of_a_network_in_training(again):
    model, x = network().train(), images()
    model(x).square().sum().backward()
    twin = again(model)
    assert repr(twin) == repr(model)
    for (name, a), (_, b) in zip(model.named_parameters(), twin.named_parameters(), strict=True):
        assert a is not b, name
        assert a.requires_grad == b.requires_grad, name
        assert torch.equal(a, b), name
    assert torch.equal(twin.eval()(x), model.eval()(x))


@pytest.mark.parametrize("name", FACTORIZED)
def test_state_dict_through_a_file(name, tmp_path):
    layer, other, x = make(name), make(name), images()
    torch.save(layer.state_dict(), tmp_path / "layer.pt")
    assert not torch.allclose(other(x), layer(x))
    other.load_state_dict(torch.load(tmp_path / "layer.pt", weights_only=True))
    other.implementation = layer.implementation = "factorized"
    assert torch.equal(other(x), layer(x))


@pytest.mark.parametrize("name", FACTORIZED)
def test_a_converted_network_from_its_plan_and_its_weights(name, tmp_path):
    torch.manual_seed(1)
    model = dense_network()
    made = plan(model, name, rank=2, exclude="stem", input_size=(3, 8, 8), implementation="factorized")
    trained = convert(model, made)
    trained(images(channels=3)).sum().backward()
    torch.optim.SGD(trained.parameters(), lr=0.01).step()
    made.save(tmp_path / "plan.yaml")
    torch.save(trained.state_dict(), tmp_path / "weights.pt")
    torch.manual_seed(2)
    again = convert(dense_network(), Plan.load(tmp_path / "plan.yaml"), from_scratch=True)
    again.load_state_dict(torch.load(tmp_path / "weights.pt", weights_only=True))
    x = images(channels=3)
    assert torch.equal(again.eval()(x), trained.eval()(x))
    assert repr(again) == repr(trained)


@pytest.mark.parametrize("name", FACTORIZED)
def test_a_layer_of_another_rank_is_refused(name):
    with pytest.raises(RuntimeError, match="size mismatch"):
        make(name).load_state_dict(LAYERS[name](4, 8, (3, 2), groups=2, rank=1).state_dict())


@pytest.mark.parametrize("name", FACTORIZED)
def test_measuring_leaves_no_trace(name):
    layer, x = make(name), images().requires_grad_()
    before = copy.deepcopy(layer.state_dict())
    layer(x)
    assert all(value.grad is None for value in (x, *layer.parameters()))
    assert all(torch.equal(value, before[key]) for key, value in layer.state_dict().items())


# Devices and dtypes -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FACTORIZED)
def test_from_the_meta_device(name):
    with torch.device("meta"):
        layer = make(name)
    assert {p.device.type for p in layer.parameters()} == {"meta"}
    assert layer(images().to("meta")).shape == make(name)(images()).shape
    layer.to_empty(device="cpu")
    with torch.no_grad():
        for value in [*layer.parameters(), *(b for b in layer.buffers() if b.is_floating_point())]:
            value.fill_(torch.nan)
    layer.reset_parameters()
    x = images()
    assert layer(x).isfinite().all()
    assert_close(layer(x), layer.to_conv2d()(x))
    assert 0.2 < layer.compose().var().item() / (2 / 12) < 3  # He's variance, 12 weights a filter
    with torch.device("meta"):
        other = make(name)
    other.load_state_dict(layer.state_dict(), assign=True)
    assert torch.equal(other.compose(), layer.compose())


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("name", FACTORIZED)
def test_autocast_to_bfloat16(name, implementation):
    layer, x = make(name, implementation).requires_grad_(), images().requires_grad_()
    wanted = [x, *layer.parameters()]
    expected = layer(x)
    gradients = torch.autograd.grad(expected.sum(), wanted)
    with torch.autocast("cpu", torch.bfloat16):
        out = layer(x)
    assert out.dtype == torch.bfloat16
    assert (out - expected).norm() < 0.02 * expected.norm()
    for a, b in zip(torch.autograd.grad(out.float().sum(), wanted), gradients, strict=True):
        assert a.dtype == torch.float32
        assert (a - b).norm() < 0.03 * b.norm()


@pytest.mark.parametrize("module_too", [False, True])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_channels_last_network(implementation, module_too):
    model, x = network(implementation).double().requires_grad_(), images().double().requires_grad_()
    model.train(implementation != "reconstructed")
    wanted = [x, *model.parameters()]
    loss = model(x).square().sum()
    expected = torch.autograd.grad(loss, wanted)
    if module_too:
        model.to(memory_format=torch.channels_last)
    out = model(x.to(memory_format=torch.channels_last))
    assert_close(out.square().sum(), loss)
    assert_close(torch.autograd.grad(out.square().sum(), wanted), expected, check_stride=False)


# Transforms, export, compilation ----------------------------------------------------------------------------------


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("name", FACTORIZED)
def test_functional_transforms(name, implementation):
    """Gradients per image by vmap(grad) are those of a loop, and grad alone is autograd's."""
    layer, x = make(name, implementation).double().requires_grad_(), images().double()
    values = {k: v.detach() for k, v in layer.named_parameters()}

    def loss(values, x):
        return functional_call(layer, values, x).sin().sum()

    per_image = vmap(grad(loss), in_dims=(None, 0))(values, x)
    whole = grad(loss)(values, x)
    expected = torch.autograd.grad(layer(x).sin().sum(), list(layer.parameters()))
    for (key, value), total in zip(layer.named_parameters(), expected, strict=True):
        rows = torch.stack([torch.autograd.grad(layer(image).sin().sum(), value)[0] for image in x])
        assert_close(per_image[key], rows)
        assert_close(whole[key], total)
    assert_close(vmap(layer)(x), layer(x))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("name", FACTORIZED)
def test_an_ensemble_by_vmap(name, implementation):
    layers = [make(name, implementation) for _ in range(3)]
    stacked = {k: torch.stack([layer.state_dict()[k] for layer in layers]) for k in layers[0].state_dict()}
    x = images()
    out = vmap(lambda values: functional_call(layers[0], values, x))(stacked)
    assert_close(out, torch.stack([layer(x) for layer in layers]))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("name", FACTORIZED)
def test_factors_that_are_computed(name, implementation):
    """As a hypernetwork or a step of meta-learning gives them."""
    layer, x, scale = make(name, implementation), images(), torch.tensor(2.0, requires_grad=True)
    values = {k: v.detach() * scale for k, v in layer.named_parameters()}
    out = functional_call(layer, values, x)
    assert torch.autograd.grad(out.square().sum(), scale)[0] != 0
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter *= 2
    assert_close(out, layer(x))


@pytest.mark.parametrize("name", FACTORIZED)
def test_activation_checkpointing(name):
    """Timing the two implementations is no part of what is computed again."""
    layer, x = make(name, "auto"), torch.randn(2, 4, 11, 7, requires_grad=True)  # a shape that no other test has timed
    checkpoint(layer, x, use_reentrant=False).square().sum().backward()
    once, x.grad = x.grad, None
    layer(x).square().sum().backward()
    assert_close(x.grad, once)


@pytest.mark.parametrize("part", ["bias", "basis", "norm.weight", "norm.bias"])
def test_timing_of_a_layer_whose_parts_are_computed(part):
    """By a parametrisation or by pruning; the user's graph stays as it is."""
    layer, x = Basis2021Conv2d(4, 6, 3, rank=3).eval(), torch.randn(2, 4, 13, 7)
    owner, name = (layer.norm, part.removeprefix("norm.")) if "." in part else (layer, part)
    prune.l1_unstructured(owner, name, 0.5)
    layer(x).square().sum().backward()
    layer(x).square().sum().backward()
    prune.remove(owner, name)
    parametrize.register_parametrization(owner, name, nn.Identity())
    layer(x).square().sum().backward()


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")  # of torch.jit.trace
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_trace(implementation):
    model, x = network(implementation).eval(), images()
    traced = torch.jit.trace(model, x, check_trace=False)
    assert_close(traced(2 * x), model(2 * x))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_export(implementation):
    model, x = network(implementation).eval(), images()
    program = torch.export.export(model, (x,))
    assert_close(program.module()(x), model(x))
    y = images()
    assert_close(program.module()(y), model(y))
    assert set(program.state_dict) == set(model.state_dict())


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_export_for_any_batch(implementation):
    model = network(implementation, padding_mode="zeros").eval()
    batch = torch.export.Dim("batch", min=2, max=512)
    program = torch.export.export(model, (images(),), dynamic_shapes=({0: batch},))
    for size in (2, 7):
        x = images(size)
        assert_close(program.module()(x), model(x))


@pytest.mark.parametrize("implementation", ["auto", "reconstructed"])
def test_compile(implementation):
    torch.compiler.reset()
    model = network(implementation, padding_mode="zeros").double().requires_grad_()
    if implementation == "auto":  # by MACs, as it is there, all others run as chains
        model[2 * FACTORIZED.index("rank1")].implementation = "factorized"
    model.train(implementation != "reconstructed")
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    for batch in (3, 5) if implementation == "auto" else (3,):  # the second is compiled for any batch
        x = images(batch).double().requires_grad_()
        wanted = [x, *model.parameters()]
        outs = [f(x) for f in (compiled, model)]
        assert_close(*outs)
        assert_close(*[torch.autograd.grad(out.square().sum(), wanted) for out in outs])


# Several devices and processes ------------------------------------------------------------------------------------


def gradients_of(model, x, y):
    nn.functional.cross_entropy(model(x), y).backward()
    module = model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model
    return {k: p.grad for k, p in module.named_parameters() if p.grad is not None}


def work(rank, state, x, y):
    torch.set_num_threads(1)
    # After "file://" comes the name of a host: "file://./store" is /store, and what another run left there.
    dist.init_process_group("gloo", init_method=Path("store").resolve().as_uri(), rank=rank, world_size=2)
    torch.manual_seed(rank)  # each draws other factors; DDP broadcasts those of the first
    model = network().double().eval()  # batch norm would see half the batch
    if rank == 0:
        model.load_state_dict(state)
    gradients = gradients_of(nn.parallel.DistributedDataParallel(model), x[rank::2], y[rank::2])
    torch.save(gradients, f"{rank}.pt")
    dist.destroy_process_group()


TWO_PROCESSES = f"""
import sys
sys.path.insert(0, {str(ROOT / "tests")!r})
import torch
import torch.multiprocessing as mp
from test_compat import work
given = torch.load("given.pt", weights_only=True)
mp.start_processes(work, tuple(given), nprocs=2, start_method="fork")
"""


def test_two_processes_have_the_gradients_of_one(call, tmp_path):
    model = network().double().eval()
    x, y = images(6).double(), torch.tensor([0, 1, 2, 2, 0, 1])
    torch.save([model.state_dict(), x, y], tmp_path / "given.pt")
    (tmp_path / "two.py").write_text(TWO_PROCESSES)
    done = call(tmp_path / "two.py", cwd=tmp_path, env={**os.environ, "GLOO_SOCKET_IFNAME": "lo"})
    assert done.returncode == 0, done.stderr
    expected = gradients_of(model, x, y)
    frozen = {k for k, p in model.named_parameters() if not p.requires_grad}
    assert frozen == {f"{2 * FACTORIZED.index('basisconv')}.basis"}
    for rank in range(2):
        assert_close(torch.load(tmp_path / f"{rank}.pt", weights_only=True), expected)


# Conversion -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FACTORIZED)
def test_conversion_keeps_containers_hooks_and_modes(name):
    model, calls = dense_network(), []
    model.norm.register_forward_hook(lambda *args: calls.append("norm"))
    model.steps.register_forward_pre_hook(lambda *args: calls.append("steps"))
    model.norm.eval()
    model.steps[0].eval()
    before = copy.deepcopy(model.state_dict())
    modules = dict(model.named_modules())
    modes = {n: m.training for n, m in modules.items()}
    new = convert(model, plan(model, name, rank=2))
    new(images(channels=3))
    assert calls == ["norm", "steps"]
    norms = [f"{key}.norm" for key in CONVOLUTIONS if name == "basisconv2021"]
    found = {n: m for n, m in new.named_modules() if n not in norms}
    assert all(new.get_submodule(n).training == new.get_submodule(n.removesuffix(".norm")).training for n in norms)
    assert {n: m.training for n, m in found.items()} == modes
    for key, module in found.items():
        assert type(module) is (LAYERS[name] if key in CONVOLUTIONS else type(modules[key]))
        assert module is not modules[key]
    assert list(found) == list(modules)
    with torch.no_grad():
        for value in new.state_dict().values():
            value.zero_()
    assert dict(model.named_modules()) == modules
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("from_scratch", [False, True])
@pytest.mark.parametrize("name", FACTORIZED)
def test_frozen_weights_stay_frozen(name, from_scratch):
    model = dense_network()
    model.stem.requires_grad_(False)
    model.steps[0].weight.requires_grad_(False)
    model.branches["wide"].bias.requires_grad_(False)
    new = convert(model, plan(model, name, rank=2), from_scratch=from_scratch)
    for key in CONVOLUTIONS:
        conv, layer = model.get_submodule(key), new.get_submodule(key)
        for own, parameter in layer.named_parameters():
            twin = conv.bias if own == "bias" else conv.weight
            fixed = (name, own) == ("basisconv", "basis")
            assert parameter.requires_grad == (twin.requires_grad and not fixed), (key, own)


@pytest.mark.parametrize("name", FACTORIZED)
def test_frozen_layers_stay_frozen_when_folded(name):
    layer = make(name).requires_grad_(False)
    assert not any(p.requires_grad for p in fold(layer).parameters())


@pytest.mark.parametrize("from_scratch", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("name", FACTORIZED)
def test_dtype_is_kept(name, dtype, from_scratch):
    model = dense_network().to(dtype)
    made = plan(model, name, rank=Share(1))
    new = convert(model, made, from_scratch=from_scratch)
    assert {p.dtype for p in new.parameters()} == {dtype}
    assert new.eval()(images(channels=3).to(dtype)).dtype == dtype
    if not from_scratch:
        limit = 1e-12 if dtype == F64 else 0.02
        assert max(row.error for row in made.rows) < limit
    assert {p.dtype for p in fold(new).parameters()} == {dtype}


@pytest.mark.parametrize("name", FACTORIZED)
def test_a_converted_network_can_be_converted_further(name):
    model = dense_network().double().eval()
    first = convert(model, plan(model, name, rank=2, include="steps.*"))
    made = plan(first, "basisconv", rank=3, exclude="stem", input_size=(3, 8, 8))
    rows = {row.name: row for row in made.rows}
    assert list(rows) == CONVOLUTIONS
    kept = rows["steps.0"]
    assert (kept.action, kept.reason) == ("keep", f"{LAYERS[name].__name__} is not a plain Conv2d")
    count = sum(p.numel() for own, p in first.steps[0].named_parameters() if own != "bias")
    assert kept.params_before == kept.params_after == count
    assert kept.macs_before == kept.macs_after == cost(first, (3, 8, 8)).loc["steps.0", "macs"]
    second = convert(first, made)
    assert type(second.steps[0]) is LAYERS[name]
    assert second.steps[0] is not first.steps[0]
    assert torch.equal(second.steps[0].compose(), first.steps[0].compose())
    assert set(made.ranks) == {"branches.wide", "tail.0.0"}


# Tied weights -----------------------------------------------------------------------------------------------------


def tied():
    """Two convolutions, one parameter."""
    model = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)).double().eval()
    model[1].weight = model[0].weight
    return model


@pytest.mark.parametrize("name", FACTORIZED)
def test_tied_weights_give_equal_layers(name):
    model = tied()
    x = images(channels=8).double()
    made = plan(model, name, rank=Share(1))
    new = convert(model, made)
    assert_close(new(x), model(x))
    assert torch.equal(new[0].compose(), new[1].compose())
    assert torch.equal(new[1].bias, model[1].bias)
    assert model[0].weight is model[1].weight


@pytest.mark.parametrize("name", FACTORIZED)
@pytest.mark.parametrize("from_scratch", [False, True])
def test_tied_weights_stay_tied(name, from_scratch):
    model = tied()
    made = plan(model, name, rank=2, input_size=(8, 6, 6))
    new = convert(model, made, from_scratch=from_scratch)
    assert all(new[1].factors()[key] is factor for key, factor in new[0].factors().items())
    assert torch.equal(new[0].compose(), new[1].compose())
    norms = [norm for layer in new for norm in used(layer).children()]  # which have their own inputs' statistics
    assert len(norms) == len(set(norms)) == 2 * (name == "basisconv2021")
    folded, x = fold(new), images(channels=8).double()
    assert_close(folded(x), new(x))
    assert (folded[0].weight is folded[1].weight) == (not norms)
    assert_close(folded[0].weight, new[0].compose())
    assert made.rows[1].reason == "shares the weight of '0'"
    assert made.rows[1].params_before == 0
    assert made.rows[1].params_after == (4 if norms else 0)
    dense, small = (cost(m, (8, 6, 6)).attrs for m in (model, new))
    for column in ("params", "macs"):
        saved = sum(getattr(row, f"{column}_before") - getattr(row, f"{column}_after") for row in made.rows)
        assert dense[column] - small[column] == saved


@pytest.mark.parametrize("name", FACTORIZED)
@pytest.mark.parametrize("what", ["params", "flops"])
def test_a_budget_holds_for_tied_weights(name, what):
    model = tied()
    dense = cost(model, (8, 6, 6)).attrs
    new = convert(model, name, rank=Budget(**{what: 0.6}), input_size=(8, 6, 6))
    assert cost(new, (8, 6, 6)).attrs[what] <= 0.6 * dense[what] + 1


def test_a_weight_shared_with_a_kept_layer_is_kept():
    model = tied()
    made = plan(model, "decef", rank=2, exclude="1")
    assert [row.reason for row in made.rows] == ["shares its weight with '1', which is kept", "excluded by '1'"]
    made = plan(model, "decef", rank=2)
    made.rows[1].rank = 3
    with pytest.raises(ValueError, match="'0' and '1' share one weight"):
        convert(model, made)


def test_a_tied_bias_stays_tied():
    model = nn.Sequential(nn.Conv2d(8, 8, 3), nn.Conv2d(8, 8, 3))
    model[1].bias = model[0].bias
    new = convert(model, "decef", rank=2)
    assert new[0].bias is new[1].bias
    assert fold(new)[0].bias is not new[0].bias
