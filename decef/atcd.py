"""ATCD: train dense kernels and keep projecting them onto the low-rank set.

Alternating tensor compose-decompose, Lee, Kim, Jeong, Yoon, Appl. Sci. 2021, 11(2), 643. The paper applies it to rank-1
filters. It only needs a projection, so here it works with every layer type that has a dense kernel in training.
"""

from __future__ import annotations

from itertools import chain

import torch
from torch import Tensor, nn

from decef.conversion import fold
from decef.layers import FactorizedConv2d
from decef.layers.factorized import without_autocast


class ATCD:
    """Trains a factorised network through its dense twin.

        atcd = ATCD(model)
        optimizer = SGD(atcd.dense.parameters(), ...)
        for every step: ...; optimizer.step(); atcd.after_step()
        for every epoch: ...; atcd.after_epoch()
        model = atcd.model      # the factors of the last projection

    A projection decomposes every dense kernel and composes it again. It is a truncated SVD, alternating least squares
    that start from the last factors, or, if BasisConv's basis is frozen, a projection onto its span. We do not know how
    or how often the paper decomposes. ATCD can also be read as the chain rule through the composed kernel. For that,
    train a `FactorizedConv2d` with `implementation="reconstructed"`. There the step depends on how the norm is split
    between the factors; here it does not.

    To first order, a projection after every step makes it a step along the tangent space of the low-rank set. The
    optimizer's momentum is left unchanged.

    Args:
        model: the factorised network. Its kernels are the initial dense ones, and projections store factors in it.
        every: steps between projections, or "epoch".

    Attributes:
        dense: the network to train, a copy of `model` with `torch.nn.Conv2d` in place of the factorised layers.
            `after_epoch` copies its other parameters and its buffers back to `model`.

    Raises:
        ValueError: `model` has no factorised layer, or has one without a dense kernel in training, or with a factor
            that is computed before each call; or `every` is neither "epoch" nor a whole number from 1 on.
    """

    def __init__(self, model: nn.Module, every: int | str = 1) -> None:
        if every != "epoch" and (isinstance(every, bool) or not isinstance(every, int) or every < 1):
            raise ValueError(f"every={every!r} is neither 'epoch' nor a whole number of steps from 1 on")
        self.model = model
        self.every = every
        self.dense = fold(model)
        layers = {n: m for n, m in model.named_modules() if isinstance(m, FactorizedConv2d)}
        if not layers:
            raise ValueError("the network has no factorised layer to return to: convert it first")
        for name, layer in layers.items():
            if not layer.composes_in_training:
                raise ValueError(f"layer '{name}' ({type(layer).__name__}) has no kernel in training to project")
            try:
                layer.check_settable()
            except ValueError as error:
                raise ValueError(f"layer '{name}': {error}") from error
        self._pairs = [(layer, self.dense.get_submodule(name)) for name, layer in layers.items()]
        self._steps = 0

    def after_step(self) -> None:
        """Call after every optimizer step: projects if a projection is due.

        Raises:
            FloatingPointError: see `project`.
        """
        self._steps += 1
        if self.every != "epoch" and self._steps % int(self.every) == 0:
            self.project()

    def after_epoch(self) -> bool:
        """Call after every epoch, before measuring or saving: projects unless the last step did, and updates `model`.

        Returns:
            Whether it projected. If so, batch norm's running statistics still belong to the kernels before that.

        Raises:
            FloatingPointError: see `project`.
        """
        moved = self.every == "epoch" or self._steps % int(self.every) > 0
        if moved:
            self.project()
        self._steps = 0  # every epoch counts anew, so that a resumed run projects after the same steps
        self._copy_rest()
        return moved

    @torch.no_grad()
    def project(self) -> float:
        """Project every dense kernel onto the low-rank set.

        Returns:
            The largest relative Frobenius distance by which a kernel moved.

        Raises:
            FloatingPointError: a kernel has NaN or infinite values, because training diverged.
        """
        errors = []
        for layer, conv in self._pairs:
            assert isinstance(conv, nn.Conv2d)
            if not conv.weight.isfinite().all():
                raise FloatingPointError("a kernel is not finite any more: the training diverged")
            errors.append(layer.decompose_(conv.weight, warm_start=True))
            with without_autocast(conv.weight.device):
                conv.weight.copy_(layer.compose())
        return max(errors)

    @torch.no_grad()
    def _copy_rest(self) -> None:
        """Copy to `model` all parameters and buffers but the projected kernels: biases, normalisation, classifier."""
        own = _tensors(self.model)
        for name, value in _tensors(self.dense).items():
            if name in own:
                own[name].copy_(value)


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by name, also those that are in no state dict."""
    return dict(chain(model.named_parameters(), model.named_buffers()))
