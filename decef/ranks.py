"""Effective ranks of kernels, and the rules that give every layer its rank."""

from __future__ import annotations

import heapq
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from decef.layers import DeCEFConv2d, FactorizedConv2d
from decef.layers.decef import stack_filters

#: Definitions of `effective_rank` and the threshold that each uses when none is given.
DEFINITIONS = {"threshold": 0.3, "energy": 0.9, "entropy": None, "stable": None}


def effective_rank(
    weight: Tensor, threshold: float | None = None, *, definition: str = "threshold", groups: int = 1
) -> Tensor:
    """Effective rank of the filters that act on each input channel.

    Of the `(kh kw, out / groups)` matrix of a channel's vectorised filters, with singular values s_1 >= s_2 >= ...:

    - "threshold": how many s_i are at least `threshold * s_1`. The DeCEF paper counts singular values per input
      channel; its exact definition and threshold are not known to us, this is our reading, and 0.3 our default.
    - "energy": the fewest s_i whose squares hold a share `threshold` of all squares (default 0.9).
    - "entropy": exp of the entropy of s_i / sum s (Roy, Vetterli 2007).
    - "stable": sum of all s_i^2 over s_1^2.

    All depend on the matrix's shape: compare with the same kernel at random initialisation.

    Args:
        weight: dense kernel `(out_channels, in_channels // groups, kh, kw)`.
        threshold: for the first two definitions, in (0, 1].
        definition: one of the four.
        groups: of the convolution.

    Returns:
        `(in_channels,)` in float64; 0 for a channel whose filters are all zero.

    Raises:
        ValueError: an unknown definition, or a threshold that is no share or that the definition doesn't take.
    """
    if definition not in DEFINITIONS:
        raise ValueError(f"definition={definition!r} is not one of {', '.join(DEFINITIONS)}")
    default = DEFINITIONS[definition]
    if threshold is not None and default is None:
        raise ValueError(f"definition={definition!r} has no threshold")
    threshold = default if threshold is None else threshold
    if threshold is not None:
        _check_share("threshold", threshold)
    s = torch.linalg.svdvals(stack_filters(weight, groups))
    largest, total = s[:, :1], s.sum(1, keepdim=True)
    if definition == "threshold":
        rank = ((s >= threshold * largest) & (s > 0)).sum(1).to(s.dtype)
    elif definition == "energy":
        assert threshold is not None
        energy = s.square().cumsum(1)
        # The tolerance keeps a share of 1 from counting values that are zero but for rounding.
        rank = (energy < (threshold - 1e-12) * energy[:, -1:]).sum(1).to(s.dtype) + 1
    elif definition == "entropy":
        p = s / total
        rank = torch.exp(-torch.special.xlogy(p, p).sum(1))
    else:
        rank = s.square().sum(1) / largest.squeeze(1).square()
    return torch.where(largest.squeeze(1) > 0, rank, 0.0)


@dataclass(frozen=True)
class Candidate:
    """A convolution that is to be factorised: what a rule may look at.

    The cost of every layer type here is proportional to its rank: `rank * params_per_rank` parameters and
    `rank * macs_per_rank` MACs, against `params` and `macs` of the dense layer (all without bias). The MACs are 0
    where no input size was given. With `moments` of its input patches, energies are of its output.
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
        """Whether the factorised layer costs less than the dense one, in MACs where they are known."""
        if self.macs:
            return rank * self.macs_per_rank < self.macs
        return rank * self.params_per_rank < self.params

    def kept_energy(self) -> Tensor:
        """Share of the kernel's squared norm that each rank adds, `(max_rank,)`, falling; see `spectrum`.

        Rank 1 keeps all of a kernel that is zero.
        """
        spectrum = self.layer.spectrum(self.weight, groups=self.groups, moments=self.moments)
        total = spectrum.sum()
        if total == 0:
            return torch.eye(1, len(spectrum), dtype=spectrum.dtype, device=spectrum.device)[0]
        return spectrum / total


@dataclass(frozen=True)
class Totals:
    """Cost of the whole dense network, kept layers included; MACs 0 where no input size was given."""

    params: int
    macs: int


class Rule(Protocol):
    """Something that turns candidates into ranks."""

    def __call__(self, candidates: Sequence[Candidate], totals: Totals) -> dict[str, int]:
        """Rank by name of every candidate that is to be factorised; one that is missing stays dense.

        Raises:
            ValueError: the rule cannot be met; the message says by which layer or how far.
        """


@dataclass(frozen=True)
class Fixed:
    """The same rank in every layer."""

    rank: int

    def __call__(self, candidates: Sequence[Candidate], totals: Totals) -> dict[str, int]:
        return {c.name: _checked(c, self.rank) for c in candidates}


@dataclass(frozen=True)
class Share:
    """A share of each layer's maximal rank, rounded, at least 1."""

    share: float

    def __post_init__(self) -> None:
        _check_share("share", self.share)

    def __call__(self, candidates: Sequence[Candidate], totals: Totals) -> dict[str, int]:
        return {c.name: max(1, round(self.share * c.max_rank)) for c in candidates}


@dataclass(frozen=True)
class Energy:
    """The smallest ranks that keep this share of every kernel's squared norm (BasisConv's rule, Tayyab 2021).

    For CPAC and rank-1 the share is of an upper bound, see `FactorizedConv2d.spectrum`: they keep less.
    """

    share: float

    def __post_init__(self) -> None:
        _check_share("share", self.share)

    def __call__(self, candidates: Sequence[Candidate], totals: Totals) -> dict[str, int]:
        # As in `effective_rank`, a share of 1 doesn't count what is zero but for rounding.
        below = {c.name: int((c.kept_energy().cumsum(0) < self.share - 1e-12).sum()) for c in candidates}
        return {c.name: min(below[c.name] + 1, c.max_rank) for c in candidates}


@dataclass(frozen=True)
class EffectiveRank:
    """The DeCEF paper's analysis as a rule: each layer's mean effective rank over input channels, rounded up.

    For the other layer types, which have no subspace per channel, it counts the singular values of their `spectrum`
    that are at least `threshold` times the largest.
    """

    threshold: float = 0.3

    def __post_init__(self) -> None:
        _check_share("threshold", self.threshold)

    def __call__(self, candidates: Sequence[Candidate], totals: Totals) -> dict[str, int]:
        ranks = {}
        for c in candidates:
            if c.layer is DeCEFConv2d:
                mean = effective_rank(c.weight, self.threshold, groups=c.groups).mean().item()
            else:
                values = c.kept_energy().sqrt()
                mean = (values >= self.threshold * values[0]).sum().item()
            ranks[c.name] = min(max(1, math.ceil(mean)), c.max_rank)
        return ranks


@dataclass(frozen=True)
class PerLayer:
    """Ranks by layer name; a layer that is not named is an error, and so is a name that is no layer."""

    ranks: Mapping[str, int]

    def __call__(self, candidates: Sequence[Candidate], totals: Totals) -> dict[str, int]:
        names = {c.name for c in candidates}
        if names != set(self.ranks):
            missing, unknown = sorted(names - set(self.ranks)), sorted(set(self.ranks) - names)
            parts = [f"no rank for {', '.join(missing)}"] if missing else []
            parts += [f"no such layer: {', '.join(unknown)}"] if unknown else []
            raise ValueError(f"ranks by layer name don't fit the network: {'; '.join(parts)}")
        return {c.name: _checked(c, self.ranks[c.name]) for c in candidates}


@dataclass(frozen=True)
class Budget:
    """The largest ranks with which the whole network stays within a share of its dense cost.

    A rank goes where it keeps most of a kernel's squared norm (as a share of that kernel's) for its cost, until
    nothing fits any more; every layer has at least rank 1. Where the next rank would cost as much as the dense layer,
    the step is to leave the layer dense. Before training, when spectra say nothing, `uniform` gives every layer the
    same share of its own dense cost, as high as the budget allows; what rounding to whole ranks leaves over goes to
    the layers in their order, one rank at a time. A layer that costs no less at rank 1 than dense stays dense. Give
    one of `flops` and `params`.

    Args:
        flops: share of the dense network's FLOPs (the same share of its MACs), in (0, 1].
        params: share of its parameters, in (0, 1].
        uniform: spread the budget evenly instead of by spectra.
    """

    flops: float | None = None
    params: float | None = None
    uniform: bool = False

    def __post_init__(self) -> None:
        if (self.flops is None) == (self.params is None):
            raise ValueError("a budget is a share of flops or of params: give one of the two")
        _check_share("flops" if self.params is None else "params", self.share)

    @property
    def share(self) -> float:
        share = self.flops if self.params is None else self.params
        assert share is not None
        return share

    def __call__(self, candidates: Sequence[Candidate], totals: Totals) -> dict[str, int]:
        if self.params is None:
            what, total = "FLOPs", totals.macs
            dense = {c.name: c.macs for c in candidates}
            per_rank = {c.name: c.macs_per_rank for c in candidates}
            if not total:
                raise ValueError("a FLOPs budget needs the input size")
        else:
            what, total = "parameters", totals.params
            dense = {c.name: c.params for c in candidates}
            per_rank = {c.name: c.params_per_rank for c in candidates}
        candidates = [c for c in candidates if per_rank[c.name] < dense[c.name]]
        dense, per_rank = ({c.name: costs[c.name] for c in candidates} for costs in (dense, per_rank))
        kept = total - sum(dense.values())
        smallest = kept + sum(per_rank.values())
        # A share such as 0.667 is a rounded number, so the limit is too: half a unit more never matters.
        limit = self.share * total + 0.5
        if smallest > limit:
            raise ValueError(
                f"a budget of {self.share:g} of the dense network's {what} can't be met: with rank 1 in every layer "
                f"it has {smallest / total:.3f} of them"
            )
        spread = _spread_evenly if self.uniform else _spread_by_energy
        return spread(candidates, dense, per_rank, limit - kept)


def _spread_by_energy(
    candidates: Sequence[Candidate], dense: dict[str, int], per_rank: dict[str, int], limit: float
) -> dict[str, int]:
    """Ranks of a total cost of at most `limit`: each next rank is the one that keeps most energy per cost."""
    ranks = {c.name: 1 for c in candidates}
    left = limit - sum(per_rank.values())
    energies = {c.name: c.kept_energy().tolist() for c in candidates}
    most = _most(candidates, dense, per_rank)
    max_rank = {c.name: c.max_rank for c in candidates}

    def step(name: str) -> tuple[float, int]:
        """What a layer's next step keeps and costs: the next rank, or from the last that saves on, dense."""
        rank = ranks[name]
        if rank < most[name]:
            return energies[name][rank], per_rank[name]
        return sum(energies[name][rank:]), dense[name] - rank * per_rank[name]

    def entry(position: int, name: str) -> tuple[float, int, str]:
        kept, costs = step(name)
        return (-kept / costs, position, name)

    heap = [entry(i, name) for i, name in enumerate(ranks) if ranks[name] < max_rank[name]]
    heapq.heapify(heap)
    while heap:
        _, position, name = heapq.heappop(heap)
        _, costs = step(name)
        if costs > left:
            continue
        left -= costs
        if ranks[name] == most[name]:
            del ranks[name]
            continue
        ranks[name] += 1
        if ranks[name] < max_rank[name]:
            heapq.heappush(heap, entry(position, name))
    return ranks


def _spread_evenly(
    candidates: Sequence[Candidate], dense: dict[str, int], per_rank: dict[str, int], limit: float
) -> dict[str, int]:
    """Ranks of a total cost of at most `limit`: every layer at the same share of its dense cost."""
    most = _most(candidates, dense, per_rank)

    def ranks_at(share: float) -> dict[str, int]:
        fitting = {name: math.floor(share * dense[name] / per_rank[name]) for name in most}
        return {name: min(max(1, fitting[name]), most[name]) for name in most}

    def used(ranks: dict[str, int]) -> int:
        return sum(rank * per_rank[name] for name, rank in ranks.items())

    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if used(ranks_at(middle)) <= limit else (low, middle)
    ranks = ranks_at(low)
    left = limit - used(ranks)
    grown = True
    while grown:
        grown = False
        for name in ranks:
            if ranks[name] < most[name] and per_rank[name] <= left:
                ranks[name] += 1
                left -= per_rank[name]
                grown = True
    return ranks


def _most(candidates: Sequence[Candidate], dense: dict[str, int], per_rank: dict[str, int]) -> dict[str, int]:
    """The largest rank of each layer that costs less than the dense layer."""
    return {c.name: min(c.max_rank, (dense[c.name] - 1) // per_rank[c.name]) for c in candidates}


def as_rule(rank: int | Mapping[str, int] | Rule) -> Rule:
    """A number is `Fixed`, a dict by layer name `PerLayer`, a rule itself.

    Raises:
        TypeError: `rank` is none of the three.
    """
    if isinstance(rank, int) and not isinstance(rank, bool):
        return Fixed(rank)
    if isinstance(rank, Mapping):
        return PerLayer(rank)
    if callable(rank):
        return rank
    raise TypeError(f"rank={rank!r} is neither a whole number, nor ranks by layer name, nor a rule of decef.ranks")


def _checked(candidate: Candidate, rank: int) -> int:
    if isinstance(rank, bool) or not isinstance(rank, int) or not 1 <= rank <= candidate.max_rank:
        raise ValueError(
            f"rank {rank!r} is not possible in layer '{candidate.name}': {candidate.layer.__name__} takes ranks from 1 "
            f"to {candidate.max_rank} there ({candidate.layer.rank_meaning})"
        )
    return rank


def _check_share(name: str, share: float) -> None:
    if not 0 < share <= 1:
        raise ValueError(f"{name}={share!r} is not a share: it must be above 0 and at most 1")
