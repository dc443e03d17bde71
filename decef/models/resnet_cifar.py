"""ResNets for 32x32 images (He, Zhang, Ren, Sun: "Deep residual learning for image recognition", 2016, section 4.2).

Parameters have the same names as in most published CIFAR ResNets (conv1, bn1, layer1.0.conv1, ..., linear), so that
their weights can be loaded.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut.

    Where the shape changes, shortcut "A" subsamples and adds zero channels (no parameters; the paper's choice for
    CIFAR), and "B" is a 1x1 convolution with batch norm.
    """

    def __init__(self, in_channels: int, channels: int, stride: int, shortcut: str) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.stride, self.new_channels = stride, channels - in_channels
        self.shortcut: nn.Module | None = None
        if self.new_channels and shortcut == "B":
            self.shortcut = nn.Sequential(
                nn.Conv2d(in_channels, channels, 1, stride, bias=False), nn.BatchNorm2d(channels)
            )

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        if self.shortcut is not None:
            x = self.shortcut(x)
        elif self.new_channels:
            half = self.new_channels // 2
            x = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, half, self.new_channels - half))
        return F.relu(x + y)


class CifarResNet(nn.Module):
    """ResNet of depth 6n + 2: 3x3 stem, three stages of n blocks with 16, 32, 64 channels, average pooling, classifier.

    Args:
        depth: any 6n + 2; in the paper 20, 32, 44, 56, 110 (0.27, 0.46, 0.66, 0.85, 1.7 M parameters).
        num_classes: number of outputs.
        in_channels: channels of the image.
        shortcut: "A" or "B", see `BasicBlock`.
        conv_classifier: make the classifier an equivalent 1x1 convolution, so that it can be factorised.

    Shape: `(B, in_channels, H, W)` to `(B, num_classes)`; H and W at least 4.

    Raises:
        ValueError: the depth is not 6n + 2, or there is no such shortcut.
    """

    def __init__(
        self,
        depth: int,
        num_classes: int = 10,
        in_channels: int = 3,
        shortcut: str = "A",
        conv_classifier: bool = False,
    ) -> None:
        super().__init__()
        if depth < 8 or (depth - 2) % 6:
            raise ValueError(f"depth={depth} is not 6n + 2, as 20, 32, 44, 56 and 110 are")
        if shortcut not in ("A", "B"):
            raise ValueError(f"shortcut={shortcut!r} is neither 'A' nor 'B'")
        blocks = (depth - 2) // 6
        self.conv1 = nn.Conv2d(in_channels, 16, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)

        def stage(in_channels: int, channels: int, stride: int) -> nn.Sequential:
            shapes = [(in_channels, stride)] + [(channels, 1)] * (blocks - 1)
            return nn.Sequential(*[BasicBlock(c, channels, s, shortcut) for c, s in shapes])

        self.layer1 = stage(16, 16, 1)
        self.layer2 = stage(16, 32, 2)
        self.layer3 = stage(32, 64, 2)
        self.linear = nn.Conv2d(64, num_classes, 1) if conv_classifier else nn.Linear(64, num_classes)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """He initialisation of every convolution and of the classifier."""
        for module in self.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                nn.init.kaiming_normal_(module.weight)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        x = torch.mean(x, dim=(2, 3), keepdim=not isinstance(self.linear, nn.Linear))
        return self.linear(x).flatten(1)
