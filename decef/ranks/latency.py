"""The rule that spreads measured time over the whole network."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import ClassVar

from decef.layers import FactorizedConv2d
from decef.ranks.candidate import Candidate, Totals
from decef.ranks.effective import check_share
from decef.ranks.steps import NOTHING, Step, spread

NO_TIMES = (
    "a time budget needs times: give those of decef.inference.latency.measure_times, for layer 'auto' by layer type"
)


@dataclass(frozen=True)
class LayerTimes:
    """Measured seconds of one layer.

    Attributes:
        dense: as a dense convolution.
        at_rank: factorised, by rank, in the fastest form of each; at least one rank.
        block: a rank above it takes as long as the next multiple of it, see `FactorizedConv2d.block`.
    """

    dense: float
    at_rank: Mapping[int, float]
    block: int = 1

    def __add__(self, other: LayerTimes) -> LayerTimes:
        """The times of two layers of the same rank, measured at the same ranks."""
        at_rank = {rank: seconds + other.at_rank[rank] for rank, seconds in self.at_rank.items()}
        return LayerTimes(self.dense + other.dense, at_rank, self.block)

    def seconds(self, rank: int) -> float:
        """Seconds at a rank, on straight lines between the ranks that were measured.

        Outside of them the nearest line goes on; with one measured rank the time is that of this rank. A larger rank
        is never faster: what was measured faster is noise.
        """
        if rank > self.block:
            rank = math.ceil(rank / self.block) * self.block
        ranks = sorted(self.at_rank)
        times = list(accumulate((self.at_rank[r] for r in ranks), max))
        if len(ranks) == 1:
            return times[0]
        i = min(max(bisect_right(ranks, rank), 1), len(ranks) - 1)
        slope = (times[i] - times[i - 1]) / (ranks[i] - ranks[i - 1])
        return max(times[i - 1] + slope * (rank - ranks[i - 1]), 0.0)


@dataclass(frozen=True)
class Times:
    """Measured seconds of a network and of its layers, for one layer type, on one machine.

    Attributes:
        total: seconds of the dense network.
        layers: by the names of convolutions.
        layer: the layer type that was measured; None if that isn't known.
    """

    total: float
    layers: Mapping[str, LayerTimes] = field(default_factory=dict)
    layer: type[FactorizedConv2d] | None = None


@dataclass(frozen=True)
class Latency:
    """The largest ranks that keep the whole network within a share of its dense time, by measured times.

    FLOPs are not time: at half the FLOPs, networks take from 0.5 to 1 of their dense time. This rule weighs energy
    against seconds, as `Budget` does against FLOPs. Every layer starts as fast as it can be. Then, one step at a time,
    the layer that gains the most energy per second gets more, up to dense, until no step fits any more.

    Time that no candidate takes (other layers, memory traffic between layers) is the dense network's and is not saved.

    Args:
        share: of the dense network's seconds, in (0, 1].
        times: what `decef.inference.latency.measure_times` found for this network, layer type and machine; for "auto"
            by layer type.

    Raises:
        ValueError: the share is not in (0, 1]. When called: there are no times, they are of another layer type or
            network, or the share can't be met.
    """

    share: float
    times: Times | Mapping[str, Times] | None = field(default=None, repr=False)

    ranks_are_final: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_share("share", self.share)

    def __call__(self, candidates: Sequence[Candidate], totals: Totals) -> dict[str, int]:
        if isinstance(self.times, Mapping):
            raise ValueError("times by layer type are for layer 'auto': give those of the one layer type")
        if self.times is None:
            raise ValueError(NO_TIMES)
        chosen = self.spread({c.name: list(self.steps(c, None, _kept(c))) for c in candidates}, totals)
        return {name: step.rank for name, step in chosen.items() if step.rank is not None}

    def most(self, candidate: Candidate) -> int:
        """The largest rank that is looked at: one with fewer MACs than dense, as a faster one nearly always has."""
        return sum(candidate.saves(rank) for rank in range(1, candidate.max_rank + 1))

    def steps(self, candidate: Candidate, layer: str | None, energy: Mapping[int, float]) -> Iterator[Step]:
        """What a candidate may be: dense, or of a layer type at every given rank that is measured to be faster.

        Args:
            candidate: the kernel.
            layer: the layer type, if `times` has several; None if it has one.
            energy: share that is kept, by rank.

        Raises:
            ValueError: there are no times for this layer type, or they are of another.
        """
        times = self.times
        if layer is not None:
            times = times.get(layer) if isinstance(times, Mapping) else None
        if not isinstance(times, Times):
            raise ValueError(f"a time budget for 'auto' needs times by layer type, here for {layer}: of measure_times")
        if times.layer not in (None, candidate.layer):
            raise ValueError(f"the times are of {times.layer.__name__}, and the layers are {candidate.layer.__name__}")
        layers = times.layers.get(candidate.name)
        if layers is None:
            return
        yield Step(layers.dense, 1.0)
        for rank, kept in energy.items():
            if layers.seconds(rank) < layers.dense:
                yield Step(layers.seconds(rank), kept, rank, layer)

    def spread(self, choices: Mapping[str, Sequence[Step]], totals: Totals) -> dict[str, Step]:
        """A step for every layer that was measured, within the share.

        Args:
            choices: what every layer may be, by name, see `steps`.
            totals: not looked at.

        Raises:
            ValueError: it can't be met, or the times are of another network.
        """
        assert self.times is not None
        if choices and not any(choices.values()):
            raise ValueError("the times are of another network: none of the layers that may change was measured")
        total = (next(iter(self.times.values())) if isinstance(self.times, Mapping) else self.times).total
        chosen = spread(choices, total, self.share * total * (1 + 1e-9))  # for rounding
        if isinstance(chosen, float):
            raise ValueError(
                f"a budget of {self.share:g} of the dense network's time can't be met: at the fastest ranks it has "
                f"{chosen / total:.2f} of it"
            )
        return chosen


def _kept(candidate: Candidate) -> dict[int, float]:
    """Share of the energy that a candidate keeps, by rank.

    A bound reaches all of it long before the kernel is reached. There it is taken to be less than what dense keeps, by
    ever less at larger ranks.
    """
    kept, most = candidate.kept_energy().cumsum(0).clamp(max=1).tolist(), candidate.max_rank
    if not candidate.layer.spectrum_is_bound:
        return dict(enumerate(kept, start=1))
    return {rank: share - NOTHING * (most + 1 - rank) / most for rank, share in enumerate(kept, start=1)}
