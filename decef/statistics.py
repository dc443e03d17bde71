"""Statistics over seeds: means with Student's t intervals, and differences paired by seed."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

LEVEL = 0.95


@dataclass(frozen=True)
class Estimate:
    """A mean over `n` values with its interval, whose ends are NaN for one value, which says nothing of the spread."""

    mean: float
    low: float
    high: float
    n: int

    def interval(self, format_spec: str = ".2f") -> str:
        """ "[low, high]", or nothing for one value."""
        return f"[{self.low:{format_spec}}, {self.high:{format_spec}}]" if self.n > 1 else ""


def estimate(values: Sequence[float], level: float = LEVEL) -> Estimate:
    """The mean and its two-sided t interval: mean ± t * sd / sqrt(n), sd with n - 1, t with n - 1 degrees of freedom.

    Raises:
        ValueError: no value, or a level outside (0, 1).
    """
    from scipy.stats import t

    n = len(values)
    if not n:
        raise ValueError("there is no value to take the mean of")
    if not 0 < level < 1:
        raise ValueError(f"level={level} must be in (0, 1), such as 0.95")
    mean = fmean(values)
    if n == 1:
        return Estimate(mean, math.nan, math.nan, n)
    half = float(t.ppf((1 + level) / 2, n - 1)) * stdev(values) / math.sqrt(n)
    return Estimate(mean, mean - half, mean + half, n)


def differences(values: Iterable[tuple[int, float]], control: Mapping[int, float]) -> list[float]:
    """Each seed's value minus the control's of the same seed; seeds that the control lacks are left out."""
    return [value - control[seed] for seed, value in values if seed in control]


def rank_correlation(x: Sequence[float], y: Sequence[float]) -> float:
    """Spearman's correlation, in [-1, 1]; NaN where one of them is constant."""
    from scipy.stats import spearmanr

    if len(set(x)) < 2 or len(set(y)) < 2:
        return math.nan
    return float(spearmanr(x, y).statistic)
