"""Several completions of a prompt: which prompts a step takes, what is counted, and what an evaluation samples."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import pytest
from transformers import PreTrainedTokenizerFast

from stable_rlhf.data import PromptStream
from tests.tiny_runs import PROMPTS, letters, rows, settings, trainer

GROUPS: dict[str, Any] = {"rollout": {"num_generations": 4}}


def run_of(
    tokenizer: PreTrainedTokenizerFast, folder: Path, preset: str = "safe-grpo", **overrides: Any
) -> tuple[Any, list[list[str]]]:
    """(a finished run of 4 steps of 8 completions, the prompts of each call of its reward)."""
    asked: list[list[str]] = []

    def reward(prompts: list[Any], completions: list[Any], **columns: Any) -> list[float]:
        asked.append(list(prompts))
        names = {prompt: number for number, prompt in enumerate(PROMPTS)}
        assert columns["number"] == [names.get(prompt, 99) for prompt in prompts]
        return letters(prompts, completions)

    given = {"train_dataset": datasets.Dataset.from_dict({"prompt": PROMPTS, "number": list(range(len(PROMPTS)))})}
    given |= {name: overrides.pop(name) for name in ("eval_dataset",) if name in overrides}
    made = trainer(settings(folder, preset, **{**GROUPS, **overrides}), tokenizer, reward=reward, **given)
    made.train()
    return made, asked


@pytest.mark.parametrize("preset", ["safe", "safe-grpo"])
def test_a_step_takes_fewer_prompts_and_samples_each_several_times_side_by_side(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path, preset: str
) -> None:
    made, asked = run_of(tokenizer, tmp_path / "run", preset)
    stream = PromptStream(len(PROMPTS), seed=0)
    assert asked == [[PROMPTS[row] for row in stream.take(2) for _ in range(4)] for _ in range(4)]
    assert [row["episode"] for row in rows(made.run_dir)] == [8, 16, 24, 32]
    assert made.epoch == 1.0  # 4 steps of 2 of the 8 prompts
    timings = [json.loads(line) for line in (made.run_dir / "timings.jsonl").read_text().splitlines()]
    assert [row["epoch"] for row in timings] == [0.25, 0.5, 0.75, 1.0]
    assert made.state.num_train_epochs == 1
    assert all(0 <= row["frac_reward_zero_std"] <= 1 for row in rows(made.run_dir))
    assert len({row["objective/scores_std"] for row in rows(made.run_dir)}) == 4  # the completions of a prompt differ


def test_a_prompt_that_was_cut_is_counted_once(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    made, asked = run_of(tokenizer, tmp_path / "run", data={"max_prompt_length": 3})
    longer = [len({prompt for prompt in prompts if len(prompt) > 3}) for prompts in asked]
    assert [row["prompts/truncated"] for row in rows(made.run_dir)] == longer
    assert max(longer) > 0


def test_an_evaluation_samples_one_completion_of_each_held_out_prompt(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    held_out = [{"prompt": f"held out {i}", "number": 99} for i in range(11)]
    made, asked = run_of(tokenizer, tmp_path / "run", eval_dataset=held_out)
    known = json.loads((made.run_dir / "evaluation.json").read_text())
    assert (known["before"]["prompts"], known["after"]["prompts"]) == (11, 11)
    evaluated = [prompts for prompts in asked if "held out" in prompts[0]]
    assert [len(prompts) for prompts in evaluated] == [8, 3, 8, 3]
    assert len({prompt for prompts in evaluated for prompt in prompts}) == 11


def test_a_stream_gives_the_same_rows_and_reads_no_more_of_them_than_it_needs(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    read: list[int] = []

    def endless() -> Any:
        for number in range(1000):
            read.append(number)
            yield {"prompt": PROMPTS[number % len(PROMPTS)], "number": number % len(PROMPTS)}

    made = trainer(
        settings(tmp_path / "run", "safe-grpo", **GROUPS),
        tokenizer,
        train_dataset=datasets.IterableDataset.from_generator(endless),
    )
    assert len(set(read)) <= 3  # two prompts a step, and what tells the columns
    made.train()
    assert [row["episode"] for row in rows(made.run_dir)] == [8, 16, 24, 32]
    assert max(read) == 8  # one is read ahead of a step


def test_a_policy_without_a_critic_is_saved_whole_and_says_so(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    made, _ = run_of(tokenizer, tmp_path / "run")
    card = (made.run_dir / "final" / "README.md").read_text()
    assert "`value_heads.safetensors` is empty: there was no critic." in card
    assert "4 of 2 prompts with 4 completions each" in card
    (last,) = rows(made.run_dir)[-1:]
    of_critic = ("val/explained_variance", "val/mean", "loss/value_avg", "grad_norm/critic", "lr_critic")
    assert not {*of_critic, "val/returns_mean", "val/clipfrac_avg", "safe/target_gap"} & last.keys()
    assert last["lr"] == 1e-2


def test_the_preview_bounds_the_updates_and_the_controller_acts(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    made, _ = run_of(tokenizer, tmp_path / "run", max_steps=12, kl={"settings": {"budget": 0.05}})
    for row in rows(made.run_dir):
        assert row["safe/moved_kl"] <= row["safe/update_kl"]
        assert 0.15 * 0.02 * row["safe/threshold"] <= row["safe/update_kl"] <= 0.02 * row["safe/threshold"]
    coefficients = [row["safe/kl_coef"] for row in rows(made.run_dir)]
    assert len(set(coefficients)) > 6
