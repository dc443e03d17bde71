"""The optimizer, the penalties in the loss, and the learning rate."""

from __future__ import annotations

import math
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from decef.layers import DeCEFConv2d, FactorizedConv2d
from decef.training.config import TrainConfig


@runtime_checkable
class _Penalised(Protocol):
    def orthogonality(self) -> Tensor: ...


def make_optimizer(model: nn.Module, config: TrainConfig, orthogonality: float = 0.0) -> torch.optim.Optimizer:
    """SGD, or Adam, over the trainable parameters.

    Eigen-filters that a penalty holds orthonormal get no weight decay. With decay "kernel" no factor gets any:
    `penalties` decays the composed kernel instead.
    """
    free: set[nn.Parameter] = set()
    for module in model.modules():
        if isinstance(module, FactorizedConv2d) and config.decay == "kernel":
            free |= set(module.factors().values())
        elif isinstance(module, DeCEFConv2d) and orthogonality:
            free.add(module.eigenfilters)
    trainable = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trainable if p not in free], "weight_decay": config.weight_decay},
        {"params": [p for p in trainable if p in free], "weight_decay": 0.0},
    ]
    if config.adam:
        return torch.optim.Adam([g for g in groups if g["params"]], lr=config.lr)
    return torch.optim.SGD(
        [g for g in groups if g["params"]], lr=config.lr, momentum=config.momentum, nesterov=config.nesterov
    )


def penalties(model: nn.Module, config: TrainConfig, orthogonality: float = 0.0) -> Tensor:
    """The scalar added to the loss: the layers' orthogonality penalties and, with decay "kernel", Frobenius decay.

    Frobenius decay is `weight_decay / 2 * ||W||^2`, summed over the composed kernels W (Khodak, Tenenholtz, Mackey,
    Fusi: "Initialization and regularization of factorized neural layers", ICLR 2021). Its gradient in W is the one that
    a dense kernel gets from the same `weight_decay`. With Adam it passes through the moments, like Adam's own weight
    decay. Factors that layers share count once.
    """
    by_factors = {tuple(m.factors().values()): m for m in model.modules() if isinstance(m, FactorizedConv2d)}
    layers = list(by_factors.values())
    terms = []
    if config.decay == "kernel" and config.weight_decay:
        terms += [config.weight_decay / 2 * layer.squared_norm() for layer in layers]
    if orthogonality:
        terms += [orthogonality * layer.orthogonality() for layer in layers if isinstance(layer, _Penalised)]
    return torch.stack(terms).sum() if terms else next(model.parameters()).new_zeros(())


def lr_at(config: TrainConfig, done: float) -> float:
    """The learning rate when a share `done` of the training, in [0, 1], is over.

    "onecycle" rises linearly during the warm-up, then falls linearly to 0. "cosine" rises the same way, then falls as
    half a cosine. "step" is multiplied by gamma at each milestone.
    """
    if config.schedule == "step":
        return config.lr * config.gamma ** sum(done >= milestone for milestone in config.milestones)
    if done < config.warmup:
        return config.lr * done / config.warmup
    left = (1 - done) / (1 - config.warmup)
    return config.lr * (left if config.schedule == "onecycle" else (1 - math.cos(math.pi * left)) / 2)
