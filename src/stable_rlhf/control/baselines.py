"""The controllers that SAFE is compared with: none, fixed, adaptive, asymmetric with momentum, PID Lagrangian.

Each gives a coefficient per rollout; the caller decides whether it acts in the reward or in the loss.

1. none        beta = 0.
2. fixed       beta is a constant.
3. adaptive    Ziegler et al. 2019 ("Fine-Tuning Language Models from Human Preferences", section 2.2):
                   e = clip(kl / target - 1, -0.2, 0.2);   beta <- beta (1 + e / horizon).
4. asymmetric  lambda_a max(0, kl - threshold)^2 + lambda_m max(0, momentum)^2, momentum = (kl - kl_50_ago) / 50 [P, C],
               through its slope in kl.
5. pid-lagrangian  Stooke et al. 2020 ("Responsive Safety in Reinforcement Learning by PID Lagrangian Methods",
               algorithm 2), the KL as the cost:
                   d = kl - limit;  I <- max(0, I + d);  beta = max(0, Kp d + Ki I + Kd max(0, kl - kl_before)).
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from stable_rlhf.control.base import Decision, Observation, check_settings, setting
from stable_rlhf.control.phase import Phase

KL_SHORT_KEEP = 0.9  # [P] share of the short KL average that one step keeps
KL_LONG_KEEP = 0.99  # [P] share of the long KL average that one step keeps


@dataclass(frozen=True, kw_only=True)
class KlAverages:
    """The two exponential averages of the KL as published, from 0, nats per token (`safe` has its own filters)."""

    short: float = 0.0
    long: float = 0.0

    def after(self, kl: float) -> KlAverages:
        """short <- 0.9 short + 0.1 kl;  long <- 0.99 long + 0.01 kl."""
        return KlAverages(
            short=KL_SHORT_KEEP * self.short + (1.0 - KL_SHORT_KEEP) * kl,
            long=KL_LONG_KEEP * self.long + (1.0 - KL_LONG_KEEP) * kl,
        )


def plain_decision(
    kl_coef: float, averages: KlAverages, threshold: float | None, excess: float, reason: str
) -> Decision:
    """A decision of a rule that has no gate, no phase and no PID."""
    return Decision(
        kl_coef=kl_coef,
        threshold=threshold,
        excess=excess,
        kl_short=averages.short,
        kl_long=averages.long,
        gate=1.0,
        phase=Phase.NONE.value,
        pid_p=0.0,
        pid_i=0.0,
        pid_d=0.0,
        entropy_floor=None,
        reason=reason,
    )


@dataclass(frozen=True, kw_only=True)
class NoneSettings:
    """Settings of the controller ``none``, which has no KL term: there are none."""


def advance_none(settings: NoneSettings, state: KlAverages, observation: Observation) -> tuple[KlAverages, Decision]:
    """beta = 0."""
    state = state.after(observation.kl)
    return state, plain_decision(0.0, state, None, 0.0, f"KL {observation.kl:.3g}: no KL term")


@dataclass(frozen=True, kw_only=True)
class FixedSettings:
    """Settings of the controller ``fixed``: a constant coefficient."""

    beta: float = setting(0.05, 0.0)
    """Reward per nat. 0.05 is the usual coefficient of PPO for language models and of the published baseline."""

    def __post_init__(self) -> None:
        check_settings(self)


def advance_fixed(settings: FixedSettings, state: KlAverages, observation: Observation) -> tuple[KlAverages, Decision]:
    """beta is a constant."""
    state = state.after(observation.kl)
    reason = f"KL {observation.kl:.3g}: coefficient fixed at {settings.beta:.3g}"
    return state, plain_decision(float(settings.beta), state, None, 0.0, reason)


@dataclass(frozen=True, kw_only=True)
class AdaptiveSettings:
    """Settings of the controller ``adaptive``: Ziegler et al. 2019, with the target per token."""

    init_beta: float = setting(0.05, above=0.0)
    """Coefficient of the first rollout, reward per nat. It must be above 0, because the rule multiplies it. 0.05 as for
    `fixed`."""
    target: float = setting(0.3, above=0.0)
    """KL to hold, nats per token (Ziegler et al. count nats per sequence). 0.3 is the budget of `safe`, so that the two
    can be compared."""
    horizon: float = setting(16.0, above=0.2)
    """Rollouts in which the coefficient changes by at most 22 % (e^0.2, because the error is clipped to 0.2). Ziegler
    et al. count prompts: their horizon is this times the batch size. Their 10,000 would change the coefficient by only
    18 % in 160 steps of 64 prompts; 16 rollouts are 1,000 prompts. It must be above 0.2, or one step could set the
    coefficient to 0."""

    def __post_init__(self) -> None:
        check_settings(self)


@dataclass(frozen=True, kw_only=True)
class AdaptiveState:
    """The averages, and the coefficient of the next rollout."""

    averages: KlAverages = field(default_factory=KlAverages)
    beta: float | None = None
    """None before the first rollout, which uses init_beta."""


MAX_BETA = 1e6  # far beyond any use: a KL that stays above the target for ever must not overflow a float
MIN_BETA = 1e-9  # the same at the other end: a product that reaches 0 could never rise again


def advance_adaptive(
    settings: AdaptiveSettings, state: AdaptiveState, observation: Observation
) -> tuple[AdaptiveState, Decision]:
    """This rollout uses beta; its KL gives the beta of the next, as in Ziegler et al. 2019."""
    beta = float(settings.init_beta) if state.beta is None else state.beta
    error = max(-0.2, min(0.2, observation.kl / settings.target - 1.0))  # 0.2: Ziegler et al., equation 4
    following = max(MIN_BETA, min(MAX_BETA, beta * (1.0 + error / settings.horizon)))
    state = AdaptiveState(averages=state.averages.after(observation.kl), beta=following)
    reason = f"KL {observation.kl:.3g} for target {settings.target:.3g}: coefficient {beta:.3g}, next {following:.3g}"
    excess = max(0.0, observation.kl - settings.target)
    return state, plain_decision(beta, state.averages, float(settings.target), excess, reason)


@dataclass(frozen=True, kw_only=True)
class AsymmetricSettings:
    """Settings of the controller ``asymmetric``: a squared penalty above a threshold, and one on the KL's momentum [P,
    C]."""

    threshold: float = setting(0.3)
    """KL above which the first term acts, nats per token [C]."""
    penalty_scale: float = setting(0.1, 0.0)
    """Weight lambda_a of the first term, reward per squared nat [C]."""
    momentum_scale: float = setting(5.0, 0.0)
    """Weight lambda_m of the momentum term, reward per squared nat of mean growth in one step [C]."""
    window: int = setting(50, 2, 10_000)
    """Number of rollouts whose KL is kept. The momentum is the newest KL minus the oldest, divided by this number
    [C]."""

    def __post_init__(self) -> None:
        check_settings(self)


@dataclass(frozen=True, kw_only=True)
class AsymmetricState:
    """The averages, and the last `window` KLs, oldest first."""

    averages: KlAverages = field(default_factory=KlAverages)
    kls: tuple[float, ...] = ()


def momentum(settings: AsymmetricSettings, kls: tuple[float, ...]) -> float:
    """(newest - oldest) / window, nats per token and step, of a full window; 0 before that [C]."""
    return (kls[-1] - kls[0]) / settings.window if len(kls) == settings.window else 0.0


def asymmetric_penalty(settings: AsymmetricSettings, kls: tuple[float, ...]) -> tuple[float, float]:
    """The two terms of the published penalty, without a gradient: only for checking against the published code."""
    above = max(0.0, kls[-1] - settings.threshold)
    growth = max(0.0, momentum(settings, kls))
    return settings.penalty_scale * above**2, settings.momentum_scale * growth**2


def advance_asymmetric(
    settings: AsymmetricSettings, state: AsymmetricState, observation: Observation
) -> tuple[AsymmetricState, Decision]:
    """kl_coef = dP/dkl = 2 lambda_a max(0, kl - threshold) + 2 lambda_m max(0, momentum) / window.

    The second slope is with respect to the newest KL: the oldest belongs to a policy that no longer moves.
    """
    kls = (*state.kls, observation.kl)[-settings.window :]
    state = replace(state, averages=state.averages.after(observation.kl), kls=kls)
    excess = max(0.0, observation.kl - settings.threshold)
    growth = max(0.0, momentum(settings, kls))
    kl_coef = 2.0 * settings.penalty_scale * excess + 2.0 * settings.momentum_scale * growth / settings.window
    side = "above" if excess > 0.0 else "within"
    level = f"KL {observation.kl:.3g} {side} {settings.threshold:.3g}, growing {growth:.2g} a step"
    reason = f"{level}: coefficient {kl_coef:.3g}"
    return state, plain_decision(kl_coef, state.averages, float(settings.threshold), excess, reason)


@dataclass(frozen=True, kw_only=True)
class PidLagrangianSettings:
    """Settings of the controller ``pid-lagrangian``: Stooke et al. 2020, with the KL as the cost, and fixed gains.

    The gains are to be tuned. The defaults are sized by `fixed`, whose 0.05 is usual: an excess of 0.1 nats gives that
    at once and again every 10 rollouts that it lasts, and a KL that rises by 0.05 in a rollout gives it too.
    """

    limit: float = setting(0.3, above=0.0)
    """KL not to be passed, nats per token. 0.3 is the budget of `safe`, so that the two can be compared."""
    kp: float = setting(0.5, 0.0)
    """Proportional gain, reward per squared nat."""
    ki: float = setting(0.05, 0.0)
    """Integral gain, reward per squared nat and rollout."""
    kd: float = setting(1.0, 0.0)
    """Derivative gain, reward times rollouts per squared nat. Only a KL that rises counts."""

    def __post_init__(self) -> None:
        check_settings(self)


@dataclass(frozen=True, kw_only=True)
class PidLagrangianState:
    """The averages, the integral, and the last KL."""

    averages: KlAverages = field(default_factory=KlAverages)
    integral: float = 0.0
    """Sum of the errors, nats per token, kept at 0 or above."""
    kl: float | None = None
    """KL of the last rollout, nats per token; None before the first, which has no derivative."""


def advance_pid_lagrangian(
    settings: PidLagrangianSettings, state: PidLagrangianState, observation: Observation
) -> tuple[PidLagrangianState, Decision]:
    """beta = max(0, Kp d + Ki I + Kd max(0, kl - kl_before)), d = kl - limit, I <- max(0, I + d).

    The paper's other part, dividing the objective by 1 + beta, changes nothing where advantages are whitened.
    """
    error = observation.kl - settings.limit
    rise = 0.0 if state.kl is None else max(0.0, observation.kl - state.kl)
    integral = max(0.0, state.integral + error)
    p, i, d = settings.kp * error, settings.ki * integral, settings.kd * rise
    kl_coef = max(0.0, p + i + d)
    averages = state.averages.after(observation.kl)
    state = PidLagrangianState(averages=averages, integral=integral, kl=observation.kl)
    reason = f"KL {observation.kl:.3g} for limit {settings.limit:.3g}: coefficient {kl_coef:.3g}"
    decision = plain_decision(kl_coef, averages, float(settings.limit), max(0.0, error), reason)
    return state, replace(decision, pid_p=p, pid_i=i, pid_d=d)
