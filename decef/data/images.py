"""The interface that gives the training loop its batches, and images held as one tensor on the training device."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Protocol, Self

import torch
import torch.nn.functional as F
from torch import Tensor

Batch = tuple[Tensor, Tensor]  # uint8 images, labels
Part = tuple[int, int]  # (i, n): process i of n


class Data(Protocol):
    """Labelled images as the training loop sees them, whether they are in memory or read from files."""

    @property
    def device(self) -> torch.device:
        """The device of the batches."""

    @property
    def labels(self) -> Tensor:
        """Labels of all images: int64, `(N,)`."""

    def __len__(self) -> int: ...

    def to(self, device: torch.device) -> Self:
        """The same images, with batches on `device`."""

    def subset(self, index: Tensor | slice) -> Self:
        """The images at these indices."""

    def batches(self, batch_size: int, generator: torch.Generator, part: Part = (0, 1)) -> Iterator[Batch]:
        """One epoch of random, augmented batches; images left over after the last full batch are dropped.

        Args:
            batch_size: images in a batch over all processes, a multiple of their number, at most `len(self)`.
            generator: a CPU generator. It alone determines order and augmentation, so they are the same on all devices.
            part: `(i, n)` yields the i-th of n equal parts of every batch, counting from 0.

        Yields:
            uint8 images `(batch_size / n, C, H, W)` and labels `(batch_size / n,)`.
        """

    def views(self, batch_size: int) -> Iterator[Batch]:
        """One view of every image for evaluation, in order, at most `batch_size` at a time."""

    def normalize(self, images: Tensor) -> Tensor:
        """The function `normalize` with the mean and standard deviation of these data."""


@dataclass
class Images:
    """uint8 images `(N, C, H, W)` in memory and their int64 labels `(N,)`; `mean` and `std` as in `normalize`.

    In training batches, every image is padded by `crop_padding` black pixels on each side and cropped back at a random
    place. With `flip` it is then mirrored left to right with probability 1/2. A whole batch takes one gather.
    """

    images: Tensor
    labels: Tensor
    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)
    crop_padding: int = 0
    flip: bool = False

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def device(self) -> torch.device:
        """The device of the images."""
        return self.images.device

    def to(self, device: torch.device | str) -> Images:
        """The same images on `device`."""
        return replace(self, images=self.images.to(device), labels=self.labels.to(device))

    def subset(self, index: Tensor | slice) -> Images:
        """The images at these indices."""
        index = index.to(self.device) if isinstance(index, Tensor) else index
        return replace(self, images=self.images[index], labels=self.labels[index])

    def normalize(self, images: Tensor) -> Tensor:
        """See `Data`."""
        return normalize(images, self.mean, self.std)

    def views(self, batch_size: int) -> Iterator[Batch]:
        """See `Data`."""
        yield from zip(self.images.split(batch_size), self.labels.split(batch_size), strict=True)

    def batches(self, batch_size: int, generator: torch.Generator, part: Part = (0, 1)) -> Iterator[Batch]:
        """See `Data`."""
        n, channels, height, width = self.images.shape
        order = torch.randperm(n, generator=generator)
        shifts = torch.randint(0, 2 * self.crop_padding + 1, (2, n), generator=generator)
        flipped = torch.randint(0, 2, (n,), generator=generator) if self.flip else torch.zeros(n, dtype=torch.long)
        order, shifts, flipped = order.to(self.device), shifts.to(self.device), flipped.to(self.device).bool()

        padded = F.pad(self.images, (self.crop_padding,) * 4)
        channel = torch.arange(channels, device=self.device)[None, :, None, None]
        rows, columns = torch.arange(height, device=self.device), torch.arange(width, device=self.device)
        for here in parts(n, batch_size, part):
            index = order[here]
            top, left = shifts[:, here]
            mirrored = torch.where(flipped[here, None], columns.flip(0), columns)
            batch = padded[
                index[:, None, None, None],
                channel,
                (top[:, None] + rows)[:, None, :, None],
                (left[:, None] + mirrored)[:, None, None, :],
            ]
            yield batch, self.labels[index]


def parts(n: int, batch_size: int, part: Part) -> Iterator[slice]:
    """For every full batch of `n` ordered images: the slice that is the i-th of `count` equal parts of the batch."""
    i, count = part
    size = batch_size // count
    for start in range(0, n - batch_size + 1, batch_size):
        yield slice(start + i * size, start + (i + 1) * size)


def normalize(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """uint8 images `(B, C, H, W)` scaled to [0, 1], minus `mean`, divided by `std`, as floats.

    `mean` and `std` have one number for every channel, or one for all.
    """
    mean_there, std_there = (_on(tuple(values), images.device) for values in (mean, std))
    scale = (1 / (255 * std_there))[:, None, None]
    return images.to(std_there.dtype) * scale - (mean_there / std_there)[:, None, None]


@lru_cache
def _on(values: tuple[float, ...], device: torch.device) -> Tensor:
    return torch.tensor(values, device=device)
