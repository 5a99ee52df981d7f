"""Several rewards combined as reward.aggregate says: literal numbers, units, samples without a score, exact resume."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from stable_rlhf.errors import CheckpointError, ConfigError, RewardError, RewardInputError
from stable_rlhf.rewards.ensemble import Ensemble
from tests.rewards.test_scorer import length, named, score
from tests.tiny_runs import letters, rows, settings, trainer

FIRST = [(0.0, 10.0), (2.0, 30.0)]
"""Means 1 and 20, deviations 1 and 10."""


def ensemble(rule: str, coefficient: float = 0.5) -> Ensemble:
    made = Ensemble(rule, coefficient, ["a", "b"])
    made.combine(FIRST)
    return made


@pytest.mark.parametrize(("rule", "total"), [("mean", 2.0), ("min", 0.0), ("uncertainty", 2.0 - 0.5 * 4.0)])
def test_the_rules_as_literal_numbers(rule: str, total: float) -> None:
    """5 is 4 deviations above the mean of the first batch, 20 is on it: mean 2, deviation 2, variance 4."""
    totals, disagreement = ensemble(rule).combine([(5.0, 20.0)])
    assert totals == [pytest.approx(total)]
    assert disagreement == pytest.approx(2.0)


def test_the_coefficient_weighs_the_variance() -> None:
    assert ensemble("uncertainty", 0.25).combine([(5.0, 20.0)])[0] == [1.0]


def test_the_units_are_those_of_the_first_batch() -> None:
    made = ensemble("min")
    made.combine([(100.0, 1.0), (300.0, 5.0)])
    assert made.units == [(1.0, 1.0), (20.0, 10.0)]


@pytest.mark.parametrize("rule", ["mean", "min", "uncertainty"])
@pytest.mark.parametrize(("scale", "offset"), [(10.0, 5.0), (1e-6, 0.0), (1e6, -3e6)])
def test_scale_and_offset_of_a_reward_change_nothing(rule: str, scale: float, offset: float) -> None:
    plain, changed = Ensemble(rule, 0.5, ["a", "b"]), Ensemble(rule, 0.5, ["a", "b"])
    for batch in ([(0.5, 3.0), (2.0, 1.0), (4.0, 2.5)], [(1.0, 1.0), (-3.0, 7.0)]):
        expected = plain.combine(batch)
        found = changed.combine([(a, scale * b + offset) for a, b in batch])
        assert found[0] == pytest.approx(expected[0], rel=1e-6)
        assert found[1] == pytest.approx(expected[1], rel=1e-6)


def test_a_sample_that_one_reward_does_not_judge_has_no_score() -> None:
    made = Ensemble("min", 0.5, ["a", "b"])
    totals, _ = made.combine([(0.0, 10.0), (9.0, None), (2.0, 30.0), (None, None)])
    assert totals == [-1.0, None, 1.0, None]
    assert made.units == [(1.0, 1.0), (20.0, 10.0)]


def test_the_scorer_marks_such_a_sample_and_takes_the_penalty_off_the_others() -> None:
    def some(prompts, completions, **columns):
        return [1.0, None, 3.0]

    found = score(
        named(length=length, some=some),
        ["p"] * 3,
        ["x", "xx", "xxx"],
        ended=(True, True, False),
        aggregate="mean",
        missing_eos_penalty=0.25,
    )
    assert (found.total, found.valid) == ([-1.0, 0.0, 0.75], [True, False, True])
    assert found.per_function == {"length": [1.0, 2.0, 3.0], "some": [1.0, None, 3.0]}
    assert found.disagreement == 0.0


def test_the_scorer_refuses_a_batch_that_no_sample_of_was_judged_by_all() -> None:
    def none(prompts, completions, **columns):
        return [None] * len(prompts)

    with pytest.raises(RewardError, match=r"none of 2 samples was scored by every reward, as reward.aggregate needs"):
        score(named(length=length, none=none), aggregate="min")


def test_a_reward_without_spread_is_named() -> None:
    with pytest.raises(RewardError, match=r"aggregate='min': b gave the first 2 .* the same score, 7, .*batch_size"):
        Ensemble("min", 0.5, ["a", "b"]).combine([(1.0, 7.0), (2.0, 7.0)])


def test_one_reward_cannot_be_combined() -> None:
    with pytest.raises(RewardInputError, match=r"reward.aggregate='min' has no effect on one reward"):
        score(named(length=length), aggregate="min")


@pytest.mark.parametrize(
    ("given", "named_setting"),
    [
        ({"aggregate": "min", "weights": [1.0, 2.0]}, "reward.weights"),
        ({"aggregate": "mean", "uncertainty_coef": 1.0}, "reward.uncertainty_coef"),
        ({"aggregate": "uncertainty", "uncertainty_coef": 0.0}, "reward.uncertainty_coef"),
        ({"aggregate": "median"}, "reward.aggregate"),
    ],
)
def test_settings_that_cannot_act_are_refused(tmp_path: Path, given, named_setting: str) -> None:
    with pytest.raises(ConfigError, match=f"^{named_setting}="):
        settings(tmp_path, reward=given)


def test_a_state_of_other_rewards_is_refused() -> None:
    with pytest.raises(CheckpointError, match="units of 2 rewards, and there are 3"):
        Ensemble("min", 0.5, ["a", "b", "c"]).load_state_dict(ensemble("min").state_dict())


def test_a_run_resumes_to_the_byte_and_records_the_disagreement(tokenizer, tmp_path: Path) -> None:
    """Two rewards, of which the second moves in the other direction for half of the texts."""

    def other(prompts, completions, **columns):
        return [1e3 * (sum(map(ord, completion)) % 5) for completion in completions]

    def run(name: str, steps: int):
        config = settings(
            tmp_path / name, max_steps=steps, save_steps=1, reward={"aggregate": "uncertainty"}, data={"eval_size": 0}
        )
        return trainer(config, tokenizer, [letters, other])

    run("whole", 2).train()
    run("stopped", 1).train()
    run("stopped", 2).train(resume_from_checkpoint=True)
    whole, stopped = ((tmp_path / name / "metrics.jsonl").read_bytes() for name in ("whole", "stopped"))
    assert whole == stopped
    first = rows(tmp_path / "whole")[0]
    # On the batch that gives the units each reward has deviation 1, so half the deviation is at most 1.
    assert 0.0 < first["reward/disagreement"] <= 1.0
    assert first["objective/scores"] <= 0.0
    assert math.isfinite(first["rewards/other/mean"])
