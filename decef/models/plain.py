"""A plain network: no normalisation or shortcuts that could make up for a bad initialisation."""

from __future__ import annotations

from torch import Tensor, nn

WIDTHS = (64, 64, 144, 144, 256, 256, 256)
POOL_AFTER = (1, 3)  # indices of the layers before 2x2 max pooling


class PlainNet(nn.Module):
    """Seven 3x3 convolutions, global average pooling, classifier.

    The convolutions are those of the MNIST network in the rank-1 authors' notebooks (arXiv 1808.04303: 64, 64, pool,
    144, 144, pool, 256, 256, 256; no bias, no batch norm, and in the notebooks no ReLU). The authors' three large fully
    connected layers after them are a single one here. We test their claim on this network that consecutive 1-D layers
    cannot be trained.

    Args:
        num_classes: number of outputs.
        in_channels: channels of the image.
        width: factor by which all widths are multiplied.
        relu: whether a ReLU follows each convolution.

    Shape: `(B, in_channels, H, W)` to `(B, num_classes)`; H and W at least 4.

    Raises:
        ValueError: the width leaves a layer without channels.
    """

    def __init__(self, num_classes: int = 10, in_channels: int = 1, width: float = 1.0, relu: bool = False) -> None:
        super().__init__()
        widths = [int(width * w) for w in WIDTHS]
        if min(widths) < 1:
            raise ValueError(f"width={width} leaves a layer without channels: take more")
        layers: list[nn.Module] = []
        for i, (c, out) in enumerate(zip([in_channels, *widths], widths, strict=False)):
            conv = nn.Conv2d(c, out, 3, padding=1, bias=False)
            nn.init.kaiming_normal_(conv.weight, nonlinearity="relu" if relu else "linear")
            layers.append(conv)
            if relu:
                layers.append(nn.ReLU())
            if i in POOL_AFTER:
                layers.append(nn.MaxPool2d(2))
        self.features = nn.Sequential(*layers)
        self.linear = nn.Linear(widths[-1], num_classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.features(x).mean((2, 3)))
