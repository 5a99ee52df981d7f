"""Rewards and callbacks of a run: they do not change it, and it does not change them."""

from __future__ import annotations

import os
import random
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from transformers import PreTrainedTokenizerFast, TrainerCallback

from stable_rlhf.checkpoints import RandomState
from stable_rlhf.errors import RewardError
from tests.tiny_runs import PROMPTS, letters, rows, settings, trainer

HELD_OUT = datasets.Dataset.from_dict({"prompt": ["held out", "another"]})


def draws() -> list[float]:
    return [random.random(), float(np.random.random()), float(torch.rand(()))]


class Meddles(TrainerCallback):
    """A reward and a callback that change whatever they can reach, and keep the numbers that they draw."""

    def __init__(self) -> None:
        self.model: Any = None
        self.seen: dict[str, list[Any]] = {}

    def meddle(self, event: str, step: int) -> None:
        self.seen.setdefault(event, []).append((step, draws()))
        torch.manual_seed(0), random.seed(0), np.random.seed(0)
        if self.model is not None:
            self.model.train()
        torch.set_grad_enabled(False)
        torch.set_default_dtype(torch.float64)
        torch.set_num_threads(torch.get_num_threads() % 2 + 1)
        os.chdir("/")

    def on_step_begin(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        self.model = given["model"]
        self.meddle("begin", state.global_step)

    def on_step_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        self.meddle("end", state.global_step)

    def on_save(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        self.meddle("save", state.global_step)

    def on_evaluate(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        self.meddle("evaluate", state.global_step)

    def reward(self, prompts: list[Any], completions: list[Any], trainer_state: Any, **columns: Any) -> list[float]:
        scores = letters(prompts, completions)
        self.meddle("reward", trainer_state.global_step)
        prompts.clear(), completions.clear()
        trainer_state.global_step = -1
        return scores


def named_letters(function: Any) -> Any:
    """The function under the name of ``letters``, in metrics and settings."""

    def letters(**arguments: Any) -> list[float]:
        return function(**arguments)

    letters.__qualname__, letters.__module__ = "letters", "tests.tiny_runs"
    return letters


def dropping(tokenizer: PreTrainedTokenizerFast) -> Any:
    """A policy with dropout, for a mode that is wrong to be seen."""
    from tests.tiny_runs import policy

    made = policy(tokenizer)
    made.config.attention_dropout = 0.5
    for layer in made.model.layers:
        layer.self_attn.attention_dropout = 0.5
    return made


def test_a_run_is_the_same_whatever_rewards_and_callbacks_do(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    threads, here = torch.get_num_threads(), Path.cwd()
    quiet = trainer(
        settings(tmp_path / "quiet", max_steps=2), tokenizer, model=dropping(tokenizer), eval_dataset=HELD_OUT
    )
    quiet.train()
    left = RandomState().state_dict()
    user = Meddles()
    loud = trainer(
        settings(tmp_path / "loud", max_steps=2),
        tokenizer,
        named_letters(user.reward),
        model=dropping(tokenizer),
        eval_dataset=HELD_OUT,
        callbacks=[user],
    )
    loud.train()
    for name in ("metrics.jsonl", "evaluation.json"):
        assert (tmp_path / "loud" / name).read_bytes() == (tmp_path / "quiet" / name).read_bytes()
    assert torch.equal(RandomState().state_dict()["cpu"], left["cpu"])
    assert (torch.is_grad_enabled(), torch.get_default_dtype()) == (True, torch.float32)
    assert (torch.get_num_threads(), Path.cwd()) == (threads, here)


class Draws(TrainerCallback):
    """Keeps the numbers that a reward and a callback draw."""

    def __init__(self) -> None:
        self.seen: dict[tuple[str, int], Any] = {}

    def on_train_begin(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        draws()

    def on_step_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        self.seen["end", state.global_step] = draws()

    def on_save(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        self.seen["save", state.global_step] = draws()

    def reward(self, trainer_state: Any, **arguments: Any) -> list[float]:
        self.seen["reward", trainer_state.global_step] = draws()
        return letters(arguments["prompts"], arguments["completions"])


def test_a_resumed_run_gives_user_code_the_numbers_of_an_uninterrupted_one(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    whole, first, second = Draws(), Draws(), Draws()
    for steps, user, folder in ((4, whole, "whole"), (2, first, "parts"), (4, second, "parts")):
        torch.manual_seed(steps)  # whatever came before
        config = settings(tmp_path / folder, max_steps=steps)
        run = trainer(config, tokenizer, named_letters(user.reward), callbacks=[user])
        run.train(resume_from_checkpoint=user is second)
    assert first.seen | second.seen == whole.seen
    assert {name for name, _ in second.seen} == {"end", "save", "reward"}
    numbers = [number for drawn in whole.seen.values() for number in drawn]
    assert len(set(numbers)) == len(numbers)


def test_a_checkpoint_that_a_callback_saves_has_the_random_numbers_of_the_run(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    class Saves(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
            if state.global_step == 1:
                run.save_checkpoint()
                run.load_checkpoint(tmp_path / "run" / "checkpoints" / "step-000001")

    run = trainer(settings(tmp_path / "run", max_steps=2, save_steps=0), tokenizer, callbacks=[Saves()])
    run.train()
    whole = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    trainer(settings(tmp_path / "quiet", max_steps=2, save_steps=0), tokenizer).train()
    assert (tmp_path / "quiet" / "metrics.jsonl").read_bytes() == whole
    again = trainer(settings(tmp_path / "run", max_steps=2, save_steps=0), tokenizer)
    again.train(resume_from_checkpoint=tmp_path / "run" / "checkpoints" / "step-000001")
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == whole


def test_an_evaluation_leaves_the_numbers_of_the_rewards_as_they_were(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    with_it, without = Draws(), Draws()
    for user, folder, held_out in ((with_it, "with", HELD_OUT), (without, "without", None)):
        config = settings(tmp_path / folder, max_steps=1)
        run = trainer(config, tokenizer, named_letters(user.reward), eval_dataset=held_out)
        run.step()
        run.end()
    assert with_it.seen["reward", 0] == without.seen["reward", 0]


def test_a_loop_of_the_users_own_cannot_leave_dropout_on(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    config = settings(tmp_path, max_steps=2, optim={"num_iterations": 1, "num_mini_batches": 1})
    run = trainer(config, tokenizer, model=dropping(tokenizer))
    layer = run.model.policy.get_decoder().layers[0].mlp

    def noisy(module: Any, inputs: Any, output: torch.Tensor) -> torch.Tensor:
        return output + torch.rand_like(output) if module.training else output  # what no name of a setting tells

    layer.register_forward_hook(noisy)
    for _ in range(2):
        run.model.policy.train()
        row = run.step()
        assert row is not None
        assert row["val/ratio"] == 1
        assert not any(module.training for module in run.model.modules())
    run.end()


# -- what functions get and record ----------------------------------------------------------------------------------


def test_functions_get_tokens_state_and_columns_and_record_figures_and_columns(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    seen: list[dict[str, Any]] = []

    def reward(prompts, completions, completion_ids, trainer_state, label, log_metric, log_extra):
        seen.append({"ids": completion_ids, "step": trainer_state.global_step, "of": trainer_state.max_steps})
        assert label == [int(prompt.split()[0]) for prompt in prompts]
        log_metric("half", len(seen))
        log_metric("half", torch.tensor(2.0))
        log_extra("doubled", [2 * value for value in label])
        log_extra("shout", [completion.upper() for completion in completions])
        assert [tokenizer.decode(ids, skip_special_tokens=True) for ids in completion_ids] == completions
        return [float(len(ids)) for ids in completion_ids]

    data = datasets.Dataset.from_dict({"prompt": [f"{i} {p}" for i, p in enumerate(PROMPTS)], "label": range(8)})
    config = settings(tmp_path, max_steps=2, log={"completions_steps": 1})
    trainer(config, tokenizer, reward, train_dataset=data).train()
    assert [(call["step"], call["of"]) for call in seen] == [(0, 2), (1, 2)]
    assert [row["user/half"] for row in rows(tmp_path)] == [1.5, 2.0]
    table = pq.read_table(tmp_path / "completions" / "step-000001.parquet").to_pylist()
    assert [row["score"] for row in table] == [row["length"] for row in table] == [len(ids) for ids in seen[1]["ids"]]
    assert all(row["doubled"] == 2 * int(row["prompt"].split()[0]) for row in table)
    assert [row["shout"] for row in table] == [row["completion"].upper() for row in table]


def test_special_tokens_are_shown_to_the_functions_that_ask_and_to_no_record(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    seen: dict[str, list[str]] = {}

    def plain(prompts, completions, **columns):
        seen["plain"] = completions
        return letters(prompts, completions)

    def asks(prompts, completions, completion_ids, **columns):
        seen["asks"] = completions
        assert completions == [tokenizer.decode(ids) for ids in completion_ids]
        return letters(prompts, completions)

    setattr(asks, "skip_special_tokens", False)  # noqa: B010
    model = dropping(tokenizer)
    model.generation_config.eos_token_id = list(range(len(tokenizer)))  # every completion is one token
    config = settings(tmp_path, max_steps=1, log={"completions_steps": 1})
    with torch.no_grad():
        model.lm_head.weight[tokenizer.eos_token_id] *= 0
        model.lm_head.weight[tokenizer.eos_token_id] += 100 * model.model.norm.weight.sign()
    run = trainer(config, tokenizer, [plain, asks], model=model)
    run.train()
    ends = [text.endswith(tokenizer.eos_token) for text in seen["asks"]]
    assert any(ends)
    assert [text.removesuffix(tokenizer.eos_token) for text in seen["asks"]] == seen["plain"]
    table = pq.read_table(tmp_path / "completions" / "step-000000.parquet").to_pylist()
    assert [row["completion"] for row in table] == seen["plain"]


@pytest.mark.parametrize(
    ("records", "message"),
    [
        (lambda log_metric, log_extra: log_metric("x", float("nan")), r"log_metric\('x', nan\): .* finite number"),
        (lambda log_metric, log_extra: log_metric("", 1.0), "name must be a text"),
        (lambda log_metric, log_extra: log_extra("x", [1]), r"give a list of 8 values, one a sample"),
        (lambda log_metric, log_extra: log_extra("score", [1] * 8), "a column of this name already"),
    ],
)
def test_what_cannot_be_recorded_is_named(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path, records: Any, message: str
) -> None:
    def reward(prompts, completions, log_metric, log_extra):
        records(log_metric, log_extra)
        return letters(prompts, completions)

    with pytest.raises(RewardError, match=message):
        trainer(settings(tmp_path), tokenizer, reward).train()
