"""The entropy gate: a factor on the coefficient that is exactly 1 in a healthy run and rises before collapse.

    gate = clip((fraction H_0 / H)^power, 1, most)

H_0 is the mean entropy of the first five rollouts, H a quick average. A slow average beside it tells an entropy that is
falling, where the coefficient must not relax, from one that is low for good, where it may.
"""

from __future__ import annotations

from dataclasses import dataclass

ENTROPY_SLOW_KEEP = 0.9  # the same of the slow entropy: over ten rollouts a collapse is plain
ENTROPY_FALLS = 0.95  # of the slow average, below which the quick one says that the entropy is falling
ENTROPY_START = 5  # rollouts averaged into the starting entropy: one is noisy, and by ten a quick run has moved
ENTROPY_KEEP = 0.5  # share of the entropy's average that one step keeps: a lag of one step, since collapse is quick


@dataclass(frozen=True, kw_only=True)
class EntropyState:
    """State of the gate, nats per token."""

    start: float = 0.0
    """Mean of the first rollouts' entropies."""
    count: int = 0
    """Rollouts in that mean, at most ENTROPY_START."""
    recent: float = 0.0
    """Quick average of the entropy."""
    slow: float = 0.0
    """Slow average of the entropy: where the quick one is clearly below it, the entropy is falling."""

    @property
    def falls(self) -> bool:
        """Whether the entropy is falling: its quick average is clearly below its slow one."""
        return self.recent < ENTROPY_FALLS * self.slow


def advance_gate(
    state: EntropyState, entropy: float, *, fraction: float, power: float, most: float
) -> tuple[EntropyState, float, float | None]:
    """One rollout of the rule above: (state, gate, floor). No floor while the start is measured or is not positive."""
    if state.count < ENTROPY_START:
        count = state.count + 1
        start = state.start + (entropy - state.start) / count
        return EntropyState(start=start, count=count, recent=start, slow=start), 1.0, None
    recent = ENTROPY_KEEP * state.recent + (1.0 - ENTROPY_KEEP) * entropy
    slow = ENTROPY_SLOW_KEEP * state.slow + (1.0 - ENTROPY_SLOW_KEEP) * entropy
    state = EntropyState(start=state.start, count=state.count, recent=recent, slow=slow)
    floor = fraction * state.start
    if floor <= 0.0:  # a policy that began without entropy has none to lose
        return state, 1.0, None
    if recent >= floor:
        return state, 1.0, floor
    # compared before the division and the power, either of which could overflow at an entropy near 0
    least = floor * most ** (-1.0 / power)
    gate = most if recent <= least else (floor / recent) ** power
    return state, gate, floor
