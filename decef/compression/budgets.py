"""Budgets of a compressed network that are measured on the network itself, and the search for a plan that meets them.

FLOPs and parameters follow from a plan. Time and memory don't: they are measured, and the plan is corrected until what
was measured is what was asked for.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from decef.plans import Plan
from decef.ranks import Budget, Latency
from decef.ranks.effective import check_share

TOLERANCE = 0.05  # of the budget, in what is measured
TRIES = 8


@dataclass(frozen=True)
class Milliseconds:
    """A time limit for one call.

    Raises:
        ValueError: it is not above 0.
    """

    limit: float

    def __post_init__(self) -> None:
        _check_positive("milliseconds", self.limit)


@dataclass(frozen=True)
class Memory:
    """A share, in (0, 1], of the dense network's memory: its weights, and the intermediate results of a call
    that are alive at once, with its layers as chains.

    Raises:
        ValueError: the share is not in (0, 1].
    """

    share: float

    def __post_init__(self) -> None:
        check_share("memory", self.share)


@dataclass(frozen=True)
class Size:
    """A limit in bytes on the weights and buffers, as they are stored.

    Raises:
        ValueError: it is not above 0.
    """

    bytes: int

    def __post_init__(self) -> None:
        _check_positive("bytes", self.bytes)


AnyBudget = Budget | Latency | Milliseconds | Memory | Size


def words(budget: AnyBudget) -> str:
    """A budget in words, such as "0.6 of the dense network's time"."""
    if isinstance(budget, Milliseconds):
        return f"{budget.limit:g} ms a call"
    if isinstance(budget, Size):
        return f"{budget.bytes} bytes of weights"
    if isinstance(budget, Budget):
        said = f"{budget.share:g} of the dense network's {'FLOPs' if budget.params is None else 'parameters'}"
        return f"{said}, spread evenly" if budget.uniform else said
    return f"{budget.share:g} of the dense network's {'time' if isinstance(budget, Latency) else 'memory'}"


@dataclass(frozen=True)
class Reached:
    """A plan, what it was measured to come to and what was asked for: shares of what the dense network takes."""

    plan: Plan
    value: float
    asked: float

    @property
    def off(self) -> float:
        """How much it is above (or, if negative, below) what was asked for, as a share of that."""
        return self.value / self.asked - 1


def search(
    plan_at: Callable[[float], Plan], measure: Callable[[Plan], float], asked: float, *, over: float = TOLERANCE
) -> Reached:
    """The plan that is nearest to what was asked for, by what is measured of it.

    Each try corrects the share that it plans for by how far the ones before were off.

    Args:
        plan_at: makes a plan for a share in (0, 1]; the larger the share, the larger the network. Raises ValueError if
            no plan is that small.
        measure: what a plan comes to, as a share of the dense network's.
        asked: what it should come to, in (0, 1].
        over: by how much of it it may be exceeded: 0 for a limit on what can be measured exactly.

    Raises:
        ValueError: it can't be reached; the message says what can.
    """
    low, high, share = 0.0, 1.0, asked
    below: Reached | None = None  # what `low` came to, and
    above: Reached | None = None  # what `high` came to
    found: list[Reached] = []
    reason = ""
    for _ in range(TRIES):
        try:
            plan = plan_at(share)
        except ValueError as error:
            low, below, reason = share, None, str(error)
        else:
            made = Reached(plan, measure(plan), asked)
            found.append(made)
            if -TOLERANCE <= made.off <= over:
                break
            if made.off > 0:
                high, above = share, made
            else:
                low, below = share, made
        if high - low < 0.002:
            break
        share = round(_next_share(low, below, high, above, asked), 4)  # it stands in the plan, to be read
    if not found:
        raise ValueError(reason)
    met = [made for made in found if made.off <= over]
    if not met:
        least = min(made.value for made in found)
        raise ValueError(
            f"the budget, {asked:.3g} of what the dense network takes, can't be met: the least that was found is "
            f"{least:.3g} of it" + (f" ({reason})" if reason else "")
        )
    return min(met, key=lambda made: abs(made.off))


def _next_share(low: float, below: Reached | None, high: float, above: Reached | None, asked: float) -> float:
    """Where to try next: on the line through what both ends came to, or in proportion to one; else halfway."""
    if below is not None and above is not None:
        share = low + (asked - below.value) / (above.value - below.value) * (high - low)
    elif above is not None:
        share = high * asked / above.value
    else:
        share = low * asked / below.value if below is not None else high
    margin = (high - low) / 10
    return share if low + margin <= share <= high - margin else (low + high) / 2


def _check_positive(name: str, value: float) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not value > 0:
        raise ValueError(f"{name}={value!r} must be a number above 0")
