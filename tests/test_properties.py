"""What must hold for any shape and any arguments of Conv2d, on examples that hypothesis draws."""

import math

import numpy as np
import pytest
import torch
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from test_layers import used
from torch import nn
from torch.testing import assert_close

from decef.layers import LAYERS, BasisConv2d, CPACConv2d, DeCEFConv2d, FactorizedConv2d, Rank1Conv2d

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same'")  # the dense reference's
F64 = torch.float64
TYPES = [pytest.param(cls, id=name) for name, cls in LAYERS.items() if issubclass(cls, FactorizedConv2d)]
few = settings(max_examples=15, deadline=None, derandomize=True)
pairs = {"kernel_size": st.integers(1, 5), "stride": st.integers(1, 3), "dilation": st.integers(1, 2)}


@st.composite
def arguments(draw):
    """Arguments of a convolution that an input of 9 x 9 and more is large enough for."""
    groups = draw(st.integers(1, 3))
    args = {name: draw(st.tuples(side, side)) for name, side in pairs.items()}
    args["padding"] = draw(st.sampled_from(["same", "valid"]) | st.tuples(st.integers(0, 3), st.integers(0, 3)))
    if args["padding"] == "same":
        args["stride"] = 1
    return {
        "in_channels": groups * draw(st.integers(1, 3)),
        "out_channels": groups * draw(st.integers(1, 4)),
        "groups": groups,
        "bias": draw(st.booleans()),
        "padding_mode": draw(st.sampled_from(["zeros", "reflect", "replicate", "circular"])),
        **args,
    }


SHARES = st.floats(0, 1)
SEEDS = st.integers(0, 2**31)
EVEN_SAME = {"in_channels": 4, "out_channels": 6, "groups": 2, "kernel_size": (4, 3), "padding": "same"}


def dense(cls, args, seed, scale=1.0):
    """A float64 convolution of these arguments with Gaussian weights, if `cls` can stand for it."""
    assume(args["kernel_size"] != (1, 1) or cls not in (DeCEFConv2d, Rank1Conv2d))
    torch.manual_seed(seed)
    conv = nn.Conv2d(**args, dtype=F64)
    with torch.no_grad():
        conv.weight.normal_(std=scale)
    return conv


def rank_at(cls, conv, share):
    """A legal rank: the lowest for 0, the highest for 1."""
    return 1 + round(share * (cls.max_rank_for(*conv.weight.shape, groups=conv.groups) - 1))


def images(conv):
    return torch.randn(2, conv.in_channels, 9, 11, dtype=F64)


@pytest.mark.parametrize("cls", TYPES)
@few
@given(args=arguments(), share=SHARES, seed=SEEDS)
@example(args=EVEN_SAME, share=0.5, seed=0)
def test_every_implementation_is_the_convolution_with_the_composed_kernel(cls, args, share, seed):
    conv = dense(cls, args, seed)
    layer = used(cls(**args, rank=rank_at(cls, conv, share), dtype=F64))
    bias = layer.compose_bias()
    conv = nn.Conv2d(**{**args, "bias": bias is not None}, dtype=F64)
    with torch.no_grad():
        conv.weight.copy_(layer.compose())
        if bias is not None:
            conv.bias.copy_(bias)
    x = images(conv)
    expected = conv(x)
    for layer.implementation in ("factorized", "reconstructed"):
        assert_close(layer(x), expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("cls", TYPES)
@few
@given(args=arguments(), training=st.booleans(), seed=SEEDS)
@example(args=EVEN_SAME, training=False, seed=0)
def test_there_and_back_at_full_rank_is_the_convolution(cls, args, training, seed):
    conv = dense(cls, args, seed).train(training)
    back = cls.from_conv2d(conv).to_conv2d()
    if not cls.composes_in_training and conv.bias is None:
        conv.bias = nn.Parameter(conv.weight.new_zeros(conv.out_channels))  # the shift of a batch norm
    assert repr(back) == repr(conv)
    assert back.training is training
    assert_close(back.state_dict(), conv.state_dict(), rtol=0, atol=1e-10)
    x = images(conv)
    assert_close(back(x), conv(x), rtol=0, atol=1e-10)


def kept_in_theory(cls, weight, rank, groups):
    """Share of the squared norm in the `rank` largest eigenvalues of the Gram matrices that each method truncates."""
    blocks = np.split(weight.detach().numpy(), groups)
    if cls is DeCEFConv2d:
        matrices = [block[:, c].reshape(len(block), -1) for block in blocks for c in range(block.shape[1])]
    else:
        matrices = [block.reshape(len(block), -1) for block in blocks]
    kept = sum(np.linalg.eigvalsh(m.T @ m)[::-1][:rank].sum() for m in matrices)
    return kept / sum(np.square(m).sum() for m in matrices)


@pytest.mark.parametrize("cls", [DeCEFConv2d, BasisConv2d])
@few
@given(args=arguments(), share=SHARES, seed=SEEDS, scale=st.sampled_from([1e-3, 1.0, 1e3]))
def test_truncation_error_is_the_theoretical_one(cls, args, share, seed, scale):
    conv = dense(cls, args, seed, scale)
    rank = rank_at(cls, conv, share)
    layer = cls.like(conv, rank)
    error = layer.decompose_(conv.weight)
    spectrum = cls.spectrum(conv.weight, groups=conv.groups)
    assert spectrum.shape == (layer.max_rank,)
    assert (spectrum.diff() <= 1e-12 * spectrum[0]).all()
    assert spectrum.sum().item() == pytest.approx(conv.weight.square().sum().item())
    assert 1 - error**2 == pytest.approx((spectrum[:rank].sum() / spectrum.sum()).item(), abs=1e-12)
    assert 1 - error**2 == pytest.approx(kept_in_theory(cls, conv.weight, rank, conv.groups), abs=1e-12)


def kept_at_most(cls, weight, rank, groups):
    """The least of the bounds that all unfoldings into two modes set: a term has rank 1 in each of them."""
    kept = []
    if cls is CPACConv2d:
        blocks = weight.detach().reshape(groups, weight.shape[0] // groups, *weight.shape[1:])
        splits = [[1], [2], [3], [4], [1, 2], [1, 3], [1, 4]]
    else:
        blocks, splits = weight.detach(), [[1], [2], [3]]
    for rows in splits:
        columns = [k for k in range(1, blocks.dim()) if k not in rows]
        matrices = blocks.permute(0, *rows, *columns).reshape(
            len(blocks), math.prod(blocks.shape[k] for k in rows), math.prod(blocks.shape[k] for k in columns)
        )
        kept.append(torch.linalg.svdvals(matrices)[:, :rank].square().sum() / weight.square().sum())
    return torch.stack(kept).min().item()


@pytest.mark.parametrize("cls", [CPACConv2d, Rank1Conv2d])
@few
@given(args=arguments(), share=SHARES, seed=SEEDS)
def test_cp_error_is_at_least_the_bounds(cls, args, share, seed):
    conv = dense(cls, args, seed)
    rank = rank_at(cls, conv, share)
    layer = cls.like(conv, rank)
    kept = 1 - layer.decompose_(conv.weight) ** 2
    spectrum = cls.spectrum(conv.weight, groups=conv.groups)
    bound = (spectrum[:rank].sum() / spectrum.sum()).item()
    assert spectrum.shape == (layer.max_rank,)
    assert kept <= bound + 1e-12
    assert kept <= kept_at_most(cls, conv.weight, rank, conv.groups) + 1e-12
    assert kept > 0
    if rank == layer.max_rank:
        assert kept == pytest.approx(1)


def test_bounds_are_not_empty_where_channels_are_few():
    """Filters of one channel are matrices, so for rank 1 the bound is the truth; CPAC's is for much wider layers."""
    one_channel = Rank1Conv2d(1, 5, 3, rank=2, dtype=torch.float64)
    weight = torch.randn(5, 1, 3, 3, dtype=torch.float64)
    error, spectrum = one_channel.decompose_(weight), Rank1Conv2d.spectrum(weight)
    assert 1 - error**2 == pytest.approx((spectrum[:2].sum() / spectrum.sum()).item(), abs=1e-9)
    assert CPACConv2d.spectrum(torch.randn(64, 3, 3, 3)).count_nonzero() == 27
    assert CPACConv2d.spectrum(torch.randn(3, 64, 3, 3)).count_nonzero() == 27


@pytest.mark.parametrize("cls", TYPES)
@few
@given(args=arguments(), share=SHARES, seed=SEEDS)
@example(args=EVEN_SAME, share=0.5, seed=0)
def test_gradients_are_those_of_the_other_implementation(cls, args, share, seed):
    conv = dense(cls, args, seed)
    layer = used(cls(**args, rank=rank_at(cls, conv, share), dtype=F64)).requires_grad_()
    wanted = {"input": images(conv).requires_grad_(), **dict(layer.named_parameters())}
    gradients = []
    for layer.implementation in ("factorized", "reconstructed"):
        loss = layer(wanted["input"]).sin().sum()
        gradients.append(dict(zip(wanted, torch.autograd.grad(loss, list(wanted.values())), strict=True)))
    assert all(g.abs().max() > 0 for g in gradients[0].values())
    assert_close(*gradients, rtol=1e-9, atol=1e-9)
