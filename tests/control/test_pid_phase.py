"""PID and phase rules against literal numbers."""

from __future__ import annotations

import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stable_rlhf.control.phase import Contrast, Phase, contrast, paper_phase, reward_phase
from stable_rlhf.control.pid import PidGains, PidState, pid_step

GAINS = PidGains(proportional=2.0, integral=0.5, derivative=3.0, integral_limit=4.0)


def test_pid_has_the_three_textbook_terms() -> None:
    state, terms = pid_step(GAINS, PidState(total=1.0, error=0.25), 0.5)
    assert (terms.p, terms.i, terms.d) == (1.0, 0.75, 0.75)
    assert terms.output == 2.5
    assert state == PidState(total=1.5, error=0.5)


def test_the_sum_stops_at_its_limit_on_both_sides() -> None:
    for sign in (1.0, -1.0):
        state = PidState()
        for _ in range(20):
            state, terms = pid_step(GAINS, state, sign)
        assert (state.total, terms.i) == (4.0 * sign, 2.0 * sign)


def test_a_saturated_output_stores_nothing_and_unwinds_at_once() -> None:
    gains = PidGains(proportional=2.0, integral=0.5, derivative=0.0, integral_limit=100.0, output_limit=1.0)
    state = PidState()
    for _ in range(50):
        state, _ = pid_step(gains, state, 1.0)
    assert state.total == 0.0  # the proportional term alone is at the limit
    state, _ = pid_step(gains, PidState(total=10.0), -0.5)
    assert state.total == 9.5  # saturated, but this error leads out


@pytest.mark.parametrize(
    ("proportional", "derivative", "error", "total"),
    [
        (2.0, 0.0, 0.5, 4.0),  # p = 1, i = 4 / 8: at the limit of 1.5, the sum leaks only
        (1.9, 0.0, 0.5, 4.5),
        (0.0, 2.0, 0.5, 4.0),  # d = 1
        (0.0, 1.9, 0.5, 4.5),
        (-4.0, 0.0, 0.5, 4.5),  # output -1.5, the error leads back
        (8.0, 0.0, -0.5, 4.0),  # output -3.5, the error leads on
        (2.0, 0.0, 0.0, 4.0),  # no error
    ],
)
def test_the_sum_takes_no_error_that_pushes_the_output_beyond_its_limit(
    proportional: float, derivative: float, error: float, total: float
) -> None:
    """The output that counts has the leaked sum in it: 0.5 x 8 = 4, times 1/8."""
    gains = PidGains(
        proportional=proportional,
        integral=0.125,
        derivative=derivative,
        integral_limit=100.0,
        leak=0.5,
        output_limit=1.5,
    )
    state, terms = pid_step(gains, PidState(total=8.0), error)
    assert state == PidState(total=total, error=error)
    assert (terms.p, terms.i, terms.d) == (proportional * error, total / 8, derivative * error)


def test_a_leak_forgets() -> None:
    gains = PidGains(proportional=0.0, integral=1.0, derivative=0.0, integral_limit=9.0, leak=0.5)
    state, _ = pid_step(gains, PidState(total=8.0), 0.0)
    assert state.total == 4.0


def test_paper_phase_at_the_edges_of_its_windows() -> None:
    assert paper_phase([0.5] * 49) is Phase.WARMUP
    assert paper_phase([0.5] * 50) is Phase.PLATEAU
    assert paper_phase([0.8] * 50) is Phase.CONVERGED
    assert paper_phase([0.0] * 49 + [0.5] * 50) is Phase.PLATEAU  # 99: climbing cannot be seen yet
    assert paper_phase([0.0] * 50 + [0.5] * 50) is Phase.CLIMBING
    assert paper_phase([0.8, 0.9] * 50) is Phase.PLATEAU  # high, but not still


def test_a_climb_of_a_hundredth_is_none_and_a_mean_of_seven_tenths_is_not_high() -> None:
    assert paper_phase([0.0] * 50 + [0.01] * 50) is Phase.PLATEAU
    assert paper_phase([0.0] * 50 + [0.0101] * 50) is Phase.CLIMBING
    assert paper_phase([0.01] * 50 + [0.0] * 50) is Phase.PLATEAU
    assert paper_phase([0.7] * 50) is Phase.PLATEAU
    assert paper_phase([0.7001] * 50) is Phase.CONVERGED


def test_a_window_is_still_by_its_population_deviation() -> None:
    """0.0199 with denominator 50, 0.0201 with 49."""
    assert paper_phase([0.8 - 0.0199, 0.8 + 0.0199] * 25) is Phase.CONVERGED
    assert paper_phase([0.8 - 0.0201, 0.8 + 0.0201] * 25) is Phase.PLATEAU


def test_only_the_last_fifty_must_be_high_and_still() -> None:
    restless, still = [0.6, 1.0] * 25, [0.8] * 50
    assert paper_phase(restless + still) is Phase.CONVERGED
    assert paper_phase(still + restless) is Phase.PLATEAU
    assert paper_phase([0.8] * 30 + [0.2] * 20 + [0.1] * 50) is Phase.PLATEAU
    assert paper_phase([9.0] + [0.0] * 50 + [0.5] * 50) is Phase.CLIMBING  # of more than 100 the last count


@given(st.lists(st.floats(-1e3, 1e3), min_size=4, max_size=30))
def test_contrast_is_the_two_sample_difference_and_its_standard_error(values: list[float]) -> None:
    half = len(values) // 2
    newer, older = values[-half:], values[-2 * half : -half]
    error = ((statistics.variance(newer) + statistics.variance(older)) / half) ** 0.5
    found = contrast(values)
    assert found.difference == pytest.approx(statistics.fmean(newer) - statistics.fmean(older), abs=1e-9)
    assert found.standard_error == pytest.approx(error, rel=1e-6, abs=1e-9)
    assert found.newer == pytest.approx(statistics.fmean(newer), abs=1e-9)


STILL = Contrast(standard_error=0.1, newer=0.3)
UP = Contrast(difference=0.4, standard_error=0.1, newer=0.6)


@pytest.mark.parametrize(
    ("reward", "kl", "phase"),
    [
        (None, None, Phase.WARMUP),
        (UP, STILL, Phase.CLIMBING),
        (STILL, STILL, Phase.PLATEAU),
        (UP.opposite(), STILL, Phase.FALLING),
        # a reward that falls with the KL is the price of a tighter budget
        (UP.opposite(), UP.opposite(), Phase.PLATEAU),
        # KL grows by 0.4 to 0.6 of a budget of 0.3, and the reward stands still
        (STILL, UP, Phase.OVEROPTIMISED),
        # the same growth while the reward climbs is what the budget is for
        (UP, UP, Phase.CLIMBING),
        # growth far below the budget is the way there
        (STILL, Contrast(difference=0.1, standard_error=0.01, newer=0.15), Phase.PLATEAU),
    ],
)
def test_reward_phase_table(reward: Contrast | None, kl: Contrast | None, phase: Phase) -> None:
    assert reward_phase(Phase.PLATEAU, reward, 0.5, kl, 0.3) is phase


def test_a_rise_within_the_noise_or_too_small_to_matter_is_no_climb() -> None:
    noisy = Contrast(difference=0.29, standard_error=0.1)
    tiny = Contrast(difference=0.04, standard_error=0.001)
    for change in (noisy, tiny):
        assert reward_phase(Phase.PLATEAU, change, 0.5, STILL, 0.3) is Phase.PLATEAU


def test_a_phase_once_entered_is_left_later_than_it_was_entered() -> None:
    fading = Contrast(difference=0.2, standard_error=0.1)
    assert reward_phase(Phase.PLATEAU, fading, 0.5, STILL, 0.3) is Phase.PLATEAU
    assert reward_phase(Phase.CLIMBING, fading, 0.5, STILL, 0.3) is Phase.CLIMBING


def test_equal_rewards_are_never_a_climb() -> None:
    assert reward_phase(Phase.CLIMBING, Contrast(), 0.0, STILL, 0.3) is Phase.PLATEAU


# -- each bound of the weighed rule ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("difference", "error", "errors", "least", "stands"),
    [
        (3.0, 1.0, 3.0, 0.0, False),  # not more than three errors
        (3.1, 1.0, 3.0, 0.0, True),
        (3.0, 1.0, 2.0, 3.0, False),  # not more than the least
        (3.0, 1.0, 2.0, 2.9, True),
        (0.0, 0.0, 3.0, -1.0, False),  # a zero difference never
        (-4.0, 1.0, 3.0, 0.0, False),
    ],
)
def test_a_difference_stands_out_above_both_bounds(
    difference: float, error: float, errors: float, least: float, stands: bool
) -> None:
    assert Contrast(difference=difference, standard_error=error).stands_out(errors, least) is stands


def test_the_opposite_turns_both_signs_and_keeps_the_error() -> None:
    turned = Contrast(difference=1.0, standard_error=2.0, newer=3.0).opposite()
    assert turned == Contrast(difference=-1.0, standard_error=2.0, newer=-3.0)


def test_a_contrast_of_an_odd_count_leaves_out_the_oldest() -> None:
    """Halves (1, 3) and (6, 10): means 2 and 8, variances 2 and 8, error sqrt(10 / 2)."""
    assert contrast([99.0, 1.0, 3.0, 6.0, 10.0]) == Contrast(difference=6.0, standard_error=5.0**0.5, newer=8.0)


@pytest.mark.parametrize(
    ("previous", "difference", "error", "phase"),
    [  # deviation 0.5: a change above 0.05, and above 0.025 once entered
        (Phase.PLATEAU, 0.051, 0.001, Phase.CLIMBING),
        (Phase.PLATEAU, 0.049, 0.001, Phase.PLATEAU),
        (Phase.CLIMBING, 0.026, 0.001, Phase.CLIMBING),
        (Phase.CLIMBING, 0.024, 0.001, Phase.PLATEAU),
        (Phase.FALLING, 0.026, 0.001, Phase.PLATEAU),
        # above three errors, and above one and a half once entered
        (Phase.PLATEAU, 0.31, 0.1, Phase.CLIMBING),
        (Phase.PLATEAU, 0.29, 0.1, Phase.PLATEAU),
        (Phase.CLIMBING, 0.16, 0.1, Phase.CLIMBING),
        (Phase.CLIMBING, 0.14, 0.1, Phase.PLATEAU),
        (Phase.PLATEAU, -0.051, 0.001, Phase.FALLING),
        (Phase.PLATEAU, -0.049, 0.001, Phase.PLATEAU),
        (Phase.FALLING, -0.026, 0.001, Phase.FALLING),
        (Phase.CLIMBING, -0.026, 0.001, Phase.PLATEAU),
        (Phase.FALLING, -0.16, 0.1, Phase.FALLING),
        (Phase.FALLING, -0.14, 0.1, Phase.PLATEAU),
    ],
)
def test_how_far_the_reward_must_move(previous: Phase, difference: float, error: float, phase: Phase) -> None:
    change = Contrast(difference=difference, standard_error=error)
    assert reward_phase(previous, change, 0.5, STILL, 0.3) is phase


@pytest.mark.parametrize(
    ("difference", "error", "phase"),
    [  # of a budget of 0.3: a fall above 0.015 and above three errors
        (-0.016, 0.001, Phase.PLATEAU),
        (-0.014, 0.001, Phase.FALLING),
        (-0.031, 0.01, Phase.PLATEAU),
        (-0.029, 0.01, Phase.FALLING),
    ],
)
def test_how_far_the_kl_must_fall_to_excuse_the_reward(difference: float, error: float, phase: Phase) -> None:
    kl = Contrast(difference=difference, standard_error=error, newer=0.2)
    assert reward_phase(Phase.PLATEAU, UP.opposite(), 0.5, kl, 0.3) is phase


@pytest.mark.parametrize(
    ("difference", "error", "newer", "phase"),
    [  # of a budget of 2: at 1.8, a growth above 0.2 and above three errors
        (0.21, 0.001, 1.8, Phase.OVEROPTIMISED),
        (0.21, 0.001, 1.79, Phase.PLATEAU),
        (0.19, 0.001, 1.8, Phase.PLATEAU),
        (0.31, 0.1, 1.8, Phase.OVEROPTIMISED),
        (0.29, 0.1, 1.8, Phase.PLATEAU),
    ],
)
def test_how_far_the_kl_must_grow_to_be_over_optimised(
    difference: float, error: float, newer: float, phase: Phase
) -> None:
    kl = Contrast(difference=difference, standard_error=error, newer=newer)
    assert reward_phase(Phase.PLATEAU, STILL, 0.5, kl, 2.0) is phase


@pytest.mark.parametrize(("reward", "kl"), [(None, STILL), (UP, None)])
def test_too_few_steps_of_either_are_a_warm_up(reward: Contrast | None, kl: Contrast | None) -> None:
    assert reward_phase(Phase.CLIMBING, reward, 0.5, kl, 0.3) is Phase.WARMUP
