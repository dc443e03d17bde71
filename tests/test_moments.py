"""Decomposition on data: nearest in the layer's output, of every layer type and every kind of convolution."""

import copy

import pytest
import torch
from test_layers import CASES, F64, TYPES, fitting
from torch import nn
from torch.testing import assert_close

import decef
from decef.data import DATASETS, normalize
from decef.layers import BasisConv2d, DeCEFConv2d
from decef.models import CifarResNet
from decef.moments import input_moments, input_patches


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def correlated(*shape):
    """Inputs whose channels and neighbours have much in common, as real ones do."""
    x = torch.randn(*shape, dtype=F64).cumsum(2).cumsum(3)
    return x + x.mean(1, keepdim=True)


def moments_of(conv, x):
    (found,) = input_moments(nn.Sequential(conv), ["0"], [x]).values()
    return found


@pytest.mark.filterwarnings("ignore:Using padding='same'")
@pytest.mark.parametrize("case", CASES)
def test_the_metric_gives_the_error_of_the_output(case):
    conv = nn.Conv2d(4, 8, **{**CASES[case], "bias": False}, dtype=F64)
    other = copy.deepcopy(conv)
    nn.init.normal_(other.weight)
    x = correlated(3, 4, 9, 10)
    off = (conv.weight - other.weight).reshape(conv.groups, 8 // conv.groups, -1)
    y = conv(x) - other(x)
    expected = y.square().sum() / (y.numel() / y.shape[1])  # the mean over positions
    assert_close(
        ((off @ moments_of(conv, x)) * off).sum(), expected, rtol=1e-4, atol=0
    )  # patches are in single precision
    patches = torch.cat([p.double() for p in input_patches(conv, x)], -1)
    rows = conv.weight.reshape(conv.groups, 8 // conv.groups, -1)
    ours = (rows @ patches).reshape(8, 3, *y.shape[2:]).transpose(0, 1)
    assert_close(ours, conv(x), rtol=1e-4, atol=1e-4)


FEW = ["plain", "groups", "depthwise", "1 x 3", "5 x 2", "all at once", "1x1", "1x1, stride, groups"]


@pytest.mark.filterwarnings("ignore:Using padding='same'")
@pytest.mark.parametrize(("cls", "case"), fitting(FEW))
def test_never_worse_on_the_data_than_without_them(cls, case):
    conv = nn.Conv2d(4, 8, **CASES[case], dtype=F64).eval()
    x = correlated(3, 4, 9, 10)
    moments = moments_of(conv, x)
    full = cls.max_rank_for(*conv.weight.shape, groups=conv.groups)

    def error(layer):
        return ((layer(x) - conv(x)).norm() / conv(x).norm()).item()

    for rank in sorted({1, (full + 1) // 2}):
        plain = cls.from_conv2d(conv, rank)
        on_data = copy.deepcopy(plain)
        told = on_data.decompose_(conv.weight, moments=moments)
        assert error(on_data) <= error(plain) * (1 + 1e-3) + 1e-6
        bias = 0 if conv.bias is None else conv.bias[:, None, None]
        off = ((on_data(x) - conv(x)).norm() / (conv(x) - bias).norm()).item()
        assert told == pytest.approx(off, rel=0.01, abs=2e-3)  # the metric has a ridge
    exact = cls.from_conv2d(conv)
    assert exact.decompose_(conv.weight, moments=moments) < 1e-6
    assert_close(exact(x), conv(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("cls", TYPES)
def test_better_where_inputs_are_correlated(cls):
    conv = nn.Conv2d(8, 12, 3, padding=1, dtype=F64).eval()
    x = correlated(16, 8, 9, 10)
    plain = cls.from_conv2d(conv, 3)
    on_data = copy.deepcopy(plain)
    on_data.decompose_(conv.weight, moments=moments_of(conv, x))
    one, other = ((layer(x) - conv(x)).norm() for layer in (on_data, plain))
    assert one < 0.8 * other


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("cls", [DeCEFConv2d, BasisConv2d])
def test_uncorrelated_inputs_of_one_scale_give_the_nearest_kernel(cls, groups):
    conv = nn.Conv2d(4, 8, 3, groups=groups, dtype=F64)
    dim = 36 // groups
    plain, on_data = cls.from_conv2d(conv, 2), cls.from_conv2d(conv, 2)
    error = on_data.decompose_(conv.weight, moments=3 * torch.eye(dim, dtype=F64).expand(groups, dim, dim))
    assert_close(on_data.compose(), plain.compose())
    assert error == pytest.approx(plain.decompose_(conv.weight), rel=1e-9)


def test_the_best_basis_is_the_outputs_leading_directions():
    """No kernel with so many basis filters is nearer: reduced-rank regression has a closed form (Eckart and Young)."""
    conv = nn.Conv2d(4, 8, 3, bias=False, dtype=F64)
    x = correlated(5, 4, 9, 10)
    layer = BasisConv2d.from_conv2d(conv, 3)
    layer.decompose_(conv.weight, moments=moments_of(conv, x))
    y = conv(x).transpose(0, 1).flatten(1)
    left_over = torch.linalg.svdvals(y)[3:].square().sum().sqrt()
    assert ((layer(x) - conv(x)).norm() - left_over).abs() < 1e-3 * y.norm()


@pytest.mark.parametrize("cls", TYPES)
def test_channels_that_are_always_zero(cls):
    conv = nn.Conv2d(4, 8, 3, dtype=F64).eval()
    x = correlated(3, 4, 9, 10)
    x[:, 1] = 0
    layer = cls.from_conv2d(conv, 2)
    assert 0 <= layer.decompose_(conv.weight, moments=moments_of(conv, x)) < 1
    assert all(f.isfinite().all() for f in layer.factors().values())
    assert layer.decompose_(conv.weight, moments=moments_of(conv, 0 * x)) < 1


def test_large_inputs_are_unfolded_in_parts(monkeypatch):
    conv, x = nn.Conv2d(3, 8, 3, padding=1), torch.randn(5, 3, 8, 8)
    whole = input_moments(conv, [""], [x])
    monkeypatch.setattr("decef.moments.PATCHES_AT_ONCE", 2 * 3 * 10 * 10 * 9)
    assert [patches.shape[-1] for patches in input_patches(conv, x)] == [128, 128, 64]
    assert_close(input_moments(conv, [""], [x]), whole, rtol=1e-5, atol=1e-5)


def test_rank1_filters_too_many_for_one_system(monkeypatch):
    monkeypatch.setattr("decef.layers.rank1.MOST_UNKNOWN", 1)
    conv, x = nn.Conv2d(8, 12, 3, padding=1, dtype=F64).eval(), correlated(16, 8, 9, 10)
    plain, on_data = (decef.Rank1Conv2d.from_conv2d(conv, 3) for _ in range(2))
    on_data.decompose_(conv.weight, moments=moments_of(conv, x))
    assert (on_data(x) - conv(x)).norm() < (plain(x) - conv(x)).norm()


def test_moments_that_do_not_fit():
    layer = BasisConv2d(4, 8, 3, rank=2)
    with pytest.raises(ValueError, match="warm_start is not possible with moments"):
        layer.decompose_(torch.randn(8, 4, 3, 3), warm_start=True, moments=torch.eye(36)[None])
    for bad, says in ((torch.eye(36), r"shape \(1, 36, 36\)"), (torch.full((1, 36, 36), torch.nan), "NaN or infinite")):
        with pytest.raises(ValueError, match=f"moments (must )?have .*{says}"):
            layer.decompose_(torch.randn(8, 4, 3, 3), moments=bad)


def test_data_that_can_not_be_used():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3))
    for data, says in (
        ([torch.full((2, 3, 8, 8), torch.nan)], "inputs of '0' are NaN or infinite"),
        ([torch.full((2, 3, 8, 8), 3e38)], "inputs of '0' are NaN or infinite"),  # their squares are
        (torch.randn(2, 3, 8, 8), r"give \[images\]"),
        ([], "no batch"),
        ([{"image": torch.randn(2, 3, 8, 8)}], "begins with one, not dict"),
    ):
        for rank in (decef.ranks.Energy(0.9), decef.ranks.Budget(params=0.5)):
            with pytest.raises(ValueError, match=says):
                decef.plan(model, "decef", rank=rank, data=data)


def network():
    model = CifarResNet(8, in_channels=1).eval()
    images, _ = DATASETS["digits"].load(None)
    x = normalize(images.images[:96], torch.tensor([0.2874]), torch.tensor([0.354]))
    return model, x


def test_other_batches_give_the_same_moments():
    model, x = network()
    names = ["layer1.0.conv1", "layer2.0.conv1", "layer3.0.conv2"]
    whole = input_moments(model, names, [x])
    split = input_moments(model, names, [(part, None) for part in x.split(40)])
    assert whole.keys() == split.keys() == set(names)
    for name in names:
        assert_close(split[name], whole[name], rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="the data yields no batch"):
        input_moments(model, names, [])


@pytest.mark.parametrize("layer", ["decef", "basisconv", "basisconv2021", "cpac", "rank1"])
def test_a_network_converted_on_data_is_nearer_to_the_dense_one(layer):
    model, x = network()
    plan = decef.plan(model, layer, rank=2 if layer == "rank1" else 5, exclude="conv1")
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, torch.zeros(len(x))), 32)
    by_kernel = decef.convert(model, plan)
    by_output = decef.convert(model, plan, data=loader)
    assert all(row.error is not None for row in plan.rows if row.action == "convert")
    one, other = ((net(x) - model(x)).norm() for net in (by_output, by_kernel))
    assert one < other


@pytest.mark.parametrize("layer", ["decef", "basisconv", "basisconv2021"])
@pytest.mark.parametrize("groups", [1, 2])
def test_the_spectrum_is_what_every_rank_keeps_of_the_output(layer, groups):
    cls = decef.LAYERS[layer]
    conv = nn.Conv2d(4, 8, 3, groups=groups, bias=False, dtype=F64).eval()
    x = correlated(5, 4, 9, 10)
    moments = moments_of(conv, x)
    spectrum = cls.spectrum(conv.weight, groups=groups, moments=moments)
    assert len(spectrum) == cls.max_rank_for(*conv.weight.shape, groups=groups)
    assert (spectrum.diff() <= 1e-12).all()
    if layer != "decef":  # whose channels are each by itself there
        for rank in (1, 2):
            error = cls.from_conv2d(conv, rank).decompose_(conv.weight, moments=moments)
            assert error**2 == pytest.approx((spectrum[rank:].sum() / spectrum.sum()).item(), rel=1e-6)


@pytest.mark.parametrize("layer", ["cpac", "rank1"])
def test_a_group_whose_inputs_are_small_weighs_little(layer):
    """The other one has rank 1, so that rank 1 keeps nearly everything of the output."""
    cls = decef.LAYERS[layer]
    conv = nn.Conv2d(8, 8, 3, groups=2, bias=False, dtype=F64)
    large = cls(4, 4, 3, rank=1).double().compose().detach()
    weight = torch.cat([conv.weight[:4].detach(), large * conv.weight[:4].detach().norm() / large.norm()])
    sizes = torch.tensor([1e-4, 1.0], dtype=F64)[:, None, None]
    moments = sizes * torch.eye(4 * 9, dtype=F64)
    spectrum = cls.spectrum(weight, groups=2, moments=moments)
    assert spectrum[0] / spectrum.sum() > 0.999
    same = cls.spectrum(weight, groups=2, moments=torch.eye(4 * 9, dtype=F64).expand(2, -1, -1))
    assert same[0] / same.sum() < 0.9


def test_effective_ranks_are_of_kernels_and_data_are_refused():
    model, x = network()
    with pytest.raises(ValueError, match="data would do nothing"):
        decef.plan(model, "basisconv", rank=decef.ranks.EffectiveRank(), data=[x])
    one = decef.plan(model, "basisconv", rank=decef.ranks.EffectiveRank())
    made = decef.convert(model, "basisconv", rank=decef.ranks.EffectiveRank(), data=[x])
    assert {name: made.get_submodule(name).rank for name in one.ranks} == one.ranks


def test_ranks_go_where_the_output_needs_them():
    """A layer whose inputs lie in a line needs one basis filter, whatever its kernel's spectrum says."""
    model = nn.Sequential(nn.Conv2d(4, 8, 1, bias=False), nn.Conv2d(8, 8, 3, bias=False)).eval()
    with torch.no_grad():
        model[0].weight[:] = torch.randn(8, 1, 1, 1) * torch.randn(1, 4, 1, 1)  # all channels are multiples of one
    x = torch.randn(8, 4, 6, 6)
    smooth = torch.ones(1, 4, 6, 6) * x.mean((2, 3), keepdim=True)  # and all pixels are alike
    by_kernel = decef.plan(model, "basisconv", rank=decef.ranks.Energy(0.99), include="1")
    by_output = decef.plan(model, "basisconv", rank=decef.ranks.Energy(0.99), include="1", data=[smooth])
    assert by_output.ranks["1"] == 1 < by_kernel.ranks.get("1", 8)
    whole = decef.convert(model, "basisconv", rank=decef.ranks.Energy(0.99), include="1", data=[smooth])
    assert whole[1].rank == 1
    assert_close(whole(smooth), model(smooth), rtol=1e-3, atol=1e-3)


def test_a_convolution_that_does_not_run_is_converted_by_its_kernel():
    class Unused(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.unused = nn.Conv2d(2, 4, 3), nn.Conv2d(2, 4, 3)

        def forward(self, x):
            return self.used(x)

    model = Unused()
    converted = decef.convert(model, decef.plan(model, "decef", rank=2), data=[torch.randn(4, 2, 6, 6)])
    assert_close(converted.unused.compose(), DeCEFConv2d.from_conv2d(model.unused, 2).compose())


def test_layers_that_share_a_weight_are_fitted_to_the_inputs_of_all():
    """Their inputs use other channels, so what is nearest for one alone is far for the other."""
    model = nn.Sequential(nn.Conv2d(4, 8, 1, bias=False), nn.Conv2d(8, 4, 1), nn.Conv2d(4, 8, 1, bias=False)).double()
    model[2].weight = model[0].weight
    model[1].weight.data[:2] *= 5
    x = torch.randn(64, 4, 5, 5, dtype=F64) * torch.tensor([0.1, 0.1, 1, 1])[:, None, None]
    with torch.no_grad():
        patches = [x.transpose(0, 1).flatten(1), model[:2](x).transpose(0, 1).flatten(1)]
    both = torch.cat(patches, 1)
    found = input_moments(model, ["0", "2"], [x])
    assert_close(found["0"], found["2"])
    assert_close(found["0"][0], both @ both.T / both.shape[1], rtol=1e-4, atol=1e-6)
    small = decef.convert(model, "basisconv", rank={"0": 2, "2": 2}, exclude="1", data=[x])
    weight = model[0].weight[:, :, 0, 0]
    u, s, v = torch.linalg.svd(weight @ both, full_matrices=False)
    best = u[:, :2] * s[:2] @ v[:2]
    assert_close(small[0].weight[:, :, 0, 0] @ both, best, rtol=1e-3, atol=1e-3)


def test_one_image_without_a_batch_dimension():
    conv, x = nn.Conv2d(2, 4, 3, stride=2, padding=1), torch.randn(2, 5, 5)
    assert torch.equal(*(torch.cat(list(input_patches(conv, images)), -1) for images in (x, x[None])))


@pytest.mark.parametrize("padding", [0, 2, "same", "valid"])
def test_a_convolution_that_was_changed_has_the_moments_of_one_made_so(padding):
    """As where strides are turned into dilations."""
    fresh = nn.Conv2d(3, 8, 3, padding=padding, dilation=2)
    changed = nn.Conv2d(3, 8, 3, padding=1)
    changed.padding, changed.dilation, changed.stride = fresh.padding, (2, 2), 1
    x = torch.randn(4, 3, 7, 6)
    assert_close(input_moments(changed, [""], [x]), input_moments(fresh, [""], [x]))


def test_batches_without_images_do_not_count():
    conv, x = nn.Conv2d(3, 8, 3), torch.randn(4, 3, 7, 6)
    assert_close(input_moments(conv, [""], [x[:0], x]), input_moments(conv, [""], [x]))
    with pytest.raises(ValueError, match="the data yields no batch"):
        input_moments(conv, [""], [x[:0]])
