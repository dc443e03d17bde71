"""Datasets of this package as loaders of normalised batches, as `compress` takes them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from decef.data import Data
from decef.training.loop import EVAL_BATCH


@dataclass
class TrainingBatches:
    """Augmented, normalised batches in an order that torch's generator decides.

    Args:
        data: the images.
        batch_size: how many in a batch, or fewer if there are fewer.
    """

    data: Data
    batch_size: int

    def __post_init__(self) -> None:
        self.batch_size = min(self.batch_size, len(self.data))

    def __len__(self) -> int:
        return len(self.data) // self.batch_size

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        generator = torch.Generator().manual_seed(int(torch.randint(2**62, ()).item()))
        for images, labels in self.data.batches(self.batch_size, generator):
            yield self.data.normalize(images), labels


@dataclass
class TestBatches:
    """One view of every image, normalised."""

    data: Data

    @property
    def labels(self) -> Tensor:
        """Labels of all images, `(N,)`, known without reading them."""
        return self.data.labels

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for images, labels in self.data.views(EVAL_BATCH):
            yield self.data.normalize(images), labels
