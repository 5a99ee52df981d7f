"""A run writes down what happened: figures of the texts and seconds they name, and files whole or not at all."""

from __future__ import annotations

import json
import math
import os
import random
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from transformers import PreTrainedTokenizerFast, TrainerCallback

from stable_rlhf.checkpoints import store
from stable_rlhf.errors import DivergenceError, PromptError
from tests.tiny_runs import PROMPTS, finished, letters, policy, rows, settings, trainer


class Rewards:
    """``letters``, None for the prompts in ``skip``; keeps every rollout's prompts and scores."""

    def __init__(self, skip: tuple[str, ...] = (), shift: float = 3.0) -> None:
        self.skip, self.shift = skip, shift
        self.prompts: list[list[str]] = []
        self.scores: list[list[float]] = []

    def __call__(self, prompts: list[str], completions: list[str], **columns: Any) -> list[float | None]:
        scores = [
            None if prompt in self.skip else score + self.shift
            for prompt, score in zip(prompts, letters(prompts, completions), strict=True)
        ]
        self.prompts.append(list(prompts))
        self.scores.append([score for score in scores if score is not None])
        return scores


# -- metrics.jsonl ------------------------------------------------------------------------------------------------


def test_the_running_reward_is_of_all_rewards_so_far_and_of_no_row_without_one(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    rewards = Rewards(skip=("hello", "w"))  # a 0 for them would be far from the others, which are 3 to 5
    found = rows(finished(settings(tmp_path / "run"), tokenizer, rewards).run_dir)
    seen: list[float] = []
    for row, scores in zip(found, rewards.scores, strict=True):
        seen += scores
        assert len(scores) == 6
        assert row["completions/skipped"] == 2
        assert row["objective/scores"] == pytest.approx(statistics.fmean(scores), rel=1e-12)
        assert row["objective/scores_std"] == pytest.approx(statistics.pstdev(scores), rel=1e-12)
        assert row["safe/reward_mean"] == pytest.approx(statistics.fmean(seen), rel=1e-9)
        assert row["safe/reward_std"] == pytest.approx(statistics.pstdev(seen), rel=1e-9)
        assert row["objective/rlhf_reward"] == row["objective/scores"] + row["objective/non_score_reward"]
    assert len({row["objective/non_score_reward"] for row in found}) > 1


def test_the_guard_weighs_a_mean_reward_by_the_rows_that_had_one(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    """The square of its standard error: the rewards' variance / (6 - 1), in the state that a checkpoint holds."""
    rewards = Rewards(skip=("hello", "w"))
    run = finished(settings(tmp_path / "run"), tokenizer, rewards)
    _, state = store.load(run.run_dir / "checkpoints" / "step-000004")
    expected = [statistics.pvariance(scores) / 5 for scores in rewards.scores]
    assert state["parts"]["guard"]["rewards"]["errors"] == pytest.approx(expected, rel=1e-9)


def test_each_step_counts_its_own_prompts_and_those_of_them_that_were_cut(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    rewards = Rewards()
    config = settings(tmp_path / "run", rollout={"batch_size": 4}, max_steps=3, data={"max_prompt_length": 2})
    found = rows(finished(config, tokenizer, rewards).run_dir)
    assert [row["episode"] for row in found] == [4, 8, 12]
    cut = [sum(len(prompt) > 2 for prompt in prompts) for prompts in rewards.prompts]
    assert [row["prompts/truncated"] for row in found] == cut
    assert len(set(cut)) > 1
    assert max(cut) < sum(len(prompt) > 2 for prompt in PROMPTS)


def test_the_seconds_of_a_step_are_those_of_its_parts_each_once(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    def slow(prompts: list[Any], completions: list[Any], **columns: Any) -> list[float]:
        time.sleep(0.1)
        return letters(prompts, completions)

    began = time.perf_counter()
    run = finished(settings(tmp_path / "run", max_steps=2), tokenizer, slow)
    elapsed = time.perf_counter() - began
    timings = [json.loads(line) for line in (run.run_dir / "timings.jsonl").read_text().splitlines()]
    parts = ("rollout_s", "scoring_s", "logprobs_s", "control_s", "update_s")
    assert [timing["step"] for timing in timings] == [0, 1]
    assert sum(timing["total_s"] for timing in timings) < elapsed
    for timing, row in zip(timings, rows(run.run_dir), strict=True):
        assert timing.keys() == {"step", "epoch", *parts, "total_s", "tokens_per_s", "memory_gb"}
        assert all(timing[name] > 0 for name in parts)
        assert timing["scoring_s"] >= 0.1
        rest = timing["total_s"] - sum(timing[name] for name in parts)
        assert rest > 0  # the row itself is made after the update
        tokens = row["completions/mean_length"] * 8
        assert timing["tokens_per_s"] * timing["total_s"] == pytest.approx(tokens, rel=1e-12)


def test_the_seconds_of_a_part_are_spent_in_that_part(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a clock that goes on where it is told to: 1 s in a reward, 10 in a decision, 100 in an optimiser step."""
    run = trainer(settings(tmp_path / "run", max_steps=1, optim={"num_iterations": 1}), tokenizer, letters)
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])

    def after(owner: Any, name: str, seconds: float) -> None:
        real = getattr(owner, name)

        def slow(*arguments: Any, **named: Any) -> Any:
            result = real(*arguments, **named)
            now[0] += seconds
            return result

        monkeypatch.setattr(owner, name, slow)

    after(run.sampler.decoder, "sample", 0.25)
    after(run.scorer, "score", 1.0)
    after(run.passes, "measure", 5.0)
    after(run.controller, "observe", 30.0)
    after(run.passes, "learn", 200.0)
    after(run, "set_learning_rates", 7000.0)
    run.train()
    (timing,) = [json.loads(line) for line in (run.run_dir / "timings.jsonl").read_text().splitlines()]
    measured = timing["logprobs_s"] / 5
    learned = timing["update_s"] / 200
    assert measured == learned == 2  # minibatches
    assert timing == {
        "step": 0,
        "epoch": 1.0,
        "rollout_s": 0.25,
        "scoring_s": 1.0,
        "logprobs_s": 10.0,
        "control_s": 30.0,
        "update_s": 400.0,
        "total_s": 7441.25,
        "tokens_per_s": pytest.approx(rows(run.run_dir)[0]["completions/mean_length"] * 8 / 7441.25, rel=1e-12),
        "memory_gb": pytest.approx(psutil.Process().memory_info().rss / 1e9, rel=0.5),  # of this process
    }


def test_an_update_is_looked_at_once_when_the_first_was_within_its_bound(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first two also with weights that are only nudged, the first after each of its four optimiser steps."""
    calls: list[int] = []
    counts: list[int] = []

    class Count(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs) -> None:
            counts.append(len(calls))
            calls.clear()

    config = settings(tmp_path / "run", optim={"learning_rate": 1e-6}, rollout={"batch_size": 8}, max_steps=3)
    run = trainer(config, tokenizer, callbacks=[Count()])
    real = run.passes.hidden
    monkeypatch.setattr(run.passes, "hidden", lambda *given: (calls.append(1), real(*given))[1])
    run.train()
    assert counts == [1 + 4, 1 + 1, 1]
    assert [row["safe/looks"] for row in rows(run.run_dir)] == [1 + 4, 1 + 1, 1]


# -- a run is a function of its seed ------------------------------------------------------------------------------


def draws() -> float:
    return random.random() + float(np.random.rand()) + torch.rand(()).item()


def by_chance(prompts: list[Any], completions: list[Any], **columns: Any) -> list[float]:
    return [score + draws() for score in letters(prompts, completions)]


@pytest.mark.parametrize("seed", [3, 2**32 + 3])
def test_a_run_is_a_function_of_its_seed_whatever_was_drawn_before(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path, seed: int
) -> None:
    written = []
    for turn in range(2):
        model = policy(tokenizer)
        random.seed(turn)
        np.random.seed(turn)
        torch.manual_seed(turn)
        run = trainer(settings(tmp_path / str(turn), max_steps=2, seed=seed), tokenizer, by_chance, model=model)
        for _ in range(turn):
            draws()  # between the making and the training, too
        run.train()
        written.append((run.run_dir / "metrics.jsonl").read_bytes())
    assert written[0] == written[1]


# -- figures that are not finite ----------------------------------------------------------------------------------


def test_weights_that_are_not_finite_after_an_update_leave_no_row(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    """Though every figure of the update, measured before its last step, is finite."""
    config = settings(tmp_path / "run", guard={"enabled": False}, optim={"preview": False})
    run = trainer(config, tokenizer)
    steps: list[int] = []

    def spoil(*_: Any) -> None:
        steps.append(1)
        if len(steps) == 2 * 4:  # the last of the second step
            with torch.no_grad():
                run.model.policy.get_input_embeddings().weight[5] = math.inf

    run.optimizer.register_step_post_hook(spoil)
    with pytest.raises(DivergenceError, match=r"step 1: the norm of the weights is (inf|nan)"):
        run.train()
    assert [row["step"] for row in rows(run.run_dir)] == [0]


def test_values_that_are_not_finite_are_found_before_the_update(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    class Breaks(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs) -> None:
            if state.global_step == 2:
                with torch.no_grad():
                    next(iter(run.model.heads[0].parameters())).fill_(math.nan)

    run = trainer(settings(tmp_path / "run", guard={"enabled": False}), tokenizer, callbacks=[Breaks()])
    updates: list[int] = []
    run.optimizer.register_step_post_hook(lambda *_: updates.append(1))
    with pytest.raises(DivergenceError, match=r"step 2: val/mean is nan"):
        run.train()
    assert len(updates) == 2 * 4
    assert [row["step"] for row in rows(run.run_dir)] == [0, 1]


# -- files, whole or not at all -----------------------------------------------------------------------------------


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_final_folder_that_cannot_be_written_whole_leaves_the_one_before(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = finished(settings(tmp_path / "run", max_steps=1), tokenizer)
    final = run.run_dir / "final"
    (final / "left over").write_text("of a model before")
    before = contents(final)
    with torch.no_grad():
        run.model.policy.get_input_embeddings().weight.add_(1.0)

    def full(*arguments: Any, **named: Any) -> None:
        raise OSError("no space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(type(run.processing_class), "save_pretrained", full)
        with pytest.raises(OSError, match="no space left"):
            run.save_final()
    assert contents(final) == before
    run.save_final()
    assert contents(final).keys() == before.keys() - {"left over", "README.md"}  # the card comes with the figures
    assert contents(final)["model.safetensors"] != before["model.safetensors"]


def test_config_yaml_is_replaced_and_not_written_over(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    """Another name of the same file keeps what it was: whoever reads, or is left by a kill, has a whole one."""
    run = finished(settings(tmp_path / "run", max_steps=2), tokenizer)
    text = (run.run_dir / "config.yaml").read_text()
    os.link(run.run_dir / "config.yaml", tmp_path / "kept.yaml")
    trainer(settings(tmp_path / "run", max_steps=3), tokenizer).train(resume_from_checkpoint=True)
    assert (tmp_path / "kept.yaml").read_text() == text
    assert (run.run_dir / "config.yaml").read_text() == text.replace("max_steps: 2", "max_steps: 3")


def test_incidents_of_a_run_that_was_never_saved_are_not_those_of_the_next(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    (tmp_path / "run").mkdir()
    incident = {"step": 0, "action": "stop", "rule": "r", "seen": "s", "done": "d", "advice": "a", "figures": {}}
    (tmp_path / "run" / "incidents.jsonl").write_text(json.dumps(incident) + "\n")
    run = finished(settings(tmp_path / "run", max_steps=1), tokenizer)
    file = run.run_dir / "incidents.jsonl"
    assert not file.exists() or file.read_text() == ""


def test_a_prompt_that_leaves_no_room_in_the_model_is_refused_before_anything_is_written(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    config = settings(tmp_path / "run", rollout={"max_completion_length": 64 - 8})
    with pytest.raises(PromptError, match=r"row 7: .*9 tokens.*context of 64.*data\.max_prompt_length to 8 "):
        trainer(config, tokenizer)
    assert not (tmp_path / "run").exists()
