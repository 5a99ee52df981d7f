"""Reward crashes against plain loops over whole lists, and their bounds in numbers without rounding."""

from __future__ import annotations

import math
import random

import pytest

from stable_rlhf.report.crashes import RewardCrash, moving_average, reward_crashes, step_errors


def test_the_moving_average_is_of_the_last_twenty() -> None:
    values = [float(20 * step) for step in range(23)]
    assert moving_average(values) == [190.0, 210.0, 230.0, 250.0]
    assert moving_average(values[:19]) == []


def naive_crashes(rewards: list[float], errors: list[float]) -> list[RewardCrash]:
    """By the definition: a fall from the last of the highest averages since the last recovery."""
    averages = [sum(rewards[t - 19 : t + 1]) / 20 for t in range(19, len(rewards))]
    crashes: list[RewardCrash] = []
    since, t = 0, 0
    while t < len(averages):
        peak = max(range(since, t + 1), key=lambda s: (averages[s], s))
        weights = [(peak <= i < peak + 20) - (t <= i < t + 20) for i in range(len(rewards))]
        error = math.sqrt(sum((weight * e) ** 2 for weight, e in zip(weights, errors, strict=True))) / 20
        fall = averages[peak] - averages[t]
        if fall > (max(averages) - averages[0]) / 4 and fall > 3 * error:
            depths = [averages[peak] - average for average in averages[t:]]
            ends = [k for k in range(len(depths)) if depths[k] <= max(depths[: k + 1]) / 2]
            last = ends[0] if ends else len(depths) - 1
            end = t + last + 19 if ends else None
            crashes.append(RewardCrash(begin=t + 19, end=end, depth=max(depths[: last + 1])))
            since = t = t + last
        t += 1
    return crashes


@pytest.mark.parametrize("seed", range(40))
def test_crashes_are_those_of_the_definition(seed: int) -> None:
    """Walks in whole numbers times 20: averages, falls and quarters of them have no rounding, and equal peaks occur."""
    rng = random.Random(seed)
    rewards, level = [], 0
    for step in range(240):
        if step % 12 == 0:
            level += rng.choice([-8, -4, -1, 0, 0, 0, 2, 6])
        rewards.append(20.0 * (level + (rng.choice([-1, 0, 1]) if seed % 2 else 0)))
    errors = [rng.choice([0.0, 1.0, 10.0]) * (seed % 4) for _ in rewards]
    assert reward_crashes(rewards, errors) == naive_crashes(rewards, errors)
    assert reward_crashes(rewards) == naive_crashes(rewards, [0.0] * len(rewards))


def test_the_walks_above_hold_crashes_that_end_and_that_do_not() -> None:
    rewards = [0.0] * 20 + [80.0] * 20 + [0.0] * 20 + [60.0] * 20 + [0.0] * 30
    assert naive_crashes(rewards, [0.0] * 110) == reward_crashes(rewards)
    first, second = reward_crashes(rewards)
    assert (first.begin, first.end, first.depth) == (45, 73, 80.0)  # 24 is more than 20; 60 x 14 / 20 = 42 is half back
    assert (second.end, second.depth) == (None, 60.0)


def test_three_errors_exactly_are_no_crash() -> None:
    """From 80 down by 4 a step: 24 is the first fall above 20. An error of 160 in one of its steps makes 8 of its
    average, three times which is 24; the next fall of 28 is more."""
    rewards = [0.0] * 20 + [80.0] * 20 + [0.0] * 20
    assert reward_crashes(rewards)[0].begin == 45
    errors = [0.0] * 60
    errors[40] = 160.0
    assert reward_crashes(rewards, errors)[0].begin == 46
    errors[40] = 159.9
    assert reward_crashes(rewards, errors)[0].begin == 45


def test_a_step_in_both_windows_adds_no_error() -> None:
    """At 45 the windows of 39 and of 45 share the steps 26..39, and hold 20..25 and 40..45 alone."""
    rewards = [0.0] * 20 + [80.0] * 20 + [0.0] * 20
    for step, begin in ((19, 45), (20, 46), (25, 46), (26, 45), (39, 45), (40, 46), (45, 46), (46, 45)):
        errors = [0.0] * 60
        errors[step] = 160.0
        assert reward_crashes(rewards, errors)[0].begin == begin, step


def test_a_crash_without_an_end_is_as_deep_as_it_ever_was() -> None:
    rewards = [0.0] * 20 + [80.0] * 20 + [0.0] * 20 + [20.0] * 20
    assert reward_crashes(rewards) == [RewardCrash(begin=45, end=None, depth=80.0)]


def test_half_recovered_exactly_is_an_end_and_a_hair_less_is_none() -> None:
    fallen = [0.0] * 20 + [80.0] * 20 + [0.0] * 20
    assert reward_crashes([*fallen, *[40.0] * 30]) == [RewardCrash(begin=45, end=79, depth=80.0)]
    assert reward_crashes([*fallen, *[39.9] * 30])[0].end is None


def test_errors_must_be_finite_too() -> None:
    for bad in (math.nan, math.inf):
        with pytest.raises(ValueError, match="must be finite"):
            reward_crashes([1.0] * 30, [0.0] * 29 + [bad])


# -- errors of the steps ----------------------------------------------------------------------------------------------


def row(step: int, episode: int, deviation: float | None, skipped: int | None = None) -> dict[str, float | None]:
    return {
        "step": step,
        "episode": episode,
        "objective/scores_std": deviation,
        "completions/skipped": skipped,
    }


def test_a_step_has_as_many_completions_as_its_share_of_the_episodes() -> None:
    """10 a step, of which the second has skipped 5 and the third none: 0.6 / 3, 0.6 / 2, 0.9 / 3."""
    rows = [row(0, 10, 0.6), row(1, 20, 0.6, 5), row(2, 30, 0.9, 0)]
    assert step_errors(rows) == pytest.approx([0.2, 0.3, 0.3], rel=1e-14)
    assert step_errors(rows[1:]) == pytest.approx([0.3, 0.3], rel=1e-14)


def test_a_step_of_two_is_as_far_off_as_the_others_completions() -> None:
    """A completion's variance in the others: (10 x 0.2^2 + 5 x 0.3^2) / 2 = 0.425."""
    rows = [row(0, 10, 0.6), row(1, 20, 0.6, 5), row(2, 30, 0.0, 8), row(3, 40, 0.1, 9)]
    expected = [0.2, 0.3, math.sqrt(0.425 / 2), math.sqrt(0.425)]
    assert step_errors(rows) == pytest.approx(expected, rel=1e-14)
    assert step_errors(rows[2:]) is None


def test_a_row_that_lacks_what_this_needs_makes_all_unknown() -> None:
    good = row(0, 10, 0.6)
    assert step_errors([good, row(1, 20, None)]) is None
    assert step_errors([good, row(1, 20, 0.6, 10)]) is None  # all skipped
    assert step_errors([good, {"step": 1, "objective/scores_std": 0.6}]) is None
    assert step_errors([good, {"step": 1, "episode": 20, "objective/scores_std": 0.9}]) == pytest.approx([0.2, 0.3])
    assert step_errors([]) is None
