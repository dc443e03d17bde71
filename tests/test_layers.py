"""The layer types: one function however they run, nearest factors of a kernel, and an initialisation like Conv2d's."""

import copy
import itertools
import math

import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.nn.utils import prune
from torch.testing import assert_close

from decef.layers import (
    LAYERS,
    Basis2021Conv2d,
    BasisConv2d,
    CPACConv2d,
    DeCEFConv2d,
    FactorizedConv2d,
    Rank1Conv2d,
)

TYPES = [pytest.param(cls, id=name) for name, cls in LAYERS.items() if issubclass(cls, FactorizedConv2d)]
IMPLEMENTATIONS = ("factorized", "reconstructed", "auto")
F64 = torch.float64

#: Arguments of a convolution with 4 input and 8 output channels, by name.
CASES = {
    "plain": {"kernel_size": 3},
    "stride": {"kernel_size": 3, "stride": 2, "padding": 1},
    "uneven stride": {"kernel_size": 3, "stride": (1, 3)},
    "uneven padding": {"kernel_size": 3, "padding": (0, 2)},
    "same": {"kernel_size": 3, "padding": "same"},
    "valid": {"kernel_size": 3, "padding": "valid"},
    "dilation": {"kernel_size": 3, "dilation": (2, 1), "padding": (2, 1)},
    "groups": {"kernel_size": 3, "padding": 1, "groups": 2},
    "depthwise": {"kernel_size": 3, "padding": 1, "groups": 4},
    "no bias": {"kernel_size": 3, "bias": False},
    "1 x 3": {"kernel_size": (1, 3), "padding": (0, 1)},
    "5 x 2": {"kernel_size": (5, 2), "stride": (2, 1), "padding": (2, 1)},
    "same, even kernel": {"kernel_size": 2, "padding": "same"},
    "same, half even kernel": {"kernel_size": (3, 4), "dilation": (2, 1), "padding": "same", "groups": 2},
    "reflect": {"kernel_size": 3, "padding": (1, 2), "padding_mode": "reflect"},
    "circular": {"kernel_size": 3, "padding": (2, 1), "padding_mode": "circular", "groups": 2},
    "replicate": {"kernel_size": 3, "stride": 2, "padding": 1, "padding_mode": "replicate"},
    "reflect, same, even kernel": {"kernel_size": (4, 3), "padding": "same", "padding_mode": "reflect"},
    "all at once": {
        "kernel_size": (3, 2),
        "stride": (2, 3),
        "padding": (1, 2),
        "dilation": (1, 2),
        "groups": 2,
        "bias": False,
    },
    "1x1": {"kernel_size": 1},
    "1x1, stride, groups": {"kernel_size": 1, "stride": 2, "padding": 1, "groups": 2},
}
NEEDS_SPACE = (DeCEFConv2d, Rank1Conv2d)  # refuse 1x1 kernels


def fitting(cases):
    """Every layer type with every case it can do."""
    return [
        pytest.param(cls, case, id=f"{name}-{case}")
        for name, cls in LAYERS.items()
        if issubclass(cls, FactorizedConv2d)
        for case in cases
        if not (cls in NEEDS_SPACE and CASES[case]["kernel_size"] == 1)
    ]


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def make(cls, case=None, *, rank=2, **kwargs):
    """A float64 layer for one of `CASES`, of rank at most `rank`, in evaluation mode, where all types have a kernel."""
    args = dict(CASES[case]) if case else {"kernel_size": 3}
    like = nn.Conv2d(4, 8, **args)
    rank = min(rank, cls.max_rank_for(*like.weight.shape, groups=like.groups))
    return used(cls(4, 8, **args, dtype=F64, rank=rank, **kwargs))


def used(layer):
    """`layer` in evaluation mode, a batch norm in it with statistics and weights as training leaves them."""
    for norm in layer.children():
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.5, 2)
        nn.init.normal_(norm.weight, 1, 0.3)
        nn.init.normal_(norm.bias)
    return layer.eval()


def relative_error(weight, approximation):
    return ((weight - approximation).norm() / weight.norm()).item()


# One function -----------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:Using padding='same'")  # the dense reference's
@pytest.mark.parametrize(("cls", "case"), fitting(CASES))
def test_forward_is_conv2d_with_the_composed_kernel(cls, case):
    layer = make(cls, case)
    bias = layer.compose_bias()
    dense = nn.Conv2d(4, 8, **{**CASES[case], "bias": bias is not None}, dtype=F64)
    with torch.no_grad():
        dense.weight.copy_(layer.compose())
        if bias is not None:
            dense.bias.copy_(bias)
    folded = layer.to_conv2d()
    assert repr(folded) == repr(dense)
    x = torch.randn(2, 4, 9, 10, dtype=F64)
    for implementation in IMPLEMENTATIONS:
        layer.implementation = implementation
        assert_close(layer(x), dense(x), rtol=0, atol=1e-10)
        assert_close(layer(x[0]), dense(x[0]), rtol=0, atol=1e-10)
    assert_close(folded(x), dense(x), rtol=0, atol=1e-10)


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("cls", TYPES)
def test_compose_is_the_formula_of_the_docstring(cls, groups):
    layer = used(cls(4, 6, (3, 2), groups=groups, dtype=F64, rank=2))
    kernels = []
    for g in range(groups):
        f = {n: t.chunk(groups)[g].detach() for n, t in layer.factors().items()}
        if cls is DeCEFConv2d:
            kernels.append(torch.einsum("ncr,crij->ncij", f["coefficients"], f["eigenfilters"]))
        elif cls is Basis2021Conv2d:
            norm = layer.norm
            scale = (norm.weight / (norm.running_var + norm.eps).sqrt()).chunk(groups)[g]
            kernels.append(torch.einsum("nq,q,qcij->ncij", f["coefficients"], scale, f["basis"]))
        elif cls is BasisConv2d:
            kernels.append(torch.einsum("nq,qcij->ncij", f["coefficients"], f["basis"]))
        elif cls is CPACConv2d:
            parts = f["filters"], f["channels"], f["vertical"], f["horizontal"]
            kernels.append(torch.einsum("nr,rc,ri,rj->ncij", *parts))
        else:
            kernels.append(torch.einsum("nmc,nmi,nmj->ncij", f["channel"], f["vertical"], f["horizontal"]))
    assert_close(layer.compose(), torch.cat(kernels), check_stride=False)


@pytest.mark.parametrize("cls", TYPES)
def test_implementation_says_what_runs(cls, monkeypatch):
    layer, x, calls = make(cls), torch.randn(1, 4, 5, 5, dtype=F64), []
    for name in ("forward_factorized", "compose"):
        whole = getattr(layer, name)
        monkeypatch.setattr(layer, name, lambda *a, name=name, whole=whole: calls.append(name) or whole(*a))

    def runs(implementation):
        calls.clear()
        layer.implementation = implementation
        layer(x)
        return list(calls)

    assert runs("factorized") == ["forward_factorized"]
    assert runs("reconstructed") == ["compose"]
    for seconds, expected in (
        ({"factorized": 1, "reconstructed": 2}, "forward_factorized"),
        ({"factorized": 2, "reconstructed": 1}, "compose"),
    ):
        monkeypatch.setattr("decef.layers.choice.MEASURED", {})
        monkeypatch.setattr("decef.layers.choice.seconds", lambda layer, name, *_, seconds=seconds: seconds[name])
        assert runs("auto") == [expected]
    monkeypatch.setattr("decef.layers.choice.seconds", lambda *args: pytest.fail("measured again"))
    assert runs("auto") == ["compose"]


@pytest.mark.parametrize("cls", TYPES)
def test_decomposing_sets_all_that_the_layer_has(cls):
    """Factors are not drawn first. In this mode, memory that was not written to holds NaN."""
    conv = nn.Conv2d(4, 8, 3)
    torch.use_deterministic_algorithms(True)
    try:
        assert nn.Linear(3, 3, device="meta").to_empty(device="cpu").weight.isnan().all()
        layer = cls.from_conv2d(conv, 1)
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(value.isfinite().all() for value in layer.state_dict().values())


@pytest.mark.parametrize("cls", TYPES)
def test_padding_and_dilation_may_be_changed_as_those_of_conv2d(cls):
    """Backbones for segmentation do so after they are made."""
    x = torch.randn(2, 4, 9, 9, dtype=F64)
    for implementation in IMPLEMENTATIONS if cls.composes_in_training else ("factorized",):
        layer = make(cls, padding=1, implementation=implementation).eval()
        dense = layer.to_conv2d()
        for changed in (layer, dense):
            changed.padding, changed.dilation = (2, 2), (2, 2)
        assert layer(x).shape == (2, 8, 9, 9)
        assert_close(layer(x), dense(x))
        assert_close(layer.to_conv2d()(x), dense(x))


@pytest.mark.parametrize("cls", TYPES)
def test_auto_measures_once_a_shape_and_computes_the_same(cls, monkeypatch):
    remembered = {}
    monkeypatch.setattr("decef.layers.choice.MEASURED", remembered)
    layer = make(cls, padding=1, padding_mode="reflect")
    layer.register_forward_hook(lambda *args: calls.append(1))
    calls = []
    for shape in ((2, 4, 6, 6), (2, 4, 6, 6), (1, 4, 6, 6)):
        x = torch.randn(shape, dtype=F64, requires_grad=True)
        dense = layer.to_conv2d()
        (expected,) = torch.autograd.grad(dense(x).sum(), x)
        assert_close(layer(x), dense(x))
        layer(x).sum().backward()
        assert_close(x.grad, expected)
    assert sum(map(len, remembered.values())) == 2
    assert len(calls) == 6  # measuring runs no hooks


def test_auto_measures_anew_where_other_factors_are_trained(monkeypatch):
    remembered = {}
    monkeypatch.setattr("decef.layers.choice.MEASURED", remembered)
    for train_basis in (False, True, False):
        make(BasisConv2d, train_basis=train_basis)(torch.randn(1, 4, 6, 6, dtype=F64))
    assert sum(map(len, remembered.values())) == 2


def test_auto_does_not_go_on_measuring_images_of_ever_other_sizes(monkeypatch):
    """Beyond some sizes the nearest decides: here the chain is faster up to 10 pixels."""
    measured = []
    monkeypatch.setattr("decef.layers.choice.MEASURED", {})
    monkeypatch.setattr(
        "decef.layers.choice.seconds",
        lambda layer, name, x, _: measured.append(x.shape[-1]) or (x.shape[-1] if name == "factorized" else 10.5),
    )
    layer = make(DeCEFConv2d)
    sizes = [5, 6, 7, 8, 10, 12, 14, 16, 9, 13, 40]
    chosen = [layer.prefers_factorized(torch.randn(1, 4, size, size, dtype=F64)) for size in sizes]
    assert chosen == [size <= 10 for size in sizes]
    assert set(measured) == set(sizes[:8])


@pytest.mark.parametrize("short", [("reconstructed",), ("factorized", "reconstructed")])
def test_auto_takes_what_the_memory_suffices_for(short, monkeypatch):
    monkeypatch.setattr("decef.layers.choice.MEASURED", {})
    layer, forward = make(DeCEFConv2d), DeCEFConv2d.forward

    def run(self, x):
        if self is not layer and self.implementation in short:
            raise torch.OutOfMemoryError("out of memory")
        return forward(self, x)

    monkeypatch.setattr(DeCEFConv2d, "forward", run)
    x = torch.randn(1, 4, 8, 8, dtype=F64)
    assert layer.prefers_factorized(x) == (len(short) == 1)
    assert_close(layer(x), layer.to_conv2d()(x))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("cls", TYPES)
def test_torch_fx_traces_layers_of_a_fixed_implementation(cls, training):
    for implementation in ("factorized", *(["reconstructed"] if cls.composes_in_training else [])):
        layer = make(cls, padding=1, implementation=implementation)
        model, x = nn.Sequential(layer).train(training), torch.randn(2, 4, 6, 6, dtype=F64)
        assert_close(torch.fx.symbolic_trace(model)(x), model(x))


def test_auto_times_the_backward_pass_where_a_gradient_goes_through(monkeypatch):
    timed = []
    monkeypatch.setattr("decef.layers.choice.MEASURED", {})
    monkeypatch.setattr("decef.layers.choice.seconds", lambda layer, name, x, trains: timed.append(trains) or 1.0)
    frozen, x = make(DeCEFConv2d).requires_grad_(False), torch.randn(1, 4, 8, 8, dtype=F64)
    through = x.clone().requires_grad_()
    for given in (x, through):
        frozen.prefers_factorized(given)
    assert timed == [False, False, True, True]
    with torch.no_grad():
        frozen.prefers_factorized(through)
    assert len(timed) == 4  # as for x


@pytest.mark.parametrize("implementation", ["factorized", "reconstructed"])
@pytest.mark.parametrize("cls", TYPES)
def test_gradcheck(cls, implementation):
    layer = used(cls(2, 4, (2, 3), (2, 1), (1, 0), groups=2, dtype=F64, rank=1))
    layer.implementation = implementation
    names, values = zip(*layer.named_parameters(), strict=True)
    values = [v.detach().clone().requires_grad_() for v in values]
    x = torch.randn(1, 2, 3, 4, dtype=F64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda x, *v: functional_call(layer, dict(zip(names, v, strict=True)), x), (x, *values)
    )


@pytest.mark.parametrize("cls", TYPES)
def test_channels_last(cls):
    layer = make(cls, "groups")
    x = torch.randn(2, 4, 6, 7, dtype=F64)
    expected, kernel = layer(x), layer.compose()
    layer.to(memory_format=torch.channels_last)
    assert_close(layer.compose(), kernel, check_stride=False)
    for layer.implementation in IMPLEMENTATIONS:
        out = layer(x.to(memory_format=torch.channels_last).requires_grad_())
        assert_close(out, expected, check_stride=False)
        out.sum().backward()
    layer.decompose_(kernel.detach())
    assert_close(layer.to_conv2d()(x), layer(x), check_stride=False)


# From scratch -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rank", [1, 3])
@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.parametrize("cls", TYPES)
def test_initial_kernel_has_he_variance(cls, groups, rank):
    layer = cls(64, 128, (3, 2), groups=groups, rank=rank).eval()
    he = math.sqrt(2 / (64 // groups * 6))
    assert layer.compose().square().mean().sqrt().item() == pytest.approx(he, rel=1e-4)
    assert layer.compose().mean().abs().item() < 0.2 * he
    layer.reset_parameters(0.37)
    assert layer.compose().square().mean().sqrt().item() == pytest.approx(0.37, rel=1e-4)


@pytest.mark.parametrize("cls", TYPES)
def test_a_start_from_nothing_can_leave_it(cls):
    """A kernel drawn at scale 0, in place of one of zeros, is zero, and its gradient is not."""
    layer = used(cls(4, 8, 3, rank=2, dtype=F64))
    layer.reset_parameters(0.0)
    assert layer.compose().norm() == 0
    layer.train()(torch.randn(2, 4, 6, 6, dtype=F64)).sin().sum().backward()
    assert getattr(layer, cls.scale_factor).grad.norm() > 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("cls", TYPES)
def test_layers_in_half_precision_start_at_the_scale_of_others(cls, dtype):
    """The squared norm of a large kernel overflows in half precision."""
    layer = cls(256, 256, 3, rank=8, dtype=dtype).eval()
    std = layer.compose().double().square().mean().sqrt().item()
    assert std == pytest.approx((2 / (9 * 256)) ** 0.5, rel=0.05)


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("cls", TYPES)
def test_squared_norm_is_the_composed_kernels_and_so_is_its_gradient(cls, groups):
    layer = used(cls(4, 6, (3, 2), groups=groups, dtype=F64, rank=3)).requires_grad_(True)
    factors = list(layer.factors().values())
    kernel = layer.compose().square().sum()
    assert_close(layer.squared_norm(), kernel)
    assert_close(torch.autograd.grad(layer.squared_norm(), factors), torch.autograd.grad(kernel, factors))


@pytest.mark.parametrize("rank", [1, 3])
def test_separate_1d_layers_are_drawn_as_conv2d_draws_them(rank):
    layer = Rank1Conv2d(32, 64, 3, rank=rank, separate_init=True)
    alone = [nn.Conv2d(32, 64 * rank, 1), nn.Conv2d(64 * rank, 64 * rank, (3, 1), groups=64 * rank)]
    alone.append(nn.Conv2d(64 * rank, 64, (1, 3), groups=64))  # which adds the terms: all are its inputs
    for factor, conv in zip(layer.factors().values(), alone, strict=True):
        assert factor.std().item() == pytest.approx(conv.weight.std().item(), rel=0.2)
        assert factor.numel() == conv.weight.numel()


@pytest.mark.parametrize("cls", TYPES)
def test_initial_bias_is_drawn_as_conv2d_draws_it(cls):
    bias = cls(3, 400, 3, rank=1).bias
    bound = 1 / math.sqrt(27)
    assert bias.abs().max().item() <= bound
    assert bias.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.1)


@pytest.mark.parametrize("cls", TYPES)
def test_initialisation_follows_the_seed(cls):
    def kernel(seed):
        torch.manual_seed(seed)
        return cls(4, 8, 3, rank=2).eval().compose()

    assert torch.equal(kernel(1), kernel(1))
    assert not torch.allclose(kernel(1), kernel(2))


# Nearest factors --------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:Using padding='same'")
@pytest.mark.parametrize(("cls", "case"), fitting(["plain"]))
def test_full_rank_reproduces_the_convolution(cls, case):
    conv = nn.Conv2d(4, 8, **CASES[case], dtype=F64).eval()
    layer = cls.from_conv2d(conv)
    assert layer.rank == layer.max_rank
    assert not layer.training
    x = torch.randn(2, 4, 9, 10, dtype=F64)
    for layer.implementation in IMPLEMENTATIONS:
        assert_close(layer(x), conv(x), rtol=0, atol=1e-10)


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("cls", TYPES)
def test_error_falls_with_the_rank_to_zero(cls, groups):
    conv = nn.Conv2d(6, 8, 3, groups=groups, dtype=F64).eval()
    full = cls.max_rank_for(*conv.weight.shape, groups=groups)
    ranks = sorted({1, 2, full // 2, full - 1, full} - {0})
    errors = [relative_error(conv.weight, cls.from_conv2d(conv, rank).compose()) for rank in ranks]
    assert all(a > b for a, b in itertools.pairwise(errors)), errors
    assert errors[0] < 1
    assert errors[-1] < 1e-12


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("cls", TYPES)
def test_decompose_returns_the_error_of_what_it_stored(cls, dtype):
    layer = used(cls(6, 8, 3, rank=2, dtype=dtype))
    weight = torch.randn(8, 6, 3, 3)
    error = layer.decompose_(weight)
    assert isinstance(error, float)
    assert error == pytest.approx(relative_error(weight.double(), layer.compose().double()), rel=1e-6)
    assert 0 < error < 1


def truncated_hosvd(tensor):
    """Rank-1 approximation by the leading singular vector of every unfolding."""
    vectors = [
        torch.linalg.svd(tensor.movedim(k, 0).flatten(1), full_matrices=False).U[:, 0] for k in range(tensor.dim())
    ]
    core = tensor
    for vector in vectors:
        core = torch.tensordot(vector, core, dims=([0], [0]))
    approximation = core
    for vector in vectors:
        approximation = approximation[..., None] * vector
    return approximation


@pytest.mark.parametrize("seed", range(5))
def test_rank1_filters_are_at_least_as_near_as_hosvd(seed):
    torch.manual_seed(seed)
    weight = torch.randn(10, 7, 3, 3, dtype=F64)
    layer = Rank1Conv2d(7, 10, 3, rank=1, dtype=F64)
    layer.decompose_(weight)
    ours = (weight - layer.compose()).flatten(1).norm(dim=1)
    hosvd = torch.stack([(f - truncated_hosvd(f)).norm() for f in weight])
    assert (ours <= hosvd + 1e-10).all()
    assert ours.sum() < 0.999 * hosvd.sum()


@pytest.mark.parametrize("seed", range(5))
def test_rank1_cpac_is_at_least_as_near_as_hosvd(seed):
    torch.manual_seed(seed)
    weight = torch.randn(5, 4, 3, 2, dtype=F64)
    error = CPACConv2d(4, 5, (3, 2), rank=1, dtype=F64).decompose_(weight)
    assert error <= relative_error(weight, truncated_hosvd(weight)) + 1e-10


@pytest.mark.parametrize("cls", TYPES)
@pytest.mark.parametrize("groups", [1, 2])
def test_a_kernel_of_the_set_is_found_exactly(cls, groups):
    rank = 1 if cls in (CPACConv2d, Rank1Conv2d) else 2  # beyond 1, finding CP terms is a hard problem
    source, target = (used(cls(6, 8, 3, groups=groups, rank=rank, dtype=F64)) for _ in range(2))
    assert target.decompose_(source.compose()) < 1e-7
    x = torch.randn(1, 6, 5, 5, dtype=F64)
    one, other = (layer.compose_bias()[:, None, None] for layer in (target, source))
    assert_close(target.forward_factorized(x, (0, 0)) - one, source(x) - other)


@pytest.mark.parametrize("rank", [1, 2, 3])
@pytest.mark.parametrize("cls", TYPES)
def test_decompose_copes_with_zeros(cls, rank):
    layer = cls(6, 8, 3, rank=rank, dtype=F64).eval()
    weight = torch.randn(8, 6, 3, 3, dtype=F64)
    weight[0], weight[:, 1] = 0, 0
    assert 0 < layer.decompose_(weight) < 1
    assert all(f.isfinite().all() for f in layer.factors().values())
    assert layer.decompose_(torch.zeros(8, 6, 3, 3)) == 0
    assert layer.compose().norm().item() < 1e-6


# Errors -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rank", [0, -1, 10_000, True, 2.0, None])
@pytest.mark.parametrize("cls", TYPES)
def test_impossible_rank_names_the_maximum(cls, rank):
    largest = cls.max_rank_for(8, 4, 3, 3)
    with pytest.raises(ValueError, match=rf"rank={rank!r}.*from 1 to {largest}$"):
        cls(4, 8, 3, rank=rank)


@pytest.mark.parametrize("cls", TYPES)
def test_rank_ends_at_the_maximum(cls):
    largest = cls.max_rank_for(8, 4, 3, 3)
    assert cls(4, 8, 3, rank=largest).rank == largest
    with pytest.raises(ValueError, match="rank"):
        cls(4, 8, 3, rank=largest + 1)


def test_maximal_ranks():
    """9 taps, 8 filters, 36 weights a filter; CP needs the product of all modes but the largest."""
    shape = (8, 4, 3, 3)
    largest = {name: LAYERS[name].max_rank_for(*shape) for name in LAYERS if name != "conv2d"}
    assert largest == {"decef": 8, "basisconv": 8, "basisconv2021": 8, "cpac": 36, "rank1": 9}
    grouped = {name: LAYERS[name].max_rank_for(*shape, groups=2) for name in largest}
    assert grouped == {"decef": 4, "basisconv": 4, "basisconv2021": 4, "cpac": 36, "rank1": 9}


@pytest.mark.parametrize("cls", TYPES)
def test_unknown_implementation(cls):
    with pytest.raises(ValueError, match="'fast' is not one of auto, factorized, reconstructed"):
        cls(4, 8, 3, rank=1, implementation="fast")


@pytest.mark.parametrize("cls", NEEDS_SPACE)
def test_1x1_is_refused(cls):
    with pytest.raises(ValueError, match="1x1"):
        cls(4, 8, 1, rank=1)


@pytest.mark.parametrize("cls", TYPES)
def test_arguments_that_conv2d_refuses(cls):
    for wrong in ({"groups": 3}, {"padding": "full"}, {"padding": "same", "stride": 2}, {"padding_mode": "wrap"}):
        with pytest.raises(ValueError, match=r"groups|padding"):
            cls(4, 8, 3, rank=1, **wrong)


@pytest.mark.parametrize("cls", TYPES)
def test_decompose_refuses_and_leaves_the_factors(cls):
    layer = make(cls)
    before = layer.compose().detach().clone()
    with pytest.raises(ValueError, match=r"\(8, 4, 3, 2\).*\(8, 4, 3, 3\)"):
        layer.decompose_(torch.zeros(8, 4, 3, 2))
    for bad in (math.nan, math.inf):
        weight = torch.randn(8, 4, 3, 3)
        weight[1, 2, 0, 0] = bad
        with pytest.raises(ValueError, match="NaN or infinite"):
            layer.decompose_(weight)
    assert torch.equal(layer.compose(), before)


# Orthonormal factors ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("cls", [DeCEFConv2d, BasisConv2d])
def test_initial_filters_are_orthonormal(cls, groups):
    layer = cls(4, 8, 3, groups=groups, rank=3, dtype=F64)
    rows = layer.eigenfilters.reshape(4, 3, 9) if cls is DeCEFConv2d else layer.basis.reshape(groups, 3, -1)
    assert_close(rows @ rows.mT, torch.eye(3, dtype=F64).expand(len(rows), 3, 3), rtol=0, atol=1e-12)


@pytest.mark.parametrize("cls", [DeCEFConv2d, Basis2021Conv2d])
def test_orthogonality_is_a_penalty_that_pulls_back(cls):
    layer = cls(4, 8, 3, rank=3, dtype=F64)
    filters = next(iter(layer.factors().values()))
    assert layer.orthogonality().item() < 1e-24
    with torch.no_grad():
        filters += 0.05 * torch.randn_like(filters)
    before = layer.orthogonality()
    before.backward()
    assert before.item() > 1e-4
    with torch.no_grad():
        filters -= 0.02 * filters.grad
    assert layer.orthogonality().item() < before.item()


def test_orthogonality_of_decefs_doubled_filters():
    """||4 I - I||^2 = 9 for every one of the orthonormal rows."""
    layer = DeCEFConv2d(4, 8, 3, rank=3, dtype=F64)
    with torch.no_grad():
        layer.eigenfilters.mul_(2)
    assert layer.orthogonality().item() == pytest.approx(9 * 3 * 4)


@pytest.mark.parametrize("groups", [1, 2])
def test_orthogonality_of_basisconv_is_the_authors(groups):
    """alpha / Q sum_i (1 - g_ii^2) + 2 (1 - alpha) / (Q (Q - 1)) sum_{i < j} g_ij^2, g of normalised filters."""
    layer = Basis2021Conv2d(4, 8, 3, groups=groups, rank=3, dtype=F64)
    with torch.no_grad():
        layer.basis.normal_()
    expected, alpha, q = 0.0, 0.5, 3
    for filters in layer.basis.flatten(1).chunk(groups):
        unit = filters / filters.norm(dim=1, keepdim=True)
        g = unit @ unit.mT
        off = sum(g[i, j] ** 2 for i in range(q) for j in range(i + 1, q))
        expected += alpha / q * (1 - g.diagonal() ** 2).sum() + 2 * (1 - alpha) / (q * (q - 1)) * off
    assert_close(layer.orthogonality(), expected)
    assert Basis2021Conv2d(4, 8, 3, rank=1).orthogonality() == 0


# Batch norm between -----------------------------------------------------------------------------------------------


def test_batch_norm_stands_between_the_convolutions():
    layer = Basis2021Conv2d(4, 8, 3, 2, 1, rank=3, bias=False, dtype=F64)
    x = torch.randn(5, 4, 9, 10, dtype=F64)
    basis, mix = nn.Conv2d(4, 3, 3, 2, 1, bias=False, dtype=F64), nn.Conv2d(3, 8, 1, bias=False, dtype=F64)
    with torch.no_grad():
        basis.weight.copy_(layer.basis)
        mix.weight.copy_(layer.coefficients[:, :, None, None])
    expected = nn.Sequential(basis, nn.BatchNorm2d(3, dtype=F64), mix)
    assert_close(layer(x), expected(x))
    assert_close(layer.eval()(x), expected.eval()(x))
    assert_close(layer.to_conv2d()(x), expected(x))
    assert all(p.requires_grad for p in layer.parameters())
    assert not any(p.requires_grad for p in layer.requires_grad_(False).to_conv2d().parameters())


def test_a_layer_with_batch_norm_has_no_kernel_in_training():
    layer = Basis2021Conv2d(4, 8, 3, rank=3)
    for refused in (layer.compose, layer.compose_bias, layer.squared_norm, lambda: layer.weight):
        with pytest.raises(RuntimeError, match="no composed kernel: call eval"):
            refused()
    with pytest.raises(ValueError, match="implementation='reconstructed' is not possible with batch norm"):
        Basis2021Conv2d(4, 8, 3, rank=3, implementation="reconstructed")
    layer(torch.randn(2, 4, 5, 5))  # auto: the chain
    assert layer.to_conv2d().weight.shape == (8, 4, 3, 3)  # what it is in evaluation mode
    assert layer.training


@pytest.mark.parametrize("implementation", ["factorized", "reconstructed"])
@pytest.mark.parametrize("train_basis", [None, False, True])
def test_basis_learns_only_when_asked(train_basis, implementation):
    options = {} if train_basis is None else {"train_basis": train_basis}
    layer = BasisConv2d(4, 8, 3, rank=3, implementation=implementation, **options)
    basis, coefficients = layer.basis.detach().clone(), layer.coefficients.detach().clone()
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    layer(torch.randn(2, 4, 5, 5)).square().mean().backward()
    optimizer.step()
    assert torch.equal(layer.basis, basis) is not bool(train_basis)
    assert not torch.equal(layer.coefficients, coefficients)
    assert "basis" in layer.state_dict()
    assert layer.basis.requires_grad is bool(train_basis)


# A module like any other ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cls", TYPES)
def test_deepcopy_is_equal_and_apart(cls):
    layer = make(cls, "all at once")
    x = torch.randn(1, 4, 9, 10, dtype=F64)
    twin, expected = copy.deepcopy(layer), layer(x)
    assert [p.requires_grad for p in twin.parameters()] == [p.requires_grad for p in layer.parameters()]
    assert torch.equal(twin(x), expected)
    twin.reset_parameters()
    assert not torch.allclose(twin(x), expected)
    assert torch.equal(layer(x), expected)


@pytest.mark.parametrize("cls", TYPES)
def test_state_dict_round_trip(cls):
    layer, other = make(cls, "groups"), make(cls, "groups")
    x = torch.randn(1, 4, 9, 10, dtype=F64)
    assert not torch.allclose(other(x), layer(x))
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other(x), layer(x))
    own = {name for name in layer.state_dict() if not name.startswith("norm.")}
    assert own == {*layer.factor_shapes(), "bias"}


@pytest.mark.parametrize("cls", TYPES)
def test_repr_shows_what_the_layer_is(cls):
    text = repr(make(cls, "all at once", implementation="factorized")).replace("(\n  4", "(4")  # where norm is a child
    for part in (
        f"{cls.__name__}(4, 8, kernel_size=(3, 2), stride=(2, 3)",
        *("padding=(1, 2)", "dilation=(1, 2)", "groups=2", "bias=False", "rank=2", "implementation='factorized'"),
    ):
        assert part in text


@pytest.mark.parametrize("cls", TYPES)
def test_like_takes_over_device_and_dtype(cls):
    layer = cls.like(nn.Conv2d(4, 8, 3, device="meta", dtype=torch.bfloat16), 1)
    assert {(p.device.type, p.dtype) for p in layer.parameters()} == {("meta", torch.bfloat16)}


def test_a_factor_that_is_computed_can_not_be_decomposed_into():
    layer = DeCEFConv2d(3, 8, 3, rank=2)
    prune.l1_unstructured(layer, "coefficients", 0.5)
    with pytest.raises(ValueError, match="coefficients is computed before each call"):
        layer.decompose_(torch.randn(8, 3, 3, 3))
