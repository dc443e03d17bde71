"""What a rule sees of a network, and what a rule is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from decef.layers import FactorizedConv2d


@dataclass(frozen=True)
class Candidate:
    """A kernel that may be factorised, with everything that a rule may look at.

    Convolutions that share one weight are one candidate, and their MACs are added up. Costs are without bias; MACs are
    for one input of the network, and 0 where its size was not given. The cost of every layer type is proportional to
    its rank: `rank * params_per_rank` parameters and `rank * macs_per_rank` MACs, against `params` and `macs` dense.

    Attributes:
        name: of the convolution, or of the first one that has this weight.
        layer: the layer type that it may become.
        weight: dense kernel `(out_channels, in_channels // groups, kh, kw)`.
        groups: number of groups of the convolution.
        max_rank: the largest rank that is possible.
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
        """Whether it costs less at this rank than dense: fewer MACs where they are known, else fewer parameters."""
        if self.macs:
            return rank * self.macs_per_rank < self.macs
        return rank * self.params_per_rank < self.params

    def kept_energy(self) -> Tensor:
        """Share of the energy (the squared norm of the kernel, or of the output) that each further rank keeps.

        Returns:
            `(max_rank,)` in float64, falling, with sum 1; see `FactorizedConv2d.spectrum`. Of a zero kernel, rank 1
            keeps everything.
        """
        spectrum = self.layer.spectrum(self.weight, groups=self.groups, moments=self.moments)
        total = spectrum.sum()
        if total == 0:
            return torch.eye(1, len(spectrum), dtype=spectrum.dtype, device=spectrum.device)[0]
        return spectrum / total


@dataclass(frozen=True)
class Totals:
    """Cost of the whole dense network, with everything that stays dense; MACs are 0 where no input size was given."""

    params: int
    macs: int


class Rule(Protocol):
    """What gives candidates their ranks: any callable with these arguments, a function for example.

    A rule may have two attributes. Where one is missing, `plan` takes it to be False:

    - `ranks_are_final`: whether its ranks are taken as they are. If not, a layer stays dense where the rank saves
      nothing (`Candidate.saves`).
    - `names_layers`: whether it has layer names of its own. If so, it is called even where there is no candidate, so
      that it can refuse names that do not exist.
    """

    def __call__(self, candidates: Sequence[Candidate], totals: Totals) -> dict[str, int]:
        """Choose the ranks.

        Returns:
            Rank by name of each candidate that is to be factorised; a candidate without a rank stays dense.

        Raises:
            ValueError: the rule cannot be followed; the message says in which layer, or by how much.
        """
