"""Holds the KL at its budget: integral control of log(coefficient), with lead, scaled to the speed of the policy.

The plant is control's word for what is regulated: here the policy's KL as it answers to the coefficient.
One rollout, with tau the budget and T the rollouts that the KL needs to reach it (measured, see below):
1. `kl_level` gives the KL's level and velocity, each with its standard error;
2. the KL that the present course leads to:      predicted = level + (lead T + lag + 2.5) velocity;
3. its error, with x = predicted / tau - 1:      e = clip(sign(x) log(1 + |x|), -1, 2);
4. how much of the gain acts:                    persistence = max(0.3, |mean e| / mean |e|), trust (see below);
5. log beta <- clip(log beta + rate e),          rate = trust * persistence * gain / (T + 18), more while the KL clearly
                                                 rises too high, none while it is still on its way to the budget, and
                                                 times fade^4 well below it (anti-windup);
6. coefficient = beta * fade,                    fade = min(1, KL / (tau / 2)): well below the budget there is no
                                                 penalty (asymmetry).

Since e contains the velocity, step 5 is a PI controller in velocity form: the velocity's part of the integral is the
proportional action. So nothing winds up where the output is clipped, and no steady error is left (cf. the PID
Lagrangian of Stooke et al. 2020, arXiv 2007.03964, whose coefficient is linear and whose gains are fixed). Where the
fade has taken the coefficient away nothing can be learned about it, so there it is not integrated either: a pull that
comes late finds the coefficient that was there before. One that is larger than the last that held the KL near its
budget (before there was one, than the first coefficient) is known to be too large, and relaxes at the full rate. Above
the budget, beyond thirty times what it was when the KL last was within the budget or clearly fell, the coefficient
grows at a fiftieth of the rate: one that shows no effect by then hardly has any.

Why the log domain: useful coefficients span decades, d(log KL)/d(log beta) is about -2 in all of them, so one gain
fits. The error is odd in x, since a log of a noisy KL would read lower than the KL is. Why T: a learning rate 100
times lower makes the KL answer 100 times later. Gains in units of T give the same curve on another clock. The KL is
half the square of a distance that grows evenly, so T is read from the square roots of two levels on the way up, from
1/16 (or three errors) to 0.3 of the budget.

Noise and swings. An error that is noise changes its sign, one that lasts does not: their ratio (the tracking signal of
Trigg and Leach 1967) sets the share of the gain, at once in both directions. A swing is a level that clearly (a fifth
of the budget, and four standard errors) crosses from one side of the budget to the other: it lowers T to what the
crossing showed, and costs a quarter of the trust, which comes back where nothing swings.

A run that begins above 0.3 of the budget has shown no rise: T stays at its unknown value until a swing lowers it.

The constants below were chosen on simulated plants (benchmarks/control) and may be turned by a third.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace

from stable_rlhf.control.kl_level import Level, LevelState, advance_level

RISE_FROM, RISE_TO = 1.0 / 16.0, 0.3  # of the budget: above the first steps' noise, and before the lead term matters
RISE_ERRORS = 3.0  # standard errors of the level from where on a rise is one
RISE_LIMIT = 200.0  # rollouts: a rise held up by a coefficient that was too large must not pass for a slow plant
UNKNOWN_SPEED = 20.0  # rollouts, before the rise was seen: the middle, on a log scale, of what runs show (2 to 200)
SWING = 1.2  # KL above tau * 1.2, then below tau / 1.2 or back, is a swing: beyond the 15 % allowed
SWING_ERRORS = 4.0  # standard errors beyond the budget: two such in turn are not noise
SWING_TRUST = 0.75  # of the gain is kept after a swing: four swings bring it to a third
CROSSING = math.sqrt(SWING) - math.sqrt(1.0 / SWING)  # of the distance to the budget: what the quickest swing covers
LEAST_TRUST = 0.1  # of the gain is never taken away, so that the integral still removes a steady error
TRUST_GROWTH = 0.1  # per T + 18 rollouts: doubled in seven of them, much slower than the swings of too high a gain
KEEP_LEAST, KEEP_SHARE = 5.0, 0.4  # rollouts, and of T + 18: window of the persistence; half of a swing at full gain
LEAST_PERSISTENCE = 0.3  # of the gain: what acts on noise alone, so that a small steady error goes too
LAST_DELAYS = 18.0  # rollouts added to T: with the lags of filter, optimiser and rollout the gain has a top
LEAD_DELAYS = 2.5  # rollouts of lead that make up for one rollout of delay and a momentum of 0.7 to 0.9
TIGHTEN = 2.0  # times the rate while KL is, or will be, above the budget and clearly rises: too late is the worse error
TIGHTEN_ERRORS = 3.0  # standard errors of the velocity that are clear: tightening on noise would be a steady error
ERROR_LOW, ERROR_HIGH = -1.0, 2.0  # one wild course may not move the coefficient by decades
FALLS = 0.5  # of the budget in one T: a KL above it that falls so quickly needs no more; what is added winds up
MOST_CLIMB = math.log(30.0)  # of log beta with no effect: more than any simulated run needed on its way to the budget
BEYOND = 0.02  # of the rate is left from there on: not none, or a KL that only noise hides would never be held
NEAR = 0.7  # of the budget, from where on (less three errors) the integral always runs
NEAR_ERRORS = 3.0
ARRIVAL = 1.0  # T: a KL that will reach the budget within this time needs no relaxing
FIRST_ARRIVAL = 200.0  # rollouts: the same before T is known
FADE_BELOW = 0.5  # of the budget, below which the coefficient fades: out of the way of the regulated band
FADE_POWER = 4.0  # of the fade in the rate below the band: a coefficient that hardly acts is hardly integrated


@dataclass(frozen=True, kw_only=True)
class RegulatorState:
    """The regulator's state between two rollouts."""

    log_coef: float
    """log beta, before fading and gate."""
    level: LevelState = field(default_factory=LevelState)
    """Filters of the KL."""
    speed: float = UNKNOWN_SPEED
    """T, rollouts."""
    risen: bool = False
    """Whether the first rise has been seen, so that T is known."""
    rise_start: float | None = None
    """Level as a share of the budget where the rise that is under way began; None while none is."""
    rising_steps: int = 0
    """Rollouts since then."""
    side: int = 0
    """Last side of the budget on which the KL clearly was: 1 above, -1 below, 0 not yet."""
    side_steps: int = 0
    """Rollouts since it was there."""
    trust: float = 1.0
    """Share of the gain that swings have left."""
    effective: float | None = None
    """log beta when the KL last was within its budget or clearly fell; None before the first rollout."""
    held: float | None = None
    """log beta when the KL last stood near its budget, before that the first; None before the first rollout."""
    error: float = 0.0
    """Average of e, for the persistence."""
    error_size: float = 0.0
    """Average of |e|; 0 where they begin anew."""


@dataclass(frozen=True, kw_only=True)
class Regulation:
    """The result of one step of the regulator."""

    coefficient: float
    """beta, reward per nat, before fading and gate."""
    short: float
    """The level that is held at the budget, nats per token."""
    fade: float
    """0..1: factor well below the budget."""
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

    kl, its standard error (0: not known) and budget in nats per token; gain without unit, lead in units of T; limits of
    beta in reward per nat. With `may_relax` False the coefficient may only grow.
    """
    first = state.level.short is None
    filters, level = advance_level(state.level, kl, kl_error, budget, state.speed)
    state = replace(state, level=filters)
    share, share_error = level.short / budget, level.error / budget
    if first:
        state = replace(state, risen=share >= RISE_TO, held=state.log_coef)
    elif state.risen:
        state = _watch_swings(state, share, share_error)
    else:
        state = _measure_rise(state, share, share_error)
    predicted = level.short + (lead * state.speed + level.lag + LEAD_DELAYS) * level.velocity
    excess = predicted / budget - 1.0
    error = max(ERROR_LOW, min(ERROR_HIGH, math.copysign(math.log1p(abs(excess)), excess)))
    fade = min(1.0, max(0.0, level.short, predicted) / (FADE_BELOW * budget))
    state, persistence = _persistence(state, error)
    full = state.trust * persistence * gain / (state.speed + LAST_DELAYS)
    if error > 0.0:
        rises = level.velocity > TIGHTEN_ERRORS * level.velocity_error
        falls = -level.velocity * state.speed >= FALLS * budget
        rate = 0.0 if falls else TIGHTEN * full if rises else full
    else:
        state, share_of_rate = _relaxing(state, level, budget, fade)
        rate = full * share_of_rate if may_relax else 0.0
    acts = level.short <= budget or level.velocity < -TIGHTEN_ERRORS * level.velocity_error
    effective = state.log_coef if acts or state.effective is None else state.effective
    if rate * error > 0.0 and state.log_coef > effective + MOST_CLIMB:
        rate *= BEYOND
    log_coef = max(math.log(limits[0]), min(math.log(limits[1]), state.log_coef + rate * error))
    regulation = Regulation(coefficient=math.exp(log_coef), short=level.short, fade=fade, predicted=predicted)
    return replace(state, log_coef=log_coef, effective=effective), regulation


def _persistence(state: RegulatorState, error: float) -> tuple[RegulatorState, float]:
    """State with the averages of e and |e|, and their ratio: 1 where the error keeps its sign, low in noise."""
    if state.error_size == 0.0:
        mean, size = error, abs(error)
    else:
        new = 1.0 / max(KEEP_LEAST, KEEP_SHARE * (state.speed + LAST_DELAYS))
        mean = state.error + new * (error - state.error)
        size = state.error_size + new * (abs(error) - state.error_size)
    ratio = abs(mean) / size if size > 0.0 else 1.0
    return replace(state, error=mean, error_size=size), max(LEAST_PERSISTENCE, ratio)


def _measure_rise(state: RegulatorState, share: float, share_error: float) -> RegulatorState:
    """T from the first rise: rollouts per distance, the distance being the square root of the share of the budget."""
    start = max(RISE_FROM, RISE_ERRORS * share_error)
    if share < RISE_TO:
        if share < start:
            return replace(state, rise_start=None, rising_steps=0)
        if state.rise_start is None:
            return replace(state, rise_start=share, rising_steps=0)
        return replace(state, rising_steps=state.rising_steps + 1)
    if state.rise_start is not None:
        speed = (state.rising_steps + 1) / (math.sqrt(share) - math.sqrt(state.rise_start))
    else:  # within one rollout; where the noise alone is as large, nothing is known
        speed = 1.0 / math.sqrt(share) if start <= RISE_TO else UNKNOWN_SPEED
    return replace(state, risen=True, speed=min(RISE_LIMIT, speed), rise_start=None, rising_steps=0)


def _watch_swings(state: RegulatorState, share: float, share_error: float) -> RegulatorState:
    """T and trust lowered by a swing across the budget; without one the trust comes back."""
    trust = min(1.0, state.trust * (1.0 + TRUST_GROWTH / (state.speed + LAST_DELAYS)))
    steps, clear = state.side_steps + 1, SWING_ERRORS * share_error
    side = 1 if share > max(SWING, 1.0 + clear) else -1 if share < min(1.0 / SWING, 1.0 - clear) else 0
    if side == 0:
        return replace(state, trust=trust, side_steps=steps)
    if side == -state.side:
        trust = max(LEAST_TRUST, trust * SWING_TRUST)
        return replace(state, trust=trust, side=side, side_steps=0, speed=min(state.speed, steps / CROSSING))
    return replace(state, trust=trust, side=side, side_steps=0)


def _relaxing(state: RegulatorState, level: Level, budget: float, fade: float) -> tuple[RegulatorState, float]:
    """Share of the rate at which the coefficient may relax: all near the budget, none on the way there, else fade^4."""
    if state.risen and level.short > NEAR * budget - NEAR_ERRORS * level.error:
        still = abs(level.velocity) * state.speed <= (1.0 - NEAR) * budget
        return replace(state, held=state.log_coef) if still else state, 1.0
    state = replace(state, error=0.0, error_size=0.0)  # the way there says nothing of the noise at the budget
    arrival = ARRIVAL * state.speed if state.risen else FIRST_ARRIVAL
    on_its_way = level.short + arrival * level.velocity >= budget
    if on_its_way:
        return state, 0.0
    return state, 1.0 if state.held is not None and state.log_coef > state.held else fade**FADE_POWER
