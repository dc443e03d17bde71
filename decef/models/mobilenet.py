"""MobileNetV1 and V2 for 32x32 images.

Howard et al.: "MobileNets: efficient convolutional neural networks for mobile vision applications", 2017; Sandler et
al.: "MobileNetV2: inverted residuals and linear bottlenecks", 2018. As usual for CIFAR, the stem (and in V2 the second
stage) keeps the resolution.
"""

from __future__ import annotations

from torch import Tensor, nn

V1_BLOCKS = ((64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2), *[(512, 1)] * 5, (1024, 2), (1024, 1))
#: Expansion, channels, blocks, stride of the first block.
V2_STAGES = ((1, 16, 1, 1), (6, 24, 2, 1), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1))


class MobileNetV1(nn.Module):
    """A 3x3 stem and thirteen depthwise-separable blocks: 3x3 depthwise, norm, ReLU, 1x1, norm, ReLU.

    Args:
        num_classes: number of outputs.
        in_channels: channels of the image.
        dense_pairs: replace every pair of depthwise and 1x1 convolution by one dense 3x3 convolution. Apart from the
            norm and ReLU inside, the pair is the DeCEF layer of rank 1 for this convolution. With `layer=decef
            layer.rank=1` the network is thus MobileNet without those, and with higher ranks it is what MobileNet
            approximates. ATCD trains the composed pair.
        width: share of every layer's channels to keep, such as 0.25, rounded to a multiple of 8; None keeps all.

    Shape: `(B, in_channels, H, W)` to `(B, num_classes)`; H and W at least 8.
    """

    def __init__(
        self, num_classes: int = 10, in_channels: int = 3, dense_pairs: bool = False, width: float | None = None
    ) -> None:
        super().__init__()
        before = stem = _share_of(32, width)
        blocks: list[nn.Module] = []
        for whole, stride in V1_BLOCKS:
            channels = _share_of(whole, width)
            if dense_pairs:
                blocks.append(_block(before, channels, 3, stride))
            else:
                blocks.append(nn.Sequential(_block(before, before, 3, stride, before), _block(before, channels, 1)))
            before = channels
        self.stem = _block(in_channels, stem, 3)
        self.blocks = nn.Sequential(*blocks)
        self.linear = nn.Linear(before, num_classes)
        _init(self)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.blocks(self.stem(x)).mean((2, 3)))


class MobileNetV2(nn.Module):
    """A 3x3 stem, seventeen inverted residual blocks (1x1, 3x3 depthwise, linear 1x1) and a last 1x1 convolution.

    Args:
        num_classes: number of outputs.
        in_channels: channels of the image.
        dense_pairs: replace every depthwise convolution and the 1x1 convolution after it by one dense 3x3 convolution,
            see `MobileNetV1`.
        width: see `MobileNetV1`; the last convolution keeps its channels, as in the paper.

    Shape: `(B, in_channels, H, W)` to `(B, num_classes)`; H and W at least 8.
    """

    def __init__(
        self, num_classes: int = 10, in_channels: int = 3, dense_pairs: bool = False, width: float | None = None
    ) -> None:
        super().__init__()
        before = stem = _share_of(32, width)
        blocks: list[nn.Module] = []
        for expansion, whole, count, first_stride in V2_STAGES:
            channels = _share_of(whole, width)
            for i in range(count):
                stride = first_stride if i == 0 else 1
                blocks.append(InvertedResidual(before, channels, stride, expansion, dense_pairs))
                before = channels
        self.stem = _block(in_channels, stem, 3, relu6=True)
        self.blocks = nn.Sequential(*blocks)
        self.head = _block(before, 1280, 1, relu6=True)
        self.linear = nn.Linear(1280, num_classes)
        _init(self)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.head(self.blocks(self.stem(x))).mean((2, 3)))


class InvertedResidual(nn.Module):
    """Expand, filter, project; with a shortcut if the shape does not change."""

    def __init__(self, in_channels: int, channels: int, stride: int, expansion: int, dense_pairs: bool) -> None:
        super().__init__()
        wide = expansion * in_channels
        layers: list[nn.Module] = [_block(in_channels, wide, 1, relu6=True)] if expansion > 1 else []
        if dense_pairs:
            layers.append(_block(wide, channels, 3, stride)[:2])
        else:
            layers += [_block(wide, wide, 3, stride, wide, relu6=True), _block(wide, channels, 1)[:2]]
        self.layers = nn.Sequential(*layers)
        self.has_shortcut = stride == 1 and in_channels == channels

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layers(x) if self.has_shortcut else self.layers(x)


def _share_of(channels: int, width: float | None) -> int:
    """A share of channels, rounded to a multiple of 8 and at least 8, as is usual for narrower MobileNets."""
    return channels if width is None else max(8, round(width * channels / 8) * 8)


def _block(
    in_channels: int, channels: int, kernel: int, stride: int = 1, groups: int = 1, *, relu6: bool = False
) -> nn.Sequential:
    conv = nn.Conv2d(in_channels, channels, kernel, stride, kernel // 2, groups=groups, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(channels), nn.ReLU6() if relu6 else nn.ReLU())


def _init(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out")
        elif isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=0.01)
            nn.init.zeros_(module.bias)
