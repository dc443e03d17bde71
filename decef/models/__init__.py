"""Networks by name."""

from __future__ import annotations

from torch import nn

from decef.models.resnet_cifar import CifarResNet

#: Depth of every CIFAR ResNet by name.
CIFAR_RESNETS = {f"resnet{depth}": depth for depth in (20, 32, 44, 56, 110)}


def create_model(
    name: str, *, num_classes: int, in_channels: int, shortcut: str = "A", conv_classifier: bool = False
) -> nn.Module:
    """A dense network by name, freshly initialised; the arguments are `CifarResNet`'s.

    Raises:
        ValueError: there is no such network.
    """
    if name not in CIFAR_RESNETS:
        raise ValueError(f"unknown model '{name}'; there are {', '.join(CIFAR_RESNETS)}")
    return CifarResNet(CIFAR_RESNETS[name], num_classes, in_channels, shortcut, conv_classifier=conv_classifier)


__all__ = ["CIFAR_RESNETS", "CifarResNet", "create_model"]
