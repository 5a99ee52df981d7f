"""Holds the KL at its budget: proportional and integral control of log(coefficient).

The plant is control's word for what is regulated: here the policy's KL as it answers to the coefficient. Its updates
are bounded (`optim.preview`), so the coefficient chooses the direction of a step more than its length: the KL climbs or
falls by some 10 % a rollout, two or three rollouts after the coefficient has changed. An integral alone swings there.
One rollout, with tau the budget:
1. `kl_level` gives the KL's level and its velocity, and leaves out one wild rollout;
2. predicted = level + lead velocity;
3. log beta <- clip(log beta + trust gain min(1, 30 / rise) w d),   d = clip(log(level / tau), -1, 1);
   w is 2 above tau, and below 0.9 tau (level / 0.9 tau)^4, but 1 there if beta is above the one that last held the KL
   near tau;
4. coefficient = beta share,   share = min(exp(2), (predicted / tau)^(2.25 trust)).

Step 4 is the proportional part: beta at the budget, nearly 0 well below it (asymmetry), and more above, at once. Step 3
is the integral. It leaves a steady error of 1 to 2 %, below the budget, since noise above tau counts twice. Where the
KL is far below, the coefficient hardly acts and hardly moves: if the reward begins to pull later, beta is still as it
was. If beta grew while it had no effect, it is now too large, and is lowered at the full rate. Useful coefficients span
decades, hence the logarithms (cf. the PID Lagrangian of Stooke et al. 2020, arXiv 2007.03964, whose coefficient is
linear).

Two figures fit the law to the policy. `rise` is the number of rollouts that the KL takes from a sixteenth to 0.9 of the
budget, judged by the quickest stage of the way, since a KL may rest on it: a policy that moves slowly is integrated
slowly. `trust` loses a seventh with each swing, in which the level clearly crosses the budget: a policy that turns at
once needs less. It comes back slowly.

The constants were chosen on simulated policies (tests/control/plants.py, benchmarks/control), some with the figures of
recorded runs. With a tenth more or less, some bounds in tests/control/test_safe.py are missed by little.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace

from stable_rlhf.control.kl_level import LevelState, advance_level

POWER = 2.25  # of predicted / tau in the share: with 1.5 the first overshoot is larger, with 3 noise moves it more
MOST = 2.0  # of the share's logarithm: a wild course may not raise the coefficient by decades
ERROR_LIMIT = 1.0  # of log(level / tau), for the same reason
TIGHTEN = 2.0  # times the gain above the budget: too late is the worse error
NEAR = 0.9  # of the budget, below which the integral fades out
FADE_POWER = 4.0  # of level / (0.9 tau) there: at 0.6 of the budget a fifth is left, at a third nothing
PASSING = 0.1  # of the budget in one rollout: a KL that moves faster is not held there
STAGES = (1.0 / 16.0, 1.0 / 8.0, 1.0 / 4.0, 1.0 / 2.0, NEAR)  # of the budget: levels that part the rise, from above the
# noise of the first rollouts on
QUICK_RISE = 30.0  # rollouts: a bounded policy needs 10 to 20, and up to there the whole gain acts
SWING = 1.12  # of the budget, and its inverse: a swing goes beyond both, most of the 15 % allowed
SWING_ERRORS = 4.0  # standard errors beyond the budget: two such in turn are not noise
SWING_TRUST = 0.85  # of the trust is kept after a swing
LEAST_TRUST = 0.15  # so that the integral still removes a steady error
TRUST_GROWTH = 1.002  # per rollout: doubled in 350, much slower than swings


@dataclass(frozen=True, kw_only=True)
class RegulatorState:
    """The regulator's state between two rollouts."""

    log_coef: float
    """log beta, the coefficient at the budget, before the gate."""
    level: LevelState = field(default_factory=LevelState)
    """Filters of the KL."""
    rise: float = 0.0
    """Rollouts from a sixteenth to 0.9 of the budget, by the quickest of the stages so far; 0 before the first."""
    stage: int = 0
    """Levels of STAGES that the KL has come to; it begins again below the lowest, unless it has come to the last."""
    since: int = 0
    """Rollouts since it came to the last of these."""
    side: int = 0
    """Last side of the budget on which the KL clearly was: 1 above, -1 below, 0 not yet."""
    trust: float = 1.0
    """Share of gain and power that swings have left."""
    held: float | None = None
    """log beta when the level was last within a tenth of tau and not passing; None while it never was."""


@dataclass(frozen=True, kw_only=True)
class Regulation:
    """The result of one step of the regulator."""

    coefficient: float
    """beta, reward per nat, before the share and the gate."""
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
    state = _measure(replace(state, level=filters), level.short / budget, kl_error / budget)
    predicted = level.short + lead * level.velocity
    error = _log(level.short / budget, -ERROR_LIMIT, ERROR_LIMIT)
    if abs(error) <= -math.log(NEAR) and abs(level.velocity) <= PASSING * budget:
        state = replace(state, held=state.log_coef)
    rate = state.trust * gain * min(1.0, QUICK_RISE / max(1.0, state.rise))
    log_coef = state.log_coef + rate * _weight(state, error, level.short / budget, may_relax) * error
    log_coef = max(math.log(limits[0]), min(math.log(limits[1]), log_coef))
    power = state.trust * POWER
    share = math.exp(power * _log(predicted / budget, -math.inf, MOST / power))
    regulation = Regulation(coefficient=math.exp(log_coef), short=level.short, share=share, predicted=predicted)
    return replace(state, log_coef=log_coef), regulation


def _weight(state: RegulatorState, error: float, ratio: float, may_relax: bool) -> float:
    """Factor on the rate: more above the budget, less the farther the KL is below it."""
    if error >= 0.0:
        return TIGHTEN
    if not may_relax:
        return 0.0
    too_large = state.held is not None and state.log_coef > state.held
    return 1.0 if too_large else min(1.0, (max(0.0, ratio) / NEAR) ** FADE_POWER)


def _measure(state: RegulatorState, ratio: float, error: float) -> RegulatorState:
    """The state with its rise and its trust advanced; level and standard error as shares of the budget."""
    if state.stage < len(STAGES):
        state = _measure_rise(state, ratio)
    trust = min(1.0, state.trust * TRUST_GROWTH)
    clear = SWING_ERRORS * error
    side = 1 if ratio > max(SWING, 1.0 + clear) else -1 if ratio < min(1.0 / SWING, 1.0 - clear) else 0
    if side != 0 and side == -state.side:
        trust = max(LEAST_TRUST, trust * SWING_TRUST)
    return replace(state, trust=trust, side=side or state.side)


def _measure_rise(state: RegulatorState, ratio: float) -> RegulatorState:
    """One rollout on the way to the budget."""
    rise, stage, since = state.rise, state.stage, state.since + 1
    if ratio <= STAGES[0]:
        stage = since = 0
    while stage < len(STAGES) and ratio > STAGES[stage]:
        if stage > 0:  # the distance from the reference, the root of the KL, grows evenly
            part = math.sqrt(STAGES[stage]) - math.sqrt(STAGES[stage - 1])
            found = since * (math.sqrt(STAGES[-1]) - math.sqrt(STAGES[0])) / part
            rise = found if rise == 0.0 else min(rise, found)
        stage, since = stage + 1, 0
    return replace(state, rise=rise, stage=stage, since=since)


def _log(x: float, low: float, high: float) -> float:
    """log x, kept between two limits; the lower limit where x is not positive."""
    return low if x <= 0.0 else max(low, min(high, math.log(x)))
