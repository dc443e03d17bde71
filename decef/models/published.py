"""The small networks from the experiments of the CPAC and rank-1 authors."""

from __future__ import annotations

from torch import Tensor, nn


class CPACNet(nn.Module):
    """CPAC-Conv's network: one or two 3x3 convolutions of 8 filters without padding or bias.

    2x2 max pooling and ReLU follow each convolution. One convolution is followed by one fully connected layer, two by
    two with nothing between them (Wang, Guo, Yue 2020, the authors' code).

    Args:
        num_classes: number of outputs.
        in_channels: channels of the image.
        image_size: height and width in pixels, at least 4, or 10 with `two`.
        two: two convolutions instead of one.

    Shape: `(B, in_channels, image_size, image_size)` to `(B, num_classes)`.

    Raises:
        ValueError: the image is too small.
    """

    def __init__(self, num_classes: int = 10, in_channels: int = 1, image_size: int = 28, two: bool = False) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for c in (in_channels, 8)[: 1 + two]:
            layers += [nn.Conv2d(c, 8, 3, bias=False), nn.MaxPool2d(2), nn.ReLU()]
            image_size = (image_size - 2) // 2
        if image_size < 1:
            raise ValueError("the image is too small for this network: it needs 4 pixels, or 10 with two=true")
        width = 8 * image_size**2
        dense = [nn.Linear(width, 50), nn.Linear(50, num_classes)] if two else [nn.Linear(width, num_classes)]
        self.layers = nn.Sequential(*layers, nn.Flatten(), *dense)

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


class Rank1Net(nn.Module):
    """The rank-1 authors' CIFAR-10 network: three pairs of 3x3 convolutions (64, 144, 256), three linear layers.

    Each pair is convolution, ReLU, batch norm, convolution, ReLU, 2x2 max pooling, dropout. The first two linear layers
    have 1024 and 512 units, each with batch norm, ReLU and dropout (Kim et al. 2018, the authors' notebook). The
    authors measured with dropout on; here it is off in evaluation mode. Biases begin as torch draws them and batch norm
    has torch's momentum and epsilon; theirs are 0, 0.01 (after linear layers 0.001) and 1e-3.

    Args:
        num_classes: number of outputs.
        in_channels: channels of the image.
        image_size: height and width in pixels, at least 8.

    Shape: `(B, in_channels, image_size, image_size)` to `(B, num_classes)`.

    Raises:
        ValueError: the image is too small.
    """

    def __init__(self, num_classes: int = 10, in_channels: int = 3, image_size: int = 32) -> None:
        super().__init__()
        if image_size < 8:
            raise ValueError("the image is too small for this network: it needs 8 pixels")
        layers: list[nn.Module] = []
        for width in (64, 144, 256):
            layers += [nn.Conv2d(in_channels, width, 3, padding=1), nn.ReLU(), nn.BatchNorm2d(width)]
            layers += [nn.Conv2d(width, width, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Dropout(0.5)]
            in_channels = width
        layers.append(nn.Flatten())
        units = 256 * (image_size // 8) ** 2
        for width in (1024, 512):
            layers += [nn.Linear(units, width), nn.BatchNorm1d(width), nn.ReLU(), nn.Dropout(0.5)]
            units = width
        self.layers = nn.Sequential(*layers, nn.Linear(units, num_classes))
        for module in self.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                nn.init.xavier_uniform_(module.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)
