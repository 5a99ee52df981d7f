"""Texts that are scored again where the reward falls, in a run before its first step."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from stable_rlhf import SAFETrainer
from stable_rlhf.control import Rescored
from stable_rlhf.runs import incidents
from stable_rlhf.training.texts import MOST, Texts
from tests.guarded_runs import captured, guarded
from tests.tiny_runs import trainer

Levels = dict[str, float]


def begun(tokenizer: PreTrainedTokenizerFast, folder: Path, reward: Any, batch: int = 8) -> SAFETrainer:
    rollout = {"batch_size": batch, "max_completion_length": 2}
    run = trainer(guarded(folder, guard={"patience": 1}, rollout=rollout), tokenizer, reward=reward)
    run.run_dir.mkdir(exist_ok=True)
    run.recovery.begin(*captured(run))
    return run


def sampled(run: SAFETrainer) -> None:
    """A rollout, remembered as that of the step which is about to be done."""
    indices = run.stream.take(run.args.rollout.batch_size)
    rollout, _ = run.sampler.collect(run.train_dataset, run.train_prompts, indices)
    run.recovery.remember(rollout, run.steps_done)


def step(run: SAFETrainer, reward: float) -> None:
    run.counters.step += 1
    run.judge({"objective/scores": reward, "objective/scores_std": 0.01, "rows": 64})


def climbs_and_falls(run: SAFETrainer) -> None:
    """20 steps at 0, 20 at 1, and steps at 0 until the guard acts."""
    for number in range(60):
        if number <= 39:
            sampled(run)
        step(run, float(20 <= number < 40))
        if incidents.read(run.run_dir):
            return


def levelled(levels: Levels):
    def reward(prompts, completions, **columns):
        return [levels["now"] + len(completion) / 10 for completion in completions]

    return reward


def test_texts_that_score_as_before_leave_the_roll_back_as_it_is_and_say_so(tokenizer, tmp_path: Path) -> None:
    run = begun(tokenizer, tmp_path, levelled({"now": 1.0}))
    climbs_and_falls(run)
    (incident,) = incidents.read(tmp_path)
    assert (incident["action"], incident["rule"], run.guard.state.rollbacks) == ("roll back", "max_drawdown", 1)
    given, then = incident["seen"].rpartition("; 32 texts of step 39 scored again give ")[2].split(", then ")
    assert given == then


def test_texts_that_score_lower_are_no_ground_for_a_roll_back_and_the_level_is_taken_anew(tokenizer, tmp_path) -> None:
    levels = {"now": 1.0}
    run = begun(tokenizer, tmp_path, levelled(levels))
    before = run.guard.state
    for number in range(60):
        sampled(run)
        if number == 40:
            levels["now"] = 0.0
        step(run, float(20 <= number < 40))
    (incident,) = incidents.read(tmp_path)  # once, though the average falls on until its window is full
    assert (incident["action"], incident["rule"]) == ("rebase", "max_drawdown")
    assert incident["seen"].startswith("the reward has moved: 32 texts of step ")
    assert run.guard.state.rollbacks == before.rollbacks == 0
    assert run.guard.state.rewards.first == pytest.approx(-1.0)  # moved with the reward, by 1


def test_a_reward_that_cannot_be_asked_again_is_said_and_the_guard_acts_as_without(tokenizer, tmp_path: Path) -> None:
    broken: Levels = {}

    def reward(prompts, completions, **columns):
        if broken:
            raise RuntimeError("no more answers")
        return [1.0 + len(completion) for completion in completions]

    run = begun(tokenizer, tmp_path, reward)
    for number in range(40):
        sampled(run)
        step(run, float(number >= 20))
    broken["now"] = 1.0
    while not incidents.read(tmp_path):
        step(run, 0.0)
    (incident,) = incidents.read(tmp_path)
    assert incident["action"] == "roll back"
    assert "; earlier texts could not be scored again (" in incident["seen"]
    assert "no more answers" in incident["seen"]


@pytest.mark.parametrize("batch", [4, 64])
def test_the_newest_texts_are_kept_those_of_earlier_steps_where_a_step_has_few(tokenizer, tmp_path, batch: int) -> None:
    run = begun(tokenizer, tmp_path, levelled({"now": 0.0}), batch)
    for number in range(10):
        run.counters.step = number
        sampled(run)
    recent = run.recovery.texts.state_dict()["recent"]
    assert len(recent) == MOST
    assert [text["step"] for text in recent] == [9 - row // min(batch, MOST) for row in range(MOST)]


def test_scoring_again_leaves_the_runs_random_rewards_where_they_are_and_gives_the_same_after_a_resume(
    tokenizer, tmp_path: Path
) -> None:
    def reward(prompts, completions, **columns):
        return [random.random() for _ in completions]

    run = begun(tokenizer, tmp_path, reward)
    sampled(run)
    run.recovery.texts.mark()

    def stream() -> str:
        return str(run.scorer.random.state_dict())

    before = stream()
    first = run.recovery.texts.again(7)
    assert stream() == before
    resumed = Texts(run.scorer, run.args.seed)
    resumed.load_state_dict(json.loads(json.dumps(run.recovery.texts.state_dict())))
    assert isinstance(first, Rescored)
    assert resumed.again(7) == first
    assert resumed.again(8) != first
    assert first.before != first.now


def test_a_text_that_json_cannot_hold_is_not_kept(tokenizer, tmp_path: Path) -> None:
    run = begun(tokenizer, tmp_path, levelled({"now": 0.0}))
    indices = run.stream.take(8)
    rollout, _ = run.sampler.collect(run.train_dataset, run.train_prompts, indices)
    rollout.columns["odd"] = [{1, 2}, *[None] * 7]
    run.recovery.remember(rollout, 0)
    assert len(run.recovery.texts.state_dict()["recent"]) == 7
    assert Texts(run.scorer, 0).again(0) == "no earlier texts are kept that could be scored again"
