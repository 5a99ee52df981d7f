"""The guard's drawdown at its bounds, in numbers without rounding, and its state over long runs against whole lists."""

from __future__ import annotations

import math
import random

import pytest

from stable_rlhf.control.guard import Action, Verdict, judge
from stable_rlhf.control.guard_config import GuardConfig
from stable_rlhf.control.guard_rules import START, WINDOW, Figures, GuardState, Rewards, max_drawdown


def naive_fall(rewards: list[float], errors: list[float]) -> tuple[float, float, float]:
    """Of whole lists: best average (the last of equal ones) - last average, best - mean of the first five, and the
    error of the first of them, by the weight that each step's reward has in the difference."""
    if len(rewards) < 20:
        return 0.0, 0.0, 0.0
    averages = [sum(rewards[i - 20 : i]) / 20 for i in range(20, len(rewards) + 1)]
    last = len(averages) - 1
    best = max(range(last + 1), key=lambda i: (averages[i], i))
    weights = [(best <= i < best + 20) / 20 - (last <= i < last + 20) / 20 for i in range(len(rewards))]
    error = math.sqrt(sum((weight * e) ** 2 for weight, e in zip(weights, errors, strict=True)))
    return averages[best] - averages[-1], averages[best] - sum(rewards[:5]) / 5, error


@pytest.mark.parametrize("seed", range(30))
def test_the_fall_and_its_error_are_those_of_the_whole_history(seed: int) -> None:
    rng = random.Random(seed)
    walk, errors, level, kept = [], [], 0, Rewards()
    for step in range(100):
        if step % 10 == 0:
            level += rng.choice([-3, -1, 0, 0, 1, 3])
        walk.append(20.0 * level)
        errors.append(float(rng.randrange(7)))
        kept = kept.after(walk[-1], errors[-1])
        assert kept.fall == pytest.approx(naive_fall(walk, errors), rel=1e-12, abs=1e-12), step
        assert len(kept.recent) <= WINDOW
        assert len(kept.best_errors) in (0, WINDOW)


def test_the_error_of_a_fall_is_of_the_steps_in_one_window_only() -> None:
    """From an average of 80 at step 39. Three steps later the windows hold 20..22 and 40..42 alone."""
    for step, counted in ((19, 0.0), (20, 8.0), (22, 8.0), (23, 0.0), (39, 0.0), (40, 8.0), (42, 8.0)):
        rewards = Rewards()
        for number in range(43):
            reward = 0.0 if number < 20 or number >= 40 else 80.0
            rewards = rewards.after(reward, 160.0 if number == step else 0.0)
        assert rewards.fall == (12.0, 80.0, counted), step
        assert rewards.since == 3


def test_the_error_of_a_long_fall_is_of_two_whole_windows() -> None:
    """Forty steps after the best: 20 errors of 3 and 20 of 4, sqrt(20 x 9 + 20 x 16) / 20."""
    rewards = Rewards()
    for number in range(80):
        early = number < 40
        rewards = rewards.after(80.0 if 20 <= number < 40 else 0.0, 3.0 if early else 4.0)
    assert rewards.since == 40
    assert rewards.fall == (80.0, 80.0, pytest.approx(math.sqrt(500) / 20, rel=1e-14))


def falling(to: float, at_40: float, rows: int = 5) -> list[Figures]:
    """20 rewards of 0, 20 of 80, then lower ones: an average of 80 that falls by (80 - to) / 20 a step. Of all steps
    only number 40 has a deviation, which with 5 completions is twice its standard error."""
    rewards = [0.0] * 20 + [80.0] * 20 + [to] * 30
    return [
        {"objective/scores": reward, "objective/scores_std": 2 * at_40 if step == 40 else 0.0, "rows": rows}
        for step, reward in enumerate(rewards)
    ]


def verdicts(steps: list[Figures], **changed: float) -> list[Verdict]:
    config, state, found = GuardConfig(patience=1, **changed), GuardState(), []
    for figures in steps:
        state, verdict = judge(config, state, figures)
        found.append(verdict)
    return found


def first_drawdown(steps: list[Figures], **changed: float) -> int | None:
    found = [n for n, verdict in enumerate(verdicts(steps, **changed)) if verdict.rule == "max_drawdown"]
    return found[0] if found else None


def test_half_of_the_gain_exactly_may_be_lost() -> None:
    """By 4 a step: 40 of 80 after ten steps, at number 49."""
    assert first_drawdown(falling(0.0, 0.0)) == 50
    assert first_drawdown(falling(0.0, 0.0), max_drawdown=0.499) == 49


def test_six_errors_exactly_are_allowed() -> None:
    """An error of 160 in one step is 8 of an average: 48, which is lost after twelve steps, at number 51."""
    assert first_drawdown(falling(0.0, 160.0)) == 52
    assert first_drawdown(falling(0.0, 159.9)) == 51


def test_a_tenth_of_the_gain_exactly_makes_no_state_suspect() -> None:
    """By 2 a step, of which 8 is a fifth of the half of 80: lost after four steps, at number 43."""
    suspect = [n for n, verdict in enumerate(verdicts(falling(40.0, 0.0))) if verdict.suspect]
    assert suspect == list(range(44, 70))


def test_six_errors_exactly_make_no_state_suspect() -> None:
    """By 2 a step: 12 after six steps, at number 45, of which six errors of 2 are as much: 40 in one step of 20."""
    suspect = [n for n, verdict in enumerate(verdicts(falling(40.0, 40.0))) if verdict.suspect]
    assert suspect == list(range(46, 70))
    almost = [n for n, verdict in enumerate(verdicts(falling(40.0, 39.9))) if verdict.suspect]
    assert almost == list(range(45, 70))


def test_a_reward_that_only_falls_has_gained_nothing_to_lose() -> None:
    """From the first average on: less than the start, so that any fall is more than half of what was gained."""
    steps: list[Figures] = [
        {"objective/scores": -20.0 * step, "objective/scores_std": 0.0, "rows": 8} for step in range(24)
    ]
    assert first_drawdown(steps) == 20
    assert max_drawdown(GuardConfig(), GuardState(), {}) is None


def test_the_gain_counts_from_the_first_five_rewards_for_ever() -> None:
    """Their mean is 20, though the first average is 60 or more: the gain of the best, 80, is 60."""
    rewards = Rewards()
    for reward in [0.0, 10.0, 20.0, 30.0, 40.0] + [80.0] * 60 + [50.0] * 20:
        rewards = rewards.after(reward, 1.0)
    assert rewards.first == 20.0
    assert rewards.fall[:2] == (30.0, 60.0)
    assert len(rewards.recent) == len(rewards.errors) == WINDOW


def test_every_roll_back_lowers_the_factor_once_more_and_a_stop_does_not() -> None:
    config, state, found = GuardConfig(max_rollbacks=3, rollback_factor=0.25), GuardState(), []
    for _ in range(5):
        state, verdict = judge(config, state, {"objective/kl": 9.0})
        found.append((verdict.action, state.rollbacks, state.factor))
    assert found == [
        (Action.ROLL_BACK, 1, 0.25),
        (Action.ROLL_BACK, 2, 0.0625),
        (Action.ROLL_BACK, 3, 0.015625),
        (Action.STOP, 3, 0.015625),
        (Action.STOP, 3, 0.015625),
    ]


def test_a_state_of_a_skipped_step_is_suspect_and_says_what_to_try() -> None:
    _, verdict = judge(GuardConfig(), GuardState(), {"policy/skipped_steps": 1})
    assert (verdict.action, verdict.rule, verdict.suspect) == (Action.SKIP, "skipped_steps", True)
    assert verdict.advice == "lower optim.learning_rate or optim.max_grad_norm, and look at the rewards"


def test_a_reward_without_a_known_error_is_left_out_of_the_average() -> None:
    state = GuardState()
    for rows in (2, 3, None, 0, 8):
        state, _ = judge(GuardConfig(), state, {"objective/scores": 1.0, "objective/scores_std": 0.5, "rows": rows})
    assert state.rewards.recent == (1.0, 1.0)
    assert state.rewards.errors == pytest.approx((0.25 / 2, 0.25 / 7), rel=1e-14)  # squares of 0.5 / sqrt(n - 1)


def test_the_critic_is_judged_once_the_start_is_known_and_not_before() -> None:
    config = GuardConfig(patience=1, min_explained_variance=-2.0)
    state, found = GuardState(), []
    for _ in range(START + 1):
        state, verdict = judge(config, state, {"objective/entropy": 3.0, "val/explained_variance": -9.0})
        found.append(verdict.action)
    assert found == [Action.GO_ON] * (START - 1) + [Action.ROLL_BACK] * 2
    assert state.entropy.mean == 3.0
