"""Whole networks of many families, converted at full rank and folded back, stay the same function."""

import copy

import pytest
import torch
from test_convert import with_biases
from torch import nn
from torch.testing import assert_close

import decef
from decef.data.torchvision_cpu import import_torchvision
from decef.layers import LAYERS, FactorizedConv2d
from decef.ranks import Budget, Share

torchvision = import_torchvision()
timm = pytest.importorskip("timm")  # imports torchvision, so it comes after

FACTORIZED = [name for name in LAYERS if name != "conv2d"]
ONE_EACH = (1, 1, 1, 1)
NARROW = (16, 32, 48, 64)
BYOB = [timm.models.ByoBlockCfg(type="rep", d=d, c=c, s=2, gs=0) for d, c in ((1, 16), (2, 32), (2, 48))]
ONE = [
    timm.models.ByoBlockCfg(type="one", d=1, c=c, s=2, gs=gs, block_kwargs={"num_conv_branches": 2})
    for c, gs in ((16, 0), (32, 1))
]
XCEPTION = [
    {"in_chs": 64, "out_chs": 32, "stride": 2},
    {"in_chs": 32, "out_chs": 32, "stride": 1},
    {"in_chs": 32, "out_chs": (32, 48, 48), "stride": 2},
    {"in_chs": 48, "out_chs": (48, 64, 64), "stride": 1, "no_skip": True, "start_with_relu": False},
]

# Family: network ("tv." is torchvision's), input size, arguments that make it small.
NETWORKS = {
    "resnet-tv": ("tv.resnet18", 32, {}),
    "resnet": ("test_resnet", 64, {}),
    "resnext": ("resnext50_32x4d", 64, {"layers": ONE_EACH, "channels": NARROW}),
    "seresnet": ("seresnet50", 64, {"layers": ONE_EACH, "channels": NARROW}),
    "densenet": ("densenet121", 64, {"block_config": (2, 2, 2, 2), "growth_rate": 16}),
    "alexnet": ("tv.alexnet", 64, {}),
    "vgg": ("vgg11_bn", 32, {"mlp_ratio": 0.01}),
    "mobilenetv1": ("mobilenetv1_100", 64, {}),
    "mobilenetv2": ("mobilenetv2_035", 64, {}),
    "mobilenetv3": ("mobilenetv3_small_050", 64, {}),
    "mobilenetv3-tv": ("tv.mobilenet_v3_small", 64, {}),
    "efficientnet": ("efficientnet_lite0", 64, {}),
    "efficientnet-same": ("tf_efficientnet_b0", 64, {}),
    "mnasnet": ("tv.mnasnet0_5", 64, {}),
    "regnet": ("regnetx_002", 64, {}),
    "convnext": ("convnext_atto", 64, {"depths": ONE_EACH, "dims": NARROW}),
    "inception_v3": ("inception_v3", 96, {}),
    "googlenet": ("tv.googlenet", 64, {"aux_logits": False, "init_weights": False}),
    "squeezenet": ("tv.squeezenet1_1", 64, {}),
    "shufflenet": ("tv.shufflenet_v2_x0_5", 64, {}),
    "ghostnet": ("ghostnet_050", 64, {}),
    "repghost": ("repghostnet_050", 64, {}),
    "hrnet": ("hrnet_w18_small", 64, {}),
    "dla": ("dla46x_c", 64, {}),
    "res2net": ("res2net50_14w_8s", 64, {"layers": ONE_EACH, "channels": NARROW}),
    "sknet": ("skresnet18", 64, {"layers": ONE_EACH, "channels": NARROW}),
    "resnest": ("resnest14d", 64, {"channels": NARROW}),
    "nfnet": ("test_nfnet", 64, {}),
    "bit": ("resnetv2_50", 64, {"layers": ONE_EACH, "channels": NARROW, "conv_layer": timm.layers.StdConv2d}),
    "resnetv2": ("resnetv2_50d", 64, {"layers": ONE_EACH, "channels": NARROW}),
    "xception": ("xception41", 64, {"block_cfg": XCEPTION}),
    "repvgg": ("repvgg_a0", 64, {"blocks": BYOB}),
    "mobileone": ("mobileone_s0", 64, {"blocks": ONE}),
    "cspdarknet": ("cs3darknet_s", 64, {}),
    "dpn": ("dpn48b", 64, {"k_sec": ONE_EACH}),
    "rexnet": ("rexnet_100", 64, {"width_mult": 0.3}),
    "tresnet": ("tresnet_m", 64, {"layers": ONE_EACH, "width_factor": 0.25}),
    "vovnet": ("ese_vovnet19b_slim_dw", 64, {}),
    "hgnet": ("hgnetv2_b0", 64, {}),
    "starnet": ("starnet_s050", 64, {}),
    "vit": ("vit_tiny_patch16_224", 64, {"img_size": 64, "embed_dim": 48, "num_heads": 3, "depth": 2}),
    "swin": (
        "swin_tiny_patch4_window7_224",
        64,
        {"img_size": 64, "window_size": 4, "embed_dim": 24, "depths": (2, 2, 2)},
    ),
    "coatnet": ("test_coatnet", 64, {"img_size": 64}),
    "levit": ("levit_conv_128s", 64, {"img_size": 64}),
    "mobilevit": ("mobilevit_xxs", 64, {}),
    "fastvit": ("fastvit_t8", 64, {"layers": ONE_EACH}),
    "repvit": ("repvit_m0_9", 64, {"embed_dim": NARROW, "depth": (1, 1, 2, 1)}),
    "pvt": ("pvt_v2_b0", 64, {"depths": ONE_EACH}),
    "inception_next": ("inception_next_atto", 64, {"depths": ONE_EACH}),
    "edgenext": ("edgenext_xx_small", 64, {"depths": ONE_EACH, "dims": (24, 32, 48, 64)}),
    "segmentation": ("tv.lraspp_mobilenet_v3_large", 64, {"weights_backbone": None}),
}

# Families with convolution classes of their own, which are kept.
CUSTOM = {"nfnet": "ScaledStdConv2d", "bit": "StdConv2d", "efficientnet-same": "Conv2dSame"}
# With random weights the rounding of float32 alone comes near the tolerance: compared in float64.
DOUBLE = ("inception_v3", "googlenet")
# With every layer type; the others with one each, in turn.
THOROUGH = ("mobilenetv2",)
LARGE = ("inception_v3", "vgg", "hrnet", "alexnet")  # minutes together: with the grid
# Beside others of their kind they show `convert` nothing new, plain convolutions at known places: with the grid, too.
ALIKE = (
    *("resnet-tv", "mobilenetv3-tv", "mnasnet", "repghost", "resnetv2", "resnest", "res2net", "hgnet", "vovnet", "dla"),
    *("rexnet", "starnet"),
)


# Not that which is its turn, but one whose decompositions of these kernels are small.
OTHERS = {"mobilenetv1": "rank1", "googlenet": "decef"}


def _cases():
    for i, family in enumerate(NETWORKS):
        layers = FACTORIZED if family in THOROUGH else [OTHERS.get(family, FACTORIZED[i % len(FACTORIZED)])]
        marks = [pytest.mark.grid] if family in LARGE + ALIKE else []
        yield from (pytest.param(family, layer, id=f"{family}-{layer}", marks=marks) for layer in layers)


@torch.no_grad()
def network(family):
    """The family's network in eval mode and images for it, redrawn so that every layer matters to the output."""
    torch.manual_seed(0)
    name, size, arguments = NETWORKS[family]
    if name.startswith("tv."):
        model = torchvision.models.get_model(name[3:], weights=None, num_classes=10, **arguments)
    else:
        model = timm.create_model(name, pretrained=False, num_classes=10, **arguments)
    for key, parameter in model.named_parameters():
        if (parameter == parameter.flatten()[0]).all():  # zeros and ones: norms, layer scales, the last of a branch
            parameter.normal_(std=0.1) if key.endswith("bias") else parameter.uniform_(0.5, 1.5)
    norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    hooks = [module.register_forward_pre_hook(_calibrate) for module in norms]
    images = torch.randn(4, 3, size, size)
    model.eval()(images)
    for hook in hooks:
        hook.remove()
    return model, images


def _calibrate(norm, args):
    variance, mean = torch.var_mean(args[0].transpose(0, 1).flatten(1), 1)
    norm.running_mean.copy_(mean)
    norm.running_var.copy_(variance.clamp_min(3 * variance.mean()))


@torch.no_grad()
def outputs(model, x):
    y = model(x)
    return y["out"] if isinstance(y, dict) else y


def assert_same(actual, expected):
    scale, tolerance = expected.abs().max(), 1e-4 if expected.dtype == torch.float32 else 1e-9
    assert_close(actual / scale, expected / scale, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(("family", "layer"), list(_cases()))
def test_full_rank_conversion_and_its_fold_are_the_network(family, layer):
    model, x = network(family)
    if family in DOUBLE:
        model, x = model.double(), x.double()
    text, before = repr(model), copy.deepcopy(model.state_dict())
    expected = outputs(model, x)
    assert expected.isfinite().all()
    assert (expected[0] - expected[1]).abs().max() > 0.01 * expected.abs().max()  # the input gets through

    made = decef.plan(model, layer, rank=Share(1.0), implementation="factorized")
    convolutions = {name: module for name, module in model.named_modules() if isinstance(module, nn.Conv2d)}
    assert [row.name for row in made.rows] == list(convolutions)
    reasons = {row.name: row.reason for row in made.rows if row.action == "keep"}
    for name, module in convolutions.items():
        if type(module) is not nn.Conv2d:
            assert reasons[name] == f"{type(module).__name__} is not a plain Conv2d"
        elif layer in ("decef", "rank1") and module.kernel_size == (1, 1):
            assert "1x1 kernel" in reasons[name]
        else:
            assert name in made.ranks
    assert made.ranks or family in CUSTOM
    assert family not in CUSTOM or any(reason.startswith(CUSTOM[family]) for reason in reasons.values())

    new = decef.convert(model, made)
    assert {n for n, m in new.named_modules() if isinstance(m, FactorizedConv2d)} == set(made.ranks)
    assert all(row.error < 1e-5 for row in made.rows if row.action == "convert")
    assert_same(outputs(new, x), expected)
    folded = decef.fold(new)
    assert repr(folded) == (text if LAYERS[layer].composes_in_training else repr(with_biases(model, made.ranks)))
    assert_same(outputs(folded, x), expected)
    assert repr(model) == text
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize(
    ("family", "layer"), [("resnet", "decef"), ("mobilenetv2", "basisconv"), ("densenet", "cpac"), ("sknet", "rank1")]
)
def test_budget(family, layer):
    model, x = network(family)
    size = x.shape[1:]
    dense = decef.cost(model, size).attrs
    made = decef.plan(model, layer, rank=Budget(flops=0.5), input_size=size)
    cost = decef.cost(decef.convert(model, made, from_scratch=True), size).attrs
    assert 0.45 * dense["macs"] < cost["macs"] <= 0.5 * dense["macs"]
    for what in ("macs", "params"):
        saved = sum(getattr(row, f"{what}_before") - getattr(row, f"{what}_after") for row in made.rows)
        assert dense[what] - cost[what] == saved
