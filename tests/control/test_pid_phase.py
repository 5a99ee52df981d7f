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
