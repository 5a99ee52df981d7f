"""Phases of a reward curve: the published rule, and one that weighs a change against its own noise.

`paper_phase` is the published rule (SAFE, arXiv 2602.04651, and its code): absolute constants for rewards in 0..1 and
windows of 50, so that CLIMBING cannot occur before call 100. `reward_phase` is ours: it compares the two halves of a
window from the first few steps on, requires the difference to stand out of its standard error, and uses no absolute
reward.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum


class Phase(StrEnum):
    """Where a reward curve is. JSON shows the plain word."""

    NONE = "NONE"
    """The rule has no phases."""
    WARMUP = "WARMUP"
    """Too few steps to say."""
    CLIMBING = "CLIMBING"
    """The reward rises."""
    PLATEAU = "PLATEAU"
    """The reward neither rises nor falls."""
    CONVERGED = "CONVERGED"
    """Published rule only: high and still."""
    FALLING = "FALLING"
    """The reward falls although the KL does not."""
    OVEROPTIMISED = "OVEROPTIMISED"
    """The KL grows at its budget and buys no reward."""


PAPER_WINDOW = 50  # calls in one window of the published rule
PAPER_CLIMB = 0.01  # rise of the window mean that counts as climbing, for rewards in 0..1
PAPER_CONVERGED_STD = 0.02  # deviation below which a window counts as still, for rewards in 0..1
PAPER_CONVERGED_MEAN = 0.7  # mean above which a still window counts as converged, for rewards in 0..1


def paper_phase(rewards: Sequence[float]) -> Phase:
    """The phase by the published rule, from the last 2 x 50 rewards, oldest first (fewer at the start).

    WARMUP before 50 rewards; CLIMBING if mean(last 50) > mean(the 50 before) + 0.01, which needs 100; CONVERGED if
    the last 50 have population deviation < 0.02 and mean > 0.7; else PLATEAU.
    """
    if len(rewards) < PAPER_WINDOW:
        return Phase.WARMUP
    mean, variance = mean_variance(rewards[-PAPER_WINDOW:], 0)
    if len(rewards) >= 2 * PAPER_WINDOW:
        before, _ = mean_variance(rewards[-2 * PAPER_WINDOW : -PAPER_WINDOW], 0)
        if mean - before > PAPER_CLIMB:
            return Phase.CLIMBING
    if math.sqrt(variance) < PAPER_CONVERGED_STD and mean > PAPER_CONVERGED_MEAN:
        return Phase.CONVERGED
    return Phase.PLATEAU


def mean_variance(values: Sequence[float], ddof: int) -> tuple[float, float]:
    """Mean and variance with denominator n - ddof."""
    mean = math.fsum(values) / len(values)
    return mean, math.fsum((value - mean) ** 2 for value in values) / (len(values) - ddof)


@dataclass(frozen=True, kw_only=True)
class Contrast:
    """Compares the newer half of a window with the older half, in the values' unit."""

    difference: float = 0.0
    """mean(newer) - mean(older)."""
    standard_error: float = 0.0
    """sqrt((s_newer^2 + s_older^2) / n): of the difference, if the steps were independent."""
    newer: float = 0.0
    """mean(newer)."""

    def stands_out(self, errors: float, least: float) -> bool:
        """True if the difference is above `errors` standard errors and above `least`; a zero difference never is."""
        return self.difference > errors * self.standard_error and self.difference > least and self.difference > 0.0

    def opposite(self) -> Contrast:
        """The same with the opposite sign, so that one test serves rises and falls."""
        return Contrast(difference=-self.difference, standard_error=self.standard_error, newer=-self.newer)


def contrast(values: Sequence[float]) -> Contrast:
    """The contrast of the two halves of `values`, oldest first; an odd count leaves out the oldest. Needs 4 values."""
    half = len(values) // 2
    newer, newer_variance = mean_variance(values[-half:], 1)
    older, older_variance = mean_variance(values[-2 * half : -half], 1)
    error = math.sqrt((newer_variance + older_variance) / half)
    return Contrast(difference=newer - older, standard_error=error, newer=newer)


CLEAR = 3.0  # standard errors: half-windows of 5 have heavy tails, and rewards of neighbouring steps are correlated
FAINT = 1.5  # standard errors at which a phase once entered is left: hysteresis, so that it does not flicker
LEAST_REWARD = 0.1  # of the run's reward deviation: a smaller change buys nothing that a person would call a climb
LEAST_KL_GROWTH = 0.1  # of the budget: more than the regulator's own ripple and than a budget that drifts back
LEAST_KL_FALL = 0.05  # of the budget: a reward that falls with the KL is the price of a tighter budget, not a failure
AT_BUDGET = 0.9  # of the budget: growth below it is the way to the budget, not more than was granted


def reward_phase(
    previous: Phase, reward: Contrast | None, deviation: float, kl: Contrast | None, budget: float
) -> Phase:
    """The phase from the half-window contrasts of reward and KL; None stands for too few steps.

    `deviation` is the reward's standard deviation over the whole run, `budget` the KL budget in nats per token. The
    result is the same for a * reward + b with any a > 0: every comparison is between quantities of the reward's unit.
    """
    if reward is None or kl is None:
        return Phase.WARMUP

    def rises(change: Contrast, entered: bool) -> bool:
        scale = 0.5 if entered else 1.0
        return change.stands_out(FAINT if entered else CLEAR, scale * LEAST_REWARD * deviation)

    if rises(reward, previous is Phase.CLIMBING):
        return Phase.CLIMBING
    kl_falls = kl.opposite().stands_out(CLEAR, LEAST_KL_FALL * budget)
    if rises(reward.opposite(), previous is Phase.FALLING) and not kl_falls:
        return Phase.FALLING
    if kl.newer >= AT_BUDGET * budget and kl.stands_out(CLEAR, LEAST_KL_GROWTH * budget):
        return Phase.OVEROPTIMISED
    return Phase.PLATEAU
