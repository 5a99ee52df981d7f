"""The regulator of the KL, rule by rule: numbers worked out by hand, and whole runs against plain loops."""

from __future__ import annotations

import dataclasses
import math
import random
from typing import Any

import pytest

from stable_rlhf.control.kl_level import LevelState
from stable_rlhf.control.kl_regulator import Regulation, RegulatorState, regulate
from tests.oracles import control as oracle

E = math.e


def known(level: float = 1.0, **changed: Any) -> RegulatorState:
    """Coefficient 1, a still KL, T known to be 36 rollouts: then the filters' lags are 0.9 and 4 rollouts."""
    filters = LevelState(short=level, long=level, last=level, before=level)
    return dataclasses.replace(RegulatorState(log_coef=0.0, level=filters, speed=36.0, risen=True), **changed)


def after(state: RegulatorState, kl: float, budget: float, **changed: Any) -> tuple[RegulatorState, Regulation]:
    given: dict[str, Any] = {"gain": 5.4, "lead": 0.25, "limits": (1e-9, 1e9), "may_relax": True}
    return regulate(state, kl, budget, **{**given, **changed})


def moved(state: RegulatorState, kl: float, budget: float, **changed: Any) -> float:
    """By how much log beta changes."""
    return after(state, kl, budget, **changed)[0].log_coef - state.log_coef


# -- the error and the rate -------------------------------------------------------------------------------------------


def test_the_first_kl_is_the_level_and_has_no_velocity() -> None:
    state, seen = after(RegulatorState(log_coef=math.log(0.05)), 0.25, 1.0)
    assert (seen.short, seen.predicted, state.level.long) == (0.25, 0.25, 0.25)
    assert (state.speed, state.trust, state.side, state.risen) == (20.0, 1.0, 0, False)


def test_the_prediction_leads_by_a_share_of_t_the_lag_and_two_and_a_half_rollouts() -> None:
    """short = 1 + 1.9 / 1.9 = 2; long = 1 + 1.9 / 5 = 1.38; velocity = 0.62 / 3.1 = 0.2."""
    seen = after(known(), 2.9, 4.0)[1]
    assert seen.short == pytest.approx(2.0, rel=1e-14)
    assert seen.predicted == pytest.approx(2.0 + (0.25 * 36 + 0.9 + 2.5) * 0.2, rel=1e-14)
    assert after(known(), 2.9, 4.0, lead=0.0)[1].predicted == pytest.approx(2.0 + 3.4 * 0.2, rel=1e-14)


def test_the_error_is_odd_in_the_relative_excess_so_that_noise_has_no_mean() -> None:
    """Rate 5.4 / (36 + 18) = 0.1; a KL a half too high and one a half too low move log beta by as much."""
    for share in (1.25, 1.5):
        up, down = moved(known(share), share, 1.0), moved(known(2.0 - share), 2.0 - share, 1.0)
        assert up == pytest.approx(0.1 * math.log(share), rel=1e-12)
        if share < 1.3:  # 0.75 is within seven tenths of the budget
            assert down == pytest.approx(-up, rel=1e-12)


def test_the_error_has_limits_of_minus_one_and_two() -> None:
    assert moved(known(), 1.0, 1.0 / (E**1.9)) == pytest.approx(0.19, rel=1e-12)
    assert moved(known(), 1.0, 1.0 / (E**2.1)) == pytest.approx(0.2, rel=1e-12)
    # a level of 1.48 that falls by 0.1 a rollout is predicted far below 0
    assert moved(known(2.0), 1.01, 1.45, lead=1.0) == pytest.approx(-0.1, rel=1e-12)


def test_the_rate_is_greater_only_while_the_kl_is_above_and_clearly_rises() -> None:
    state = known(2.0)  # a KL of 2.95: short 2.5, long 2.19, velocity 0.1, predicted 3.74
    rate = 0.1 * math.log(3.74 / 1.87)
    assert moved(state, 2.95, 1.87) == pytest.approx(2.0 * rate, rel=1e-12)
    # 0.1 a rollout is within three errors of the velocity where one KL is uncertain by 0.5
    assert moved(state, 2.95, 1.87, kl_error=0.5) == pytest.approx(rate, rel=1e-12)


def test_the_coefficient_keeps_its_limits() -> None:
    state, seen = after(known(log_coef=math.log(9.9)), 1.0, E**-2, limits=(0.1, 10.0))
    assert (state.log_coef, seen.coefficient) == pytest.approx((math.log(10.0), 10.0), rel=1e-14)
    low = known(0.8, log_coef=math.log(0.1001))
    assert after(low, 0.8, 1.0, limits=(0.1, 10.0))[1].coefficient == pytest.approx(0.1, rel=1e-14)


def test_a_coefficient_that_may_not_relax_may_still_grow() -> None:
    assert moved(known(0.8), 0.8, 1.0, may_relax=False) == 0.0 > moved(known(0.8), 0.8, 1.0)
    assert moved(known(), 1.0, 0.5, may_relax=False) == moved(known(), 1.0, 0.5) > 0.0


# -- no wind-up -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [0.5, 0.25, 0.05, 0.0])
def test_well_below_the_budget_the_coefficient_relaxes_as_the_fourth_power_of_the_fade(share: float) -> None:
    fade = min(1.0, 2 * share)
    expected = -0.1 * math.log(2 - share) * fade**4
    assert moved(known(share), share, 1.0) == pytest.approx(expected, rel=1e-12)


def test_a_coefficient_above_the_last_that_held_the_kl_relaxes_at_the_full_rate_to_it() -> None:
    state = known(0.8, held=-9.0)
    stood, _ = after(state, 0.8, 1.0)
    assert stood.held == state.log_coef  # still, and near the budget
    assert after(known(2.0, held=-9.0), 1.2, 2.0)[0].held == -9.0  # near, and in fast fall
    too_large = known(0.02, held=-1.0)
    assert moved(too_large, 0.02, 1.0) == pytest.approx(-0.1 * math.log(1.98), rel=1e-12)
    assert moved(known(0.02, held=0.0), 0.02, 1.0) > -1e-6
    assert after(RegulatorState(log_coef=-3.0), 0.02, 1.0)[0].held == -3.0


def test_where_the_coefficient_is_faded_away_three_hundred_rollouts_do_not_move_it() -> None:
    state = RegulatorState(log_coef=0.0)
    for _ in range(300):
        state, _ = after(state, 0.003, 0.3)
    assert state.log_coef > -0.01


def test_a_kl_that_arrives_within_one_rise_time_is_left_alone_below_seven_tenths() -> None:
    """Level 2, velocity 0.2: 36 x 0.2 = 7.2 more. Without lead 2.68 is predicted."""
    state = dataclasses.replace(known(), level=LevelState(short=1.9, long=1.3, last=1.9, before=1.9))
    seen = after(state, 2.09, 9.0, lead=0.0)[1]
    velocity = (seen.predicted - seen.short) / 3.4
    reached = seen.short + 36 * velocity
    assert moved(state, 2.09, reached * 0.999, lead=0.0) == 0.0
    assert moved(state, 2.09, reached * 1.001, lead=0.0) < 0.0


def test_near_the_budget_is_within_three_errors_of_seven_tenths() -> None:
    still = known(0.6, speed=36.0)
    whole, faded = -0.1 * math.log(1.4), 1.0  # the fade is 1 from half the budget on
    assert moved(still, 0.6, 1.0) == pytest.approx(whole * faded, rel=1e-12)
    assert after(still, 0.6, 1.0)[0].error_size == 0.0
    assert after(still, 0.6, 1.0, kl_error=0.1)[0].error_size > 0.0


@pytest.mark.parametrize(("kl", "fade"), [(0.5, 1.0), (0.4, 0.8), (0.1, 0.2), (0.0, 0.0), (-0.1, 0.0), (3.0, 1.0)])
def test_a_still_kl_below_half_the_budget_fades_in_proportion(kl: float, fade: float) -> None:
    assert after(known(kl), kl, 1.0)[1].fade == pytest.approx(fade, rel=1e-14)


def test_a_kl_that_falls_by_half_its_budget_in_a_rise_time_needs_no_more() -> None:
    """From 10, a KL of 9.9: short 9.947, long 9.98, velocity -0.0106, times 36 is -0.38."""
    assert moved(known(10.0), 9.9, 0.75) == 0.0 < moved(known(10.0), 9.9, 0.78)


def test_above_the_budget_a_coefficient_without_effect_grows_at_a_fiftieth_of_the_rate_beyond_thirtyfold() -> None:
    whole = 0.1 * math.log(2)
    assert moved(known(2.0, effective=-3.40), 2.0, 1.0) == pytest.approx(whole, rel=1e-12)
    state, _ = after(known(2.0, effective=-3.41), 2.0, 1.0)
    assert (state.log_coef, state.effective) == (pytest.approx(0.02 * whole, rel=1e-12), -3.41)
    falling = dataclasses.replace(state, level=LevelState(short=2.0, long=2.1, last=2.0, before=2.0))
    falls, _ = after(falling, 1.9, 1.0)  # it has an effect: thirtyfold again, from here
    assert falls.effective == state.log_coef
    within, _ = after(known(effective=-1.0), 1.0, 1.0)
    assert within.effective == 0.0


# -- persistence ------------------------------------------------------------------------------------------------------


def test_an_error_that_changes_its_sign_keeps_three_tenths_of_the_gain_and_one_that_lasts_all() -> None:
    """Averages over 0.4 x 54 = 21.6 rollouts: of e = log 1.25 after (0, 1) nothing is left but 1 / 21.6 of it."""
    up = math.log(1.25)
    assert moved(known(1.25, error=0.5, error_size=0.5), 1.25, 1.0) == pytest.approx(0.1 * up, rel=1e-12)
    assert moved(known(1.25, error=0.0, error_size=0.5), 1.25, 1.0) == pytest.approx(0.03 * up, rel=1e-12)
    new = 1 / 21.6
    ratio = (0.3 + new * (up - 0.3)) / (0.5 + new * (up - 0.5))
    assert moved(known(1.25, error=0.3, error_size=0.5), 1.25, 1.0) == pytest.approx(0.1 * up * ratio, rel=1e-12)


# -- the speed: first from the rise -----------------------------------------------------------------------------------


def rise(shares: list[float], kl_error: float = 0.0) -> RegulatorState:
    """After still levels at shares of a budget of 1: each is put where the filter would have brought it."""
    state = RegulatorState(log_coef=0.0)
    for share in shares:
        filters = LevelState(short=share, long=share, last=share, before=share)
        state, _ = after(dataclasses.replace(state, level=filters), share, 1.0, kl_error=kl_error)
    return state


@pytest.mark.parametrize(
    ("shares", "speed"),
    [
        ([0.01, 0.09, 0.16, 0.36], 2 / (0.6 - 0.3)),  # from 0.3 to 0.6 of the distance in two rollouts
        ([0.01, 0.09, 0.16, 0.25, 0.36], 3 / (0.6 - 0.3)),
        ([0.01, 0.09, 0.04, 0.16, 0.36], 1 / (0.6 - 0.4)),  # back below a sixteenth: it begins anew
        ([0.01, 0.36], 1 / 0.6),  # all in one rollout
        ([0.01, *[0.29] * 100, 0.30], 200.0),
    ],
)
def test_t_is_rollouts_per_distance_between_two_levels_of_the_rise(shares: list[float], speed: float) -> None:
    state = rise(shares)
    assert (state.risen, state.rise_start, state.rising_steps) == (True, None, 0)
    assert state.speed == pytest.approx(speed, rel=1e-12)


def test_a_rise_begins_above_three_errors_of_the_level() -> None:
    """At T = 20 the lag is 1/2, the level's error 0.06 / sqrt(2), three of them 0.127."""
    assert rise([0.01, 0.09, 0.16, 0.36], 0.06).speed == pytest.approx(1 / (0.6 - 0.4), rel=1e-12)
    assert rise([0.01, 0.09, 0.16, 0.36], 0.2).speed == 20.0  # the noise is the whole rise


# -- the speed and the trust: then from swings ------------------------------------------------------------------------


@pytest.mark.parametrize("side", [1, -1])
def test_a_swing_costs_a_quarter_of_the_trust_and_lowers_t_to_what_it_showed(side: int) -> None:
    there, back = (2.0, 0.5) if side == 1 else (0.5, 2.0)
    grown = 0.5 * (1 + 0.1 / 54)
    stays, _ = after(known(there, side=side, side_steps=2, trust=0.5), there, 1.0)
    assert (stays.side, stays.side_steps, stays.speed) == (side, 0, 36.0)
    assert stays.trust == pytest.approx(grown, rel=1e-14)
    swings, _ = after(known(back, side=side, side_steps=2, trust=0.5), back, 1.0)
    assert (swings.side, swings.side_steps) == (-side, 0)
    assert swings.speed == pytest.approx(3 / (math.sqrt(1.2) - math.sqrt(1 / 1.2)), rel=1e-12)
    assert swings.trust == pytest.approx(grown * 0.75, rel=1e-14)
    slow, _ = after(known(back, side=side, side_steps=50, trust=0.5), back, 1.0)
    assert (slow.side, slow.speed) == (-side, 36.0)  # a swing slower than T says nothing of T


def test_what_is_within_four_errors_of_the_budget_is_no_swing() -> None:
    """Lag 0.9: the level's error is 0.3 / sqrt(2.8) = 0.179, four of them 0.717."""
    for level, side in ((1.7, 1), (1.73, -1)):
        state, _ = after(known(level, side=-1, side_steps=2), level, 1.0, kl_error=0.3)
        assert state.side == -side


def test_trust_keeps_its_limits() -> None:
    assert after(known(1.0, trust=0.9999), 1.0, 1.0)[0].trust == 1.0
    assert after(known(2.0, side=-1, side_steps=3, trust=0.11), 2.0, 1.0)[0].trust == 0.1


# -- whole runs -------------------------------------------------------------------------------------------------------


def walk(seed: int, steps: int) -> tuple[list[float], list[float], list[bool]]:
    """KL, budget and whether the coefficient may relax: rises, swings, falls to nothing, a budget that moves."""
    rng = random.Random(seed)
    level, kls, budgets, relaxes = 0.002, [], [], []
    pace, budget = 1.0 + rng.random() / 3, rng.choice([0.02, 0.3, 2.0])
    for step in range(steps):
        if step % 30 == 29:
            pace = rng.choice([0.8, 0.93, 1.0, 1.0, 1.1, 1.4])
        level = min(3.0, max(0.001, level * pace * math.exp(0.05 * rng.gauss(0, 1))))
        kls.append(budget * level - (0.01 if rng.random() < 0.02 else 0.0))
        budgets.append(budget * (1 + 0.3 * math.sin(step / 40)))
        relaxes.append(step % 60 < 45)
    return kls, budgets, relaxes


@pytest.mark.parametrize("seed", range(12))
def test_a_run_is_that_of_plain_loops(seed: int) -> None:
    settings = {"initial_coef": 0.05, "min_coef": 0.01, "max_coef": 5.0, "gain": 3.5 + seed / 4, "lead": 0.1 * seed}
    kls, budgets, relaxes = walk(seed, 250)
    state = RegulatorState(log_coef=math.log(0.05))
    theirs = oracle.regulator(settings, math.log(0.05))
    next(theirs)
    for step, (kl, budget, may_relax) in enumerate(zip(kls, budgets, relaxes, strict=True)):
        kl_error = 0.0 if seed % 2 else 0.05 * budget
        given = {"gain": settings["gain"], "lead": settings["lead"], "limits": (0.01, 5.0), "may_relax": may_relax}
        state, seen = regulate(state, kl, budget, kl_error=kl_error, **given)
        ours = {**dataclasses.asdict(seen), "long": state.level.long, "speed": state.speed}
        assert ours == pytest.approx(theirs.send((kl, kl_error, budget, may_relax)), rel=1e-8, abs=1e-12), step
