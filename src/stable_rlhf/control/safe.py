"""The controller `safe`: a regulated KL, a moving KL budget and, if asked for, an entropy gate, as SAFE intends them.

Once per rollout, in this order:
1. threshold   The KL budget moves with the reward curve (`phase.reward_phase`, half-windows against their own
               noise): it opens while the reward climbs, closes when KL grows and buys nothing or when reward falls,
               and drifts back on a plateau. A PID on the smoothed reward velocity, in deviations of the run's own
               rewards, sets how far. A rate limit keeps it from jumping. No absolute reward occurs anywhere:
               a * reward + b, a > 0, gives the same decisions. A budget per sequence becomes nats per token by the
               smoothed length of the responses.
2. gate        1 unless `gate_on`. gate = clip((fraction H_0 / H)^power, 1, max), H_0 the mean entropy of the first
               rollouts: exactly 1 in a healthy run, above it before collapse. While it is above 1 and the entropy still
               falls, the coefficient may not relax, else the regulator would undo it. Where the entropy has stopped
               falling, it may: a task whose answers are certain is no collapse, and its KL belongs at the budget.
3. regulation  `kl_regulator.regulate` brings KL to the threshold and holds it there.
4. decision    kl_coef = gate * min(share * beta, max_coef), share the regulator's proportional part; at least
               gate * min(1, gate - 1) * beta. And the second actuator, the bound on what one update may move:
               update_kl = update_share * threshold * clip((0.8 threshold / KL)^12, 0.15, 1).
               No coefficient can hold the KL if random movement alone exceeds the budget; smaller updates can.

Intent: SAFE (arXiv 2602.04651), sections on the gate, the asymmetric penalty and the PID threshold; the forms are ours.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace

from stable_rlhf.control.base import Decision, Observation, check_settings, setting
from stable_rlhf.control.entropy_gate import EntropyState, advance_gate
from stable_rlhf.control.kl_regulator import Regulation, RegulatorState, regulate
from stable_rlhf.control.normaliser import Moments, merge
from stable_rlhf.control.phase import CLEAR, Contrast, Phase, contrast, reward_phase
from stable_rlhf.control.pid import PidGains, PidState, PidTerms, pid_step

USUAL_BUDGET = 0.3  # nats per token, for which initial_coef is given
FIRST_POWER = 0.75  # another budget begins with (0.3 / budget)^0.75 times as much. A constant pull needs the power 1/2,
# recorded runs needed 1.1 to 1.25; a first coefficient that is too small costs an overshoot, one too large only time
UPDATE_FROM = 0.8  # of the threshold, from which the bound shrinks: on the way up updates are whole
UPDATE_POWER = 12.0  # of threshold / KL in the bound: it has shrunk before the KL is at the threshold. A policy whose
# updates all point one way changes its KL by 2 sqrt(KL update_kl): a whole update by 28 % there, this one by 11 %. It
# answers to the coefficient two rollouts later, so it swings by twice that and must stay within 15 %
LEAST_UPDATE = (
    0.15  # of the bound is always left, so that the policy can come back and goes on learning at the threshold
)
LENGTH_KEEP = 0.9  # share of the length's average that one rollout keeps: a threshold must not jump with one batch
WINDOW_START = 10  # rollouts before the first verdict on the reward: halves of 5 are the least with a usable variance
MULTIPLE = {  # of the base budget that each phase asks for
    Phase.WARMUP: 1.0,
    Phase.CLIMBING: 1.2,  # [C] the published multiplier
    Phase.PLATEAU: 1.0,
    Phase.FALLING: 0.75,
    Phase.OVEROPTIMISED: 0.75,  # clearly below what the KL had when it stopped buying reward
}
REOPEN = 0.25  # of the rate limit, on a plateau below the base: its KL growth in one half-window stays under
# phase.LEAST_KL_GROWTH, so that reopening cannot look like over-optimisation and start a cycle
ERROR_LIMIT = 3.0  # deviations per half-window: more than any real climb, and one outlier may not fill the integral
PID_LEAK = 0.95  # share of the PID's sum that is kept: the gain of a climb is forgotten in about one half-window
PID_SUM = 5.0  # limit of the PID's sum, deviations: what a steep climb reaches in five steps
PID_LIMIT = 0.25  # of the base budget: the PID adjusts what the phase asks for, and never turns it round


@dataclass(frozen=True, kw_only=True)
class SafeSettings:
    """Settings of the controller ``safe``."""

    budget: float = setting(0.3, above=0.0)
    """Base KL budget, in nats per `budget_per`: the KL to the reference that the controller allows. The threshold, the
    budget in force, moves around it. 0.3 is the paper's threshold, and about where the best fixed coefficients end."""
    budget_per: str = setting("token", choices=("token", "sequence"))
    """What the budget counts: ``token``, nats per response token; ``sequence``, nats per response, which is divided by
    the smoothed mean length of the responses."""
    initial_coef: float = setting(0.05, above=0.0)
    """First coefficient, reward per nat, for rewards of unit deviation and a budget of 0.3 nats per token; another
    budget begins with (0.3 / budget)^0.75 times as much. 0.05 is the usual one of PPO; it is not 0, so that a penalty
    is there once the KL grows."""
    min_coef: float = setting(1e-4, above=0.0)
    """Smallest coefficient at the budget. It has no effect on rewards of unit deviation, and is large enough to recover
    from."""
    max_coef: float = setting(100.0, above=0.0)
    """Largest coefficient, before the gate. No reward of unit deviation outweighs it; it only prevents overflow."""
    gain: float = setting(0.3, 0.0, 2.0)
    """Integral gain: change of the coefficient's logarithm in one rollout, for each unit of log(KL / threshold). On
    simulated policies (benchmarks/control) 0.25 to 0.35 hold the KL alike."""
    lead: float = setting(2.9, 0.0, 20.0)
    """Rollouts by which the KL is predicted ahead. Prediction damps: the KL answers two or three rollouts after the
    coefficient. With less the first overshoot is larger, with more than 3 noise moves the coefficient."""
    update_share: float = setting(0.02, above=0.0, high=1.0)
    """Share of the threshold that one update may move the policy, as KL(before || after): the bound that
    `optim.preview` enforces. 0.02 lets the KL reach its budget in seven updates at the soonest; with 0.01 it
    takes longer and ends no higher, with 0.07 the noise of the updates costs reward at small budgets."""
    gate_on: bool = setting(False)
    """Whether the gate acts: a factor that raises the coefficient when the entropy is low. On our benches it was 1 in
    every run whose KL was regulated (docs/results.md), so it is off."""
    gate_fraction: float = setting(0.6, above=0.0, high=1.0, switch="gate_on")
    """Share of the starting entropy below which the gate acts. In the prototype's runs, entropy stayed above 0.7 of its
    start in healthy runs and fell below 0.3 where the reward was hacked."""
    gate_power: float = setting(2.0, above=0.0, high=8.0, switch="gate_on")
    """Steepness of the gate: at half of the entropy floor (gate_fraction times the starting entropy) the gate is
    2^power. 2, as the published penalty is squared."""
    gate_max: float = setting(8.0, 1.0, switch="gate_on")
    """Largest gate, reached at about a third of the entropy floor. Below that there is little policy left to save."""
    threshold_on: bool = setting(True)
    """Whether the KL budget moves with the reward; False keeps it at `budget`, the ablation without a moving
    threshold."""
    threshold_min: float = setting(0.5, above=0.0, high=1.0, switch="threshold_on")
    """Smallest threshold, as a multiple of the budget."""
    threshold_max: float = setting(1.5, 1.0, 10.0, switch="threshold_on")
    """Largest threshold, as a multiple of the budget: the largest published multiplier (that of WARMUP)."""
    threshold_rate: float = setting(0.01, above=0.0, high=0.2, switch="threshold_on")
    """Largest relative change of the threshold in one step. 1 % is slow compared with the regulator; a threshold of 1.2
    times the budget is reached in 20 steps."""
    window: int = setting(40, 10, 1000, switch="threshold_on")
    """Number of rollouts whose rewards and KLs are compared, newer half with older half. 20 against 20 detects a climb
    of one standard deviation of the noise."""
    pid_kp: float = setting(0.1, 0.0, 10.0, switch="threshold_on")
    """Proportional gain of the PID that adjusts the threshold: multiple of the budget for each standard deviation of
    reward gained in half a window."""
    pid_ki: float = setting(0.01, 0.0, 10.0, switch="threshold_on")
    """Integral gain of the PID, for each standard deviation of its sum. The sum is limited to 5, so this term is at
    most half of the proportional term's size."""
    pid_kd: float = setting(0.1, 0.0, 10.0, switch="threshold_on")
    """Derivative gain of the PID, for each standard deviation by which that reward gain changes in one step, so that
    the budget follows a turn early."""

    def __post_init__(self) -> None:
        check_settings(self)
        if not self.min_coef <= self.initial_coef <= self.max_coef:
            raise ValueError(
                f"initial_coef={self.initial_coef!r} is outside [min_coef={self.min_coef!r}, "
                f"max_coef={self.max_coef!r}]: move it between them, or widen them."
            )


@dataclass(frozen=True, kw_only=True)
class ThresholdState:
    """State of the moving budget; the histories are at most `window` long, oldest first."""

    rewards: tuple[float, ...] = ()
    kls: tuple[float, ...] = ()
    moments: Moments = field(default_factory=Moments)
    """Of every step's mean reward so far: the scale in which a change of reward is judged."""
    pid: PidState = field(default_factory=PidState)
    phase: str = Phase.WARMUP.value
    multiple: float = 1.0
    """Threshold as a multiple of the base budget."""


@dataclass(frozen=True, kw_only=True)
class SafeState:
    """The controller's state between two rollouts."""

    regulator: RegulatorState
    threshold: ThresholdState = field(default_factory=ThresholdState)
    entropy: EntropyState = field(default_factory=EntropyState)
    length: float | None = None
    """Smoothed mean length of the responses, tokens; None where the budget is per token."""


def initial_safe_state(settings: SafeSettings) -> SafeState:
    """The state before step 0."""
    return SafeState(regulator=RegulatorState(log_coef=math.log(settings.initial_coef)))


def advance_safe(settings: SafeSettings, state: SafeState, observation: Observation) -> tuple[SafeState, Decision]:
    """One rollout of the rules above."""
    length, base = _base_budget(settings, state.length, observation)
    moved, terms = _move_threshold(settings, state.threshold, observation, base)
    threshold = base * moved.multiple
    before = _first(state.regulator, settings, threshold)
    entropy, gate, floor = state.entropy, 1.0, None
    if settings.gate_on:
        entropy, gate, floor = advance_gate(
            entropy,
            observation.entropy,
            fraction=settings.gate_fraction,
            power=settings.gate_power,
            most=settings.gate_max,
        )
    regulator, regulation = regulate(
        before,
        observation.kl,
        threshold,
        kl_error=observation.kl_error,
        gain=settings.gain,
        lead=settings.lead,
        limits=(settings.min_coef, settings.max_coef),
        may_relax=gate <= 1.0 or not entropy.falls,
    )
    kl_short = regulation.short
    # a gate above 1 also acts where the KL is small, continuously: collapse is answered there too
    acting = min(regulation.share * regulation.coefficient, settings.max_coef)
    kl_coef = gate * max(acting, min(1.0, gate - 1.0) * regulation.coefficient)
    decision = Decision(
        kl_coef=kl_coef,
        threshold=threshold,
        excess=max(0.0, kl_short - threshold),
        kl_short=kl_short,
        kl_long=regulator.level.long,
        gate=gate,
        phase=moved.phase,
        pid_p=terms.p,
        pid_i=terms.i,
        pid_d=terms.d,
        entropy_floor=floor,
        update_kl=_update_kl(settings, threshold, kl_short),
        reason=_reason(kl_short, threshold, regulation, before, kl_coef, gate)
        + _budget_reason(settings, state.threshold.multiple, moved, terms),
    )
    return SafeState(regulator=regulator, threshold=moved, entropy=entropy, length=length), decision


def _base_budget(settings: SafeSettings, length: float | None, observation: Observation) -> tuple[float | None, float]:
    """The smoothed length, and the base budget in nats per token."""
    if settings.budget_per == "token":
        return None, settings.budget
    if observation.length is None:
        raise ValueError(
            f"budget_per='sequence' needs Observation.length, which is None at step {observation.step}: give the mean "
            "number of response tokens, or set budget_per='token'."
        )
    length = observation.length if length is None else LENGTH_KEEP * length + (1 - LENGTH_KEEP) * observation.length
    return length, settings.budget / length


def _first(regulator: RegulatorState, settings: SafeSettings, threshold: float) -> RegulatorState:
    """The regulator's state, before step 0 with the first coefficient that fits the threshold."""
    if regulator.level.short is not None:
        return regulator
    coef = settings.initial_coef * (USUAL_BUDGET / threshold) ** FIRST_POWER
    return replace(regulator, log_coef=math.log(max(settings.min_coef, min(settings.max_coef, coef))))


def _update_kl(settings: SafeSettings, threshold: float, kl: float) -> float:
    """Most that the update may move the policy, nats per token."""
    near = UPDATE_FROM * threshold
    share = 1.0 if kl <= near else max(LEAST_UPDATE, (near / kl) ** UPDATE_POWER)
    return settings.update_share * threshold * share


def _move_threshold(
    settings: SafeSettings, state: ThresholdState, observation: Observation, base: float
) -> tuple[ThresholdState, PidTerms]:
    if not settings.threshold_on:
        return ThresholdState(phase=Phase.NONE.value), PidTerms()
    rewards = (*state.rewards, observation.reward)[-settings.window :]
    kls = (*state.kls, observation.kl)[-settings.window :]
    moments = merge(state.moments, observation.reward, 0.0, 1)
    enough = len(rewards) >= WINDOW_START
    reward_change = contrast(rewards) if enough else None
    phase = reward_phase(
        Phase(state.phase),
        reward_change,
        moments.deviation,
        contrast(kls) if enough else None,
        base * state.multiple,
    )
    gains = PidGains(
        proportional=settings.pid_kp,
        integral=settings.pid_ki,
        derivative=settings.pid_kd,
        integral_limit=PID_SUM,
        leak=PID_LEAK,
        output_limit=PID_LIMIT,
    )
    velocity = _velocity(reward_change, moments.deviation, phase)
    pid, terms = pid_step(gains, state.pid, velocity)
    wanted = _wanted(settings, phase, terms)
    rate = settings.threshold_rate
    opening = REOPEN * rate if phase is Phase.PLATEAU and state.multiple < 1.0 else rate
    multiple = max(state.multiple * (1.0 - rate), min(state.multiple * (1.0 + opening), wanted))
    moved = ThresholdState(rewards=rewards, kls=kls, moments=moments, pid=pid, phase=phase.value, multiple=multiple)
    return moved, terms


def _wanted(settings: SafeSettings, phase: Phase, terms: PidTerms) -> float:
    """The multiple of the base budget that the phase asks for, adjusted by the PID, within the limits."""
    wanted = MULTIPLE[phase] + max(-PID_LIMIT, min(PID_LIMIT, terms.output))
    return max(settings.threshold_min, min(settings.threshold_max, wanted))


def _velocity(change: Contrast | None, deviation: float, phase: Phase) -> float:
    """Reward gained in half a window, in deviations, less the size of its noise: 0 where it is within the noise.

    Shrinking by CLEAR standard errors keeps the PID quiet on a plateau, where a plain velocity is nothing but noise.
    A fall counts only in FALLING: elsewhere it is the price of a KL that has just been brought down.
    """
    if change is None or deviation == 0.0 or (change.difference < 0.0 and phase is not Phase.FALLING):
        return 0.0
    size = max(0.0, abs(change.difference) - CLEAR * change.standard_error) / deviation
    return math.copysign(min(ERROR_LIMIT, size), change.difference)


def _reason(
    kl: float,
    threshold: float,
    regulation: Regulation,
    before: RegulatorState,
    kl_coef: float,
    gate: float,
) -> str:
    """One line: level and course of the KL, what the coefficient does, and whether it is faded or gated."""
    side = "above" if kl > threshold else "within"
    course = f", heading for {regulation.predicted:.3g}" if abs(regulation.predicted - kl) > 0.1 * threshold else ""
    old, new = math.exp(before.log_coef), regulation.coefficient
    parts = [f"KL {kl:.3g} {side} budget {threshold:.3g}{course}: coefficient {old:.3g} -> {new:.3g}"]
    acts = f"acts with {kl_coef:.3g}"
    parts.append(f"entropy below its floor, gate {gate:.3g}, {acts}" if gate > 1.0 else acts)
    return "; ".join(parts)


def _budget_reason(settings: SafeSettings, last: float, moved: ThresholdState, terms: PidTerms) -> str:
    """The last clause of the reason: how the reward moves, and how the budget follows. Empty where it adds nothing.

    The budget goes to the multiple that phase and PID ask for. Where that is against the phase (it closes while the
    reward climbs, or opens while it falls), the clause says from where to where, and why: a steep climb opens it more
    than a slow one, and an earlier phase may have closed it more than the present one does.
    """
    meaning = {
        Phase.CLIMBING: "reward climbs",
        Phase.FALLING: "reward falls",
        Phase.OVEROPTIMISED: "more KL buys no reward",
    }
    phase = Phase(moved.phase)
    if phase not in meaning:
        return ""
    opens, closes = moved.multiple > last, moved.multiple < last
    budget = "opens" if opens else "closes" if closes else "stays"
    against = closes if phase is Phase.CLIMBING else opens
    if not against:
        return f"; {meaning[phase]}, budget {budget}"
    why = "as the climb slows" if phase is Phase.CLIMBING else "where this phase holds it"
    wanted = _wanted(settings, phase, terms)
    return f"; {meaning[phase]}, budget {budget} from {last:.3g} to {wanted:.3g} times its base, {why}"
