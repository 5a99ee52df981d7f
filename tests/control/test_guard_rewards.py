"""The guard's measure of a fall of the reward, and when it is a crash; the levels of a run's start."""

from __future__ import annotations

import dataclasses
import math
import random
import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stable_rlhf.control.guard import Action, Verdict, judge
from stable_rlhf.control.guard_config import GuardConfig
from stable_rlhf.control.guard_rules import (
    WINDOW,
    Figures,
    GuardState,
    Level,
    Rewards,
    max_drawdown,
    standard_error,
)


def run(config: GuardConfig, steps: list[Figures]) -> list[Verdict]:
    state, verdicts = GuardState(), []
    for figures in steps:
        state, verdict = judge(config, state, figures)
        verdicts.append(verdict)
    return verdicts


def naive_fall(rewards: list[float], errors: list[float]) -> tuple[float, float, float]:
    """Of whole lists: best average - last average, best - mean of the first five, and the error of the first of
    them, by the weight that each step's reward has in the difference."""
    if len(rewards) < 20:
        return 0.0, 0.0, 0.0
    averages = [sum(rewards[i - 20 : i]) / 20 for i in range(20, len(rewards) + 1)]
    best = max(i for i, average in enumerate(averages) if average >= max(averages))
    last = len(averages) - 1
    weights = [(best <= i < best + 20) / 20 - (last <= i < last + 20) / 20 for i in range(len(rewards))]
    error = math.sqrt(sum((weight * e) ** 2 for weight, e in zip(weights, errors, strict=True)))
    return averages[best] - averages[-1], averages[best] - sum(rewards[:5]) / 5, error


@given(
    st.lists(st.integers(-8, 8), max_size=70),
    st.lists(st.integers(0, 6), min_size=70, max_size=70),
)
def test_the_fall_and_its_error_are_those_of_the_whole_history(steps: list[int], errors: list[int]) -> None:
    """Random walks in eighths, whose sums are exact: the first of two equal bests is not taken for the last."""
    walk = [sum(steps[: i + 1]) / 8 for i in range(len(steps))]
    kept = Rewards()
    for i, reward in enumerate(walk):
        kept = kept.after(reward, float(errors[i]))
        expected = naive_fall(walk[: i + 1], [float(e) for e in errors[: i + 1]])
        assert kept.fall == pytest.approx(expected, rel=1e-12, abs=1e-12)
        assert len(kept.recent) <= WINDOW
        assert len(kept.best_errors) in (0, WINDOW)


def drawn(rewards: list[float], deviation: float, rows: int = 64) -> list[Figures]:
    return [{"objective/scores": reward, "objective/scores_std": deviation, "rows": rows} for reward in rewards]


def first_incident(config: GuardConfig, steps: list[Figures]) -> int | None:
    state = GuardState()
    for number, figures in enumerate(steps):
        state, verdict = judge(config, state, figures)
        if verdict.action is not Action.GO_ON:
            assert verdict.rule == "max_drawdown"
            return number
    return None


def test_a_reward_that_loses_half_of_its_gain_is_a_crash() -> None:
    """R climbs from 0 to 1 and falls back to 0 with the last reward: half is lost when 10 of 20 are 0; more with 11."""
    config = GuardConfig(patience=1)
    rewards = [0.0] * 20 + [1.0] * 20 + [0.0] * 20
    assert first_incident(config, drawn(rewards, deviation=0.01)) == 40 + 11 - 1
    assert first_incident(dataclasses.replace(config, max_drawdown=0.25), drawn(rewards, 0.01)) == 40 + 6 - 1
    assert first_incident(dataclasses.replace(config, max_drawdown=None), drawn(rewards, 0.01)) is None
    assert first_incident(GuardConfig(patience=5), drawn(rewards, 0.01)) == 40 + 11 - 1 + 4


def test_what_was_gained_before_the_first_average_is_gained_too() -> None:
    """A run that climbs from 0 to 1 in its first ten steps: its first average is 0.5, and a fall to 0.6 loses 0.4."""
    rewards = [0.0] * 5 + [0.2, 0.4, 0.6, 0.8, 1.0] + [1.0] * 30 + [0.6] * 40
    assert first_incident(GuardConfig(patience=1), drawn(rewards, deviation=0.01)) is None
    deeper = [reward if step < 40 else 0.4 for step, reward in enumerate(rewards)]
    assert first_incident(GuardConfig(patience=1), drawn(deeper, deviation=0.01)) == 40 + 17 - 1


def test_a_fall_that_chance_explains_is_none() -> None:
    """Of 20 steps new and 20 old the error of the difference is sqrt(2/20) of a step's: 1 is six times sqrt(2/20) of
    sqrt(10)/6."""
    rewards = [0.0] * 20 + [1.0] * 20 + [0.0] * 30
    config, bound = GuardConfig(patience=1), math.sqrt(10) / 6
    assert first_incident(config, drawn(rewards, deviation=bound * 0.999 * math.sqrt(2), rows=3)) == 59
    assert first_incident(config, drawn(rewards, deviation=bound * 1.001 * math.sqrt(2), rows=3)) is None
    assert first_incident(config, drawn(rewards, deviation=bound * 0.999 * 8, rows=65)) == 59
    assert first_incident(config, drawn(rewards, deviation=bound * 1.001 * 8, rows=65)) is None


def test_the_error_of_a_mean_is_that_of_its_figures_and_unknown_of_two() -> None:
    figures = [1.0, 4.0, 4.0, 11.0]
    expected = statistics.stdev(figures) / math.sqrt(4)  # denominator n - 1, then / sqrt(n)
    assert standard_error(statistics.pstdev(figures), 4) == pytest.approx(expected, rel=1e-15)
    assert (
        standard_error(0.0, 1) is standard_error(0.0, 2) is standard_error(None, 4) is standard_error(0.5, None) is None
    )


@pytest.mark.parametrize("rows", [1, 2, 3])
@pytest.mark.parametrize("right", [None, 0.9], ids=["normal", "0 or 1"])
def test_a_handful_of_completions_a_step_does_not_alarm_by_chance(rows: int, right: float | None) -> None:
    """20 runs of 1,000 steps of noise. A deviation of one completion is 0: its mean is not therefore exact."""
    for seed in range(20):
        noise = random.Random(seed)
        drawings = [
            [noise.gauss(0.0, 1.0) if right is None else float(noise.random() < right) for _ in range(rows)]
            for _ in range(1000)
        ]
        steps = [
            {"objective/scores": statistics.fmean(d), "objective/scores_std": statistics.pstdev(d), "rows": rows}
            for d in drawings
        ]
        assert {verdict.action for verdict in run(GuardConfig(), steps)} == {Action.GO_ON}


def test_a_reward_that_begins_to_fall_makes_a_state_suspect_for_two_windows() -> None:
    """From 1 to 0.7: a tenth of what was gained is lost with the seventh step of 20, and never half."""
    rewards = [0.0] * 20 + [1.0] * 20 + [0.7] * 60
    verdicts = run(GuardConfig(), drawn(rewards, deviation=0.01))
    assert [number for number, verdict in enumerate(verdicts) if verdict.suspect] == list(range(46, 80))
    assert {verdict.action for verdict in verdicts} == {Action.GO_ON}
    for other in (GuardConfig(max_drawdown=None), GuardConfig(max_drawdown=1.6)):
        assert not any(verdict.suspect for verdict in run(other, drawn(rewards, deviation=0.01)))
    noisy = run(GuardConfig(), drawn(rewards, deviation=1.3))
    assert not any(verdict.suspect for verdict in noisy)


def test_noise_about_a_level_that_does_not_move_is_no_crash() -> None:
    """300 runs of 500 steps, by seeds: not one step beyond the bound, let alone five in a row."""
    config, beyond = GuardConfig(), 0
    for seed in range(300):
        noise, rewards = random.Random(seed), Rewards()
        for _ in range(500):
            rewards = rewards.after(noise.gauss(0.0, 1 / 8), 1 / 8)
            beyond += max_drawdown(config, GuardState(rewards=rewards), {}) is not None
    assert beyond == 0


def test_a_level_takes_the_first_five_finite_values() -> None:
    level = Level()
    for value in (None, 1.0, math.nan, 2.0, None, 3.0, 4.0, 5.0, 99.0):
        level = level.after(value)
    assert level == Level(count=5, mean=3.0)
