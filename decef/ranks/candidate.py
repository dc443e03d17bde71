"""The interface of a rule, and what a rule sees of a network."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor

from decef.layers import FactorizedConv2d


@dataclass(frozen=True, eq=False)  # tensors have no one truth value
class Candidate:
    """A kernel that may be factorised, with everything that a rule may look at.

    Convolutions that share one weight are one candidate, and their MACs are added up. Costs exclude the bias. MACs are
    for one input of the network, and 0 if no input size was given. The cost of every layer type is proportional to its
    rank: `rank * params_per_rank` parameters and `rank * macs_per_rank` MACs, compared with `params` and `macs` for the
    dense layer.

    Attributes:
        name: name of the convolution, or of the first one with this weight.
        layer: the layer type that it may become.
        weight: dense kernel `(out_channels, in_channels // groups, kh, kw)`.
        groups: number of groups of the convolution.
        max_rank: the largest possible rank.
        moments: second moments of its input, `(groups, d, d)`, see `decef.moments`. With them, energies are those of
            the layer's output; without them, those of the kernel.
    """

    name: str
    layer: type[FactorizedConv2d]
    weight: Tensor
    groups: int
    max_rank: int
    params: int
    params_per_rank: int
    macs: int
    macs_per_rank: int
    moments: Tensor | None = None

    def saves(self, rank: int) -> bool:
        """Whether it costs less at this rank than dense: fewer MACs if they are known, else fewer parameters."""
        if self.macs:
            return rank * self.macs_per_rank < self.macs
        return rank * self.params_per_rank < self.params

    def kept_energy(self) -> Tensor:
        """Share of the energy (the squared norm of the kernel, or of the output) that each further rank adds.

        Returns:
            `(max_rank,)` in float64, descending, with sum 1; see `FactorizedConv2d.spectrum`. For a zero kernel, rank 1
            adds everything.
        """
        return self._kept_energy

    @cached_property
    def _kept_energy(self) -> Tensor:
        spectrum = self.layer.spectrum(self.weight, groups=self.groups, moments=self.moments)
        total = spectrum.sum()
        if total == 0:
            return torch.eye(1, len(spectrum), dtype=spectrum.dtype, device=spectrum.device)[0]
        return spectrum / total


@dataclass(frozen=True)
class Totals:
    """Cost of the whole dense network, not only of its candidates; MACs are 0 if no input size was given."""

    params: int
    macs: int


class Rule(Protocol):
    """Chooses ranks for candidates: any callable with this signature, such as a function.

    It may have an attribute `ranks_are_final`: whether its ranks are used as they are. If not, or if it is missing, a
    layer stays dense if its rank saves nothing (`Candidate.saves`).
    """

    def __call__(self, candidates: Sequence[Candidate], totals: Totals) -> dict[str, int]:
        """Choose the ranks.

        Returns:
            Ranks by the names of the candidates to factorise; a candidate without a rank stays dense.

        Raises:
            ValueError: the rule cannot be followed; the message says in which layer, or by how much.
        """
