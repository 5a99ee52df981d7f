"""One step of a PID controller with anti-windup: gains and old state in, new state and the three terms out."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class PidGains:
    """Gains and limits of one PID controller; the error's unit is the caller's."""

    proportional: float
    """Output per unit of error."""
    integral: float
    """Output per unit of summed error."""
    derivative: float
    """Output per unit of the error's change in one step."""
    integral_limit: float
    """The sum of errors is clamped to +- this, so that a long error cannot store up an output that outlives it."""
    leak: float = 1.0
    """Share of the sum that is kept each step; 1 forgets nothing."""
    output_limit: float = math.inf
    """Size of the output at which the sum stops growing in the same direction; infinity sets none."""


@dataclass(frozen=True, kw_only=True)
class PidState:
    """The PID controller's state between two steps."""

    total: float = 0.0
    """Clamped (and leaked) sum of the errors."""
    error: float = 0.0
    """The last error, for the derivative; 0 before the first step."""


@dataclass(frozen=True, kw_only=True)
class PidTerms:
    """The three terms of one step; their sum is the output before any limit of the caller's."""

    p: float = 0.0
    i: float = 0.0
    d: float = 0.0

    @property
    def output(self) -> float:
        """p + i + d."""
        return self.p + self.i + self.d


def pid_step(gains: PidGains, state: PidState, error: float) -> tuple[PidState, PidTerms]:
    """PID = kp e + ki S + kd (e - e_prev), S <- clamp(leak S + e, +-integral_limit).

    Source: SAFE (arXiv 2602.04651), the threshold. Anti-windup by conditional integration (Astrom and Hagglund, "PID
    Controllers", 1995, section 3.5): where the output has reached +-output_limit and the error would push it further, S
    leaks but does not take the error.
    """
    p = gains.proportional * error
    d = gains.derivative * (error - state.error)
    kept = gains.leak * state.total
    output = p + gains.integral * kept + d
    saturated = abs(output) >= gains.output_limit and output * error > 0.0
    total = kept if saturated else max(-gains.integral_limit, min(gains.integral_limit, kept + error))
    return PidState(total=total, error=error), PidTerms(p=p, i=gains.integral * total, d=d)
