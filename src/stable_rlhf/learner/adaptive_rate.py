"""Learning rates that follow the KL of the updates."""

from __future__ import annotations

from collections.abc import Mapping

FACTOR = 1.5  # rsl_rl: the rates change by this at most in an update
BAND = 2.0  # Schulman et al. 2017, section 4: beyond this times the target, or below the target over it, they change
RANGE = 100.0  # of the schedule: rsl_rl lets rates go from 1e-5 to 1e-2, two orders and a half


class AdaptiveRate:
    """The factor of both learning rates: x / 1.5 after an update of KL > 2 target, x * 1.5 after one < target / 2.

    Source: the adaptive schedule of rsl_rl (Rudin et al. 2022), after Schulman et al. 2017, section 4, which adapts a
    coefficient in this way. ``target`` is in nats per token; None never changes the factor.
    """

    def __init__(self, target: float | None) -> None:
        self.target = target
        self.factor = 1.0

    def observe(self, kl: float | None) -> None:
        """Takes the KL of an update, nats per token; None or 0 where the policy took no step, which says nothing."""
        if self.target is None or not kl:
            return
        if kl > BAND * self.target:
            self.factor = max(1.0 / RANGE, self.factor / FACTOR)
        elif kl < self.target / BAND:
            self.factor = min(RANGE, self.factor * FACTOR)

    def state_dict(self) -> dict[str, float]:
        """Everything that the next rates depend on."""
        return {"factor": self.factor}

    def load_state_dict(self, saved: Mapping[str, float]) -> None:
        self.factor = saved["factor"]
