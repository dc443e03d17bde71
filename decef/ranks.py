"""Rules that give every layer its rank."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from decef.layers import FactorizedConv2d


@dataclass(frozen=True)
class Candidate:
    """A convolution that is to be factorised: what a rule may look at.

    The cost of every layer type here is proportional to its rank: `rank * params_per_rank` parameters and
    `rank * macs_per_rank` MACs, against `params` and `macs` of the dense layer (all without bias). The MACs are 0
    where no input size was given.
    """

    name: str
    layer: type[FactorizedConv2d]
    max_rank: int
    params: int
    params_per_rank: int
    macs: int
    macs_per_rank: int


@dataclass(frozen=True)
class Totals:
    """Cost of the whole dense network, kept layers included; MACs 0 where no input size was given."""

    params: int
    macs: int


class Rule(Protocol):
    """Something that turns candidates into ranks."""

    def __call__(self, candidates: Sequence[Candidate], totals: Totals) -> dict[str, int]:
        """Rank of every candidate by name.

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

    Every layer gets the same share of its own dense cost, as high as the budget allows; what the rounding to whole
    ranks leaves over goes to the layers in their order, one rank at a time. Give one of the two.

    Args:
        flops: share of the dense network's FLOPs (the same share of its MACs), in (0, 1].
        params: share of its parameters, in (0, 1].
    """

    flops: float | None = None
    params: float | None = None

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
        kept = total - sum(dense.values())
        smallest = kept + sum(per_rank.values())
        # A share such as 0.667 is a rounded number, so the limit is too: half a unit more never matters.
        limit = self.share * total + 0.5
        if smallest > limit:
            raise ValueError(
                f"a budget of {self.share:g} of the dense network's {what} can't be met: with rank 1 in every layer "
                f"it has {smallest / total:.3f} of them"
            )

        def ranks_at(share: float) -> dict[str, int]:
            return {
                c.name: min(max(1, math.floor(share * dense[c.name] / per_rank[c.name])), c.max_rank)
                for c in candidates
            }

        def used(ranks: dict[str, int]) -> int:
            return kept + sum(rank * per_rank[name] for name, rank in ranks.items())

        low, high = 0.0, max((c.max_rank * per_rank[c.name] / dense[c.name] for c in candidates), default=0.0)
        for _ in range(60):
            middle = (low + high) / 2
            low, high = (middle, high) if used(ranks_at(middle)) <= limit else (low, middle)
        ranks = ranks_at(low)
        left = limit - used(ranks)
        grown = True
        while grown:
            grown = False
            for c in candidates:
                if ranks[c.name] < c.max_rank and per_rank[c.name] <= left:
                    ranks[c.name] += 1
                    left -= per_rank[c.name]
                    grown = True
        return ranks


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
