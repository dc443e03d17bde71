"""The config of a run, a file for each group of `configs/`. Values are checked on construction."""

from decef.training.config.dataset import DatasetConfig
from decef.training.config.errors import BusyError, InputError, input_errors
from decef.training.config.layer import LayerConfig
from decef.training.config.model import REPLACEMENT_OPTIONS, ModelConfig
from decef.training.config.run import GROUPS, MAX_SEED, RunConfig, WandbConfig, flat, group
from decef.training.config.train import DEFAULT_DECAY, TrainConfig

__all__ = [
    "DEFAULT_DECAY",
    "GROUPS",
    "MAX_SEED",
    "REPLACEMENT_OPTIONS",
    "BusyError",
    "DatasetConfig",
    "InputError",
    "LayerConfig",
    "ModelConfig",
    "RunConfig",
    "TrainConfig",
    "WandbConfig",
    "flat",
    "group",
    "input_errors",
]
