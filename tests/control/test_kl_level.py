"""The level of a noisy KL: filters in numbers worked out by hand, its noise, and what is left out as wild."""

from __future__ import annotations

import math
import random
import statistics

import pytest

from stable_rlhf.control.kl_level import Level, LevelState, advance_level


def levels(kls: list[float], error: float = 0.0, budget: float = 1.0) -> tuple[LevelState, list[Level]]:
    """After all of them, at T = 36: lags of 0.9 and 4."""
    state, found = LevelState(), []
    for kl in kls:
        state, level = advance_level(state, kl, error, budget, 36.0)
        found.append(level)
    return state, found


def test_two_filters_give_level_and_velocity() -> None:
    """short = 1 + 0.19 / 1.9, long = 1 + 0.19 / 5."""
    state, found = levels([1.0, 1.19])
    assert (found[0].short, found[0].velocity) == (1.0, 0.0)
    assert (found[1].short, state.long) == pytest.approx((1.1, 1.038), rel=1e-12)
    assert found[1].velocity == pytest.approx((1.1 - 1.038) / 3.1, rel=1e-12)


@pytest.mark.parametrize(("speed", "short", "long"), [(9.0, 0.25, 1.25), (720.0, 8.0, 40.0), (80.0, 2.0, 80 / 9)])
def test_the_lags_follow_t_within_limits(speed: float, short: float, long: float) -> None:
    state, _ = advance_level(LevelState(), 0.0, 0.0, 9.0, speed)
    state, level = advance_level(state, 1.0, 0.0, 9.0, speed)
    assert (level.short, state.long, level.lag) == pytest.approx((1 / (1 + short), 1 / (1 + long), short), rel=1e-12)


def test_the_errors_of_level_and_velocity_are_those_of_filtered_noise() -> None:
    rng = random.Random(0)
    _, found = levels([1.0 + 0.1 * rng.gauss(0, 1) for _ in range(20000)], error=0.1)
    assert found[0].error == pytest.approx(0.1 / math.sqrt(2.8), rel=1e-12)
    assert statistics.pstdev(level.short for level in found) == pytest.approx(found[0].error, rel=0.03)
    assert statistics.pstdev(level.velocity for level in found) == pytest.approx(found[0].velocity_error, rel=0.03)


def test_without_an_error_the_noise_is_that_of_second_differences_and_a_ramp_has_none() -> None:
    rng = random.Random(1)
    noise = statistics.fmean(
        levels([1.0 + 0.01 * step + 0.05 * rng.gauss(0, 1) for step in range(100)])[0].noise for _ in range(100)
    )
    assert noise == pytest.approx(0.05, rel=0.05)
    assert levels([0.01 * step for step in range(100)])[0].noise == pytest.approx(0.0, abs=1e-12)


def test_one_wild_kl_is_left_out_and_a_jump_that_stays_is_taken() -> None:
    """Wild is beyond half the budget of 1, or of the level where that is more, and five errors."""
    state, found = levels([0.4, 0.4, 4.0, 0.4])
    assert [level.short for level in found] == pytest.approx([0.4] * 4)
    assert state.doubted == 0
    state, found = levels([0.4, 0.4, 4.0, 4.0])
    assert [level.short for level in found[:3]] == pytest.approx([0.4] * 3)
    assert found[3].short == pytest.approx(0.4 + 3.6 / 1.9)
    assert state.noise == 0.0  # a jump is no noise
    assert levels([0.4, 0.4, 4.0, -4.0])[1][3].short == pytest.approx(0.4)  # wild on two sides


@pytest.mark.parametrize(
    ("level", "kl", "error", "taken"),
    [(0.4, 0.89, 0.0, True), (0.4, 0.91, 0.0, False), (0.4, 1.39, 0.1, True), (0.4, 1.41, 0.1, False),
     (4.0, 5.99, 0.0, True), (4.0, 6.01, 0.0, False), (0.4, -0.11, 0.0, False)],
)  # fmt: skip
def test_what_is_wild(level: float, kl: float, error: float, taken: bool) -> None:
    assert (levels([level, level, kl], error)[0].doubted == 0) == taken


def test_the_second_kl_is_taken_whatever_it_is() -> None:
    assert levels([0.0, 5.0])[1][1].short == pytest.approx(5 / 1.9)
