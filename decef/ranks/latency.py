"""The rule that spreads measured time over the whole network."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

from decef.ranks.candidate import Candidate, Totals
from decef.ranks.effective import check_share


@dataclass(frozen=True)
class LayerTimes:
    """Measured seconds of one layer.

    Attributes:
        dense: as a dense convolution.
        at_rank: factorised, by rank, in the fastest form of each; at least one rank.
    """

    dense: float
    at_rank: Mapping[int, float]

    def seconds(self, rank: int) -> float:
        """Seconds at a rank, on straight lines between the ranks that were measured.

        Outside of them the nearest line goes on; with one measured rank the time is that of this rank. A larger rank
        is never faster: what was measured faster is noise.
        """
        ranks = sorted(self.at_rank)
        times = list(_rising(self.at_rank[r] for r in ranks))
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
    """

    total: float
    layers: Mapping[str, LayerTimes] = field(default_factory=dict)


@dataclass(frozen=True)
class Latency:
    """The largest ranks that keep the whole network within a share of its dense time, by measured times.

    FLOPs are not time: at half the FLOPs, networks take from 0.6 to 1.1 of their dense time. This rule weighs energy
    against seconds, as `Budget` does against FLOPs. Every layer starts as fast as it can be. Then, one step at a time,
    the layer that gains the most energy per second gets more, up to dense, until no step fits any more.

    Time that no candidate takes (other layers, memory traffic between layers) is the dense network's and is not saved.

    Args:
        share: of the dense network's seconds, in (0, 1].
        times: what `decef.inference.latency.measure_times` found for this network, layer type and machine.

    Raises:
        ValueError: the share is not in (0, 1]. When called: there are no times, or the share can't be met.
    """

    share: float
    times: Times | None = None

    ranks_are_final: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_share("share", self.share)

    def __call__(self, candidates: Sequence[Candidate], totals: Totals) -> dict[str, int]:
        if self.times is None:
            raise ValueError("a time budget needs times: give those of decef.inference.latency.measure_times")
        layers = {
            c.name: list(_frontier(c, self.times.layers[c.name])) for c in candidates if c.name in self.times.layers
        }
        spent = self.times.total + sum(
            steps[0].seconds - self.times.layers[name].dense for name, steps in layers.items()
        )
        limit = self.share * self.times.total * (1 + 1e-9)  # for rounding
        if spent > limit:
            raise ValueError(
                f"a budget of {self.share:g} of the dense network's time can't be met: at the fastest ranks it has "
                f"{spent / self.times.total:.2f} of it"
            )
        position = dict.fromkeys(layers, 0)
        while True:
            fitting = [
                (step.gain_per_second(steps[position[name]]), name)
                for name, steps in layers.items()
                for step in steps[position[name] + 1 : position[name] + 2]
                if spent + step.seconds - steps[position[name]].seconds <= limit
            ]
            if not fitting:
                break
            _, name = max(fitting)
            spent -= layers[name][position[name]].seconds
            position[name] += 1
            spent += layers[name][position[name]].seconds
        ranks = {name: steps[position[name]].rank for name, steps in layers.items()}
        return {name: rank for name, rank in ranks.items() if rank is not None}


@dataclass(frozen=True)
class _Step:
    """What a layer may be: at a rank, or dense (rank None)."""

    rank: int | None
    seconds: float
    energy: float  # share kept

    def gain_per_second(self, before: _Step) -> float:
        return (self.energy - before.energy) / max(self.seconds - before.seconds, 1e-12)


def _frontier(candidate: Candidate, times: LayerTimes) -> Iterator[_Step]:
    """The steps that are worth it, fastest first: each gains less energy per second than the one before."""
    kept = candidate.kept_energy().cumsum(0).tolist()
    steps = [_Step(rank, times.seconds(rank), kept[rank - 1]) for rank in range(1, candidate.max_rank + 1)]
    steps = [step for step in steps if step.seconds < times.dense] + [_Step(None, times.dense, 1.0)]
    hull: list[_Step] = []
    for step in sorted(steps, key=lambda s: (s.seconds, -s.energy)):
        if hull and step.energy <= hull[-1].energy:
            continue
        while len(hull) > 1 and step.gain_per_second(hull[-2]) >= hull[-1].gain_per_second(hull[-2]):
            hull.pop()
        hull.append(step)
    yield from hull


def _rising(values: Iterator[float]) -> Iterator[float]:
    largest = 0.0
    for value in values:
        largest = max(largest, value)
        yield largest
