"""The plan that meets a budget: from costs alone, or by measuring what plans come to."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

from torch import Tensor, nn

from decef.compression.budgets import AnyBudget, Memory, Milliseconds, Reached, Size, search
from decef.conversion import convert
from decef.costs import total_cost
from decef.inference.deploy import Deployed, deploy
from decef.inference.forms import to_convolutions
from decef.inference.latency import measure_times
from decef.inference.memory import activation_bytes, stored_bytes
from decef.inference.timing import inference_call, interleaved_times, times_beside
from decef.plans import AUTO, AUTO_TYPES, Plan, planner
from decef.ranks import Budget, Latency, Rule


class Planner:
    """Plans for a network and looks at what they come to.

    Args:
        model: the dense network, in evaluation mode.
        x: an input `(B, C, H, W)`, of the batch size to be fast at.
        layer: a layer type, or "auto".
        dense: the same, as it runs fastest in the engine that it should be fast in.
        include, exclude: names of convolutions, see `decef.plan`.
        progress: show progress bars.
    """

    def __init__(
        self,
        model: nn.Module,
        x: Tensor,
        layer: str,
        dense: Deployed,
        *,
        include: Sequence[str] | None,
        exclude: Sequence[str] | None,
        progress: bool,
    ) -> None:
        self._model, self._x, self._layer, self._dense, self._progress = model, x, layer, dense, progress
        self._where: dict[str, Any] = {"include": include, "exclude": exclude}
        self._input_size = tuple(x.shape[1:])

    def reach(self, budget: AnyBudget) -> tuple[Reached, Deployed | None]:
        """The plan; and, if the budget is one of time, the network as it was deployed to meet it.

        Raises:
            ValueError: the budget can't be met; the message says what can.
        """
        if isinstance(budget, Budget):
            return self._by_cost(budget), None
        if isinstance(budget, (Memory, Size)):
            return self._by_bytes(budget), None
        return self._by_time(budget)

    def _by_cost(self, budget: Budget) -> Reached:
        key, unit = ("macs", "MACs") if budget.params is None else ("params", "parameters")
        whole = total_cost(self._model, self._input_size)
        _check_smaller(budget.share, f"{whole[key]} {unit}")
        made = self._plan(budget)
        return Reached(made, total_cost(self._small(made), self._input_size)[key] / whole[key], budget.share)

    def _by_bytes(self, budget: Memory | Size) -> Reached:
        def measure(model: nn.Module) -> int:
            return memory_bytes(model, self._x) if isinstance(budget, Memory) else stored_bytes(model)

        whole = measure(self._model)
        asked = budget.share if isinstance(budget, Memory) else budget.bytes / whole
        _check_smaller(asked, f"{whole} bytes")
        return search(
            lambda share: self._plan(Budget(params=share)),
            lambda made: measure(self._small(made)) / whole,
            asked,
            over=0,
        )

    def _by_time(self, budget: Latency | Milliseconds) -> tuple[Reached, Deployed]:
        (seconds,) = interleaved_times({"dense": inference_call(self._dense, self._x)}).values()
        asked = budget.share if isinstance(budget, Latency) else budget.limit / 1e3 / seconds
        _check_smaller(asked, f"{seconds * 1e3:.3g} ms")
        types = AUTO_TYPES if self._layer == AUTO else (self._layer,)
        given = {**self._where, "engine": self._dense.engine, "progress": self._progress}
        times = {name: measure_times(self._model, name, self._x, **given) for name in types}
        known = times if self._layer == AUTO else times[self._layer]
        tried: list[tuple[Plan, Deployed]] = []

        def measure(made: Plan) -> float:
            small = deploy(self._small(made), self._x, engines=[self._dense.engine], progress=self._progress)
            tried.append((made, small))
            return time_share(self._dense, small, self._x)

        reached = search(lambda share: self._plan(Latency(share, known)), measure, asked)
        return reached, next(small for made, small in tried if made is reached.plan)

    @cached_property
    def _plan(self) -> Callable[[Rule], Plan]:
        """Makes a plan by a rule, from the kernels' energies: those of the outputs spread a budget no better."""
        where = {**self._where, "input_size": self._input_size}
        return planner(self._model, self._layer, progress=self._progress, **where)

    def _small(self, made: Plan) -> nn.Module:
        return convert(self._model, made, from_scratch=True)


def seconds_beside(dense: nn.Module, small: nn.Module, x: Tensor) -> dict[str, float]:
    """Seconds of a call of two networks, timed in turn, as "dense" and "small"; see `times_beside`."""
    seconds, ratio = times_beside(inference_call(dense, x), inference_call(small, x), rounds=10)
    return {"dense": seconds, "small": ratio * seconds}


def time_share(dense: nn.Module, small: nn.Module, x: Tensor) -> float:
    """Time of a call of a network over another's."""
    seconds = seconds_beside(dense, small, x)
    return seconds["small"] / seconds["dense"]


def memory_bytes(model: nn.Module, x: Tensor) -> int:
    """Bytes of a network's weights, and of its intermediate results at their peak."""
    network = to_convolutions(model)
    return stored_bytes(network) + activation_bytes(network, x.shape)


def _check_smaller(asked: float, whole: str) -> None:
    if asked >= 1:
        raise ValueError(f"the budget is no less than what the dense network takes, {whole}: there is nothing to do")
