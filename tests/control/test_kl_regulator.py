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


def still(level: float = 1.0) -> RegulatorState:
    """A coefficient of 1 at the budget and a KL that does not move."""
    return RegulatorState(log_coef=0.0, level=LevelState(short=level, long=level, last=level, before=level))


def after(state: RegulatorState, kl: float, budget: float, **changed: Any) -> tuple[RegulatorState, Regulation]:
    given: dict[str, Any] = {"gain": 0.25, "lead": 4.0, "limits": (1e-9, 1e9), "may_relax": True}
    return regulate(state, kl, budget, **{**given, **changed})


def moved(state: RegulatorState, kl: float, budget: float, **changed: Any) -> float:
    """By how much log beta changes."""
    return after(state, kl, budget, **changed)[0].log_coef - state.log_coef


# -- the proportional part --------------------------------------------------------------------------------------------


def test_the_first_kl_is_the_level_and_has_no_velocity() -> None:
    state, seen = after(RegulatorState(log_coef=math.log(0.05)), 0.5, 1.0)
    assert (seen.short, seen.predicted, state.level.long) == (0.5, 0.5, 0.5)
    assert seen.share == pytest.approx(2**-2.25)


@pytest.mark.parametrize(
    ("kl", "share"), [(1.0, 1.0), (0.0625, 2**-9), (0.1, 0.1**2.25), (1.21, 1.1**4.5), (0.0, 0.0), (-0.1, 0.0)]
)
def test_the_coefficient_goes_with_a_power_of_a_still_kl_over_its_budget(kl: float, share: float) -> None:
    assert after(still(kl), kl, 1.0)[1].share == pytest.approx(share, abs=1e-15)


def test_a_kl_that_rushes_up_is_met_early_by_its_course() -> None:
    """short = 1 + 1.67 / 1.67 = 2, long = 1 + 1.67 / 3, velocity = (1 - 0.5567) / 1.33 = 1 / 3."""
    seen = after(still(), 2.67, 8.0)[1]
    assert seen.predicted == pytest.approx(2.0 + 4.0 / 3.0, rel=1e-12)
    assert seen.share == pytest.approx((10.0 / 24.0) ** 2.25, rel=1e-12)
    assert after(still(), 2.67, 8.0, lead=0.0)[1].predicted == pytest.approx(2.0, rel=1e-12)


def test_one_wild_course_raises_the_coefficient_by_e_squared_at_most() -> None:
    assert after(still(30.0), 30.0, 1.0)[1].share == pytest.approx(math.exp(2.0))


# -- the integral -----------------------------------------------------------------------------------------------------


def test_at_the_budget_the_coefficient_stays() -> None:
    assert moved(still(), 1.0, 1.0) == 0.0


@pytest.mark.parametrize(("kl", "change"), [(1.5, 0.5 * math.log(1.5)), (0.95, 0.25 * math.log(0.95)), (9.0, 0.5)])
def test_it_moves_by_the_logarithm_of_the_excess_and_twice_as_fast_above_the_budget(kl: float, change: float) -> None:
    assert moved(still(kl), kl, 1.0) == pytest.approx(change, rel=1e-12)


@pytest.mark.parametrize("kl", [0.8, 0.35, 0.05])
def test_below_nine_tenths_it_fades_out_so_that_nothing_winds_up(kl: float) -> None:
    size = 0.25 * max(-1.0, math.log(kl)) * (kl / 0.9) ** 4
    assert moved(still(kl), kl, 1.0) == pytest.approx(size, rel=1e-12)


def test_a_coefficient_above_the_one_that_last_held_the_kl_comes_back_at_the_full_rate() -> None:
    state = dataclasses.replace(still(0.1), log_coef=2.0, held=1.0)
    assert moved(state, 0.1, 1.0) == pytest.approx(-0.25, rel=1e-12)
    assert moved(dataclasses.replace(state, log_coef=0.9), 0.1, 1.0) == pytest.approx(
        -0.25 * (0.1 / 0.9) ** 4, rel=1e-9
    )
    for kl, held in ((0.905, 2.0), (1.105, 2.0), (0.895, 1.0), (1.115, 1.0)):
        assert after(dataclasses.replace(state, level=still(kl).level), kl, 1.0)[0].held == held
    passing = LevelState(short=1.5, long=2.0, last=1.5, before=2.0)
    assert after(dataclasses.replace(state, level=passing), 0.8, 1.0)[0].held == 1.0


@pytest.mark.parametrize("kl", [0.0, -0.02])
def test_where_there_is_no_kl_three_hundred_rollouts_do_not_move_it(kl: float) -> None:
    state = still(kl)
    for _ in range(300):
        state, _ = after(state, kl, 1.0)
    assert state.log_coef == 0.0


def test_a_coefficient_that_may_not_relax_may_still_grow() -> None:
    assert moved(still(0.8), 0.8, 1.0, may_relax=False) == 0.0
    assert moved(still(1.5), 1.5, 1.0, may_relax=False) > 0.1


def test_the_coefficient_keeps_its_limits() -> None:
    assert after(still(9.0), 9.0, 1.0, limits=(0.5, 1.1))[1].coefficient == pytest.approx(1.1)
    assert after(still(0.75), 0.75, 1.0, limits=(0.98, 1.1))[1].coefficient == pytest.approx(0.98)


# -- what fits it to the policy ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("rollouts", "rate"), [(10.0, 1.0), (30.0, 1.0), (60.0, 0.5), (300.0, 0.1)])
def test_a_policy_that_takes_long_to_come_to_its_budget_is_integrated_slowly(rollouts: float, rate: float) -> None:
    state = dataclasses.replace(still(1.1), rise=rollouts, stage=5)
    assert moved(state, 1.1, 1.0) == pytest.approx(2 * 0.25 * rate * math.log(1.1), rel=1e-12)


def climbed(levels: list[float]) -> RegulatorState:
    """The state after a row of levels, each of which stands still."""
    state = still(0.0)
    for level in levels:
        state, _ = after(dataclasses.replace(state, level=still(level).level), level, 1.0)
    return state


WAY = math.sqrt(0.9) - 0.25
"""From a sixteenth of the budget to 0.9, as a distance."""


def test_the_rise_is_that_of_the_quickest_stage_as_if_all_were_as_quick() -> None:
    """An eighth is passed two rollouts after a sixteenth, a quarter five later, a half one later, 0.9 three later."""
    climb = [0.0, 0.07, 0.1, 0.13, *[0.2] * 4, 0.26, 0.6, 0.7, 0.8, 0.91]
    rises = [climbed(climb[:n]).rise for n in (3, 4, 9, 10, 13)]
    first = 2 * WAY / (math.sqrt(0.125) - 0.25)
    third = WAY / (math.sqrt(0.5) - 0.5)
    assert rises == pytest.approx([0.0, first, first, third, third], rel=1e-12)
    there = climbed([*climb, 0.05, 0.07, 0.13])
    assert (there.rise, there.stage, there.since) == (pytest.approx(third), 5, 0)


def test_a_climb_that_falls_back_begins_again() -> None:
    slow = [0.07, *[0.1] * 9, 0.13]
    assert climbed(slow).rise == pytest.approx(10 * WAY / (math.sqrt(0.125) - 0.25))
    assert climbed([*slow, 0.06, 0.07, 0.13]).rise == pytest.approx(WAY / (math.sqrt(0.125) - 0.25))


@pytest.mark.parametrize("level", [0.1, 0.2, 0.4, 0.8])
def test_a_kl_that_rests_on_its_way_for_a_thousand_rollouts_is_met_as_one_that_did_not(level: float) -> None:
    """Then it goes to twice its budget: the coefficient grows at the full rate, less what one swing takes of it."""
    way = [0.07, 0.13, 0.26, 0.51]
    rested = [each for each in way if each < level] + [level] * 1000 + [each for each in way if each > level]
    state = dataclasses.replace(climbed([*rested, 0.95]), level=still(2.0).level)
    assert moved(state, 2.0, 1.0) == pytest.approx(0.85 * 2 * 0.25 * math.log(2.0), rel=1e-9)


def swings(levels: list[float], error: float = 0.0) -> list[float]:
    """The trust after each of a row of levels, each of which stands still."""
    state, found = still(1.0), []
    for level in levels:
        state, _ = after(dataclasses.replace(state, level=still(level).level), level, 1.0, kl_error=error)
        found.append(state.trust)
    return found


def test_trust_is_lost_by_a_swing_across_the_budget_and_by_nothing_else() -> None:
    assert swings([0.5, 1.1, 0.95, 0.5, 1.05]) == [1.0] * 5
    assert swings([0.5, 1.13, 1.5, 0.9, 0.89, 1.13]) == pytest.approx(
        [1.0, 0.85, 0.85 * 1.002, 0.85 * 1.002**2, 0.85**2 * 1.002**3, 0.85**3 * 1.002**4], rel=1e-12
    )
    assert swings([0.5, *[1.5, 0.5] * 30])[-1] == 0.15
    assert swings([0.5, 1.5, *[1.0] * 90])[-1] == 1.0


def test_a_swing_within_four_standard_errors_is_noise() -> None:
    assert swings([0.5, 1.19], error=0.05) == [1.0, 1.0]
    assert swings([0.5, 1.21], error=0.05) == [1.0, 0.85]
    assert swings([0.81, 1.5], error=0.05) == [1.0, 1.0]
    assert swings([0.79, 1.5], error=0.05) == [1.0, 0.85]


def test_a_policy_that_swings_is_regulated_with_less_gain_and_less_power() -> None:
    """Trust a half before, so 0.501 in this rollout."""
    state = dataclasses.replace(still(1.1), trust=0.5)
    after_it, seen = after(state, 1.1, 1.0)
    assert after_it.log_coef == pytest.approx(0.501 * 2 * 0.25 * math.log(1.1), rel=1e-12)
    assert seen.share == pytest.approx(1.1 ** (0.501 * 2.25), rel=1e-12)
    assert after(dataclasses.replace(state, level=still(90.0).level), 90.0, 1.0)[1].share == pytest.approx(math.exp(2))


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
    settings = {"initial_coef": 0.05, "min_coef": 0.01, "max_coef": 5.0, "gain": 0.1 + seed / 20, "lead": 0.5 * seed}
    kls, budgets, relaxes = walk(seed, 250)
    state = RegulatorState(log_coef=math.log(0.05))
    theirs = oracle.regulator(settings, math.log(0.05))
    next(theirs)
    for step, (kl, budget, may_relax) in enumerate(zip(kls, budgets, relaxes, strict=True)):
        kl_error = 0.0 if seed % 2 else 0.05 * budget
        given = {"gain": settings["gain"], "lead": settings["lead"], "limits": (0.01, 5.0), "may_relax": may_relax}
        state, seen = regulate(state, kl, budget, kl_error=kl_error, **given)
        ours = {**dataclasses.asdict(seen), "long": state.level.long}
        assert ours == pytest.approx(theirs.send((kl, kl_error, budget, may_relax)), rel=1e-8, abs=1e-12), step
