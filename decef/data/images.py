"""Images that live as one uint8 tensor on the training device, augmented a batch at a time."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass
class Images:
    """uint8 images `(N, C, H, W)` and their int64 labels `(N,)`."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def to(self, device: torch.device | str) -> Images:
        """The same images on `device`."""
        return Images(self.images.to(device), self.labels.to(device))

    def subset(self, index: Tensor | slice) -> Images:
        """The images that `index` names."""
        return Images(self.images[index], self.labels[index])


def normalize(images: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """uint8 images `(B, C, H, W)` as floats in [0, 1], less `mean`, over `std` (both `(C,)`)."""
    scale = (1 / (255 * std))[:, None, None]
    return images.to(std.dtype) * scale - (mean / std)[:, None, None]


def augmented_batches(
    data: Images,
    batch_size: int,
    generator: torch.Generator,
    *,
    crop_padding: int = 0,
    flip: bool = False,
) -> Iterator[tuple[Tensor, Tensor]]:
    """One epoch of random batches; images that don't fill the last batch are left out.

    An image is padded by `crop_padding` black pixels on each side and cropped back at a random place, then flipped
    left to right with probability 1/2: one gather for a whole batch.

    Args:
        data: images on the training device.
        batch_size: at most `len(data)`.
        generator: a CPU generator; it alone determines order and augmentation, on every device alike.
        crop_padding: pixels.
        flip: whether to flip.

    Yields:
        uint8 images `(batch_size, C, H, W)` and labels `(batch_size,)`.
    """
    device = data.images.device
    n, channels, height, width = data.images.shape
    order = torch.randperm(n, generator=generator)
    shifts = torch.randint(0, 2 * crop_padding + 1, (2, n), generator=generator)
    flipped = torch.randint(0, 2, (n,), generator=generator) if flip else torch.zeros(n, dtype=torch.long)
    order, shifts, flipped = order.to(device), shifts.to(device), flipped.to(device).bool()

    padded = F.pad(data.images, (crop_padding,) * 4)
    channel = torch.arange(channels, device=device)[None, :, None, None]
    rows, columns = torch.arange(height, device=device), torch.arange(width, device=device)
    for start in range(0, n - batch_size + 1, batch_size):
        index = order[start : start + batch_size]
        top, left = shifts[:, start : start + batch_size]
        mirrored = torch.where(flipped[start : start + batch_size, None], columns.flip(0), columns)
        batch = padded[
            index[:, None, None, None],
            channel,
            (top[:, None] + rows)[:, None, :, None],
            (left[:, None] + mirrored)[:, None, None, :],
        ]
        yield batch, data.labels[index]
