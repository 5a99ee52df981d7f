"""The level of a noisy KL: filters in numbers worked out by hand, its noise, and what is left out as wild."""

from __future__ import annotations

import itertools
import random
import statistics

import pytest

from stable_rlhf.control.kl_level import Level, LevelState, advance_level


def levels(kls: list[float], error: float = 0.0, budget: float = 1.0) -> tuple[LevelState, list[Level]]:
    """After all of them."""
    state, found = LevelState(), []
    for kl in kls:
        state, level = advance_level(state, kl, error, budget)
        found.append(level)
    return state, found


def test_two_filters_give_level_and_velocity() -> None:
    """Lags of 0.67 and 2: short = 1 + 0.167 / 1.67, long = 1 + 0.167 / 3."""
    state, found = levels([1.0, 1.167])
    assert (found[0].short, found[0].velocity) == (1.0, 0.0)
    assert (found[1].short, state.long) == pytest.approx((1.1, 1 + 0.167 / 3), rel=1e-12)
    assert found[1].velocity == pytest.approx((0.1 - 0.167 / 3) / 1.33, rel=1e-12)


def test_a_steady_rise_has_its_own_velocity() -> None:
    assert levels([0.02 * step for step in range(60)])[1][-1].velocity == pytest.approx(0.02, rel=1e-6)


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
    assert found[3].short == pytest.approx(0.4 + 3.6 / 1.67)
    assert state.noise == 0.0  # a jump is no noise
    assert levels([0.4, 0.4, 4.0, -4.0])[1][3].short == pytest.approx(0.4)  # wild on two sides


def test_a_kl_that_runs_away_is_followed_from_its_second_rollout_on() -> None:
    kls = [1.0, 1.0, *(2.0 * 1.8**step for step in range(6))]
    shorts = [level.short for level in levels(kls)[1]]
    assert shorts[2] == 1.0  # left out once
    assert all(later > 1.4 * before for before, later in itertools.pairwise(shorts[2:]))


@pytest.mark.parametrize(
    ("level", "kl", "error", "taken"),
    [(0.4, 0.89, 0.0, True), (0.4, 0.91, 0.0, False), (0.4, 1.39, 0.1, True), (0.4, 1.41, 0.1, False),
     (4.0, 5.99, 0.0, True), (4.0, 6.01, 0.0, False), (0.4, -0.11, 0.0, False)],
)  # fmt: skip
def test_what_is_wild(level: float, kl: float, error: float, taken: bool) -> None:
    assert (levels([level, level, kl], error)[0].doubted == 0) == taken


def test_the_second_kl_is_taken_whatever_it_is() -> None:
    assert levels([0.0, 5.0])[1][1].short == pytest.approx(5 / 1.67)
