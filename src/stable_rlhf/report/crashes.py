"""Reward crashes, by the definition that reports, comparisons and guard share (docs/metrics.md)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from stable_rlhf.control import WINDOW, standard_error

CRASH_SHARE = 0.25  # of the reward gained, max R - R_20: smaller falls are oscillation
CRASH_ERRORS = 3.0  # standard errors of D: by chance alone about one in a thousand exceeds them
Rows = Sequence[dict[str, Any]]


@dataclass(frozen=True, kw_only=True)
class RewardCrash:
    """A fall of R: indices into the rewards (`end` is None when R never recovered), `depth` = the largest D in it."""

    begin: int
    end: int | None
    depth: float


def moving_average(values: Sequence[float]) -> list[float]:
    """R_t = mean of the last WINDOW values, for t >= WINDOW - 1 only (entry 0 is R at that t)."""
    return [math.fsum(values[end - WINDOW : end]) / WINDOW for end in range(WINDOW, len(values) + 1)]


def reward_crashes(rewards: Sequence[float], standard_errors: Sequence[float] | None = None) -> list[RewardCrash]:
    """Crashes of a run: R = 20-step moving average of `rewards`, D_t = max_{s<=t} R_s - R_t.

    A crash begins at the first t with D_t > 25 % of (max R - R_20), max over the whole run, and D_t > 3 standard errors
    of D_t. It ends at the first t where R has recovered half of the crash's largest D. From there on the maximum starts
    anew, or the half still lost would count as a second crash. R needs 20 rewards: no crash begins before the 21st.

    `standard_errors` holds one value per reward, that of the step's mean (`standard_error`). Steps
    being independent, Var(D_t) = (sum of se_i^2 over the steps i that lie in one of the two windows, of s and of t, but
    not in both) / 20^2. None drops this condition. Raises ValueError on another length and on values not finite.
    """
    errors = [0.0] * len(rewards) if standard_errors is None else list(standard_errors)
    if len(errors) != len(rewards):
        raise ValueError(f"{len(rewards)} rewards but {len(errors)} standard errors")
    if not all(map(math.isfinite, [*rewards, *errors])):
        raise ValueError("rewards and standard errors must be finite: leave out the steps that have none")
    averages = moving_average(rewards)
    least_fall = CRASH_SHARE * (max(averages) - averages[0]) if averages else 0.0
    crashes: list[RewardCrash] = []
    peak, begin, depth = 0, None, 0.0
    for now, average in enumerate(averages):
        if begin is None and average >= averages[peak]:
            peak = now
        fall = averages[peak] - average
        if begin is None:
            if fall > least_fall and fall > CRASH_ERRORS * _error_of_fall(errors, peak, now):
                begin, depth = now, fall
        elif fall <= depth / 2:
            crashes.append(RewardCrash(begin=begin + WINDOW - 1, end=now + WINDOW - 1, depth=depth))
            peak, begin = now, None
        else:
            depth = max(depth, fall)
    if begin is not None:
        crashes.append(RewardCrash(begin=begin + WINDOW - 1, end=None, depth=depth))
    return crashes


def _error_of_fall(errors: Sequence[float], peak: int, now: int) -> float:
    before, after = set(range(peak, peak + WINDOW)), set(range(now, now + WINDOW))
    return math.sqrt(math.fsum(errors[i] ** 2 for i in before ^ after)) / WINDOW


def step_errors(rows: Rows) -> list[float] | None:
    """Standard error of each row's objective/scores (`standard_error`); None when a row lacks what this needs.

    n = prompts of the step - completions/skipped. Every step takes as many prompts, hence episode / (step + 1) of them.
    A step of fewer than FEWEST is as far off as n completions of the other steps: sqrt(mean of their n se^2 / n).
    """
    counts, errors = [], []
    for row in rows:
        deviation, episode = row.get("objective/scores_std"), row.get("episode")
        counts.append((episode or 0) / (row["step"] + 1) - (row.get("completions/skipped") or 0))
        if deviation is None or counts[-1] <= 0:
            return None
        errors.append(standard_error(deviation, counts[-1]))
    variances = [n * error**2 for n, error in zip(counts, errors, strict=True) if error is not None]
    if not variances:
        return None
    usual = math.fsum(variances) / len(variances)
    return [math.sqrt(usual / n) if error is None else error for n, error in zip(counts, errors, strict=True)]
