"""Which images."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from decef.data import FOLDERS, Data, Dataset, dataset, folder_identity
from decef.data.subsets import stratified_subset
from decef.training.config.checks import check_flag, check_whole


@dataclass(frozen=True)
class DatasetConfig:
    """Which images. `configs/dataset/*.yaml` explains the settings.

    Raises:
        ValueError: a number is negative or not whole, a flag is neither true nor false, or a mean is no list.
    """

    name: str
    root: str | None = None
    workers: int = 0
    train_size: int | None = None
    crop_padding: int | None = None
    flip: bool = False
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    size: int | None = None
    num_classes: int | None = None
    split_test: bool = False
    as_published: bool = False
    images_md5: str | None = None

    def __post_init__(self) -> None:
        for key in ("train_size", "crop_padding", "workers"):
            check_whole(f"dataset.{key}", getattr(self, key))
        for key in ("flip", "split_test", "as_published"):
            check_flag(f"dataset.{key}", getattr(self, key))
        for key in ("mean", "std"):
            value = getattr(self, key)
            if value is not None and not (isinstance(value, tuple) and all(isinstance(v, (int, float)) for v in value)):
                raise ValueError(f"dataset.{key}={value!r} must be a list with a number for every channel")

    @property
    def folder(self) -> Path | None:
        """The folder to look in first, if one is given."""
        return Path(self.root) if self.root else None

    def dataset(self) -> Dataset:
        """The configured dataset; nothing is read.

        Raises:
            ValueError: see `decef.data.dataset`.
        """
        if self.crop_padding and self.name in FOLDERS:
            raise ValueError(
                f"dataset.crop_padding={self.crop_padding} would do nothing: {self.name} has its own crops"
            )
        return dataset(
            self.name,
            mean=self.mean,
            std=self.std,
            size=self.size,
            num_classes=self.num_classes,
            split_test=self.split_test,
            as_published=self.as_published,
        )

    def load(self, root: Path | None = None) -> tuple[Data, Data]:
        """The training and the test images, from `root` or the configured folder.

        Raises:
            ValueError, FileNotFoundError, ImportError: see `Dataset.load`.
        """
        folder = self.folder if root is None else root
        train, test = self.dataset().load(
            folder, crop_padding=self.crop_padding or 0, flip=self.flip, workers=self.workers
        )
        return stratified_subset(train, self.train_size) if self.train_size else train, test

    def resolved(self) -> DatasetConfig:
        """The config with the settings filled in that follow from the dataset or its folder.

        The MD5 of the images' names is part of a run's identity, as one's own folders have nothing else that tells them
        apart.

        Raises:
            FileNotFoundError: there is no folder of images.
            ValueError: `images_md5` is given and the folder has another; or see `decef.data.dataset`.
        """
        config = self
        if self.name == "imagefolder":
            classes, md5 = folder_identity(self.folder)
            if self.images_md5 not in (None, md5):
                raise ValueError(f"dataset.root={self.root} has not the images that the run began with")
            config = replace(self, num_classes=self.num_classes or classes, images_md5=md5)
        known = config.dataset()
        return replace(config, mean=known.mean, std=known.std)

    def part_md5(self) -> str | None:
        """MD5 of the images' names in a part of ImageNet; None if it is whole, not here or another dataset.

        It stands in a record's summary, not in its config as `images_md5` does: older records keep their ids.
        """
        if self.name != "imagenet" or self.num_classes == 1000:
            return None
        try:
            return folder_identity(self.folder, self.name)[1]
        except FileNotFoundError:
            return None
