"""Statistics over seeds: means with Student's t intervals, differences paired by seed, and tests against a bound."""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Any

LEVEL = 0.95
ALPHA = 0.05  # how often tests may reject a true hypothesis
POWER = 0.8  # how often `seeds_needed` values should decide
MOST_SEEDS = 50  # `seeds_needed` looks no further
PERCENT = (0.0, 100.0)
ROUNDING = 1e-9  # values of about 1 to 100 that differ by no more count as equal


@dataclass(frozen=True)
class Estimate:
    """A mean over `n` values with its interval. One value says nothing about the spread: the ends are then NaN."""

    mean: float
    low: float
    high: float
    n: int

    def interval(self, format_spec: str = ".2f") -> str:
        """ "[low, high]", or an empty text for one value."""
        return f"[{self.low:{format_spec}}, {self.high:{format_spec}}]" if self.n > 1 else ""

    def words(self, format_spec: str = ".2f", unit: str = "") -> str:
        """ "mean [low, high]", or the mean alone for one value; `unit` follows the mean."""
        return f"{self.mean:{format_spec}}{unit} {self.interval(format_spec)}".rstrip()


def estimate(values: Sequence[float], within: tuple[float, float] = (-math.inf, math.inf)) -> Estimate:
    """The mean and its two-sided t interval: mean ± t * sd / sqrt(n); sd and t have n - 1 degrees of freedom.

    The interval is cut off at the ends of `within`, where the quantity's own range ends, as at 100 %.

    Raises:
        ValueError: there is no value.
    """
    from scipy.stats import t

    n = len(values)
    if not n:
        raise ValueError("there is no value to take the mean of")
    mean = fmean(values)
    if n == 1:
        return Estimate(mean, math.nan, math.nan, n)
    half = float(t.ppf((1 + LEVEL) / 2, n - 1)) * _sd(values) / math.sqrt(n)
    return Estimate(mean, max(mean - half, within[0]), min(mean + half, within[1]), n)


def differences(values: Iterable[tuple[Hashable, float]], control: Mapping[Any, float]) -> list[float]:
    """Each value minus the control's of the same pair, a seed for example. Values without a control are left out."""
    return [value - control[pair] for pair, value in values if pair in control]


def p_value(values: Sequence[float], bound: float, *, by_sign: bool = False) -> float:
    """The p-value of the two-sided t test that the mean is `bound`.

    Values that don't differ give a t test no spread, which would decide anything: they get the sign test, 2^(1 - n), or
    1 if they are the bound. If a value is NaN, it is 1: they say nothing.

    Args:
        values: one per seed.
        bound: what they are tested against.
        by_sign: take the sign test in any case: how many are above the bound, of those that aren't the bound.

    Raises:
        ValueError: fewer than two values.
    """
    from scipy.stats import binomtest, ttest_1samp

    if len(values) < 2:
        raise ValueError("one value has no spread to test it by")
    if any(map(math.isnan, values)):
        return 1.0
    if by_sign or max(values) - min(values) <= ROUNDING:
        above, below = _sides(values, bound)
        return float(binomtest(above, above + below).pvalue) if above + below else 1.0
    return float(ttest_1samp(values, bound).pvalue)


def is_above(values: Sequence[float], bound: float, *, by_sign: bool = False) -> bool:
    """Whether the mean of the values is above the bound, or more of them are above it than below."""
    above, below = _sides(values, bound)
    return above > below if by_sign else fmean(values) > bound


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values corrected for their number by Holm's method.

    If all hypotheses with a corrected p-value of at most `ALPHA` are rejected, the chance that any true one is among
    them is at most `ALPHA`.
    """
    from statsmodels.stats.multitest import multipletests

    return [float(p) for p in multipletests(p_values, method="holm")[1]] if p_values else []


def seeds_needed(values: Sequence[float], bound: float, alpha: float = ALPHA, *, by_sign: bool = False) -> int | None:
    """How many values it takes until `p_value` is at most `alpha` with probability `POWER`.

    That is if they are normal with the mean and spread of `values`, which a few values only guess at; by the sign test,
    if as large a share of them is above the bound. Values that don't differ go on not to differ.

    Returns:
        The smallest such number, from 2 on; None if it is above `MOST_SEEDS`.

    Raises:
        ValueError: fewer than two values.
    """
    import numpy as np
    from scipy.stats import binom, ncf, t

    if len(values) < 2:
        raise ValueError("one value has no spread to estimate from")
    if any(map(math.isnan, values)):
        return None
    n = np.arange(2, MOST_SEEDS + 1)
    if by_sign or max(values) - min(values) <= ROUNDING:
        above, below = _sides(values, bound)
        if not above + below:
            return None
        share = above / (above + below)
        least = binom.ppf(alpha / 2, n, 0.5)  # the test decides if fewer than so many are on one side
        least += binom.cdf(least, n, 0.5) <= alpha / 2
        power = binom.cdf(least - 1, n, share) + binom.cdf(least - 1, n, 1 - share)
        enough = n[power >= POWER]
        return int(enough[0]) if len(enough) else None
    effect = (fmean(values) - bound) / _sd(values)
    # Power of the two-sided test. A noncentral t squared is a noncentral F, which scipy has for large effects too.
    power = ncf.sf(t.isf(alpha / 2, n - 1) ** 2, 1, n - 1, n * effect**2)
    enough = n[power >= POWER]
    return int(enough[0]) if len(enough) else None


def rank_correlation(x: Sequence[float], y: Sequence[float]) -> float:
    """Spearman's correlation, in [-1, 1]; NaN if `x` or `y` is constant."""
    from scipy.stats import spearmanr

    if len(set(x)) < 2 or len(set(y)) < 2:
        return math.nan
    return float(spearmanr(x, y).statistic)


def _sides(values: Sequence[float], bound: float) -> tuple[int, int]:
    """How many values are above the bound, and how many below."""
    return sum(v > bound + ROUNDING for v in values), sum(v < bound - ROUNDING for v in values)


def _sd(values: Sequence[float]) -> float:
    return math.nan if any(map(math.isnan, values)) else stdev(values)  # stdev doesn't take NaN
