"""What a layer may become, and the choice over all layers that keeps the most energy for a total cost."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from decef.ranks.candidate import Candidate

POINTS = 5  # ranks at which the time of a layer is measured
ENERGY_POINTS = 7  # ranks at which its energy is
NOTHING = 1e-12  # of the energy; less is rounding


@dataclass(frozen=True)
class Step:
    """One thing that a layer may be.

    Attributes:
        cost: in the unit of the budget: seconds, MACs or parameters.
        energy: share of its energy that it keeps.
        rank: None for the dense layer.
        layer: layer type; None for the dense layer, or where there is only one type.
    """

    cost: float
    energy: float
    rank: int | None = None
    layer: str | None = None

    def gain(self, before: Step) -> float:
        """Energy per cost of going from another step to this one."""
        return (self.energy - before.energy) / max(self.cost - before.cost, 1e-12)


def frontier(steps: Iterable[Step]) -> list[Step]:
    """The steps worth taking, cheapest first: each gains less energy per cost than the one before."""
    hull: list[Step] = []
    for step in sorted(steps, key=lambda s: (s.cost, -s.energy)):
        if hull and step.energy <= hull[-1].energy:
            continue
        while len(hull) > 1 and step.gain(hull[-2]) >= hull[-1].gain(hull[-2]):
            hull.pop()
        hull.append(step)
    return hull


def spread(choices: Mapping[str, Sequence[Step]], whole: float, limit: float) -> dict[str, Step] | float:
    """Choose a step for every layer: start with the cheapest, then always take the step that gains most per cost.

    Args:
        choices: the steps of every layer by name, the dense one among them; none for a layer that stays as it is.
        whole: cost of the whole network with these layers dense.
        limit: on the cost of the whole network.

    Returns:
        A step for every layer that has any; or, if even the cheapest steps exceed the limit, the network's cost then.
    """
    dense = sum(step.cost for steps in choices.values() for step in steps if step.rank is None)
    frontiers = {name: frontier(steps) for name, steps in choices.items() if steps}
    spent = whole - dense + sum(steps[0].cost for steps in frontiers.values())
    limit *= 1 + 1e-9  # for rounding
    if spent > limit:
        return float(spent)
    position = dict.fromkeys(frontiers, 0)
    while True:
        fitting = [
            (steps[at + 1].gain(steps[at]), name)
            for name, steps in frontiers.items()
            if (at := position[name]) + 1 < len(steps) and spent + steps[at + 1].cost - steps[at].cost <= limit
        ]
        if not fitting:
            return {name: steps[position[name]] for name, steps in frontiers.items()}
        _, name = max(fitting)
        steps, at = frontiers[name], position[name]
        spent += steps[at + 1].cost - steps[at].cost
        position[name] += 1


def spaced(most: int, points: int = POINTS) -> list[int]:
    """At most so many whole numbers from 1 to `most`, at even ratios."""
    return sorted({round(most ** (i / max(1, points - 1))) for i in range(points)})


def measured_energy(candidate: Candidate, most: int) -> dict[int, float]:
    """Share of its energy that a candidate keeps at every rank up to `most`, by decomposing it.

    Unlike `Candidate.kept_energy`, which is a bound for CPAC and rank-1, this can be compared between layer types. At
    some ranks it is measured. Between them the energy that is lost is taken to fall geometrically, as spectra do; a
    larger rank never keeps less.
    """
    out, per_group, kh, kw = weight_shape = candidate.weight.shape
    assert len(weight_shape) == 4
    ranks = spaced(most, ENERGY_POINTS) if most else []
    lost: list[float] = []
    for rank in ranks:
        layer = candidate.layer(
            per_group * candidate.groups, out, (kh, kw), groups=candidate.groups, bias=False,
            device="meta", dtype=candidate.weight.dtype, rank=rank,
        ).to_empty(device=candidate.weight.device)  # fmt: skip
        error = layer.decompose_(candidate.weight, moments=candidate.moments)
        lost.append(min(max(error**2, NOTHING), *lost[-1:], 1.0))
    found = {}
    for (low, first), (high, last) in pairwise(zip(ranks, lost, strict=True)):
        for rank in range(low, high):
            found[rank] = 1 - first * (last / first) ** ((rank - low) / (high - low))
    if ranks:
        found[ranks[-1]] = 1 - lost[-1]
    return found
