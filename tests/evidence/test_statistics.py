"""Statistics of few runs: against literal numbers, scipy, exact formulas and simulated runs whose truth is known."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from scipy import stats

from stable_rlhf.evidence.statistics import (
    STATISTICS,
    Difference,
    Estimate,
    Name,
    Values,
    difference,
    difference_of_shares,
    estimate,
    holm,
    iqm,
    probability_of_improvement,
    share,
    spread,
)

FIVE = [0.1, 0.4, 0.2, 0.9, 0.3]
OTHERS = [0.3, 0.5, 0.35, 1.1, 0.45]


def arm(values: list[float] | np.ndarray, stratum: str = "", first_seed: int = 0) -> Values:
    return {(stratum, first_seed + seed): float(value) for seed, value in enumerate(values)}


def bounds(found: Estimate | Difference) -> tuple[float, float]:
    assert found.low is not None
    assert found.high is not None
    return found.low, found.high


def exact_error(values: list[float], statistic: Callable[..., np.ndarray]) -> float:
    """The bootstrap's standard error from every one of the n^n resamples."""
    return float(np.std(statistic(np.array(list(itertools.product(values, repeat=len(values)))))))


# -- one arm --------------------------------------------------------------------------------------------------------


def test_mean_and_iqm_are_the_literal_numbers() -> None:
    assert estimate(arm(FIVE)).value == pytest.approx(0.38, abs=1e-12)
    assert estimate(arm(FIVE), "IQM").value == pytest.approx((0.2 + 0.3 + 0.4) / 3, abs=1e-12)
    eight = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 100.0]
    assert estimate(arm(eight), "IQM").value == pytest.approx((3 + 4 + 5 + 6) / 4, abs=1e-12)


@pytest.mark.parametrize("runs", range(1, 13))
def test_the_iqm_is_scipys_trimmed_mean(runs: int) -> None:
    values = np.random.default_rng(runs).normal(size=(3, runs))
    assert iqm(values) == pytest.approx(stats.trim_mean(values, 0.25, axis=1), abs=1e-12)


def test_the_interval_of_a_mean_is_student_ts() -> None:
    found = estimate(arm(FIVE))
    low, high = stats.t.interval(0.95, 4, loc=np.mean(FIVE), scale=stats.sem(FIVE))
    assert (found.low, found.high) == pytest.approx((low, high), abs=0.02 * (high - low))  # of 2,000 resamples
    assert found.runs == 5


@pytest.mark.parametrize("name", STATISTICS)
def test_the_error_is_that_of_every_resample_there_is(name: Name) -> None:
    found = estimate(arm(FIVE), name)
    low, high = bounds(found)
    error = (high - low) / 2 / stats.t.ppf(0.975, 4)
    inflation = math.sqrt(5 / 4) if name == "mean" else 1.0
    assert error == pytest.approx(inflation * exact_error(FIVE, STATISTICS[name]), rel=0.04)


def test_strata_are_resampled_within_themselves() -> None:
    far = {**arm(FIVE, "a"), **arm([1000 + value for value in FIVE], "b")}
    found = estimate(far)
    assert found.value == pytest.approx(500.38, abs=1e-9)
    low, high = bounds(found)
    error = math.sqrt(2 * np.var(FIVE, ddof=1) / 5) / 2  # of the mean of two independent means
    assert (high - low) / 2 == pytest.approx(stats.t.ppf(0.975, 8) * error, rel=0.05)


@pytest.mark.parametrize("values", [arm([0.3]), {**arm(FIVE, "a"), **arm([0.3], "b")}])
def test_a_single_run_has_no_interval(values: Values) -> None:
    found = estimate(values)
    assert (found.low, found.high, found.runs) == (None, None, len(values))


def test_equal_runs_have_an_interval_without_width() -> None:
    found = estimate(arm([2.0] * 4))
    assert (found.value, found.low, found.high) == (2.0, 2.0, 2.0)


def test_the_same_runs_give_the_same_interval_every_time() -> None:
    assert estimate(arm(FIVE)) == estimate(dict(reversed([*arm(FIVE).items()])))


def test_no_run_is_refused() -> None:
    with pytest.raises(ValueError, match="no run"):
        estimate({})


def test_percentiles_of_the_runs_are_interpolated() -> None:
    assert spread([1.0, 2.0, 3.0, 4.0, 5.0]) == pytest.approx((1.2, 3.0, 4.8))


@pytest.mark.parametrize("ones", range(6))
def test_the_interval_of_a_share_is_clopper_and_pearsons(ones: int) -> None:
    found = share(arm([1.0] * ones + [0.0] * (5 - ones)))
    expected = stats.binomtest(ones, 5).proportion_ci(0.95, method="exact")
    assert (found.value, *bounds(found)) == pytest.approx((ones / 5, expected.low, expected.high), abs=1e-12)


# -- two arms -------------------------------------------------------------------------------------------------------


def test_arms_of_the_same_seeds_are_compared_by_pairs() -> None:
    found = difference(arm(OTHERS), arm(FIVE))
    expected: Any = stats.ttest_rel(OTHERS, FIVE)
    low, high = expected.confidence_interval(0.95)
    assert found.paired
    assert found.runs == (5, 5)
    assert found.value == pytest.approx(0.16, abs=1e-12)
    assert found.p == pytest.approx(expected.pvalue, rel=0.15)
    assert (found.low, found.high) == pytest.approx((low, high), abs=0.02 * (high - low))


def test_arms_of_other_seeds_are_compared_as_independent_runs() -> None:
    found = difference(arm(OTHERS), arm(FIVE, first_seed=10))
    expected: Any = stats.ttest_ind(OTHERS, FIVE, equal_var=False)
    low, high = expected.confidence_interval(0.95)
    assert not found.paired
    assert found.p == pytest.approx(expected.pvalue, rel=0.05)
    assert (found.low, found.high) == pytest.approx((low, high), abs=0.03 * (high - low))


def test_the_seeds_that_both_have_are_paired_where_one_arm_lacks_some() -> None:
    found = difference(arm(OTHERS), arm(FIVE[:4]))
    assert found.paired
    assert found.runs == (4, 4)
    assert found.value == pytest.approx(np.mean(np.subtract(OTHERS[:4], FIVE[:4])), abs=1e-12)


def test_pairs_are_of_one_stratum() -> None:
    ours = {("a", 0): 1.0, ("a", 1): 2.0, ("b", 0): 13.0, ("b", 1): 14.5}
    others = {("a", 0): 0.5, ("a", 1): 1.5, ("b", 0): 12.0, ("b", 1): 13.0}
    assert difference(ours, others).value == pytest.approx((0.5 + 0.5 + 1.0 + 1.5) / 4, abs=1e-12)


def test_of_runs_without_any_spread_p_is_that_of_the_most_extreme_order() -> None:
    apart = difference(arm([3.0] * 5), arm([0.0] * 5, first_seed=9))
    assert apart.p == pytest.approx(2 / math.comb(10, 5), abs=1e-12)
    assert difference(arm([3.0] * 5), arm([0.0] * 5)).p == pytest.approx(2 / 2**5, abs=1e-12)
    assert difference(arm([3.0] * 5), arm([3.0] * 5)).p == 1.0
    shifted = [value + 1.0 for value in FIVE]  # by the same, but for rounding
    assert difference(arm(shifted), arm(FIVE)).p == pytest.approx(2 / 2**5, abs=1e-12)


@pytest.mark.parametrize("runs", [(5, 5), (3, 8), (1, 4)])
def test_the_p_of_shares_is_scipys_fisher(runs: tuple[int, int]) -> None:
    for ours, others in itertools.product(range(runs[0] + 1), range(runs[1] + 1)):
        sides = [[1.0] * ones + [0.0] * (count - ones) for ones, count in zip((ours, others), runs, strict=True)]
        found = difference_of_shares(arm(sides[0]), arm(sides[1]))
        _, expected = stats.fisher_exact([[ours, runs[0] - ours], [others, runs[1] - others]])
        assert found.p == pytest.approx(expected)
        assert found.value == pytest.approx(ours / runs[0] - others / runs[1])


@pytest.mark.parametrize("shares", [(0.5, 0.5), (1.0, 0.6), (0.9, 0.2), (1.0, 0.0)])
def test_intervals_of_a_difference_of_shares_hold_it_and_no_difference_is_rarely_called_one(
    shares: tuple[float, float],
) -> None:
    generator = np.random.default_rng(2)
    held = called = 0
    for _ in range(SIMULATIONS):
        found = difference_of_shares(*(arm((generator.random(5) < share).astype(float)) for share in shares))
        low, high = bounds(found)
        held += low <= shares[0] - shares[1] <= high
        called += (found.p or 0.0) < 0.05
        assert high > low
    assert held / SIMULATIONS >= 0.93
    assert shares[0] != shares[1] or called / SIMULATIONS <= 0.05


def test_single_runs_have_a_difference_without_a_test() -> None:
    found = difference(arm([1.0]), arm([0.25]))
    assert (found.value, found.low, found.p) == (0.75, None, None)


def test_probability_of_improvement_is_mann_whitneys_u() -> None:
    found = probability_of_improvement(arm(OTHERS), arm(FIVE))
    u = stats.mannwhitneyu(OTHERS, FIVE).statistic
    assert found.value == pytest.approx(u / 25, abs=1e-12)
    two = probability_of_improvement(
        {**arm([1.0, 2.0], "a"), **arm([1.0, 2.0], "b")}, {**arm([0.0], "a"), **arm([1.0, 3.0], "b")}
    )
    assert two.value == pytest.approx((1.0 + (0.5 + 0 + 1 + 0) / 4) / 2, abs=1e-12)


def test_the_interval_of_the_probability_is_the_bootstraps() -> None:
    x, y = np.array(OTHERS), np.array(FIVE)

    def probability(a: np.ndarray, b: np.ndarray, axis: int = -1) -> np.ndarray:
        above = (a[..., :, None] > b[..., None, :]) + 0.5 * (a[..., :, None] == b[..., None, :])
        return above.mean(axis=(-2, -1))

    expected = stats.bootstrap(
        (x, y), probability, n_resamples=20_000, method="percentile", rng=np.random.default_rng(1), vectorized=True
    ).confidence_interval
    found = probability_of_improvement(arm(x), arm(y))
    assert (found.low, found.high) == pytest.approx(tuple(expected), abs=0.041)  # one pair of 25


def test_holm_is_the_worked_example() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    assert holm([]) == []


# -- simulations ----------------------------------------------------------------------------------------------------

SIMULATIONS = 1000


@pytest.mark.parametrize("runs", [3, 5, 10])
@pytest.mark.parametrize("name", STATISTICS)
def test_intervals_hold_the_truth_in_95_of_100_simulations(name: Name, runs: int) -> None:
    generator = np.random.default_rng(runs)
    held = 0
    for _ in range(SIMULATIONS):
        found = estimate(arm(generator.normal(2.0, 0.5, runs)), name)
        low, high = bounds(found)
        held += low <= 2.0 <= high
    assert held / SIMULATIONS == pytest.approx(0.95, abs=0.02)


def test_intervals_of_pooled_cells_hold_the_truth() -> None:
    generator = np.random.default_rng(0)
    held = 0
    for _ in range(SIMULATIONS):
        cells = [arm(generator.normal(level, 0.3, 5), name) for level, name in ((0.0, "a"), (1.0, "b"), (5.0, "c"))]
        found = estimate({key: value for cell in cells for key, value in cell.items()})
        low, high = bounds(found)
        held += low <= 2.0 <= high
    assert held / SIMULATIONS == pytest.approx(0.95, abs=0.02)


@pytest.mark.parametrize("first_seed", [0, 100], ids=["by pairs", "independent"])
@pytest.mark.parametrize("name", STATISTICS)
def test_intervals_of_a_known_difference_hold_it(name: Name, first_seed: int) -> None:
    generator = np.random.default_rng(5)
    held = 0
    for _ in range(SIMULATIONS):
        seeds = generator.normal(0.0, 1.0, 5) if first_seed == 0 else 0.0  # what a seed does to both arms
        ours, others = (generator.normal(level, 0.3, 5) + seeds for level in (1.5, 1.0))
        found = difference(arm(ours), arm(others, first_seed=first_seed), name)
        low, high = bounds(found)
        held += low <= 0.5 <= high
    assert held / SIMULATIONS == pytest.approx(0.95, abs=0.02)


@pytest.mark.parametrize("first_seed", [0, 100], ids=["by pairs", "independent"])
def test_no_difference_is_called_one_in_at_most_5_of_100_families(first_seed: int) -> None:
    """Four arms against a baseline, Holm's correction over them: the error is the family's."""
    generator = np.random.default_rng(7)
    called = 0
    for _ in range(SIMULATIONS):
        base = arm(generator.normal(size=5))
        ps = [difference(arm(generator.normal(size=5), first_seed=first_seed), base).p or 0.0 for _ in range(4)]
        called += min(holm(ps)) < 0.05
    assert called / SIMULATIONS <= 0.05


def test_a_difference_of_two_deviations_is_found_by_five_seeds() -> None:
    generator = np.random.default_rng(3)
    found = 0
    for _ in range(200):
        gap = difference(arm(generator.normal(2.0, 1.0, 5)), arm(generator.normal(0.0, 1.0, 5), first_seed=9))
        found += (gap.p or 1.0) < 0.05
    power = 0.79  # of Welch's test of these (scipy.stats.power would be simulated too): two of three at the least
    assert found / 200 > power - 0.1
