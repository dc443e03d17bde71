"""Statistics over seeds: means with Student's t intervals, differences paired by seed, and tests against a bound."""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Any

LEVEL = 0.95
ALPHA = 0.05  # how often a test may reject what is true
MOST_SEEDS = 1000  # beyond it nobody counts
ROUNDING = 1e-9  # what values of the order of 1 to 100 may differ by and still be the same


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
    half = float(t.ppf((1 + level) / 2, n - 1)) * _sd(values) / math.sqrt(n)
    return Estimate(mean, mean - half, mean + half, n)


def differences(values: Iterable[tuple[Hashable, float]], control: Mapping[Any, float]) -> list[float]:
    """Each run's value minus the control's that it is paired with, by seed say; those without one are left out."""
    return [value - control[pair] for pair, value in values if pair in control]


def p_value(values: Sequence[float], bound: float) -> float:
    """Of the two-sided t test that the mean is `bound`; without any spread 1 where the mean is the bound, else 0.

    With a NaN among the values it is 1: they say nothing.

    Raises:
        ValueError: fewer than two values.
    """
    from scipy.stats import ttest_1samp

    if len(values) < 2:
        raise ValueError("one value has no spread to test it by")
    if any(map(math.isnan, values)):
        return 1.0
    if max(values) - min(values) <= ROUNDING:
        return float(math.isclose(fmean(values), bound, abs_tol=ROUNDING))
    return float(ttest_1samp(values, bound).pvalue)


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values corrected for their number by Holm: with what is below `ALPHA` rejected, one error is as rare as that.

    That is, the chance that any of what is true is rejected is at most `ALPHA`.
    """
    from statsmodels.stats.multitest import multipletests

    return [float(p) for p in multipletests(p_values, method="holm")[1]] if p_values else []


def seeds_needed(values: Sequence[float], bound: float, alpha: float = ALPHA) -> int | None:
    """How many values of this mean and spread it takes until their interval at `1 - alpha` leaves the bound out.

    Returns:
        The smallest number, 2 or more; None above `MOST_SEEDS`.

    Raises:
        ValueError: fewer than two values.
    """
    import numpy as np
    from scipy.stats import t

    if len(values) < 2:
        raise ValueError("one value has no spread to reckon with")
    n = np.arange(2, MOST_SEEDS + 1)
    half = t.ppf(1 - alpha / 2, n - 1) * _sd(values) / np.sqrt(n)
    enough = n[half + ROUNDING < abs(fmean(values) - bound)]
    return int(enough[0]) if len(enough) else None


def rank_correlation(x: Sequence[float], y: Sequence[float]) -> float:
    """Spearman's correlation, in [-1, 1]; NaN where one of them is constant."""
    from scipy.stats import spearmanr

    if len(set(x)) < 2 or len(set(y)) < 2:
        return math.nan
    return float(spearmanr(x, y).statistic)


def _sd(values: Sequence[float]) -> float:
    return math.nan if any(map(math.isnan, values)) else stdev(values)  # which takes no NaN
