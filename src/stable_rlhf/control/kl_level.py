"""The level and the velocity of a noisy KL: two filters, the size of the noise, and one rule for a wild rollout.

One rollout, with tau the budget and sigma the deviation of the KL's noise:
1. sigma is the standard error that came with the KL. Where none came, it is an average of the second differences
   |x_t - 2 x_{t-1} + x_{t-2}| / sqrt(6), times sqrt(pi / 2): a steady rise does not enter it.
2. A KL further from the level than half of tau (or of the level, if that is more) and five sigma is wild. It is left
   out; where the next one is wild on the same side, the KL has really jumped, and is taken. The second rollout's is
   taken in any case: nothing is known yet of what it should be.
3. Two quick filters of the KL give its level and its velocity:
       short <- short + (kl - short) / (1 + lag_s);  long likewise with lag_l;
       velocity = (short - long) / (lag_l - lag_s).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

NOISE_KEEP = 0.9  # share of the noise's average that one rollout keeps: ten rollouts know it to a quarter
DEVIATION = math.sqrt(math.pi / 2.0) / math.sqrt(6.0)  # of one value, per mean size of a second difference
LAG_SHORT, LAG_LONG = 0.67, 2.0  # rollouts: delay costs more than noise, and the KL turns within three rollouts
WILD_SHARE, WILD_ERRORS = 0.5, 5.0  # of the budget or level, and sigma: beyond what one bounded update can move the KL


@dataclass(frozen=True, kw_only=True)
class LevelState:
    """The filters between two rollouts, nats per token."""

    short: float | None = None
    """Quick filter of the KL; None before the first rollout."""
    long: float = 0.0
    """Slow filter of the KL."""
    last: float = 0.0
    """The last KL that was taken."""
    before: float | None = None
    """The one before it; None while there is none."""
    noise: float = 0.0
    """Average of the second differences, as the deviation of one KL."""
    doubted: int = 0
    """Side on which the last KL was wild, left out or taken as a jump confirmed: 1 above, -1 below, else 0."""


@dataclass(frozen=True, kw_only=True)
class Level:
    """Level and velocity of the KL after one rollout."""

    short: float
    """The level, nats per token."""
    velocity: float
    """Change of the level in one rollout, nats per token."""


def advance_level(state: LevelState, kl: float, kl_error: float, budget: float) -> tuple[LevelState, Level]:
    """One rollout of the rules above. KL, error and budget in nats per token; an error of 0 is unknown."""
    first = state.short is None
    short = kl if state.short is None else state.short
    noise = kl_error if kl_error > 0.0 else state.noise
    far = WILD_SHARE * max(budget, short) + WILD_ERRORS * noise
    side = 1 if kl > short + far else -1 if kl < short - far else 0
    if first:
        state = LevelState(short=kl, long=kl, last=kl)
    elif state.before is not None and side not in (0, state.doubted):
        state = replace(state, doubted=side)
    else:
        short += (kl - short) / (1.0 + LAG_SHORT)
        long = state.long + (kl - state.long) / (1.0 + LAG_LONG)
        still = side if state.doubted else 0  # after a confirmed jump the next need not be confirmed again
        noise_seen = _noise(state, kl)
        state = LevelState(short=short, long=long, last=kl, before=state.last, noise=noise_seen, doubted=still)
    return state, Level(short=short, velocity=(short - state.long) / (LAG_LONG - LAG_SHORT))


def _noise(state: LevelState, kl: float) -> float:
    if state.before is None or state.doubted != 0:  # a confirmed jump is no noise
        return state.noise
    size = DEVIATION * abs(kl - 2.0 * state.last + state.before)
    return NOISE_KEEP * state.noise + (1.0 - NOISE_KEEP) * size
