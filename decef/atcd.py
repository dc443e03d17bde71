"""ATCD: train dense kernels and keep returning them to the low-rank set.

Lee, Kim, Jeong, Yoon: "Compression of deep learning models by alternating tensor compose-decompose", Appl. Sci. 2021,
11(2), 643. The paper has it for rank-1 filters; it needs nothing but a projection, so here it takes every layer type.
"""

from __future__ import annotations

import torch
from torch import nn

from decef.conversion import fold
from decef.layers import FactorizedConv2d


class ATCD:
    """Trains a factorised network through its dense twin.

        atcd = ATCD(model)
        optimizer = SGD(atcd.dense.parameters(), ...)
        for every step: ...; optimizer.step(); atcd.after_step()
        for every epoch: ...; atcd.after_epoch()
        model = atcd.model      # the factors of the last projection

    A projection decomposes every dense kernel (truncated SVD, or alternating least squares from the last factors) and
    composes it again. How the paper decomposes, and how often, is not known to us. Its other reading, the chain rule
    through the composed kernel, is training a `FactorizedConv2d` with `implementation="reconstructed"`: there the step
    depends on how the norm is split between the factors, here it does not.

    To first order a projection after every step is a step along the tangent space of the low-rank set. The
    optimizer's momentum is left alone.

    Args:
        model: the factorised network; its layers receive the factors. At the start its kernels are the dense ones.
        every: steps between projections, or "epoch".

    Attributes:
        dense: the network to train: `model` with `torch.nn.Conv2d` where it has factorised layers. The rest of it is a
            copy too; `model` gets its values whenever the kernels are projected.

    Raises:
        ValueError: `model` has no factorised layer or one without a kernel in training, or `every` is neither "epoch"
            nor a whole number from 1 on.
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
        without = next((name for name, layer in layers.items() if not layer.composes_in_training), None)
        if without is not None:
            raise ValueError(
                f"layer '{without}' ({type(layers[without]).__name__}) has no kernel in training to project"
            )
        self._pairs = [(layer, self.dense.get_submodule(name)) for name, layer in layers.items()]
        self._steps = 0

    def after_step(self) -> None:
        """Call after every optimizer step: projects when it is due."""
        self._steps += 1
        if self.every != "epoch" and self._steps % int(self.every) == 0:
            self.project()

    def after_epoch(self) -> bool:
        """Call after every epoch: projects, so that what is measured and saved is in the low-rank set.

        Returns:
            Whether that moved the kernels; batch norm's running statistics are then those of other kernels.
        """
        moved = self.every == "epoch" or self._steps % int(self.every) > 0
        if moved:
            self.project()
        self._steps = 0  # an epoch is a new start, so that a resumed run projects after the same steps
        self._copy_rest()
        return moved

    @torch.no_grad()
    def project(self) -> float:
        """Return every dense kernel to the low-rank set.

        Returns:
            The largest relative Frobenius distance that a kernel was moved.

        Raises:
            FloatingPointError: a kernel is not finite any more: the training diverged.
        """
        errors = []
        for layer, conv in self._pairs:
            assert isinstance(conv, nn.Conv2d)
            if not conv.weight.isfinite().all():
                raise FloatingPointError("a kernel is not finite any more: the training diverged")
            errors.append(layer.decompose_(conv.weight, warm_start=True))
            conv.weight.copy_(layer.compose())
        return max(errors)

    @torch.no_grad()
    def _copy_rest(self) -> None:
        """Give `model` all that is not a kernel: biases, normalisation, classifier."""
        own = self.model.state_dict()
        for name, value in self.dense.state_dict().items():
            if name in own:
                own[name].copy_(value)
