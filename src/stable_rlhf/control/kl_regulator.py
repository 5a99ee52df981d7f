"""Holds the KL at its budget: proportional and integral control of log(coefficient).

The plant is control's word for what is regulated: here the policy's KL as it answers to the coefficient. Its updates
are bounded (`optim.preview`), so the coefficient chooses the direction of a step more than its length: the KL climbs or
falls by some 10 % a rollout, two or three rollouts after the coefficient has changed. An integral alone swings there.
One rollout, with tau the budget:
1. `kl_level` gives the KL's level and its velocity, and leaves out one wild rollout;
2. predicted = level + lead velocity;
3. log beta <- clip(log beta + gain clip(log(level / tau), -1, 1)),  below 0.7 tau times (level / 0.7 tau)^4
   unless beta is above the one that last held the KL near tau;
4. coefficient = beta min(e^2, (predicted / tau)^2).

Step 4 is the proportional part, in the log domain: beta at the budget, 0 where there is no KL, and more above, at once.
So below the budget there is hardly a penalty (asymmetry), and one that the KL rushes towards is met early. Step 3 is
the integral: it leaves no steady error. Where the KL is far below, the coefficient hardly acts and hardly moves, so a
pull that comes late finds beta as it was; a beta that grew while it had no effect is known to be too large, and comes
back at the full rate. Useful coefficients span decades, hence the logarithms (cf. the PID
Lagrangian of Stooke et al. 2020, arXiv 2007.03964, whose coefficient is linear).

A policy whose learning rate moves it 100 times more slowly is held by the same constants: on its clock the proportional
part acts at once.

The constants were chosen on simulated policies with the figures of recorded runs (benchmarks/control).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace

from stable_rlhf.control.kl_level import LevelState, advance_level

POWER = 2.0  # of predicted / tau in the coefficient: with 1 the KL swings longer, with 3 its noise moves it more
MOST = 2.0  # of the logarithm of the proportional part: a wild course may not raise the coefficient by decades
ERROR_LIMIT = 1.0  # of log(level / tau), for the same reason
NEAR = 0.7  # of the budget, below which the integral fades out
PASSING = 0.1  # of the budget in one rollout: a KL that moves faster is not held there
FADE_POWER = 4.0  # of level / (0.7 tau) there: at half of the budget a quarter is left, at a fifth nothing


@dataclass(frozen=True, kw_only=True)
class RegulatorState:
    """The regulator's state between two rollouts."""

    log_coef: float
    """log beta, the coefficient at the budget, before the gate."""
    level: LevelState = field(default_factory=LevelState)
    """Filters of the KL."""
    held: float | None = None
    """log beta when the level was last between 0.7 tau and tau / 0.7 and not passing; None while it never was."""


@dataclass(frozen=True, kw_only=True)
class Regulation:
    """The result of one step of the regulator."""

    coefficient: float
    """beta, reward per nat, before the proportional part and the gate."""
    short: float
    """The level that is held at the budget, nats per token."""
    share: float
    """Proportional part: the coefficient that acts is this times beta."""
    predicted: float
    """KL that the present course leads to, nats per token."""


def regulate(
    state: RegulatorState,
    kl: float,
    budget: float,
    *,
    kl_error: float = 0.0,
    gain: float,
    lead: float,
    limits: tuple[float, float],
    may_relax: bool,
) -> tuple[RegulatorState, Regulation]:
    """One rollout of the rules above.

    kl, its standard error (0: not known) and budget in nats per token; gain without unit, lead in rollouts; limits of
    beta in reward per nat. With `may_relax` False beta may only grow.
    """
    filters, level = advance_level(state.level, kl, kl_error, budget)
    predicted = level.short + lead * level.velocity
    error = _log(level.short / budget, -ERROR_LIMIT, ERROR_LIMIT)
    holds = abs(error) <= -math.log(NEAR) and abs(level.velocity) <= PASSING * budget
    held = state.log_coef if holds else state.held
    if error < 0.0 and not (held is not None and state.log_coef > held):
        error *= min(1.0, (max(0.0, level.short) / (NEAR * budget)) ** FADE_POWER)
    if error < 0.0 and not may_relax:
        error = 0.0
    log_coef = max(math.log(limits[0]), min(math.log(limits[1]), state.log_coef + gain * error))
    share = math.exp(POWER * _log(predicted / budget, -math.inf, MOST / POWER))
    regulation = Regulation(coefficient=math.exp(log_coef), short=level.short, share=share, predicted=predicted)
    return replace(state, log_coef=log_coef, level=filters, held=held), regulation


def _log(x: float, low: float, high: float) -> float:
    """log x between two limits; the lower one where there is no logarithm."""
    return low if x <= 0.0 else max(low, min(high, math.log(x)))
