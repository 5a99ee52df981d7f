"""`safe`, rule by rule: threshold, gate and coefficient in numbers worked out by hand, and runs against plain loops."""

from __future__ import annotations

import dataclasses
import math
import random
from typing import Any

import pytest

from stable_rlhf.control import Decision, Observation, controller_settings, make_controller
from stable_rlhf.control.kl_regulator import RegulatorState
from stable_rlhf.control.normaliser import Moments
from stable_rlhf.control.safe import SafeSettings, SafeState, ThresholdState, advance_safe
from tests.oracles import control as oracle


def drive(rows: list[tuple[float, float, float]], **changed: float | bool) -> list[Decision]:
    """Decisions for rows of (reward, kl, entropy), whatever the controller says."""
    controller = make_controller("safe", **changed)
    return [controller.observe(Observation(step, *row)) for step, row in enumerate(rows)]


def rewarded(rewards: list[float], kl: float = 0.1, **changed: float | bool) -> list[Decision]:
    return drive([(reward, kl, 3.0) for reward in rewards], **changed)


# -- whole runs -------------------------------------------------------------------------------------------------------


def eventful(seed: int, steps: int) -> list[tuple[float, float, float]]:
    """Stretches of 25 steps: a reward that climbs, falls or stands still, a KL from nothing to three budgets, an
    entropy that falls to nothing and comes back."""
    rng = random.Random(seed)
    rows, reward, kl, entropy = [], 0.0, 0.004, 3.0
    climb, pace, fade, noise = 0.0, 1.15, 1.0, 0.02
    for step in range(steps):
        if step % 25 == 10:
            climb = rng.choice([-0.05, 0.0, 0.0, 0.02, 0.1])
            pace, fade = rng.choice([0.85, 0.97, 1.0, 1.0, 1.05, 1.3]), rng.choice([0.85, 1.0, 1.2])
            noise = rng.choice([0.002, 0.02, 0.2])
        reward += climb
        kl = min(0.9, max(0.003, kl * pace))
        entropy = min(3.0, max(0.2, entropy * fade))
        signed = kl * (1 + 0.1 * rng.gauss(0, 1)) - (0.05 if rng.random() < 0.02 else 0.0)
        rows.append((reward + noise * rng.gauss(0, 1), signed, entropy + 0.05 * rng.gauss(0, 1)))
    return rows


GATE: dict[str, Any] = {"gate_on": True}
CHANGES: list[dict[str, Any]] = [
    GATE,
    GATE,
    GATE,
    GATE | {"window": 15, "gate_fraction": 0.8, "gate_power": 1.0, "gate_max": 3.0},
    GATE | {"budget": 0.1, "threshold_min": 0.9, "threshold_max": 1.1, "threshold_rate": 0.05},
    GATE | {"gain": 1.0, "lead": 0.2, "min_coef": 0.02, "max_coef": 0.2},
    GATE | {"pid_kp": 0.02, "pid_ki": 0.05, "pid_kd": 0.5, "window": 10},
    {"initial_coef": 2.0},
    GATE | {"threshold_on": False, "gate_power": 4.0},
    {},
]


@pytest.mark.parametrize(("seed", "changed"), list(enumerate(CHANGES)))
def test_a_run_is_that_of_plain_loops(seed: int, changed: dict[str, Any]) -> None:
    rows = eventful(seed, 260)
    expected = oracle.safe(rows, controller_settings("safe", changed))
    for step, (decision, figures) in enumerate(zip(drive(rows, **changed), expected, strict=True)):
        found = dataclasses.asdict(decision)
        for name, value in figures.items():
            wanted = pytest.approx(value, rel=1e-8, abs=1e-12) if isinstance(value, float) else value
            assert found[name] == wanted, (step, name)


def test_the_runs_above_reach_every_phase_the_gate_and_both_ends_of_the_budget() -> None:
    decisions = [decision for seed in range(3) for decision in drive(eventful(seed, 260), **GATE)]
    assert {each.phase for each in decisions} == {"WARMUP", "CLIMBING", "PLATEAU", "FALLING", "OVEROPTIMISED"}
    assert max(each.gate for each in decisions) == 8.0
    assert min(each.threshold or 0 for each in decisions) < 0.2
    assert max(each.threshold or 0 for each in decisions) > 0.35


# -- the threshold ----------------------------------------------------------------------------------------------------


def test_the_first_verdict_comes_with_the_tenth_reward() -> None:
    """Five zeros and five ones: the halves differ by 1, in deviations of 1/2 by 2: p = 0.1 x 2 and d = 0.1 x (2 - 0).

    Together they pass the PID's limit of 1/4, so nothing is summed. The budget may open by 1 % a step.
    """
    decisions = rewarded([0.0] * 5 + [1.0] * 5)
    assert [each.phase for each in decisions] == ["WARMUP"] * 9 + ["CLIMBING"]
    assert [each.threshold for each in decisions[:9]] == [0.3] * 9
    last = decisions[-1]
    assert (last.pid_p, last.pid_i, last.pid_d) == pytest.approx((0.2, 0.0, 0.2), rel=1e-12)
    assert last.threshold == pytest.approx(0.3 * 1.01, rel=1e-14)


def test_the_terms_of_the_next_step() -> None:
    """Without d the sum takes the 2. One more 1: halves of 5 of the last ten, of variance 0 and 1/5, differ by 0.8;
    less three errors of 0.2 that is 0.2, in deviations of sqrt(6 x 5) / 11."""
    first, second = rewarded([0.0] * 5 + [1.0] * 6, pid_kd=0.0)[-2:]
    assert (first.pid_p, first.pid_i, first.pid_d) == pytest.approx((0.2, 0.02, 0.0), rel=1e-12)
    velocity = 0.2 / (math.sqrt(30) / 11)
    assert second.pid_p == pytest.approx(0.1 * velocity, rel=1e-12)
    assert second.pid_i == pytest.approx(0.01 * (0.95 * 2 + velocity), rel=1e-12)
    assert second.threshold == pytest.approx(0.3 * 1.01**2, rel=1e-14)


def test_a_fall_closes_by_one_percent_of_itself_a_step() -> None:
    decisions = rewarded([1.0] * 5 + [0.0] * 5 + [-0.5] * 3)
    assert [each.phase for each in decisions[9:]] == ["FALLING"] * 4
    assert (decisions[9].pid_p, decisions[9].pid_d) == pytest.approx((-0.2, -0.2), rel=1e-12)
    expected = [0.3 * 0.99**n for n in (1, 2, 3, 4)]
    assert [each.threshold for each in decisions[9:]] == pytest.approx(expected, rel=1e-14)


@pytest.mark.parametrize(("newer", "end"), [(1.0, 1.2), (-1.0, 0.75)])
def test_a_phase_asks_for_its_multiple_of_the_budget(newer: float, end: float) -> None:
    """From half a percent before it, with no PID and with one that is at its limit of a quarter."""
    sign = math.copysign(1.0, newer)
    for gain, wanted in ((0.0, end), (10.0, end + 0.25 * sign)):
        near = wanted * (1 - 0.005 * sign)
        given = SafeSettings(window=10, pid_kp=gain, pid_ki=0.0, pid_kd=0.0, threshold_max=2.0)
        _, decision = settled(near, (newer, 0.1), (0.0, newer), (0.1, 0.1), given)
        assert decision.threshold == pytest.approx(0.3 * wanted, rel=1e-12)


def test_more_than_three_deviations_count_as_three() -> None:
    """200 zeros and 5 ones, in halves of 5: a rise of 1 in deviations of sqrt(5 x 200) / 205 = 0.154 is 6.5."""
    last = rewarded([0.0] * 200 + [1.0] * 5, window=10)[-1]
    assert last.pid_p == pytest.approx(0.1 * 3.0, rel=1e-14)


def test_the_pids_sum_stops_at_five_and_forgets_a_twentieth_a_step() -> None:
    climb = [float(step) for step in range(100)]
    still = [99.0] * 60
    decisions = rewarded(climb + still, pid_kp=0.0, pid_kd=0.0)
    assert max(each.pid_i for each in decisions) == pytest.approx(0.01 * 5.0, rel=1e-14)
    assert decisions[-1].pid_i == pytest.approx(decisions[-2].pid_i * 0.95, rel=1e-12)
    assert decisions[-1].pid_i > 0.0


def test_rewards_that_are_all_alike_move_nothing() -> None:
    decisions = rewarded([0.1] * 30)
    assert {(each.threshold, each.pid_p, each.pid_i, each.pid_d) for each in decisions} == {(0.3, 0.0, 0.0, 0.0)}
    assert [each.phase for each in decisions] == ["WARMUP"] * 9 + ["PLATEAU"] * 21


def test_a_fall_within_a_plateau_moves_no_pid() -> None:
    """KL falls with the reward: the price of a tighter budget."""
    rows = [(1.0, 0.3, 3.0)] * 5 + [(0.0, 0.1, 3.0)] * 5
    last = drive(rows)[-1]
    assert (last.phase, last.pid_p, last.pid_i, last.pid_d, last.threshold) == ("PLATEAU", 0.0, 0.0, 0.0, 0.3)


def settled(
    multiple: float,
    newest: tuple[float, float],
    rewards: tuple[float, float],
    kls: tuple[float, float],
    given: SafeSettings | None = None,
) -> Any:
    """The decision of the newest (reward, kl) after five and four of each of two levels, in a run of deviation 1."""
    threshold = ThresholdState(
        rewards=(rewards[0],) * 5 + (rewards[1],) * 4,
        kls=(kls[0],) * 5 + (kls[1],) * 4,
        moments=Moments(mean=0.0, variance=1.0, count=1e9),
        phase="PLATEAU",
        multiple=multiple,
    )
    state = SafeState(regulator=RegulatorState(log_coef=math.log(0.05)), threshold=threshold)
    return advance_safe(given or SafeSettings(window=10, pid_kp=10.0), state, Observation(9, *newest, 3.0))


@pytest.mark.parametrize(
    ("multiple", "following"),
    [(0.9, 0.9 * 1.0025), (1.0, 1.01), (1.1, 1.1 * 1.01)],
)
def test_a_plateau_reopens_at_a_quarter_of_the_rate_below_the_base_only(multiple: float, following: float) -> None:
    """A rise of 0.05 deviations is no climb, yet ten times it is more than the PID's limit: 1.25 is asked for."""
    state, decision = settled(multiple, (0.05, 0.1), (0.0, 0.05), (0.1, 0.1))
    assert decision.phase == "PLATEAU"
    assert state.threshold.multiple == pytest.approx(following, rel=1e-14)
    assert decision.threshold == pytest.approx(0.3 * following, rel=1e-14)


@pytest.mark.parametrize(
    ("multiple", "older", "newer", "phase"),
    [
        (0.5, 0.10, 0.14, "OVEROPTIMISED"),  # 0.14 is at a budget of 0.15, and far below 0.3
        (0.5, 0.12, 0.134, "PLATEAU"),  # 0.9 x 0.15 = 0.135
        (1.5, 0.30, 0.40, "PLATEAU"),  # on the way to a budget of 0.45
        (1.5, 0.30, 0.41, "OVEROPTIMISED"),
        (1.5, 0.40, 0.44, "PLATEAU"),  # grown by 0.04, less than a tenth of 0.45
    ],
)
def test_the_phase_is_judged_by_the_budget_in_force(multiple: float, older: float, newer: float, phase: str) -> None:
    assert settled(multiple, (0.0, newer), (0.0, 0.0), (older, newer))[1].phase == phase


def test_the_deviation_includes_the_newest_reward() -> None:
    """Nine rewards of deviation 1 and one at their mean: sqrt(0.9) = 0.949. A rise of 0.097 is more than a tenth of
    that, and not of 1."""
    threshold = ThresholdState(
        rewards=(0.0,) * 5 + (0.097,) * 4,
        kls=(0.1,) * 9,
        moments=Moments(mean=0.097, variance=1.0, count=9.0),
    )
    state = SafeState(regulator=RegulatorState(log_coef=0.0), threshold=threshold)
    _, decision = advance_safe(SafeSettings(), state, Observation(9, 0.097, 0.1, 3.0))
    assert decision.phase == "CLIMBING"
    assert decision.pid_p == pytest.approx(0.1 * 0.097 / math.sqrt(0.9), rel=1e-12)


# -- the gate ---------------------------------------------------------------------------------------------------------


def gates(entropies: list[float], **changed: float | bool) -> list[tuple[float, float | None]]:
    decisions = drive([(0.0, 0.3, entropy) for entropy in entropies], **(GATE | changed))
    return [(each.gate, each.entropy_floor) for each in decisions]


def test_the_gate_begins_from_the_mean_of_the_first_five_entropies() -> None:
    """Their mean is 3, the floor 1.8; a 0 halves the average to 1.5, another to 0.75, a third to 0.375."""
    found = gates([2.0, 3.0, 2.0, 3.0, 5.0, 0.0, 0.0, 0.0])
    assert found[:5] == [(1.0, None)] * 5
    assert [gate for gate, _ in found[5:]] == pytest.approx([1.2**2, 2.4**2, 8.0], rel=1e-12)
    assert [floor for _, floor in found[5:]] == pytest.approx([1.8] * 3, rel=1e-14)


def test_the_settings_of_the_gate_are_its_floor_its_power_and_its_top() -> None:
    start = [4.0] * 5
    assert gates([*start, 2.0], gate_fraction=1.0)[-1] == (pytest.approx((4 / 3) ** 2, rel=1e-12), 4.0)
    assert gates([*start, 0.0, 0.0], gate_fraction=1.0, gate_power=1.0)[-1] == (pytest.approx(4.0, rel=1e-12), 4.0)
    assert gates([*start, 0.0], gate_fraction=1.0, gate_power=1.0, gate_max=2.5)[-1][0] == pytest.approx(2.0, rel=1e-12)
    assert gates([*start, 0.0, 0.0], gate_fraction=1.0, gate_power=1.0, gate_max=2.5)[-1] == (2.5, 4.0)
    assert gates([*start, 0.0, 0.0], gate_fraction=1.0, gate_power=4.0, gate_max=300.0)[-1][0] == pytest.approx(256.0)
    assert gates([*start, -9.0])[-1] == (8.0, pytest.approx(2.4, rel=1e-14))
    assert gates([*start, 0.0, 0.0], gate_on=False)[-1] == (1.0, None)


def test_the_gate_lets_go_when_the_entropy_comes_back() -> None:
    """From an average of 0.75 to 1.875 with one 3, above the floor of 1.8: exactly 1 again."""
    assert gates([3.0] * 5 + [0.0, 0.0, 3.0])[-1] == (1.0, pytest.approx(1.8, rel=1e-14))


# -- the coefficient --------------------------------------------------------------------------------------------------


def test_the_coefficient_is_gate_times_share_times_beta_and_a_gate_of_two_takes_the_shares_place() -> None:
    """A still KL of a tenth of the budget has a share of 0.1^2.25. Beta relaxes by 0.3 x 1 x (0.1 / 0.9)^4 a step while
    the gate is 1, and while the entropy falls, stays.

    The entropy's average goes 3, 1.7, 1.6, 0.8: gates 1.12, 1.27, 5.06, of which 0.12, 0.27 and 1 take the share's
    place.
    """
    decisions = drive([(0.0, 0.03, entropy) for entropy in [3.0] * 5 + [0.4, 1.5, 0.0]], gate_on=True)
    relaxed = 0.3 * (0.1 / 0.9) ** 4
    beta = [0.05 * math.exp(-relaxed * min(step, 5)) for step in range(1, 9)]
    gates = [1.0] * 5 + [(1.8 / 1.7) ** 2, (1.8 / 1.6) ** 2, (1.8 / 0.8) ** 2]
    acts = [0.1**2.25] * 5 + [gates[5] - 1, gates[6] - 1, 1.0]
    expected = [gate * share * each for gate, share, each in zip(gates, acts, beta, strict=True)]
    assert [each.kl_coef for each in decisions] == pytest.approx(expected, rel=1e-12)


def test_the_gate_may_take_the_coefficient_beyond_the_regulators_limit() -> None:
    rows = [(0.0, 2.0, 3.0)] * 5 + [(0.0, 2.0, 0.0)] * 5
    decisions = drive(rows, max_coef=0.06, threshold_on=False, gate_on=True)
    assert decisions[4].kl_coef == pytest.approx(0.06, rel=1e-12)  # the share of a KL far above would be e^2
    assert decisions[-1].kl_coef == pytest.approx(0.06 * 8, rel=1e-12)


def test_the_first_two_steps_of_a_kl_above_its_budget() -> None:
    """The first KL has no velocity: beta grows by 2 x 0.3 log 2, and the share is 2^2.25. A swing needs two sides.

    Then 0.433: short 0.6 - 0.167 / 1.67 = 0.5, long 0.6 - 0.167 / 3, velocity their difference / 1.33.
    """
    first, second = drive([(0.0, 0.6, 3.0), (0.0, 0.433, 3.0)])
    beta = 0.05 * math.exp(0.6 * math.log(2))
    assert first.kl_coef == pytest.approx(2**2.25 * beta, rel=1e-12)
    assert (first.excess, first.kl_short, first.kl_long) == pytest.approx((0.3, 0.6, 0.6), rel=1e-14)
    long = 0.6 - 0.167 / 3
    predicted = 0.5 + 2.9 * (0.5 - long) / 1.33
    assert (second.excess, second.kl_short, second.kl_long) == pytest.approx((0.2, 0.5, long), rel=1e-12)
    beta *= math.exp(0.6 * math.log(0.5 / 0.3))
    assert second.kl_coef == pytest.approx(beta * (predicted / 0.3) ** 2.25, rel=1e-12)


def test_the_regulator_holds_the_threshold_in_force_and_not_the_base() -> None:
    """A KL of 0.3, still, while the budget of this step is 0.3 x 0.5 x 1.0025: the error is the log of their ratio.

    The first coefficient is 0.05 at a threshold of 0.3, and (0.3 / threshold)^0.75 times as much at another.
    """
    state, decision = settled(0.5, (0.0, 0.3), (0.0, 0.0), (0.3, 0.3))
    assert decision.threshold == pytest.approx(0.150375, rel=1e-14)
    ratio = math.log(0.3 / 0.150375)
    assert state.regulator.log_coef == pytest.approx(math.log(0.05) + (0.75 + 2 * 0.3) * ratio, rel=1e-12)


def test_the_coefficient_relaxes_to_its_least_and_no_further() -> None:
    """A still KL of nine tenths of the budget: log beta falls by 0.3 log (1 / 0.9) a step; the share is 0.9^2.25."""
    decisions = drive([(0.0, 0.27, 3.0)] * 4, min_coef=0.047)
    expected = [0.05 * 0.9**0.3, 0.047, 0.047, 0.047]
    assert [each.kl_coef for each in decisions] == pytest.approx([0.9**2.25 * beta for beta in expected], rel=1e-12)


@pytest.mark.parametrize(("budget", "first"), [(0.3, 0.05), (0.3e-4, 50.0), (4.8, 0.00625), (3e-9, 100.0)])
def test_the_first_coefficient_goes_inversely_with_the_budget_to_the_power_of_three_quarters(
    budget: float, first: float
) -> None:
    assert drive([(0.0, budget, 3.0)], budget=budget)[0].kl_coef == pytest.approx(first, rel=1e-12)


# -- the bound on an update, and a budget per sequence ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("kl", "share"), [(0.1, 1.0), (0.24, 1.0), (0.27, (8 / 9) ** 12), (0.3, 0.15), (0.9, 0.15), (-0.1, 1.0)]
)
def test_an_update_may_move_two_percent_of_the_threshold_and_from_eight_tenths_on_soon_a_seventh_of_that(
    kl: float, share: float
) -> None:
    decision = drive([(0.0, kl, 3.0)])[0]
    assert decision.update_kl == pytest.approx(0.02 * 0.3 * share, rel=1e-12)
    assert drive([(0.0, kl, 3.0)], update_share=0.1)[0].update_kl == pytest.approx(0.1 * 0.3 * share, rel=1e-12)


def test_a_budget_per_sequence_is_divided_by_the_smoothed_length() -> None:
    controller = make_controller("safe", budget=6.0, budget_per="sequence", threshold_on=False)
    found = [
        controller.observe(Observation(step, 0.0, 0.3, 3.0, length=length)).threshold
        for step, length in enumerate([20.0, 20.0, 40.0])
    ]
    assert found == pytest.approx([0.3, 0.3, 6 / 22], rel=1e-12)
    with pytest.raises(ValueError, match=r"budget_per='sequence' needs Observation\.length, which is None at step 3"):
        controller.observe(Observation(3, 0.0, 0.3, 3.0))


@pytest.mark.parametrize("initial", [0.01, 0.04])
def test_a_first_coefficient_may_be_either_limit(initial: float) -> None:
    controller = make_controller("safe", initial_coef=initial, min_coef=0.01, max_coef=0.04)
    assert controller.observe(Observation(0, 0.0, 0.3, 3.0)).kl_coef == pytest.approx(initial, rel=1e-12)


# -- the reason -------------------------------------------------------------------------------------------------------


def test_the_reason_has_the_figures_of_the_decision() -> None:
    """0.5 is wild beside 0.02 and is left out once; then 0.48 / 1.67 of the way to it are taken."""
    first, second, left_out, taken = drive([(0.0, 0.02, 3.0)] * 2 + [(0.0, 0.5, 3.0)] * 2)
    assert first.reason == ("KL 0.02 within budget 0.3: coefficient 0.05 -> 0.05; acts with 0.000113")
    assert left_out.reason == second.reason == first.reason
    assert taken.reason.startswith("KL 0.307 above budget 0.3, heading for ")
    steady = drive([(0.0, 0.3, 3.0)] * 2)[-1]
    assert steady.reason == "KL 0.3 within budget 0.3: coefficient 0.05 -> 0.05; acts with 0.05"


def test_a_course_is_told_from_a_tenth_of_the_budget_on() -> None:
    """Of a step of d the prediction is 2.9 (1 / 1.67 - 1 / 3) / 1.33 = 0.579 d above: told from d = 0.0518."""
    for d, told in ((0.051, False), (0.053, True)):
        assert (", heading for" in drive([(0.0, 0.3, 3.0), (0.0, 0.3 + d, 3.0)])[-1].reason) == told


@pytest.mark.parametrize(
    ("multiple", "newer", "said"),
    [
        (0.8, 1.0, "reward climbs, budget opens"),
        (1.45, 1.0, "reward climbs, budget stays"),
        (1.3, -1.0, "reward falls, budget closes"),
        (0.5, -1.0, "reward falls, budget stays"),
        (1.48, 1.0, "reward climbs, budget closes from 1.48 to 1.45 times its base, as the climb slows"),
    ],
)
def test_the_reason_says_which_way_the_budget_moves(multiple: float, newer: float, said: str) -> None:
    _, decision = settled(multiple, (newer, 0.1), (0.0, newer), (0.1, 0.1))
    assert decision.reason.endswith(f"; {said}")
