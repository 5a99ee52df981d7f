"""The evaluation's figures are those of loops over the completions; it moves no draw; its file is replaced whole."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import os
import random
import statistics
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast, TrainerCallback

from stable_rlhf import ConfigError, RewardError
from stable_rlhf.config import DataConfig
from stable_rlhf.data import split as data_split
from stable_rlhf.data.sources import load_prompts
from stable_rlhf.records import Measured, Rollout
from stable_rlhf.runs import evaluation
from stable_rlhf.training import evaluate
from tests.tiny_runs import letters, settings, trainer
from tests.tiny_updates import make_rollout, some_rows

HELD_OUT = [{"prompt": f"held out {i}"} for i in range(11)]


# -- figures ------------------------------------------------------------------------------------------------------


def measured(rollout: Rollout, seed: int) -> Measured:
    """Figures at every position, those under the mask far from the others."""
    generator = torch.Generator().manual_seed(seed)
    mask = rollout.tokens.mask & torch.tensor(rollout.valid)[:, None]

    def figures() -> Tensor:
        return torch.where(mask, torch.randn(mask.shape, generator=generator), 100.0)

    tokens = dataclasses.replace(rollout.tokens, mask=mask)
    values = torch.zeros(1, *mask.shape)
    return Measured(
        tokens=tokens, logp=figures(), ref_logp=figures() / 2, entropy=figures(), values=values, targets=values
    )


def narrowed(rollout: Rollout, width: int) -> Rollout:
    """Its responses in fewer columns: the parts of an evaluation differ in width."""
    tokens = dataclasses.replace(
        rollout.tokens, response=rollout.tokens.response[:, :width], mask=rollout.tokens.mask[:, :width]
    )
    return dataclasses.replace(rollout, tokens=tokens)


def test_the_figures_are_those_of_loops_over_the_rows_of_all_parts() -> None:
    """11 rows of two parts, three of them without a reward: those count as prompts and in no mean of rewards."""
    parts = [
        (rollout, measured(rollout, seed))
        for seed, rollout in enumerate(
            [
                make_rollout(4 + 3, skipped=(2, 5)),  # four tokens, so that pairs come twice
                narrowed(some_rows(make_rollout(4 + 3, skipped=(1,)), [1, 3, 7]), 4),
            ]
        )
    ]
    rewards: list[float] = []
    counts: list[int] = []
    kl, entropy, tokens, pairs = 0.0, 0.0, 0, []
    for rollout, figures in parts:
        for row, valid in enumerate(rollout.valid):
            said = [t for t, m in zip(rollout.tokens.response[row], rollout.tokens.mask[row], strict=True) if m]
            counts.append(len(said))
            pairs += [(int(a), int(b)) for a, b in itertools.pairwise(said)]
            if valid:
                rewards.append(rollout.scores[row])
                for at in range(len(said)):
                    kl += float(figures.logp[row, at]) - float(figures.ref_logp[row, at])
                    entropy += float(figures.entropy[row, at])
                    tokens += 1
    found = evaluate.evaluation_metrics(parts)
    assert len(set(pairs)) < len(pairs)
    assert (len(rewards), len(counts)) == (8, 11)
    assert found == {
        "reward": pytest.approx(statistics.fmean(rewards), rel=1e-12),
        "reward_se": pytest.approx(statistics.stdev(rewards) / math.sqrt(8), rel=1e-12),
        "kl": pytest.approx(kl / tokens, rel=1e-6),
        "entropy": pytest.approx(entropy / tokens, rel=1e-6),
        "distinct_2": pytest.approx(len(set(pairs)) / len(pairs), rel=1e-12),
        "length": pytest.approx(statistics.fmean(counts), rel=1e-12),
        "prompts": 11,
    }


def test_a_single_reward_has_no_standard_error_also_among_more_rows() -> None:
    rollout = make_rollout(50, skipped=(0, 1, 2, 4, 5, 6, 7))
    found = evaluate.evaluation_metrics([(rollout, measured(rollout, 0))])
    assert (found["reward"], found["reward_se"], found["prompts"]) == (2.0, None, 8)


def some(prompts: list[Any], completions: list[Any], **columns: Any) -> list[float | None]:
    """None for every second of the held-out prompts."""
    scores = letters(prompts, completions)
    odd = [int(prompt.removeprefix("held out ")) % 2 for prompt in prompts]
    return [None if skip else score for skip, score in zip(odd, scores, strict=True)]


def test_samples_are_the_first_16_with_no_reward_where_there_is_none(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    data = [{"prompt": f"held out {i}"} for i in range(18)]
    run = trainer(settings(tmp_path / "run"), tokenizer, some, eval_dataset=data)
    figures, samples = evaluate.evaluate(
        run.passes, run.sampler, run.eval_dataset, run.eval_prompts, run.args.max_steps
    )
    assert [sample["prompt"] for sample in samples] == [row["prompt"] for row in data[:16]]
    assert [sample["reward"] for sample in samples] == some(
        [row["prompt"] for row in data[:16]], [sample["completion"] for sample in samples]
    )
    assert figures["prompts"] == 18


# -- its draws ----------------------------------------------------------------------------------------------------


def seed_all(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def draws() -> tuple[float, float, float]:
    return random.random(), float(np.random.rand()), torch.rand(()).item()


def by_chance(prompts: list[Any], completions: list[Any], **columns: Any) -> list[float]:
    return [score + sum(draws()) for score in letters(prompts, completions)]


def test_an_evaluation_draws_the_same_whatever_was_drawn_before_and_moves_no_draw_after(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    run = trainer(settings(tmp_path / "run"), tokenizer, by_chance, eval_dataset=HELD_OUT)
    seen = []
    for seed in (1, 2):
        seed_all(seed)
        seen.append(run.evaluate())
        after = draws()
        seed_all(seed)
        assert after == draws()
    assert seen[0] == seen[1]


def test_a_reward_draws_the_same_in_every_evaluation(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    def drawn(prompts: list[Any], completions: list[Any]) -> list[float]:
        return [random.random() for _ in prompts]

    run = trainer(settings(tmp_path), tokenizer, drawn, eval_dataset=[{"prompt": "the cat"}, {"prompt": "a dog"}])
    first = run.evaluate()
    run.scorer.random.seed(99)
    assert run.evaluate() == first


def test_an_evaluation_that_fails_moves_no_draw_either(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    def fails(prompts: list[Any], completions: list[Any], **columns: Any) -> list[float]:
        draws()
        raise TimeoutError("no answer")

    run = trainer(settings(tmp_path / "run"), tokenizer, fails, eval_dataset=HELD_OUT)
    seed_all(3)
    with pytest.raises(RewardError, match="no answer"):
        run.evaluate()
    after = draws()
    seed_all(3)
    assert after == draws()


@pytest.mark.parametrize("failing", [2, 4])
def test_an_evaluation_that_failed_is_made_up_for_by_the_resume(
    failing: int, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    """In the middle, and after the last step; the best so far is then that one, whose checkpoint stays."""

    def trained(folder: str, fails: int | None = None, resumed: bool = False) -> Any:
        def reward(prompts: list[Any], completions: list[Any], trainer_state: Any, **columns: Any) -> list[float]:
            if trainer_state.global_step == fails and prompts[0] == HELD_OUT[0]["prompt"]:
                raise TimeoutError("no answer")
            return [float(sum(letter in "etaoin" for letter in text)) for text in completions]

        config = settings(
            tmp_path / folder,
            max_steps=4,
            eval_steps=2,
            save_steps=0,
            save_total_limit=1,
            metric_for_best_model="length",
            reward={"accept_changed": True},
        )
        run = trainer(config, tokenizer, reward, eval_dataset=HELD_OUT)
        run.train(resume_from_checkpoint=resumed)
        return run

    whole = trained("whole")
    for _ in range(2):
        with pytest.raises(RewardError, match=f"no answer.*continues from step {failing}"):
            trained("parts", fails=failing, resumed=(tmp_path / "parts").exists())
    parts = trained("parts", resumed=True)
    assert evaluation.read(parts.run_dir) == evaluation.read(whole.run_dir)
    assert [figures["step"] for figures in evaluation.read(parts.run_dir)["during"]] == [2, 4]
    assert parts.counters == whole.counters
    found = [{path.name for path in (run.run_dir / "checkpoints").iterdir()} for run in (whole, parts)]
    assert found[0] == found[1]
    for name in found[0]:  # the best so far is saved again as the best
        counters = [
            json.loads((run.run_dir / "checkpoints" / name / "state.json").read_text())["parts"]["counters"]
            for run in (whole, parts)
        ]
        assert counters[0] == counters[1]
    logged = [
        [{name: value for name, value in entry.items() if name.startswith("eval_")} for entry in run.state.log_history]
        for run in (whole, parts)
    ]
    assert logged[0] == logged[1]


def test_callbacks_are_given_the_figures_of_both_sides(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    given: list[dict[str, Any]] = []

    class Record(TrainerCallback):
        def on_evaluate(self, args, state, control, metrics=None, **kwargs) -> None:
            given.append(metrics)

    config = settings(tmp_path / "run", max_steps=1)
    result = trainer(config, tokenizer, eval_dataset=HELD_OUT, callbacks=[Record()]).train()
    sides = [{f"eval_{name}": value for name, value in result[side].items()} for side in ("before", "after")]
    assert given == [{**sides[0], "epoch": 0.0}, {**sides[1], "epoch": 1.0}]
    assert given[0] != given[1]


# -- evaluation.json ----------------------------------------------------------------------------------------------

SIDE = {"reward": 1.0}


def sample(prompt: str, completion: str, reward: float) -> dict[str, Any]:
    return {"prompt": prompt, "completion": completion, "reward": reward}


def test_before_begins_the_file_anew_and_after_adds_to_it(tmp_path: Path) -> None:
    for text in ("of a run that never began", "b"):
        evaluation.record(tmp_path, "before", SIDE, [sample(text, text, 1.0)])
        evaluation.record(tmp_path, "after", {"reward": 2.0}, [sample(text, text + "!", 2.0)])
    evaluation.record(tmp_path, "before", SIDE, [sample("p", "c", 0.5)])
    known = {"before": SIDE, "samples": [{"prompt": "p", "before": "c", "reward_before": 0.5}]}
    assert evaluation.read(tmp_path) == known
    evaluation.record(tmp_path, "after", {"reward": 2.0}, [sample("p", "d", 0.75)])
    both = {"prompt": "p", "before": "c", "reward_before": 0.5, "after": "d", "reward_after": 0.75}
    assert evaluation.read(tmp_path) == {"before": SIDE, "after": {"reward": 2.0}, "samples": [both]}
    evaluation.forget_after(tmp_path, 0)
    assert evaluation.read(tmp_path) == known


@pytest.mark.parametrize("change", ["after", "forgotten"])
def test_the_file_is_replaced_and_not_written_over(tmp_path: Path, change: str) -> None:
    """Another name of the same file keeps what it was: whoever reads, or is left by a kill, has a whole one."""
    evaluation.record(tmp_path, "before", SIDE, [sample("p", "c", 0.5)])
    if change == "forgotten":
        evaluation.record(tmp_path, "after", SIDE, [sample("p", "d", 0.5)])
    text = (tmp_path / "evaluation.json").read_text()
    os.link(tmp_path / "evaluation.json", tmp_path / "kept.json")
    if change == "forgotten":
        evaluation.forget_after(tmp_path, 0)
    else:
        evaluation.record(tmp_path, "after", SIDE, [sample("p", "d", 0.5)])
    assert (tmp_path / "kept.json").read_text() == text
    assert (tmp_path / "evaluation.json").read_text() != text


def test_long_prompts_and_completions_are_cut_with_a_count(tmp_path: Path) -> None:
    known = evaluation.record(tmp_path, "before", SIDE, [sample("p" * 20_003, "c" * 20_001, 1.0)])
    (kept,) = known["samples"]
    assert kept["prompt"] == "p" * 20_000 + "… (3 more characters)"
    assert kept["before"] == "c" * 20_000 + "… (1 more character)"
    (kept,) = evaluation.record(tmp_path, "after", SIDE, [sample("p", "d" * 20_000, 1.0)])["samples"]
    assert kept["after"] == "d" * 20_000


# -- which prompts are held out -----------------------------------------------------------------------------------


def written(path: Path, prompts: list[Any]) -> str:
    path.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts))
    return str(path)


def split(tmp_path: Path, seed: int = 0, **data: Any) -> tuple[list[Any], list[Any]]:
    train, held_out = data_split.split_datasets(DataConfig(**data), seed, None, None)
    return train.dataset["prompt"][:], held_out.dataset["prompt"][:] if held_out is not None else []


def test_rows_are_held_out_by_the_seed_and_one_at_least_is_left(tmp_path: Path) -> None:
    prompts = [f"prompt {i}" for i in range(40)]
    file = written(tmp_path / "a.jsonl", prompts)
    first, again, other = (split(tmp_path, seed, train=file, eval_size=8) for seed in (5, 5, 6))
    assert first == again
    assert set(first[1]) != set(other[1])
    assert len(first[1]) == 8
    assert sorted(first[0] + first[1]) == sorted(prompts)
    assert split(tmp_path, train=file, eval_size=0, limit=3) == (prompts[:3], [])
    assert len(split(tmp_path, train=file, eval_size=39)[0]) == 1
    with pytest.raises(ConfigError, match=r"data\.eval_size=40: the training set has only 40 rows; lower it or set"):
        split(tmp_path, train=file, eval_size=40)


def test_prompts_that_all_begin_alike_leave_nothing_to_train_on(tmp_path: Path) -> None:
    file = written(tmp_path / "a.jsonl", ["same"] * 10)
    with pytest.raises(ConfigError, match=r"data\.eval_size=2: every training prompt begins like a held-out one"):
        split(tmp_path, train=file, eval_size=2)


def test_conversations_are_told_apart_by_the_user_and_not_by_the_system_message(tmp_path: Path) -> None:
    chats = [
        [{"role": "system", "content": f"be kind, {i}"}, {"role": "user", "content": f"question {i // 2}"}]
        for i in range(20)
    ]
    train, held_out = split(tmp_path, train=written(tmp_path / "a.jsonl", chats), eval_size=4)
    assert {chat[1]["content"] for chat in train}.isdisjoint(chat[1]["content"] for chat in held_out)
    assert len(held_out) == 4
    alike = [[{"role": "system", "content": "be kind"}, {"role": "user", "content": f"question {i}"}] for i in range(9)]
    train, held_out = split(tmp_path, train=written(tmp_path / "b.jsonl", alike), eval_size=4)
    assert (len(train), len(held_out)) == (5, 4)
    told = [[{"role": "system", "content": f"say {i}"}] for i in range(6)]  # nothing of a user in it
    train, held_out = split(tmp_path, train=written(tmp_path / "c.jsonl", told), eval_size=2)
    assert (len(train), len(held_out)) == (4, 2)


def test_named_held_out_prompts_are_the_first_of_their_own_split(tmp_path: Path) -> None:
    train = written(tmp_path / "a.jsonl", ["a", "b", "c"])
    held_out = written(tmp_path / "b.jsonl", ["d", "e", "f"])
    assert split(tmp_path, train=train, eval=held_out, eval_size=2) == (["a", "b", "c"], ["d", "e"])
    builtin = load_prompts("builtin", split="eval", limit=3)["prompt"][:]
    assert split(tmp_path, train="builtin", limit=2, eval_size=3) == (
        load_prompts("builtin", limit=2)["prompt"][:],
        builtin,
    )
