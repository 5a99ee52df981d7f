"""The controller `paper`: SAFE to the letter (arXiv 2602.04651 and its code), with the penalty acting by its slope.

Once per rollout, in this order:
1. kl_short <- 0.9 kl_short + 0.1 kl;  kl_long <- 0.99 kl_long + 0.01 kl;
2. v <- 0.95 v + 0.05 (reward - last reward);  PID on e = v - 0.001 (from the second call on);
3. phase of the last 100 rewards;  threshold = clip((0.3 + PID) * multiplier(phase), 0.1, 0.6);
4. gate = max(0.5, 2.0 / (entropy + 0.1)) where kl_short > threshold, else 1;
5. penalty = 0.1 gate max(0, kl_short - threshold)^2, and kl_coef its slope in kl_short.

The constants fit rewards in 0..1 and one model's entropy. The controller
`safe` does not have that limit.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from stable_rlhf.control.base import Decision, Observation, check_settings, setting
from stable_rlhf.control.baselines import KlAverages
from stable_rlhf.control.phase import PAPER_WINDOW, Phase, paper_phase
from stable_rlhf.control.pid import PidGains, PidState, PidTerms, pid_step

MULTIPLIER = {  # [C] threshold multiplier of each phase
    Phase.WARMUP: 1.5,
    Phase.CLIMBING: 1.2,
    Phase.CONVERGED: 1.0,
    Phase.PLATEAU: 0.8,
}
ENTROPY_OFFSET = 0.1  # [C] nats per token, keeps the gate's division finite at zero entropy


@dataclass(frozen=True, kw_only=True)
class PaperSettings:
    """Settings of the controller ``paper``; the defaults are the published constants."""

    penalty_scale: float = setting(0.1, 0.0)
    """Weight lambda of the penalty, reward per squared nat [P]."""
    base_threshold: float = setting(0.3, 0.0)
    """KL threshold tau before the PID and the phase change it, nats per token [P]."""
    threshold_min: float = setting(0.1, 0.0)
    """Lowest threshold, nats per token [C]."""
    threshold_max: float = setting(0.6, 0.0)
    """Highest threshold, nats per token [C]."""
    entropy_floor: float = setting(2.0, 0.0)
    """Entropy at which the gate (the factor on the penalty) is about 1, nats per token [P]."""
    gate_min: float = setting(0.5, 0.0)
    """Smallest gate, reached at high entropy [P]."""
    velocity_keep: float = setting(0.95, 0.0, 1.0)
    """Share of the average reward velocity that is kept in one step [P]."""
    velocity_target: float = setting(0.001)
    """Reward velocity at which the PID's error is 0, scorer's units per step [P]."""
    pid_kp: float = setting(0.3)
    """Proportional gain of the PID, nats per token per unit of velocity [P]."""
    pid_ki: float = setting(0.01)
    """Integral gain of the PID, nats per token per unit of velocity [P]."""
    pid_kd: float = setting(0.05)
    """Derivative gain of the PID, nats per token per unit of velocity [P]."""
    pid_integral_limit: float = setting(1.0, 0.0)
    """Limit of the PID's summed error, in both directions [C]."""

    def __post_init__(self) -> None:
        check_settings(self)
        if self.threshold_min > self.threshold_max:
            raise ValueError(
                f"threshold_min={self.threshold_min!r} is above threshold_max={self.threshold_max!r}: swap or "
                "widen them."
            )


@dataclass(frozen=True, kw_only=True)
class PaperState:
    """The controller's state between two calls; the history is at most 100 rewards."""

    averages: KlAverages = field(default_factory=KlAverages)
    rewards: tuple[float, ...] = ()
    """The last rewards, oldest first."""
    velocity: float = 0.0
    """Average change of the reward in one step."""
    pid: PidState = field(default_factory=PidState)


def penalty(settings: PaperSettings, decision: Decision) -> float:
    """lambda gate excess^2: the published number, which has no gradient.

    It is only for checking against the published code.
    """
    return settings.penalty_scale * decision.gate * decision.excess**2


def advance_paper(settings: PaperSettings, state: PaperState, observation: Observation) -> tuple[PaperState, Decision]:
    """One call of the published controller; kl_coef = dP/dkl_short = 2 lambda gate excess."""
    averages = state.averages.after(observation.kl)
    velocity, pid, terms = _reward_velocity(settings, state, observation.reward)
    rewards = (*state.rewards, observation.reward)[-2 * PAPER_WINDOW :]
    phase = paper_phase(rewards)
    wanted = (settings.base_threshold + terms.output) * MULTIPLIER[phase]
    threshold = max(settings.threshold_min, min(settings.threshold_max, wanted))
    excess = max(0.0, averages.short - threshold)
    gate = _gate(settings, observation.entropy) if excess > 0.0 else 1.0
    kl_coef = 2.0 * settings.penalty_scale * gate * excess
    side = "above" if excess > 0.0 else "within"
    decision = Decision(
        kl_coef=kl_coef,
        threshold=threshold,
        excess=excess,
        kl_short=averages.short,
        kl_long=averages.long,
        gate=gate,
        phase=phase.value,
        pid_p=terms.p,
        pid_i=terms.i,
        pid_d=terms.d,
        entropy_floor=float(settings.entropy_floor),
        reason=f"KL {averages.short:.3g} {side} threshold {threshold:.3g} ({phase.value}): coefficient {kl_coef:.3g}",
    )
    return PaperState(averages=averages, rewards=rewards, velocity=velocity, pid=pid), decision


def _reward_velocity(settings: PaperSettings, state: PaperState, reward: float) -> tuple[float, PidState, PidTerms]:
    if not state.rewards:  # no change to speak of yet: the published code leaves the PID alone
        return state.velocity, state.pid, PidTerms()
    keep = settings.velocity_keep
    velocity = keep * state.velocity + (1.0 - keep) * (reward - state.rewards[-1])
    gains = PidGains(
        proportional=settings.pid_kp,
        integral=settings.pid_ki,
        derivative=settings.pid_kd,
        integral_limit=settings.pid_integral_limit,
    )
    pid, terms = pid_step(gains, state.pid, velocity - settings.velocity_target)
    return velocity, pid, terms


def _gate(settings: PaperSettings, entropy: float) -> float:
    """max(gate_min, floor / (H + 0.1)). An entropy <= -0.1 cannot be a policy's, and would turn the gate's sign."""
    if entropy + ENTROPY_OFFSET <= 0.0:
        raise ValueError(
            f"Observation.entropy is {entropy!r}: a policy's entropy is >= 0. Look at how it was averaged."
        )
    return max(settings.gate_min, settings.entropy_floor / (entropy + ENTROPY_OFFSET))
