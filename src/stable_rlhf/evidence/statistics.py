"""Means of few runs with honest intervals: stratified bootstrap, pairs of seeds, probability of improvement.

Runs of one arm differ by their seed. Where an arm pools several cells of a sweep (all rates of a preset, say), each
cell is a stratum: runs are resampled within it, never across (Agarwal et al., 2021, "Deep Reinforcement Learning at
the Edge of the Statistical Precipice", section 4; the library rliable). The standard error is the bootstrap's. The
percentiles of the bootstrap are not used for the interval of a mean: of five runs they hold the true mean in 86 of
100 cases instead of 95. The interval is estimate +- t * error, with Student's t instead (Hesterberg, 2015, "What
Teachers Should Know About the Bootstrap", section 3).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from scipy.special import betaincinv, stdtr, stdtrit

LEVEL = 0.95
"""Share of intervals that hold the true value."""

RESAMPLES = 2000
"""Of each bootstrap: the standard error is then known to 2 % (1 / sqrt(2 * RESAMPLES)), far less than seeds allow."""

FEW = 5
"""With fewer seeds, an interval is so wide, and rests so much on the form of the distribution, that it shows little."""

EQUAL = 1e-9
"""Share of a difference below which its error is rounding: the runs' differences are equal."""

SPREAD = (5, 50, 95)
"""Percentiles of the runs themselves: what one more run may give."""

Values = Mapping[tuple[str, int], float]
"""(stratum, seed) -> a figure of that run."""

Name = Literal["mean", "IQM"]


@dataclass(frozen=True)
class Estimate:
    """A statistic of `runs` runs, and its interval, None where a stratum has a single run."""

    value: float
    low: float | None
    high: float | None
    runs: int


@dataclass(frozen=True)
class Difference:
    """A statistic of one arm less that of another. `p`: two-sided, of no difference; None where it has no interval."""

    value: float
    low: float | None
    high: float | None
    p: float | None
    runs: tuple[int, int]
    paired: bool
    """By seed: the difference of each seed counts, so that what a seed does to both arms is gone."""


def mean(values: np.ndarray, axis: int = -1) -> np.ndarray:
    return np.mean(values, axis=axis)


def iqm(values: np.ndarray, axis: int = -1) -> np.ndarray:
    """The interquartile mean: the mean of what is left without the lowest and the highest quarter of the runs (rounded
    down), as rliable has it."""
    cut, runs = values.shape[axis] // 4, values.shape[axis]
    return np.mean(np.take(np.sort(values, axis=axis), range(cut, runs - cut), axis=axis), axis=axis)


STATISTICS: dict[Name, Callable[..., np.ndarray]] = {"mean": mean, "IQM": iqm}


def estimate(values: Values, statistic: Name = "mean") -> Estimate:
    """A statistic over all runs, with its interval."""
    ordered, strata = _ordered(values)
    value = float(STATISTICS[statistic](ordered))
    if (freedom := _freedom(strata)) is None:
        return Estimate(value, None, None, len(ordered))
    half = stdtrit(freedom, (1 + LEVEL) / 2) * _error(STATISTICS[statistic](ordered[_drawn(strata)]), strata, statistic)
    return Estimate(value, float(value - half), float(value + half), len(ordered))


def share(values: Values) -> Estimate:
    """The share of the runs that have 1 and not 0, with the exact interval of Clopper and Pearson (1934), strata
    pooled."""
    runs, ones = len(values), round(math.fsum(values.values()))
    tail = (1 - LEVEL) / 2
    low = float(betaincinv(ones, runs - ones + 1, tail)) if ones else 0.0
    high = float(betaincinv(ones + 1, runs - ones, 1 - tail)) if ones < runs else 1.0
    return Estimate(ones / runs, low, high, runs)


def difference_of_shares(ours: Values, others: Values) -> Difference:
    """`share` of ours less that of others, of independent runs: Fisher's exact test, as Student's t knows no runs that
    are all equal; and the interval of Newcombe (1998, method 10), from those of both shares, here the exact ones."""
    one, other = share(ours), share(others)
    value = one.value - other.value
    bounds = (one.low or 0.0, one.high or 0.0), (other.low or 0.0, other.high or 0.0)
    low = value - math.hypot(one.value - bounds[0][0], bounds[1][1] - other.value)
    high = value + math.hypot(bounds[0][1] - one.value, other.value - bounds[1][0])
    ones = [round(math.fsum(side.values())) for side in (ours, others)]
    p = _fisher(ones[0], one.runs, ones[1], other.runs)
    return Difference(value, low, high, p, (one.runs, other.runs), paired=False)


def difference(ours: Values, others: Values, statistic: Name = "mean") -> Difference:
    """`ours` less `others`: over the pairs of one seed and stratum where at least two, and all of the smaller arm's
    runs, have one; otherwise of independent runs (Welch's degrees of freedom)."""
    common = ours.keys() & others.keys()
    if len(common) >= 2 and len(common) == min(len(ours), len(others)):
        return _paired({key: (ours[key], others[key]) for key in common}, statistic)
    compute = STATISTICS[statistic]
    sides = [_ordered(values) for values in (ours, others)]
    value = float(compute(sides[0][0]) - compute(sides[1][0]))
    runs = (len(ours), len(others))
    freedoms = [_freedom(strata) for _, strata in sides]
    if None in freedoms:
        return Difference(value, None, None, None, runs, False)
    variances = [_error(compute(ordered[_drawn(strata)]), strata, statistic) ** 2 for ordered, strata in sides]
    error = math.sqrt(sum(variances))
    parts = [v / sum(variances) for v in variances] if error else [1.0, 1.0]
    freedom = sum(parts) ** 2 / sum(part**2 / f for part, f in zip(parts, freedoms, strict=True) if f)
    return _tested(value, error, freedom, 2 / math.comb(sum(runs), runs[0]), runs, paired=False)


def probability_of_improvement(ours: Values, others: Values) -> Estimate:
    """The probability that a run of ours is above one of the others, ties counting half: the mean over strata of the
    share of all pairs (Mann-Whitney's U / (n m); Agarwal et al., 2021, equation 2).

    Only strata that both have count. The interval is the percentile interval of the stratified bootstrap, rliable's;
    with few runs it is too narrow, and where no run of one arm lies beyond one of the other it has no width.
    """
    names = sorted({stratum for stratum, _ in ours} & {stratum for stratum, _ in others})
    if not names:
        raise ValueError("the arms share no stratum: pool them")
    generator = np.random.default_rng(0)
    shares, resampled, runs = [], np.zeros(RESAMPLES), 0
    for name in names:
        x, y = (np.array([v for (s, _), v in sorted(side.items()) if s == name]) for side in (ours, others))
        above = (x[:, None] > y) + 0.5 * (x[:, None] == y)
        shares.append(above.mean())
        i, j = (generator.integers(0, len(side), (RESAMPLES, len(side))) for side in (x, y))
        counts = [np.stack([(drawn == k).sum(1) for k in range(n)], 1) for drawn, n in ((i, len(x)), (j, len(y)))]
        resampled += np.einsum("bi,ij,bj->b", counts[0], above, counts[1]) / above.size / len(names)
        runs += len(x)
    tail = (1 - LEVEL) / 2
    low, high = np.quantile(resampled, [tail, 1 - tail])
    single = all(len({seed for s, seed in side if s == name}) == 1 for name in names for side in (ours, others))
    value = float(np.mean(shares))
    return Estimate(value, *((None, None) if single else (float(low), float(high))), runs)


def spread(values: Sequence[float]) -> tuple[float, ...]:
    """The percentiles SPREAD of the runs, interpolated linearly."""
    return tuple(float(value) for value in np.percentile(np.asarray(values, float), SPREAD))


def holm(ps: Sequence[float]) -> list[float]:
    """Holm's adjusted p of several comparisons: where the smallest is below .05, at most one in twenty families of
    comparisons without any difference has one called a difference (Holm, 1979)."""
    adjusted, highest = [0.0] * len(ps), 0.0
    for rank, index in enumerate(sorted(range(len(ps)), key=ps.__getitem__)):
        highest = max(highest, min(1.0, (len(ps) - rank) * ps[index]))
        adjusted[index] = highest
    return adjusted


def _paired(pairs: Mapping[tuple[str, int], tuple[float, float]], statistic: Name) -> Difference:
    compute = STATISTICS[statistic]
    ordered, strata = _ordered({key: complex(*pair) for key, pair in pairs.items()})  # both sides of a pair go together
    value = float(compute(np.real(ordered)) - compute(np.imag(ordered)))
    runs = (len(pairs), len(pairs))
    if (freedom := _freedom(strata)) is None:
        return Difference(value, None, None, None, runs, True)
    drawn = ordered[_drawn(strata)]
    error = _error(compute(np.real(drawn)) - compute(np.imag(drawn)), strata, statistic)
    return _tested(value, error, freedom, 2.0 ** (1 - len(pairs)), runs, paired=True)


def _tested(
    value: float, error: float, freedom: float, least: float, runs: tuple[int, int], *, paired: bool
) -> Difference:
    """`least`: the p of the most extreme order of these runs, for runs without any spread: no test of t sees those."""
    half = float(stdtrit(freedom, (1 + LEVEL) / 2)) * error
    if error > EQUAL * abs(value):
        p = float(2 * stdtr(freedom, -abs(value) / error))
    else:
        p = min(1.0, least) if value else 1.0
    return Difference(value, value - half, value + half, p, runs, paired)


def _fisher(ones: int, runs: int, other_ones: int, other_runs: int) -> float:
    """Two-sided: of all tables with the same sums, those that are at most as likely as this one (Fisher, 1922)."""
    total = ones + other_ones
    ways = {k: math.comb(runs, k) * math.comb(other_runs, total - k) for k in range(min(runs, total) + 1)}
    return sum(way for way in ways.values() if way <= ways[ones]) / math.comb(runs + other_runs, total)


def _ordered(values: Mapping[tuple[str, int], complex]) -> tuple[np.ndarray, list[int]]:
    """The values by stratum, and the number of runs of each stratum."""
    if not values:
        raise ValueError("there is no run to estimate from")
    keys = sorted(values)
    strata: dict[str, int] = {}
    for stratum, _ in keys:
        strata[stratum] = strata.get(stratum, 0) + 1
    return np.array([values[key] for key in keys]), list(strata.values())


def _freedom(strata: Sequence[int]) -> int | None:
    """Degrees of freedom: a mean is taken off each stratum. None where one has a single run: its spread is unknown."""
    return None if min(strata) < 2 else sum(strata) - len(strata)


def _drawn(strata: Sequence[int]) -> np.ndarray:
    return _indices(tuple(strata))


@functools.lru_cache(maxsize=64)  # arms of a sweep have the same sizes
def _indices(strata: tuple[int, ...]) -> np.ndarray:
    """(RESAMPLES, runs) indices: each stratum drawn with replacement from itself; the same for the same sizes."""
    generator = np.random.default_rng(0)
    starts = np.cumsum([0, *strata[:-1]])
    return np.concatenate(
        [start + generator.integers(0, n, (RESAMPLES, n)) for start, n in zip(starts, strata, strict=True)], axis=1
    )


def _error(resampled: np.ndarray, strata: Sequence[int], statistic: Name) -> float:
    """The standard error. A bootstrap of n runs has the variance with denominator n; here it is that with n - 1.

    Not so for the IQM of one stratum: as soon as runs are cut off, resamples that repeat an outer run already make its
    error too large by more than that (97 of 100 intervals of five normal runs would hold the truth).
    """
    runs = sum(strata)
    cut = statistic == "IQM" and len(strata) == 1 and runs >= 4
    return float(np.std(resampled)) * (1.0 if cut else math.sqrt(runs / (runs - len(strata))))
