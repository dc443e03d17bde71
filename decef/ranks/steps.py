"""What a layer may become, and the choice over all layers that keeps the most energy for a total cost."""

from __future__ import annotations

import heapq
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
    """Choose a step for every layer, of those that are worth taking; see `greedy`.

    Args:
        choices: the steps of every layer by name, the dense one among them; none for a layer that stays as it is.
        whole: cost of the whole network with these layers dense.
        limit: on the cost of the whole network.

    Returns:
        A step for every layer that has any; or, if even the cheapest steps exceed the limit, the network's cost then.
    """
    dense = sum(step.cost for steps in choices.values() for step in steps if step.rank is None)
    return greedy({name: frontier(steps) for name, steps in choices.items() if steps}, whole - dense, limit)


def greedy(choices: Mapping[str, Sequence[Step]], other: float, limit: float) -> dict[str, Step] | float:
    """Choose a step for every layer: start with the first, then always take the one that gains most energy per cost.

    Of steps that gain the same, the layer's comes first that has spent the smallest share of its last step's cost.
    Beyond CPAC's bound all gain nothing, as far as it says: what is left there is spread evenly.

    Args:
        choices: the steps of every layer by name, cheapest first.
        other: cost of everything else.
        limit: on the cost of everything.

    Returns:
        A step for every layer; or, if even the first steps exceed the limit, the cost of everything then.
    """
    spent = other + sum(steps[0].cost for steps in choices.values())
    if spent > limit:
        return float(spent)
    at = dict.fromkeys(choices, 0)
    heap: list[tuple[float, float, int, str]] = []  # minus the gain of every layer's next step: the smallest is popped

    def push(number: int, name: str) -> None:
        steps, i = choices[name], at[name]
        if i + 1 < len(steps):
            heapq.heappush(heap, (-steps[i + 1].gain(steps[i]), steps[i].cost / steps[-1].cost, number, name))

    for number, name in enumerate(choices):
        push(number, name)
    while heap:
        *_, number, name = heapq.heappop(heap)
        steps, i = choices[name], at[name]
        price = steps[i + 1].cost - steps[i].cost
        if spent + price <= limit:  # else it won't fit later either
            spent += price
            at[name] += 1
            push(number, name)
    return {name: steps[at[name]] for name, steps in choices.items()}


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
