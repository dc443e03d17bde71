import math

import numpy as np
import pytest
from scipy import stats

from decef.results.statistics import differences, estimate, holm, is_above, p_value, rank_correlation, seeds_needed


@pytest.mark.parametrize("n", [2, 3, 5, 20])
def test_interval_is_scipys(n):
    values = np.random.default_rng(n).normal(90, 2, n)
    ours = estimate(list(values))
    expected = stats.t.interval(0.95, n - 1, loc=values.mean(), scale=stats.sem(values))
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
    assert math.isnan(estimate([math.nan, 92.0]).low)
    with pytest.raises(ValueError, match="no value"):
        estimate([])


def test_words_and_intervals_within_a_range():
    assert estimate([90.0, 92.0]).words(unit=" %") == "91.00 % [78.29, 103.71]"
    assert estimate([90.0, 92.0], within=(0, 100)).words(unit=" %") == "91.00 % [78.29, 100.00]"
    assert estimate([0.5]).words("+.1f") == "+0.5"


def test_differences_leave_out_seeds_that_the_control_lacks():
    assert differences([(0, 90.0), (1, 91.0), (7, 50.0)], {1: 90.5, 0: 91.0, 2: 0.0}) == [-1.0, 0.5]


def test_rank_correlation():
    x, y = [1.0, 2, 3, 4, 5], [2.0, 1, 4, 3, 5]
    assert rank_correlation(x, y) == pytest.approx(stats.spearmanr(x, y).statistic)
    assert rank_correlation(x, [-(v**3) for v in x]) == pytest.approx(-1)
    assert math.isnan(rank_correlation(x, [1.0] * 5))


@pytest.mark.parametrize("bound", [-1.0, 0.0, 0.4])
def test_p_value_is_that_of_the_t_test(bound):
    values = list(np.random.default_rng(3).normal(0.3, 0.5, 4))
    assert p_value(values, bound) == pytest.approx(stats.ttest_1samp(values, bound).pvalue)
    interval = estimate(values)
    assert (p_value(values, bound) < 0.05) == (not interval.low <= bound <= interval.high)


def test_p_value_without_spread_and_without_a_warning():
    assert p_value([90.0, 90.0], 50.0) == stats.binomtest(2, 2).pvalue == 0.5
    assert p_value([90.0] * 7, 50.0) == stats.binomtest(7, 7).pvalue
    assert p_value([-0.5, -0.5, -0.5], -0.5) == 1
    assert p_value([90.3 - 90.2, 0.1], 0.1) == 1  # equal but for rounding
    assert p_value([91.1 - 90.1, 90.1 - 89.1], 0.5) == 0.5
    assert p_value([0.5, math.nan], 0.0) == 1
    with pytest.raises(ValueError, match="one value"):
        p_value([90.0], 50.0)


def test_p_value_by_sign_counts_sides_alone():
    values = [0.9, 0.9, 0.9, 0.9, 1.0]
    assert p_value(values, 0.0) < 1e-5
    assert p_value(values, 0.0, by_sign=True) == stats.binomtest(5, 5).pvalue == 0.0625
    assert p_value([-5.0, 1.0, 1.0, 2.0, 0.0], 0.0, by_sign=True) == stats.binomtest(3, 4).pvalue
    assert p_value([0.0, 0.0], 0.0, by_sign=True) == 1
    assert p_value([0.5, math.nan], 0.0, by_sign=True) == 1
    mostly_below = [-0.1] * 8 + [1.0]
    assert is_above(mostly_below, 0.0)
    assert not is_above(mostly_below, 0.0, by_sign=True)


def test_holm_against_its_definition():
    found = [0.01, 0.04, 0.03, 0.5]
    assert holm(found) == pytest.approx([0.04, 0.09, 0.09, 0.5])  # 4 x, then 3 x 0.03, which 2 x 0.04 is not below
    assert holm([0.03]) == pytest.approx([0.03])
    assert holm([]) == []


@pytest.mark.parametrize("alpha", [0.05, 0.05 / 9])
@pytest.mark.parametrize("effect", [-1.4, 0.7, 3.0, 15.0])
def test_as_many_seeds_as_needed_decide_four_times_in_five(alpha, effect):
    values = [-0.65, -0.15, 0.25, 0.65]
    sd = float(np.std(values, ddof=1))
    bound = float(np.mean(values)) - effect * sd
    n = seeds_needed(values, bound, alpha)
    draws = np.random.default_rng(0).normal(np.mean(values), sd, (4000, n))

    def power(count):
        return float((stats.ttest_1samp(draws[:, :count], bound, axis=1).pvalue <= alpha).mean())

    assert power(n) > 0.79
    assert n == 2 or power(n - 1) < 0.81


@pytest.mark.parametrize("values", [[-1.0, 1.0, 1.0, 1.0, 1.0, 1.0], [2.0, 3.0]])
def test_as_many_seeds_as_needed_decide_by_sign(values):
    n = seeds_needed(values, 0.0, by_sign=True)
    draws = np.random.default_rng(0).choice(values, (2000, n))

    def power(count):
        return np.mean([p_value(list(row[:count]), 0.0, by_sign=True) <= 0.05 for row in draws])

    assert power(n) > 0.78
    assert power(n - 1) < 0.82


def test_one_value_has_no_spread():
    for statistic in (p_value, seeds_needed):
        with pytest.raises(ValueError, match="one value has no spread"):
            statistic([1.0], 0.0)


def test_seeds_needed_at_its_ends():
    assert seeds_needed([1.0, 1.0], 0.0) == 6
    assert p_value([1.0] * 6, 0.0) <= 0.05 < p_value([1.0] * 5, 0.0)
    assert seeds_needed([1.0, 1.0], 1.0) is None
    assert seeds_needed([-1.0, 1.0], 0.0, by_sign=True) is None
    assert seeds_needed([0.9, 1.0], 0.0, 0.05 / 12, by_sign=True) == 9
    assert seeds_needed([-1.0, 1.0], 0.05) is None  # more than 50
    assert seeds_needed([math.nan, 1.0], 0.0) is None
    assert seeds_needed([math.nan, 1.0], 0.0, by_sign=True) is None
    with pytest.raises(ValueError, match="one value"):
        seeds_needed([1.0], 0.0)
