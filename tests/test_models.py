import math

import pytest
import torch
from torch import nn

from decef.conversion import convert
from decef.costs import total_cost
from decef.data.torchvision_cpu import import_torchvision
from decef.models import CifarResNet, create_model
from decef.plans import plan

# Parameters and MACs (convolutions and classifier) as published or worked out from the papers' tables.
CIFAR = {  # the ResNets are in test_cost.py
    "vgg16_bn": (14_728_266, 313_201_664),
    "mobilenetv1": (3_217_226, 46_354_432),
    "mobilenetv2": (2_236_682, 87_976_448),
}
IMAGENET = {
    "torchvision/resnet18": (11_689_512, 1_814_073_344),
    "torchvision/resnet34": (21_797_672, 3_663_761_408),
    "torchvision/resnet50": (25_557_032, 4_089_184_256),
    "torchvision/vgg16": (138_357_544, 15_470_264_320),
    "torchvision/vgg16_bn": (138_365_992, 15_470_264_320),
    "torchvision/mobilenet_v2": (3_504_872, 300_774_272),
    "timm/mobilenetv1_100": (4_231_976, 568_740_352),
}


@pytest.mark.parametrize("name", CIFAR)
def test_networks_for_cifar_have_their_size(name):
    cost = total_cost(create_model(name, num_classes=10), (3, 32, 32))
    assert (cost["params"], cost["macs"]) == CIFAR[name]


@pytest.mark.parametrize("name", IMAGENET)
def test_networks_for_imagenet_have_their_size(name):
    with torch.device("meta"):
        model = create_model(name, num_classes=1000)
    cost = total_cost(model, (3, 224, 224))
    assert (cost["params"], cost["macs"]) == IMAGENET[name]


@pytest.mark.parametrize("name", ["resnet20", "vgg16_bn", "mobilenetv1", "mobilenetv2", "plain", "timm/resnet10t"])
def test_small_and_grey_images(name):
    model = create_model(name, num_classes=7, in_channels=1).eval()
    sizes = (8, 28, 32) if not name.startswith("timm") else (32,)
    for size in sizes:
        assert model(torch.randn(2, 1, size, size)).shape == (2, 7)


@pytest.mark.parametrize("name", ["mobilenetv1", "mobilenetv2"])
def test_a_separable_pair_is_a_decef_of_rank_1(name):
    pairs = create_model(name, num_classes=10, width=0.25)
    dense = create_model(name, num_classes=10, width=0.25, dense_pairs=True)
    made = plan(dense, "decef", rank=1, min_kernel_size=2, exclude="stem.0", input_size=(3, 32, 32))
    assert len(made.ranks) == sum(isinstance(m, nn.Conv2d) and m.groups > 1 for m in pairs.modules())

    def convolutions(model):
        norms = sum(p.numel() for m in model.modules() if isinstance(m, nn.BatchNorm2d) for p in m.parameters())
        cost = total_cost(model, (3, 32, 32))
        return cost["params"] - norms, cost["macs"]

    assert convolutions(convert(dense, made, from_scratch=True)) == convolutions(pairs)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("resnet21", {}, "unknown model 'resnet21': did you mean 'resnet"),
        ("timm/resnet19", {}, "timm has no model 'resnet19'; did you mean"),
        ("torchvision/resnet17", {}, "torchvision has no classifier 'resnet17'"),
        ("torchvision/resnet18", {"in_channels": 1}, "takes images of 3 channels, not 1"),
        ("torchvision/resnet18", {"shortcut": "A"}, "torchvision/resnet18 has no option shortcut"),
        ("vgg16_bn", {"conv_classifier": True}, "model 'vgg16_bn' has no option conv_classifier"),
        ("plain", {"width": 0.001}, "leaves a layer without channels"),
        ("plain", {"width": math.nan}, "model 'plain': width=nan must be a number above 0"),
        ("mobilenetv2", {"width": -1}, "model 'mobilenetv2': width=-1 must be a number above 0"),
        ("cpacnet", {"image_size": 3}, "the image is too small for this network: it needs 4 pixels, or 10 with two"),
        (
            "cpacnet",
            {"image_size": 9, "two": True},
            "the image is too small for this network: it needs 4 pixels, or 10",
        ),
        ("rank1net", {"image_size": 7}, "the image is too small for this network: it needs 8 pixels"),
        ("argparse:Namespace", {}, "argparse:Namespace must return a torch.nn.Module, not a Namespace"),
        ("resnet20", {"pretrained": True}, "no trained weights of 'resnet20'"),
        ("mynets:make", {"pretrained": True}, "no trained weights of 'mynets:make' to download"),
    ],
)
def test_networks_that_cannot_be_made(name, options, message):
    with pytest.raises(ValueError, match=message):
        create_model(name, num_classes=10, **options)


def test_networks_of_the_least_image_size_run():
    for name, size, options in (("cpacnet", 4, {}), ("cpacnet", 10, {"two": True}), ("rank1net", 8, {})):
        model = create_model(name, num_classes=10, in_channels=1, image_size=size, **options).eval()
        assert model(torch.zeros(2, 1, size, size)).shape == (2, 10)
    with pytest.raises(ValueError, match=r"depth=19 is not 6n \+ 2"):
        CifarResNet(19)


def test_trained_weights_of_torchvision_come_with_their_classes(monkeypatch):
    asked = []
    monkeypatch.setattr(import_torchvision().models, "get_model", lambda *args, **given: asked.append((args, given)))
    with pytest.raises(ValueError, match=r"weights of torchvision/resnet18 are for 1000 classes, not 10: .*timm"):
        create_model("torchvision/resnet18", num_classes=10, pretrained=True)
    assert not asked
    create_model("torchvision/resnet18", num_classes=1000, pretrained=True)
    assert asked == [(("resnet18",), {"weights": "DEFAULT"})]
