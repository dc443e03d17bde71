"""What tests share: small configs, small networks, short trainings."""

import copy
import dataclasses
from pathlib import Path

import torch
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from omegaconf import OmegaConf

from decef.conversion import convert
from decef.data import DATASETS
from decef.models import CifarResNet
from decef.plans import plan
from decef.training.config import RunConfig, TrainConfig
from decef.training.loop import fit

ROOT = Path(__file__).resolve().parents[1]
DIGITS = DATASETS["digits"].load()
SETTINGS = {
    "dataset": {"name": "digits", "root": None, "train_size": 256, "crop_padding": 1, "flip": False},
    "model": {"name": "resnet20", "shortcut": "A", "dense_stem": True, "factorize_classifier": False},
    "layer": {"name": "decef", "rank": 2, "flops": None, "implementation": "reconstructed"},
    "train": {"name": "smoke", "epochs": 2, "batch_size": 64, "lr": 0.1, "scales": [[0.5, 0.75]]},
    "wandb": {"mode": "disabled", "project": "decef", "entity": None, "group": None},
    "experiment": None,
    "seed": 0,
    "device": "cpu",
    "threads": None,
    "progress": False,
    "keep_checkpoints": 0,
}
TRAIN = TrainConfig(name="test", epochs=4, batch_size=64, lr=0.1, warmup=0.25)


def settings(results, **changes):
    """A small run as plain data; `group__key` changes one setting of a group."""
    new = {**copy.deepcopy(SETTINGS), "results": str(results)}
    for key, value in changes.items():
        group, _, name = key.partition("__")
        if name:
            new[group][name] = value
        else:
            new[group] = value
    if (new["model"] or {}).get("name") == "plain" and "train__scales" not in changes:
        new["train"]["scales"] = []  # its last maps are small already
    return new


def config(results, **changes):
    """`settings` as a config."""
    return RunConfig.from_dict(settings(results, **changes))


def composed(*overrides):
    """What Hydra composes from command-line overrides, as plain data."""
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
        return OmegaConf.to_container(compose("train", overrides=list(overrides)), resolve=True)


class Memory:
    """A state that remembers, and can stop the training after some epoch as a kill would."""

    def __init__(self, stop_after=None):
        self.saved, self.stop_after = None, stop_after

    def save(self, state):
        clone = lambda v: v.clone() if isinstance(v, torch.Tensor) else v  # noqa: E731
        self.saved = torch.utils._pytree.tree_map(clone, dict(state))
        if state["epoch"] == self.stop_after:
            raise KeyboardInterrupt


def network(layer="conv2d", seed=0, **options):
    """A ResNet-8 for digits with one layer type in it, freshly initialised."""
    torch.manual_seed(seed)
    model = CifarResNet(8, in_channels=1)
    rank = 12 if layer.startswith("basisconv") else 4
    return convert(model, plan(model, layer, rank=rank, exclude="conv1", **options), from_scratch=True)


def train(model, config=TRAIN, state=None, seed=0, size=512, orthogonality=0.0):
    """Train on some of the digits; returns the epochs' metrics."""
    images, test = DIGITS
    metrics, state = [], state or Memory()
    images = dataclasses.replace(images.subset(slice(0, size)), crop_padding=1)
    fit(
        model, images, test, config,
        seed=seed, orthogonality=orthogonality, saved=state.saved, save=state.save, on_epoch=metrics.append,
    )  # fmt: skip
    return metrics
