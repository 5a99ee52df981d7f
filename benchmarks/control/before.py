"""The law of `safe` as it was at commit f169609, frozen: what loop.py compares the present law with, and nothing else.

`regulate` and its constants are those of control/kl_regulator.py there, word for word. It knows no error of the KL, no
bound on an update, and one first coefficient for every budget. Do not mend it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from stable_rlhf.control import Observation

RISE_FROM, RISE_TO = 1.0 / 16.0, 0.3  # of the budget: above the first steps' noise, and before the lead term matters
RISE_SHARE = 3.7  # T per step between them: the share is 0.30 if KL grows as t^2, 0.24 if as t; 1/0.27
RISE_LIMIT = 200.0  # steps: a rise held up by a coefficient that was too large must not pass for a slow plant
UNKNOWN_SPEED = 20.0  # steps, before the rise was seen: the middle, on a log scale, of what runs show (2 to 200)
SWING = 1.2  # KL above tau * 1.2, then below tau / 1.2 or back, is a swing: beyond the noise, about the 15 % allowed
SWING_TRUST = 0.75  # of the gain is kept after a swing: four swings bring it to a third
LEAST_TRUST = 0.1  # of the gain is never taken away, so that the integral still removes a steady error
TRUST_GROWTH = 1.002  # per step: doubled in 350, much slower than the swings of a gain that is too high
LAST_DELAYS = 13.0  # steps added to T: with the lags of the filter, the optimiser and the rollout the gain has a top
LEAD_DELAYS = 2.5  # steps of lead that make up for one rollout of delay and a momentum of 0.7 to 0.9
TIGHTEN = 1.6  # times the rate while KL is, or will be, above the budget and still rises: too late is the worse error
ERROR_LOW, ERROR_HIGH = -1.0, 2.0  # of log(predicted / tau): one wild rollout may not move the coefficient by decades
NEAR = 0.7  # of the budget, from where on the integral always runs
ARRIVAL = 2.0  # T: a KL that will reach the budget within this time needs no relaxing
FIRST_ARRIVAL = 200.0  # steps: the same before T is known
FIRST_RELAX = 0.02  # rate before T is known: e-fold in 50 steps, so that a long critic warm-up leaves a coefficient
FADE_BELOW = 0.5  # of the budget, below which the coefficient fades: out of the way of the regulated band


@dataclass(frozen=True, kw_only=True)
class RegulatorState:
    """The regulator's state between two rollouts."""

    log_coef: float
    """log beta, before fading and gate."""
    short: float | None = None
    """Quick filter of the KL, nats per token; None before the first rollout."""
    long: float = 0.0
    """Slow filter of the KL, nats per token."""
    speed: float = UNKNOWN_SPEED
    """T, steps."""
    risen: bool = False
    """Whether the first rise has been seen, so that T is known."""
    rising_steps: int = 0
    """Steps spent between RISE_FROM and RISE_TO on the first rise."""
    side: int = 0
    """Last side of the budget on which the KL was clearly: 1 above, -1 below, 0 not yet."""
    side_steps: int = 0
    """Steps since it was there."""
    trust: float = 1.0
    """Share of the gain that is used."""


@dataclass(frozen=True, kw_only=True)
class Regulation:
    """The result of one step of the regulator."""

    coefficient: float
    """beta, reward per nat, before fading and gate."""
    short: float
    """Quick filter of the KL, nats per token: the level that is held at the budget."""
    fade: float
    """0..1: factor well below the budget."""
    predicted: float
    """KL that the present course leads to, nats per token."""


def regulate(
    state: RegulatorState,
    kl: float,
    budget: float,
    *,
    gain: float,
    lead: float,
    limits: tuple[float, float],
    may_relax: bool,
) -> tuple[RegulatorState, Regulation]:
    """One rollout of the rules above.

    kl and budget in nats per token; gain without unit, lead in units of T; limits of beta in reward per nat. With
    `may_relax` False the coefficient may only grow.
    """
    first = state.short is None
    state, short, velocity, lag = _filter(state, kl)
    state = replace(state, risen=short / budget >= RISE_TO) if first else _measure_speed(state, short / budget)
    predicted = short + (lead * state.speed + lag + LEAD_DELAYS) * velocity
    error = math.log(max(predicted / budget, math.exp(ERROR_LOW)))
    rate = _rate(state, short, velocity, budget, gain, error, may_relax)
    log_coef = state.log_coef + rate * min(ERROR_HIGH, error)
    log_coef = max(math.log(limits[0]), min(math.log(limits[1]), log_coef))
    fade = min(1.0, max(0.0, short, predicted) / (FADE_BELOW * budget))
    regulation = Regulation(coefficient=math.exp(log_coef), short=short, fade=fade, predicted=predicted)
    return replace(state, log_coef=log_coef), regulation


def _filter(state: RegulatorState, kl: float) -> tuple[RegulatorState, float, float, float]:
    """State with both filters advanced; the short one; the KL's velocity, nats per token and step; its lag, steps."""
    # nearly no lag in the level: delay costs more than noise, which the integral averages
    lag_short = max(0.25, min(8.0, state.speed / 40.0))
    # a velocity over a ninth of the rise: less lag than there is lead
    lag_long = max(1.25, min(40.0, state.speed / 9.0))
    if state.short is None:
        return replace(state, short=kl, long=kl), kl, 0.0, lag_short
    short = state.short + (kl - state.short) / (1.0 + lag_short)
    long = state.long + (kl - state.long) / (1.0 + lag_long)
    return replace(state, short=short, long=long), short, (short - long) / (lag_long - lag_short), lag_short


def _measure_speed(state: RegulatorState, share: float) -> RegulatorState:
    """T from the first rise, then from swings; `share` is short / budget."""
    if not state.risen:
        if share < RISE_FROM:
            return replace(state, rising_steps=0)
        if share < RISE_TO:
            return replace(state, rising_steps=state.rising_steps + 1)
        speed = min(RISE_LIMIT, RISE_SHARE * (state.rising_steps + 0.5))  # 0.5: both ends fall between two rollouts
        return replace(state, risen=True, speed=speed)
    trust = min(1.0, state.trust * TRUST_GROWTH)
    steps = state.side_steps + 1
    side = 1 if share > SWING else -1 if share < 1.0 / SWING else 0
    if side == 0:
        return replace(state, trust=trust, side_steps=steps)
    if side == -state.side:
        trust = max(LEAST_TRUST, trust * SWING_TRUST)
        return replace(state, trust=trust, side=side, side_steps=0, speed=min(state.speed, float(steps)))
    return replace(state, trust=trust, side=side, side_steps=0)


def _rate(
    state: RegulatorState,
    short: float,
    velocity: float,
    budget: float,
    gain: float,
    error: float,
    may_relax: bool,
) -> float:
    """Change of log beta per unit of error; 0 where integrating would only wind up."""
    rate = state.trust * gain / (state.speed + LAST_DELAYS)
    if error > 0.0:
        return TIGHTEN * rate if velocity > 0.0 else rate
    if not may_relax:
        return 0.0
    if not state.risen:
        return 0.0 if short + FIRST_ARRIVAL * velocity >= budget else FIRST_RELAX
    arriving = short + ARRIVAL * state.speed * velocity >= budget
    return 0.0 if arriving and short <= NEAR * budget else rate


class Before:
    """The regulator alone, with the defaults of that commit: coefficient and fade, no gate, no moving threshold."""

    update_kl = None

    def __init__(self, budget: float, initial_coef: float = 0.05) -> None:
        self.budget = budget
        self.state = RegulatorState(log_coef=math.log(initial_coef))

    def coefficient(self, seen: Observation) -> float:
        """The coefficient for the update that follows."""
        limits = (1e-4, 100.0)
        self.state, found = regulate(
            self.state, seen.kl, self.budget, gain=3.5, lead=0.7, limits=limits, may_relax=True
        )
        return found.fade * found.coefficient
