"""The grid: every dataset, architecture and layer type, by configuration alone, on tiny slices."""

import copy
import itertools
import json
import logging
from dataclasses import replace
from functools import cache

import pytest
import torch
from support import composed as compose

from decef.data import DATASETS, FOLDERS, Images
from decef.layers import LAYERS
from decef.training.config import DatasetConfig, RunConfig
from decef.training.run import run

#: Other depths of a CIFAR ResNet and larger networks of torchvision and timm are the same code and take longer.
ARCHITECTURES = ("resnet20", "vgg16_bn", "mobilenetv1", "mobilenetv2", "plain", "torchvision", "timm")
SMALLER = {
    "timm": {"name": "timm/resnet10t"},
    "torchvision": {"name": "torchvision/squeezenet1_1"},
    "plain": {"width": 0.1},
    **{name: {"width": 0.25} for name in ("vgg16_bn", "mobilenetv1", "mobilenetv2")},
}
#: MobileNet's pairs as dense convolutions: a depthwise or 1x1 kernel has no low-rank form in these layer types.
PAIRS = ("decef", "rank1")


@cache
def composed(folder, name):
    return compose(f"{folder}={name}")[folder]


def group(folder, name):
    return copy.deepcopy(composed(folder, name))


def config(data, model, layer, results):
    train = group("train", "smoke") | {"epochs": 1, "batch_size": 4, "lr": 1e-4}  # four images may say anything
    layer_config = group("layer", layer) | ({} if layer == "conv2d" else {"rank": 1})
    model_config = group("model", model) | SMALLER.get(model, {})
    if "dense_pairs" in model_config:
        model_config |= {"dense_pairs": layer in PAIRS}
    if layer in PAIRS:
        model_config |= {"min_kernel_size": 2}
    data_config = group("dataset", data) | {"train_size": 8}
    if data in FOLDERS:
        data_config |= {"size": 32, "workers": 0, "num_classes": 3}
    return {
        "dataset": data_config, "model": model_config, "layer": layer_config, "train": train, "seed": 0,
        "device": "cpu", "threads": None, "progress": False, "keep_checkpoints": 0, "results": str(results),
        "wandb": {"mode": "disabled", "project": "decef", "entity": None, "group": None}, "experiment": None,
    }  # fmt: skip


REAL = DatasetConfig.dataset


def tiny(settings):
    """A dataset of noise in the real one's shape; its files have tests of their own."""
    real = REAL(settings)
    generator = torch.Generator().manual_seed(0)
    size = real.input_size if real.input_size[1] < 64 else (real.input_size[0], 32, 32)

    def images(n):
        pixels = torch.randint(0, 256, (n, *size), generator=generator, dtype=torch.uint8)
        return Images(pixels, torch.arange(n) % real.num_classes)

    return replace(real, input_size=size, read=lambda root: (images(8), images(4)))


DATA = (*DATASETS, *FOLDERS)
#: Their images have the shape of another's, so here one architecture is enough; test_every_cell has all.
SAME_IMAGES = ("cifar100", "svhn", "fashion_mnist", "magnetic_tile_masks", "imagefolder", "imagenet")


def run_cells(cells, tmp_path, monkeypatch, caplog):
    caplog.set_level(logging.ERROR)
    monkeypatch.setattr(DatasetConfig, "dataset", tiny)
    monkeypatch.setattr("decef.training.config.dataset.folder_identity", lambda root, name="": (10, "of no folder"))
    monkeypatch.setattr("decef.training.recorder.environment", lambda device: {"started": "now"})
    done = 0
    for data, model, layer in cells:
        settings = RunConfig.from_dict(config(data, model, layer, tmp_path))
        if REAL(settings.dataset).input_size[0] == 1 and settings.model.name.startswith("torchvision/"):
            continue  # torchvision's networks take colour images only; timm's take both
        summary = run(settings)
        record = json.loads((tmp_path / "runs" / summary["id"] / "summary.json").read_text())
        assert record["status"] == "finished"
        assert 0 <= record["test_top1"] <= 100
        assert bool(record["ranks"]) == (layer != "conv2d")
        done += 1
    assert len(list((tmp_path / "runs").iterdir())) == done > 0


@pytest.mark.parametrize("model", ARCHITECTURES)
def test_every_architecture_with_three_layer_types_in_turn(model, tmp_path, monkeypatch, caplog):
    first = ARCHITECTURES.index(model)
    layers = [list(LAYERS)[(first + step) % len(LAYERS)] for step in (0, 2, 3)]  # so each MobileNet has one of PAIRS
    run_cells([("cifar10", model, layer) for layer in layers], tmp_path, monkeypatch, caplog)


@pytest.mark.parametrize("data", [data for data in DATA if data != "cifar10"])  # which has a test of its own
def test_every_dataset_and_every_shape_of_image_with_every_architecture(data, tmp_path, monkeypatch, caplog):
    layers = itertools.islice(itertools.cycle(LAYERS), DATA.index(data), None)  # in turn
    models = ARCHITECTURES[:1] if data in SAME_IMAGES else ARCHITECTURES
    cells = [(data, model, layer) for model, layer in zip(models, layers, strict=False)]
    run_cells(cells, tmp_path, monkeypatch, caplog)


@pytest.mark.grid
@pytest.mark.parametrize("data", DATA)
def test_every_cell(data, tmp_path, monkeypatch, caplog):
    run_cells(itertools.product([data], ARCHITECTURES, LAYERS), tmp_path, monkeypatch, caplog)
