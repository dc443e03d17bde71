"""The rule that spreads a budget of FLOPs or parameters over the whole network."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from decef.ranks.candidate import Candidate, Totals
from decef.ranks.effective import check_share
from decef.ranks.steps import Step, greedy, spread

NO_INPUT_SIZE = "a FLOPs budget needs the input size"


@dataclass(frozen=True)
class Budget:
    """The largest ranks that keep the whole network within a share of its dense cost.

    Every layer starts at rank 1. Then, one step at a time, the layer that gains the most energy per cost gets its next
    rank, until no layer's next step fits into the budget. A layer's energy is a share of its own total, see
    `Candidate.kept_energy`. If a layer's next rank would cost at least as much as the dense layer, its next step is to
    stay dense. A layer that saves nothing even at rank 1 stays dense from the start.

    The energies of an untrained network mean nothing; use `uniform` there. Every layer then gets the same share of its
    own dense cost, as large as the budget allows. Ranks are whole numbers, so some of the budget is left over. It goes
    to the layers in order, one rank at a time, as long as it lasts.

    Args:
        flops: share of the dense network's FLOPs, in (0, 1]; `plan` then needs the input size. Give this or `params`.
        params: share of the dense network's parameters, in (0, 1].
        uniform: give every layer the same share of its dense cost, whatever its energies.

    Raises:
        ValueError: both or neither of `flops` and `params` are given, or the share is not in (0, 1]. When called: the
            budget can't be met, or it is in FLOPs but no input size was given.
    """

    flops: float | None = None
    params: float | None = None
    uniform: bool = False

    ranks_are_final: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if (self.flops is None) == (self.params is None):
            raise ValueError("a budget is a share of flops or of params: give one of the two")
        check_share("flops" if self.params is None else "params", self.share)

    @property
    def share(self) -> float:
        """The given share, of FLOPs or of parameters."""
        share = self.flops if self.params is None else self.params
        assert share is not None
        return share

    def __call__(self, candidates: Sequence[Candidate], totals: Totals) -> dict[str, int]:
        what, total = self._of(totals)
        layers = [priced for priced in map(self._priced, candidates) if priced.per_rank < priced.dense]
        kept = total - sum(layer.dense for layer in layers)
        smallest = kept + sum(layer.per_rank for layer in layers)
        # Costs are whole numbers, so half a unit only makes up for rounding, of a share like 0.667 and of the product.
        limit = self.share * total + 0.5
        if smallest > limit and not layers:
            raise ValueError(
                f"a budget of {self.share:g} of the dense network's {what} can't be met: there is no convolution that "
                "this layer type could make cheaper, of those that may be replaced"
            )
        if smallest > limit:
            raise ValueError(
                f"a budget of {self.share:g} of the dense network's {what} can't be met: with rank 1 in every layer "
                f"it has {smallest / total:.3f} of them"
            )
        if self.uniform:
            return _spread_evenly(layers, limit - kept)
        chosen = greedy({layer.name: layer.steps() for layer in layers}, kept, limit)
        assert not isinstance(chosen, float)
        return {name: step.rank for name, step in chosen.items() if step.rank is not None}

    def most(self, candidate: Candidate) -> int:
        """The largest rank at which a candidate costs less than dense; 0 if none does.

        Raises:
            ValueError: the budget is in FLOPs, but no input size was given.
        """
        return self._priced(candidate).most

    def steps(self, candidate: Candidate, layer: str | None, energy: Mapping[int, float]) -> Iterator[Step]:
        """What a candidate may be: dense, or of a layer type at every rank that costs less.

        Args:
            candidate: the kernel.
            layer: the layer type.
            energy: share that is kept, by rank.
        """
        priced = self._priced(candidate)
        yield Step(priced.dense, 1.0)
        for rank, kept in energy.items():
            if rank <= priced.most:
                yield Step(rank * priced.per_rank, kept, rank, layer)

    def spread(self, choices: Mapping[str, Sequence[Step]], totals: Totals) -> dict[str, Step]:
        """A step for every layer, within the share.

        Args:
            choices: what every layer may be, by name, see `steps`.
            totals: cost of the dense network.

        Raises:
            ValueError: it can't be met, or it is in FLOPs but no input size was given.
        """
        what, total = self._of(totals)
        chosen = spread(choices, total, self.share * total + 0.5)
        if isinstance(chosen, float):
            raise ValueError(
                f"a budget of {self.share:g} of the dense network's {what} can't be met: at the smallest ranks it has "
                f"{chosen / total:.3f} of them"
            )
        return chosen

    def _of(self, totals: Totals) -> tuple[str, int]:
        """What the budget is a share of, in words and in number."""
        if self.params is not None:
            return "parameters", totals.params
        if not totals.macs:
            raise ValueError(NO_INPUT_SIZE)
        return "FLOPs", totals.macs

    def _priced(self, candidate: Candidate) -> _Priced:
        if self.params is not None:
            return _Priced(candidate, candidate.params, candidate.params_per_rank)
        if not candidate.macs_per_rank:
            raise ValueError(NO_INPUT_SIZE)
        return _Priced(candidate, candidate.macs, candidate.macs_per_rank)


@dataclass(frozen=True)
class _Priced:
    """A candidate and its costs in the unit of the budget, MACs or parameters."""

    candidate: Candidate
    dense: int
    per_rank: int

    @property
    def name(self) -> str:
        return self.candidate.name

    @property
    def most(self) -> int:
        """The largest rank that costs less than the dense layer; 0 if none does."""
        return min(self.candidate.max_rank, max(0, self.dense - 1) // self.per_rank)

    def steps(self) -> list[Step]:
        """Every rank that costs less than dense, then the dense layer, if one more rank would cost as much."""
        kept = self.candidate.kept_energy().cumsum(0).tolist()
        ranks = [Step(rank * self.per_rank, kept[rank - 1], rank) for rank in range(1, self.most + 1)]
        return ranks if self.most == self.candidate.max_rank else [*ranks, Step(self.dense, kept[-1])]


def _spread_evenly(layers: Sequence[_Priced], limit: float) -> dict[str, int]:
    """Ranks that together cost at most `limit`, where every layer has about the same share of its dense cost."""

    def ranks_at(share: float) -> dict[str, int]:
        return {x.name: min(max(1, math.floor(share * x.dense / x.per_rank)), x.most) for x in layers}

    def used(ranks: dict[str, int]) -> int:
        return sum(ranks[layer.name] * layer.per_rank for layer in layers)

    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if used(ranks_at(middle)) <= limit else (low, middle)
    ranks = ranks_at(low)
    left = limit - used(ranks)
    grown = True
    while grown:
        grown = False
        for layer in layers:
            if ranks[layer.name] < layer.most and layer.per_rank <= left:
                ranks[layer.name] += 1
                left -= layer.per_rank
                grown = True
    return ranks
