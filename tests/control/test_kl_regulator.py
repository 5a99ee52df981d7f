"""The regulator of the KL, rule by rule: numbers worked out by hand, and whole runs against plain loops."""

from __future__ import annotations

import dataclasses
import math
import random
from typing import Any

import pytest

from stable_rlhf.control.kl_regulator import Regulation, RegulatorState, regulate
from tests.oracles import control as oracle

E = math.e


def known(**changed: Any) -> RegulatorState:
    """Coefficient 1, KL 1 and still, T known to be 36 steps: then the filters' lags are 0.9 and 4 steps."""
    return dataclasses.replace(RegulatorState(log_coef=0.0, short=1.0, long=1.0, speed=36.0, risen=True), **changed)


def unknown(**changed: Any) -> RegulatorState:
    """The same before the first rise was seen: T is taken for 20 steps, the lags are 1/2 and 20/9."""
    return known(**{"speed": 20.0, "risen": False, **changed})


def after(state: RegulatorState, kl: float, budget: float, **changed: Any) -> tuple[RegulatorState, Regulation]:
    given: dict[str, Any] = {"gain": 4.9, "lead": 0.25, "limits": (1e-9, 1e9), "may_relax": True}
    return regulate(state, kl, budget, **{**given, **changed})


def moved(state: RegulatorState, kl: float, budget: float, **changed: Any) -> float:
    """By how much log beta changes."""
    return after(state, kl, budget, **changed)[0].log_coef - state.log_coef


# -- level, velocity, prediction --------------------------------------------------------------------------------------


def test_the_first_kl_is_the_level_and_has_no_velocity() -> None:
    state, seen = after(RegulatorState(log_coef=math.log(0.05)), 0.25, 1.0)
    assert (state.short, state.long, seen.short, seen.predicted) == (0.25, 0.25, 0.25, 0.25)
    assert (state.speed, state.trust, state.side, state.rising_steps) == (20.0, 1.0, 0, 0)


def test_two_filters_give_level_velocity_and_prediction() -> None:
    """short = 1 + 1.9 / (1 + 0.9) = 2; long = 1 + 1.9 / (1 + 4) = 1.38; velocity = (2 - 1.38) / (4 - 0.9) = 0.2."""
    state, seen = after(known(), 2.9, 2.0)
    assert (state.short, state.long) == pytest.approx((2.0, 1.38), rel=1e-14)
    assert seen.short == state.short
    assert seen.predicted == pytest.approx(2.0 + (0.25 * 36 + 0.9 + 2.5) * 0.2, rel=1e-14)
    assert after(known(), 2.9, 2.0, lead=0.0)[1].predicted == pytest.approx(2.0 + (0.9 + 2.5) * 0.2, rel=1e-14)


@pytest.mark.parametrize(
    ("speed", "kl", "short", "long", "velocity", "lag"),
    [
        (9.0, 3.8125, 3.25, 2.25, 1.0, 0.25),  # lags at least 1/4 and 5/4
        (720.0, 370.0, 42.0, 10.0, 1.0, 8.0),  # and at most 8 and 40
    ],
)
def test_the_lags_of_the_filters_follow_the_speed_within_limits(
    speed: float, kl: float, short: float, long: float, velocity: float, lag: float
) -> None:
    state, seen = after(known(speed=speed), kl, 1000.0, lead=0.0)
    assert (state.short, state.long) == pytest.approx((short, long), rel=1e-14)
    assert seen.predicted == pytest.approx(short + (lag + 2.5) * velocity, rel=1e-13)


# -- the error and the rate -------------------------------------------------------------------------------------------


def test_log_beta_grows_by_rate_times_the_log_of_predicted_over_budget() -> None:
    """A still KL of e^0.5 budgets: error 1/2, rate 4.9 / (36 + 13) = 0.1."""
    state, seen = after(known(), 1.0, E**-0.5)
    assert state.log_coef == pytest.approx(0.05, rel=1e-12)
    assert seen.coefficient == pytest.approx(math.exp(0.05), rel=1e-12)
    assert moved(known(log_coef=3.0), 1.0, E**-0.5, gain=9.8) == pytest.approx(0.1, rel=1e-12)
    assert moved(known(trust=0.5), 1.0, E**-0.5) == pytest.approx(0.05 * 0.5 * 1.002, rel=1e-12)


def test_the_error_is_of_the_predicted_kl_and_not_of_the_level() -> None:
    predicted = 2.0 + 12.4 * 0.2
    assert moved(known(), 2.9, predicted / E) == pytest.approx(0.16, rel=1e-12)  # it rises: 1.6 times the rate
    level = known(short=2.0, long=2.0)  # to short 1, long 1.62, velocity -0.2: the level is at its budget
    assert after(level, 0.1, 1.0)[1].predicted == pytest.approx(1.0 - 12.4 * 0.2, rel=1e-12)
    assert moved(level, 0.1, 1.0) == pytest.approx(-0.1, rel=1e-12)


def test_the_rate_is_greater_only_while_the_kl_is_above_and_rises() -> None:
    tightened = moved(known(), 2.9, 4.48 / E**0.5)
    assert tightened == pytest.approx(1.6 * 0.1 * 0.5, rel=1e-12)
    assert moved(known(), 1.0, E**-0.5) == pytest.approx(0.1 * 0.5, rel=1e-12)  # still
    sinks = known(short=2.0, long=2.0)  # to short 1.9, long 1.962, velocity -0.02, predicted 1.652
    assert moved(sinks, 1.81, 1.652 / E**0.5) == pytest.approx(0.1 * 0.5, rel=1e-12)
    # it rises, and without lead 2 + 3.4 x 0.2 = 2.68 is predicted, which is below
    assert moved(known(), 2.9, 2.68 * E**0.05, lead=0.0) == pytest.approx(-0.1 * 0.05, rel=1e-12)


def test_the_error_has_limits_of_minus_one_and_two() -> None:
    assert moved(known(), 1.0, E**-1.9) == pytest.approx(0.19, rel=1e-12)
    assert moved(known(), 1.0, E**-2.1) == pytest.approx(0.2, rel=1e-12)
    assert moved(known(), 1.0, E**0.9) == pytest.approx(-0.09, rel=1e-12)
    assert moved(known(), 1.0, E**1.1) == pytest.approx(-0.1, rel=1e-12)
    assert moved(known(short=-1.0, long=-1.0), -1.0, 1.0) == pytest.approx(-0.1, rel=1e-12)


def test_the_coefficient_keeps_its_limits() -> None:
    state, seen = after(known(log_coef=math.log(9.9)), 1.0, E**-2, limits=(0.1, 10.0))
    assert (state.log_coef, seen.coefficient) == pytest.approx((math.log(10.0), 10.0), rel=1e-14)
    state, seen = after(known(log_coef=math.log(0.101)), 1.0, E, limits=(0.1, 10.0))
    assert (state.log_coef, seen.coefficient) == pytest.approx((math.log(0.1), 0.1), rel=1e-14)


def test_a_coefficient_that_may_not_relax_may_still_grow() -> None:
    for state in (known(), unknown()):
        assert moved(state, 1.0, 2.0, may_relax=False) == 0.0
        assert moved(state, 1.0, 2.0) < 0.0
        assert moved(state, 1.0, 0.5, may_relax=False) == moved(state, 1.0, 0.5) > 0.0


# -- no wind-up on the way --------------------------------------------------------------------------------------------


def test_before_the_rise_is_known_the_coefficient_relaxes_slowly_if_the_kl_is_not_on_its_way() -> None:
    assert moved(unknown(short=0.1, long=0.1), 0.1, 1.0) == pytest.approx(-0.02, rel=1e-12)
    assert moved(unknown(short=0.1, long=0.1, trust=0.5), 0.1, 1.0, gain=1.0) == pytest.approx(-0.02, rel=1e-12)
    # A step of d moves short by 2/3 d and long by 9/29 d, hence velocity = 6/29 d: 0.1 + (2/3 + 1200/29) d = 0.6.
    for d, expected in ((0.01188, -0.02), (0.01190, 0.0)):
        assert moved(unknown(short=0.1, long=0.1), 0.1 + d, 0.6, lead=0.0) == pytest.approx(expected, rel=1e-12)


def test_a_kl_that_arrives_within_two_rise_times_is_left_alone_below_seven_tenths_of_the_budget() -> None:
    """At T = 36 and a velocity of 0.2, 72 x 0.2 = 14.4 is added to a level of 2. Without lead 2.68 is predicted."""
    for budget, expected in ((16.3, 0.0), (16.5, -0.1)):
        assert moved(known(), 2.9, budget, lead=0.0) == pytest.approx(expected, rel=1e-12)
    for budget, on_its_way in ((2.85, False), (2.86, True)):  # 2 / 0.7 = 2.857
        expected = 0.0 if on_its_way else -0.1 * math.log(budget / 2.68)
        assert moved(known(), 2.9, budget, lead=0.0) == pytest.approx(expected, rel=1e-12)


def test_a_still_kl_below_seven_tenths_of_the_budget_is_not_on_its_way() -> None:
    assert moved(known(), 1.0, 1.0 / 0.5) == pytest.approx(-0.1 * math.log(2), rel=1e-12)


def test_the_bounds_of_being_on_its_way_belong_to_it() -> None:
    """Powers of two throughout: T = 8 has lags of 1/4 and 5/4, so short = 2 and long = 1.25 make a velocity of 3/4."""
    rising = known(speed=8.0, short=0.0, long=0.25)  # of a KL of 2.5: short 2, long 0.25 + 2.25 / 2.25 = 1.25
    state, seen = after(rising, 2.5, 14.0, lead=0.0)
    assert (state.short, state.long) == (2.0, 1.25)
    assert seen.predicted == 2.0 + 2.75 * 0.75
    assert moved(rising, 2.5, 14.0, lead=0.0) == 0.0  # 2 + 2 x 8 x 0.75 = 14 is reached in time
    assert moved(rising, 2.5, math.nextafter(14.0, 15), lead=0.0) < 0.0
    first = dataclasses.replace(rising, risen=False)
    assert moved(first, 2.5, 152.0, lead=0.0) == 0.0  # 2 + 200 x 0.75 = 152
    assert moved(first, 2.5, math.nextafter(152.0, 153), lead=0.0) == pytest.approx(-0.02, rel=1e-12)
    # a lead of -2 predicts less than the level, so that the coefficient would relax
    level = dataclasses.replace(rising, short=3.5, long=1.25)  # short 3.5, long 2.25, predicted 3.5 + 2.75 x 1.25
    state, seen = after(level, 3.5, 5.0, lead=-2.0)
    assert (state.short, state.long) == (3.5, 2.25)
    assert 0.7 * 5.0 == 3.5
    assert moved(level, 3.5, 5.0, lead=-2.0) == 0.0  # 3.5 is seven tenths of 5
    assert moved(level, 3.5, math.nextafter(5.0, 4), lead=-2.0) < 0.0


# -- fading -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kl", "fade"), [(0.5, 1.0), (0.4, 0.8), (0.1, 0.2), (0.0, 0.0), (-0.1, 0.0), (3.0, 1.0)])
def test_a_still_kl_below_half_the_budget_fades_in_proportion(kl: float, fade: float) -> None:
    assert after(known(short=kl, long=kl), kl, 1.0)[1].fade == pytest.approx(fade, rel=1e-14)


def test_fading_is_of_the_greater_of_the_level_and_the_prediction() -> None:
    rising, sinking = after(known(), 2.9, 20.0)[1], after(known(short=3.0, long=3.0), 2.81, 20.0)[1]
    assert rising.fade == pytest.approx(4.48 / 10, rel=1e-12)
    assert sinking.predicted < sinking.short == pytest.approx(2.9, rel=1e-14)
    assert sinking.fade == pytest.approx(2.9 / 10, rel=1e-12)


# -- the speed: first from the rise -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("share", "risen"), [(0.3, True), (math.nextafter(0.3, 0), False), (2.0, True), (0.0, False)])
def test_a_run_that_begins_at_three_tenths_of_its_budget_shows_no_rise(share: float, risen: bool) -> None:
    state, _ = after(RegulatorState(log_coef=0.0), share, 1.0)
    assert (state.risen, state.speed, state.rising_steps) == (risen, 20.0, 0)


@pytest.mark.parametrize(
    ("share", "before", "counted", "risen"),
    [
        (0.0625, 3, 4, False),
        (math.nextafter(0.0625, 0), 3, 0, False),  # back below a sixteenth: it is to begin anew
        (math.nextafter(0.3, 0), 3, 4, False),
        (0.3, 3, 3, True),
    ],
)
def test_the_steps_of_the_rise_are_counted_from_a_sixteenth_to_three_tenths(
    share: float, before: int, counted: int, risen: bool
) -> None:
    state, _ = after(unknown(short=share, long=share, rising_steps=before), share, 1.0)
    assert (state.rising_steps, state.risen) == (counted, risen)
    assert state.speed == (pytest.approx(3.7 * 3.5, rel=1e-14) if risen else 20.0)
    assert (state.trust, state.side, state.side_steps) == (1.0, 0, 0)


@pytest.mark.parametrize(("steps", "speed"), [(0, 1.85), (1, 5.55), (53, 197.95), (54, 200.0), (900, 200.0)])
def test_the_rise_time_is_its_steps_and_a_half_times_3_7_and_200_at_most(steps: int, speed: float) -> None:
    state, seen = after(unknown(short=0.5, long=0.5, rising_steps=steps), 0.5, 1.0)
    assert (state.speed, state.risen) == (pytest.approx(speed, rel=1e-14), True)
    assert seen.predicted == 0.5


def test_the_prediction_and_the_rate_use_the_rise_time_that_was_just_measured() -> None:
    """Lags of 1/2 and 20/9 are still of T = 20; the lead and the rate are of T = 3.7 x 1.5 = 5.55."""
    state, seen = after(unknown(short=0.25, long=0.25, rising_steps=1), 0.4, 0.9)
    short, long = 0.35, 0.25 + 0.15 / (29 / 9)
    velocity = (short - long) / (20 / 9 - 0.5)
    assert seen.predicted == pytest.approx(short + (0.25 * 5.55 + 0.5 + 2.5) * velocity, rel=1e-12)
    # 0.35 + 2 x 5.55 velocity = 0.69 does not arrive at 0.9; with T = 20 it would
    assert state.log_coef == pytest.approx(4.9 / 18.55 * math.log(seen.predicted / 0.9), rel=1e-12)


# -- the speed: then from swings --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("share", "side"),
    [
        (1.2, 0),
        (math.nextafter(1.2, 2), 1),
        (1 / 1.2, 0),
        (math.nextafter(1 / 1.2, 0), -1),
        (0.82, -1),
        (0.84, 0),
        (1.19, 0),
    ],
)
def test_a_side_of_the_budget_begins_beyond_a_fifth(share: float, side: int) -> None:
    state, _ = after(known(short=share, long=share, side_steps=6), share, 1.0)
    assert (state.side, state.side_steps) == (side, 0 if side else 7)
    assert (state.trust, state.speed) == (1.0, 36.0)


@pytest.mark.parametrize("side", [1, -1])
def test_a_swing_lowers_the_rise_time_to_its_steps_and_the_trust_by_a_quarter(side: int) -> None:
    there, back = (2.0, 0.5) if side == 1 else (0.5, 2.0)
    stays, _ = after(known(short=there, long=there, side=side, side_steps=6, trust=0.5), there, 1.0)
    assert (stays.side, stays.side_steps, stays.speed) == (side, 0, 36.0)
    assert stays.trust == pytest.approx(0.501, rel=1e-14)
    swings, _ = after(known(short=back, long=back, side=side, side_steps=6, trust=0.5), back, 1.0)
    assert (swings.side, swings.side_steps, swings.speed) == (-side, 0, 7.0)
    assert swings.trust == pytest.approx(0.501 * 0.75, rel=1e-14)
    slow, _ = after(known(short=back, long=back, side=side, side_steps=50, trust=0.5), back, 1.0)
    assert (slow.side, slow.speed) == (-side, 36.0)  # a swing slower than T says nothing of T
    between, _ = after(known(side=side, side_steps=6, trust=0.5), 1.0, 1.0)
    assert (between.side, between.side_steps) == (side, 7)  # the last side is kept until the other one
    assert between.trust == pytest.approx(0.501, rel=1e-14)


def test_trust_keeps_its_limits() -> None:
    assert after(known(trust=0.999), 1.0, 1.0)[0].trust == 1.0
    low, _ = after(known(short=2.0, long=2.0, side=-1, side_steps=3, trust=0.11), 2.0, 1.0)
    assert low.trust == 0.1
    full, _ = after(known(short=2.0, long=2.0, side=-1, side_steps=3), 2.0, 1.0)
    assert full.trust == 0.75  # of 1 that could not grow


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
    found = []
    for kl, budget, may_relax in zip(kls, budgets, relaxes, strict=True):
        given = {"gain": settings["gain"], "lead": settings["lead"], "limits": (0.01, 5.0), "may_relax": may_relax}
        state, seen = regulate(state, kl, budget, **given)
        found.append((seen.coefficient, seen.fade, seen.short, state.long, seen.predicted))
    for step, (ours, theirs) in enumerate(zip(found, oracle.regulated(kls, budgets, relaxes, settings), strict=True)):
        assert ours == pytest.approx(theirs, rel=1e-8, abs=1e-12), step
