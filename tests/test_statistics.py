import math

import numpy as np
import pytest
from scipy import stats

from decef.statistics import differences, estimate, rank_correlation


@pytest.mark.parametrize("n", [2, 3, 5, 20])
@pytest.mark.parametrize("level", [0.9, 0.95])
def test_interval_is_scipys(n, level):
    values = np.random.default_rng(n).normal(90, 2, n)
    ours = estimate(list(values), level)
    expected = stats.t.interval(level, n - 1, loc=values.mean(), scale=stats.sem(values))
    assert (ours.low, ours.high) == pytest.approx(expected)
    assert (ours.mean, ours.n) == (pytest.approx(values.mean()), n)


def test_paired_interval_is_that_of_the_paired_t_test():
    rng = np.random.default_rng(0)
    dense = rng.normal(90, 3, 6)  # seeds differ by more than the layers do
    other = dense - 0.5 + rng.normal(0, 0.2, 6)
    ours = estimate(differences(enumerate(other), dict(enumerate(dense))))
    expected = stats.ttest_rel(other, dense).confidence_interval(0.95)
    assert (ours.low, ours.high) == pytest.approx((expected.low, expected.high))
    assert ours.high < 0 < stats.ttest_ind(other, dense).confidence_interval(0.95).high


def test_one_value_has_no_interval_and_none_is_an_error():
    one = estimate([91.0])
    assert one.mean == 91
    assert math.isnan(one.low)
    assert one.interval() == ""
    assert estimate([90.0, 92.0]).interval(".1f") == "[78.3, 103.7]"
    with pytest.raises(ValueError, match="no value"):
        estimate([])
    with pytest.raises(ValueError, match="level=95"):
        estimate([1.0, 2.0], 95)


def test_differences_leave_out_seeds_that_the_control_lacks():
    assert differences([(0, 90.0), (1, 91.0), (7, 50.0)], {1: 90.5, 0: 91.0, 2: 0.0}) == [-1.0, 0.5]


def test_rank_correlation():
    x, y = [1.0, 2, 3, 4, 5], [2.0, 1, 4, 3, 5]
    assert rank_correlation(x, y) == pytest.approx(stats.spearmanr(x, y).statistic)
    assert rank_correlation(x, [-(v**3) for v in x]) == pytest.approx(-1)
    assert math.isnan(rank_correlation(x, [1.0] * 5))
