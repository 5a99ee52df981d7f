"""A reward that has moved against a policy that has fallen, by the scores of the same texts."""

from __future__ import annotations

import dataclasses
import math
import statistics

import pytest

from stable_rlhf.control import GuardConfig, Rescored
from stable_rlhf.control.guard import Action, judge
from stable_rlhf.control.guard_rules import GuardState, Rewards

BEFORE = (1.0, 2.0, 4.0, 3.0, 5.0)


def moved(*drops: float) -> Rescored:
    return Rescored(step=9, before=BEFORE, now=tuple(old - drop for old, drop in zip(BEFORE, drops, strict=True)))


def test_the_drop_and_its_error_are_those_of_the_pairs() -> None:
    drops = (1.0, 1.5, 0.5, 1.25, 0.75)
    rescored = moved(*drops)
    assert rescored.drop == pytest.approx(1.0)
    assert rescored.error == pytest.approx(statistics.stdev(drops) / math.sqrt(5))
    assert str(rescored) == "5 texts of step 9 scored again give 2, then 3"


@pytest.mark.parametrize(
    ("drops", "fall", "explained"),
    [
        ((1, 1, 1, 1, 1), 1.0, True),  # the reward has moved by all of it
        ((1, 1, 1, 1, 1), 1.5, True),  # what is left is allowed
        ((1, 1, 1, 1, 1), 1.51, False),  # it moved, and the policy fell as well
        ((0, 0, 0, 0, 0), 1.0, False),  # the same texts score as before
        ((-1, -1, -1, -1, -1), 0.4, False),  # higher than before
        ((4, -3, 4, -3, 3), 1.0, False),  # a noisy reward: the drop is within its error
    ],
)
def test_a_reward_has_moved_where_that_is_clear_and_what_is_left_is_allowed(drops, fall: float, explained) -> None:
    assert moved(*map(float, drops)).explains(fall, 0.5) is explained


def test_two_texts_do_not_show_their_error() -> None:
    assert not Rescored(step=0, before=(1.0, 1.0), now=(0.0, 0.0)).explains(1.0, 0.5)


def fallen() -> GuardState:
    """A run that gained 2 from 1 to 3, and has lost 1.5 of it; the last of ``patience`` steps is to come."""
    rewards = Rewards(recent=(1.5,) * 20, errors=(1e-6,) * 20, first=1.0, best=3.0, best_errors=(1e-6,) * 20, since=25)
    return dataclasses.replace(GuardState(), rewards=rewards, streaks={**GuardState().streaks, "max_drawdown": 4})


LOW = {"objective/scores": 1.5, "objective/scores_std": 0.01, "rows": 64}


def test_only_a_fall_that_is_due_asks_for_the_texts_and_a_moved_reward_takes_its_level_anew() -> None:
    asked = []

    def again() -> Rescored:
        asked.append(True)
        return moved(1.5, 1.5, 1.5, 1.5, 1.5)

    early = dataclasses.replace(fallen(), streaks=GuardState().streaks)
    _, verdict = judge(GuardConfig(), early, LOW, again)
    assert (verdict.action, verdict.suspect, asked) == (Action.GO_ON, True, [])
    state, verdict = judge(GuardConfig(), fallen(), LOW, again)
    assert (verdict.action, verdict.rule, asked) == (Action.REBASE, "max_drawdown", [True])
    assert verdict.seen.startswith("the reward has moved: 5 texts of step 9 scored again give 1.5, then 3: not the ")
    assert (state.rewards, state.rollbacks, state.factor) == (Rewards(first=-0.5), 0, 1.0)
    assert not any(state.streaks.values())


@pytest.mark.parametrize(
    ("rescored", "said"),
    [
        (moved(0, 0, 0, 0, 0), "; 5 texts of step 9 scored again give 3, then 3, for"),
        ("earlier texts could not be scored again (no)", "; earlier texts could not be scored again (no), for"),
    ],
)
def test_otherwise_the_guard_acts_as_without_and_says_what_it_saw(rescored: Rescored | str, said: str) -> None:
    without, alone = judge(GuardConfig(), fallen(), LOW)
    state, verdict = judge(GuardConfig(), fallen(), LOW, lambda: rescored)
    assert state == without
    assert dataclasses.replace(verdict, seen=alone.seen) == alone
    assert verdict.seen == alone.seen + said.removesuffix(", for")
