"""Rules that look at one layer at a time, and `as_rule`, which also accepts plain ranks."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from numbers import Integral
from typing import ClassVar

from decef.layers import DeCEFConv2d
from decef.ranks.candidate import Candidate, Rule, Totals
from decef.ranks.effective import ROUNDING, check_share, effective_rank


@dataclass(frozen=True)
class Fixed:
    """The same rank in every layer."""

    rank: int

    ranks_are_final: ClassVar[bool] = True

    def __call__(self, candidates: Sequence[Candidate], totals: Totals) -> dict[str, int]:
        return {c.name: self.rank for c in candidates}


@dataclass(frozen=True)
class PerLayer:
    """Ranks by layer name, one for every candidate.

    Raises:
        ValueError: when called, if a candidate has no rank, or a name is not that of a candidate.
    """

    ranks: Mapping[str, int]

    ranks_are_final: ClassVar[bool] = True

    def __call__(self, candidates: Sequence[Candidate], totals: Totals) -> dict[str, int]:
        names = {c.name for c in candidates}
        if names != set(self.ranks):
            missing, unknown = sorted(names - set(self.ranks)), sorted(set(self.ranks) - names)
            parts = [f"no rank for {', '.join(missing)}"] if missing else []
            parts += [f"no such layer: {', '.join(unknown)}"] if unknown else []
            raise ValueError(f"ranks by layer name don't fit the network: {'; '.join(parts)}")
        return {c.name: self.ranks[c.name] for c in candidates}


@dataclass(frozen=True)
class Share:
    """A share, in (0, 1], of each layer's largest rank, rounded, but at least rank 1.

    Raises:
        ValueError: the share is not in (0, 1].
    """

    share: float

    ranks_are_final: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_share("share", self.share)

    def __call__(self, candidates: Sequence[Candidate], totals: Totals) -> dict[str, int]:
        return {c.name: max(1, round(self.share * c.max_rank)) for c in candidates}


@dataclass(frozen=True)
class Energy:
    """The smallest rank at which each layer keeps a share, in (0, 1], of its energy.

    This is BasisConv's rule (Tayyab, Khan, Mahalanobis 2021). For CPAC and rank-1 only an upper bound of the kept
    energy is known, with data an estimate of it (`FactorizedConv2d.spectrum`), so they may keep less than the share.

    Raises:
        ValueError: the share is not in (0, 1].
    """

    share: float

    def __post_init__(self) -> None:
        check_share("share", self.share)

    def __call__(self, candidates: Sequence[Candidate], totals: Totals) -> dict[str, int]:
        below = {c.name: int((c.kept_energy().cumsum(0) < self.share - ROUNDING).sum()) for c in candidates}
        return {c.name: min(below[c.name] + 1, c.max_rank) for c in candidates}


@dataclass(frozen=True)
class EffectiveRank:
    """Each layer's effective rank, of its kernel: for DeCEF the mean of `effective_rank` over its input channels.

    It is rounded up. The other layer types have no matrix per input channel. For them it is the number of singular
    values (square roots of `FactorizedConv2d.spectrum`) that are at least `threshold`, in (0, 1], times the largest.

    Raises:
        ValueError: the threshold is not in (0, 1].
    """

    threshold: float = 0.3

    def __post_init__(self) -> None:
        check_share("threshold", self.threshold)

    def __call__(self, candidates: Sequence[Candidate], totals: Totals) -> dict[str, int]:
        ranks = {}
        for c in candidates:
            if c.layer is DeCEFConv2d:
                mean = effective_rank(c.weight, self.threshold, groups=c.groups).mean().item()
            else:
                values = replace(c, moments=None).kept_energy().sqrt()
                mean = (values >= self.threshold * values[0]).sum().item()
            ranks[c.name] = min(max(1, math.ceil(mean)), c.max_rank)
        return ranks


def as_rule(rank: int | Mapping[str, int] | Rule) -> Rule:
    """The rule for `rank`: `Fixed` for a number, `PerLayer` for ranks by layer name, `rank` itself if it is a rule.

    Raises:
        TypeError: `rank` is none of the three.
    """
    if isinstance(rank, Integral) and not isinstance(rank, bool):
        return Fixed(int(rank))
    if isinstance(rank, Mapping):
        return PerLayer(rank)
    if callable(rank):
        return rank
    raise TypeError(f"rank={rank!r} is neither a whole number, nor ranks by layer name, nor a rule of decef.ranks")
