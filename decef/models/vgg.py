"""VGG-16 with batch norm, in its CIFAR form.

Simonyan, Zisserman: "Very deep convolutional networks for large-scale image recognition", 2015. For 32x32 images it has
only one fully connected layer after the convolutions, as is usual since Liu, Deng: "Very deep convolutional neural
network based image classification using small training sample size", 2015.
"""

from __future__ import annotations

from torch import Tensor, nn

STAGES = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))


class CifarVGG16(nn.Module):
    """Thirteen 3x3 convolutions in five stages, 2x2 max pooling after each, global average pooling, classifier.

    A 32x32 image ends as a 1x1 map, so the average does nothing. Smaller images get there earlier: a map of one pixel
    stays one, as the pooling rounds sizes up.

    Args:
        num_classes: number of outputs.
        in_channels: channels of the image.
        width: share of every layer's channels to keep, such as 0.25, rounded down; None keeps all.

    Shape: `(B, in_channels, H, W)` to `(B, num_classes)`.

    Raises:
        ValueError: the width leaves a layer without channels.
    """

    def __init__(self, num_classes: int = 10, in_channels: int = 3, width: float | None = None) -> None:
        super().__init__()
        share = 1.0 if width is None else width
        if int(share * STAGES[0][0]) < 1:
            raise ValueError(f"width={width} leaves a layer without channels: take more")
        stages: list[nn.Module] = []
        for widths in STAGES:
            layers: list[nn.Module] = []
            for channels in (int(share * whole) for whole in widths):
                conv = nn.Conv2d(in_channels, channels, 3, padding=1)
                nn.init.kaiming_normal_(conv.weight, mode="fan_out")
                assert conv.bias is not None
                nn.init.zeros_(conv.bias)
                layers += [conv, nn.BatchNorm2d(channels), nn.ReLU()]
                in_channels = channels
            stages.append(nn.Sequential(*layers, nn.MaxPool2d(2, ceil_mode=True)))
        self.stages = nn.Sequential(*stages)
        self.linear = nn.Linear(in_channels, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.stages(x).mean((2, 3)))
