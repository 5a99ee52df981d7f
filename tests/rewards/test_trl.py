"""Each row of the table in docs/rewards.md, "What TRL's GRPO accepts", is tried."""

from __future__ import annotations

import asyncio
import functools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaForCausalLM, TrainerState

from stable_rlhf.config import RewardConfig
from stable_rlhf.errors import RewardError, RewardInputError
from stable_rlhf.rewards import make_scorer, resolve_reward
from stable_rlhf.rewards.scorer import Scores
from tests.rewards.test_scorer import CHAT, tiny_config, tiny_model, word_tokenizer

DOCUMENT = Path(__file__).parents[2] / "docs" / "rewards.md"
PROMPTS, COMPLETIONS, IDS = ["a ", "b "], ["c", "d e"], [[5, 2], [6, 7, 2]]


def scored(
    rewards: Any,
    columns: dict[str, list[Any]] | None = None,
    prompts: Any = PROMPTS,
    tokenizers: Any = None,
    whole: Any = None,
    **settings: Any,
) -> Scores:
    """The scores of two samples, as in step 3 of a run."""
    state = TrainerState(global_step=3)
    device = torch.device("cpu")
    scorer = make_scorer(RewardConfig(**settings), rewards, tokenizers, device, trainer_state=lambda: state)
    scores = scorer.score(prompts, COMPLETIONS, columns or {}, [True, True], IDS, whole)
    assert state.global_step == 3
    return scores


def refused(rewards: Any, message: str, columns: dict[str, list[Any]] | None = None, **settings: Any) -> None:
    with pytest.raises(RewardError, match=message):
        scored(rewards, columns, **settings)


def given(rewards: Any = None, **settings: Any) -> dict[str, Any]:
    """The keyword arguments of a function that takes all."""
    seen: dict[str, Any] = {}

    def function(**arguments: Any) -> list[float]:
        seen.update(arguments)
        return [0.0, 1.0]

    scored(function, **settings)
    return seen


def lengths(prompts: Any, completions: Any, **kwargs: Any) -> list[float]:
    return [float(len(completion)) for completion in completions]


def constant(value: Any) -> Callable[..., Any]:
    return lambda prompts, completions, **kwargs: value


async def waits(prompts: Any, completions: Any, **kwargs: Any) -> list[float]:
    await asyncio.sleep(0)
    return [1.0, 2.0]


def one_or_a_list() -> None:
    assert scored(lengths).total == [1.0, 3.0]
    assert scored([lengths, lengths]).total == [2.0, 6.0]


def a_function() -> None:
    seen = given(prompts=[CHAT, CHAT])
    assert seen["prompts"] == [CHAT, CHAT]
    assert seen["completions"] == [[{"role": "assistant", "content": text}] for text in COMPLETIONS]


def completion_ids() -> None:
    trl = pytest.importorskip("trl.rewards", reason="trl is not installed: pip install 'stable-rlhf[reward]'")
    punished = trl.get_soft_overlong_punishment(max_completion_len=3, soft_punish_cache=2)  # one of TRL's own
    assert scored(punished).total == [-0.5, -1.0]
    assert given()["completion_ids"] == IDS


def trainer_state() -> None:
    def function(trainer_state: TrainerState, **kwargs: Any) -> list[float]:
        step, trainer_state.global_step = trainer_state.global_step, 9
        return [step, step]

    assert scored([function, function]).total == [6.0, 6.0]  # `scored` looks at the run's own


def log_metric() -> None:
    def function(log_metric: Any, **kwargs: Any) -> list[float]:
        log_metric("hits", 1), log_metric("hits", np.float32(2))
        return [0.0, 1.0]

    assert scored(function).metrics == {"hits": 1.5}


def log_extra() -> None:
    def function(log_extra: Any, **kwargs: Any) -> list[float]:
        log_extra("number", torch.tensor([1, 2]))
        log_extra("text", ["x", 3])
        return [0.0, 1.0]

    assert scored(function).extra == {"number": [1.0, 2.0], "text": ["x", "3"]}
    refused([function, function], "a column of this name already")


def every_column() -> None:
    columns = {"label": [1, {"a": [2]}], "completion": ["x", "y"]}
    seen = given(columns=columns)
    assert {name: seen[name] for name in columns} == columns
    refused(lengths, "column 'trainer_state' has the name of a reward argument", {"trainer_state": [1, 2]})


def environments() -> None:
    assert sorted(given()) == ["completion_ids", "completions", "log_extra", "log_metric", "prompts", "trainer_state"]


def without_kwargs() -> None:
    assert scored(lambda prompts, completions: [1, 2]).total == [1.0, 2.0]
    refused(lambda prompts, completions: [1, 2], "does not take 'label'", {"label": [1, 2]})


def partials() -> None:
    def scaled(prompts: Any, completions: Any, factor: float, **kwargs: Any) -> list[float]:
        return [factor * len(completion) for completion in completions]

    scores = scored([functools.partial(scaled, factor=2.0), functools.partial(waits)])
    assert scores.per_function == {"scaled": [2.0, 6.0], "waits": [1.0, 2.0]}


class Judge:
    def __init__(self, answer: Any = (1.0, 2.0)) -> None:
        self.answer = answer

    def __call__(self, prompts: Any, completions: Any, **kwargs: Any) -> Any:
        return list(self.answer)

    def method(self, **kwargs: Any) -> list[float]:
        return [3.0, 4.0]


class AsyncJudge:
    async def __call__(self, prompts: Any, completions: Any, **kwargs: Any) -> list[float]:
        return await waits(prompts, completions)


def objects() -> None:
    assert scored(Judge()).per_function == {"Judge": [1.0, 2.0]}


def lambdas_and_methods() -> None:
    scores = scored([lambda **kwargs: [5.0, 6.0], Judge().method])
    assert scores.per_function == {"<lambda>": [5.0, 6.0], "method": [3.0, 4.0]}


def asynchronous() -> None:
    meeting: list[asyncio.Barrier] = []

    async def meets(prompts: Any, completions: Any, **kwargs: Any) -> list[float]:
        meeting[:] = meeting or [asyncio.Barrier(2)]
        await asyncio.wait_for(meeting[0].wait(), timeout=10)
        return [1.0, 2.0]

    assert scored([meets, meets]).total == [2.0, 4.0]


def awaitables() -> None:
    assert scored([AsyncJudge(), lambda **kwargs: waits(**kwargs)]).total == [2.0, 4.0]


def named_model(folder: Path) -> None:
    scored_by_name = scored("builtin").total
    assert len(set(scored_by_name)) == 2
    LlamaForCausalLM(tiny_config()).save_pretrained(folder)
    word_tokenizer().save_pretrained(folder)
    with pytest.raises(RewardInputError, match=r"lacks 1 weights \(score\.weight\): they would be random"):
        scored(str(folder))


def model_object(folder: Path) -> None:
    tiny_model().save_pretrained(folder)
    word_tokenizer().save_pretrained(folder)
    model = type(tiny_model()).from_pretrained(folder)
    assert scored(model).total == scored(str(folder)).total


def processing_classes() -> None:
    with pytest.raises(RewardInputError, match="needs its tokenizer: set reward_processing_classes"):
        scored(tiny_model())
    assert scored([tiny_model(), lengths], tokenizers=[word_tokenizer(), None]).valid == [True, True]


def names() -> None:
    assert scored("tests.rewards.test_trl:lengths").per_function == {"lengths": [1.0, 3.0]}


def none() -> None:
    scores = scored([constant([None, 2.0]), constant([10.0, 20.0])], weights=[3.0, 0.5])
    assert (scores.total, scores.valid) == ([5.0, 16.0], [True, True])


def none_from_all() -> None:
    scores = scored([constant([None, 2.0]), constant([None, None])])
    assert (scores.total, scores.valid) == ([0.0, 2.0], [False, True])
    refused([constant([None, None])] * 2, "none of 2 samples was scored by any reward")


def nan() -> None:
    refused(constant([1.0, math.nan]), "returned nan for sample 2")


def kinds_of_numbers() -> None:
    for values in ([1, 2.0], (1, 2), torch.tensor([1.0, 2.0]), np.array([1, 2]), [np.float32(1), torch.tensor(2)]):
        assert scored(constant(values)).total == [1.0, 2.0]


def wrong_answers() -> None:
    refused(constant([1.0]), r"'<lambda>' returned 1 scores; it must return a list of 2 scores")
    refused(constant([1.0, math.inf]), "returned inf for sample 2")
    refused(constant(["1", 2]), "returned '1' for sample 1")
    refused(constant([[1], [2]]), r"returned \[1\] for sample 1")


def weights() -> None:
    assert scored([lengths, constant([1.0, 1.0])], weights=[2.0, -1.0]).total == [1.0, 5.0]


def special_tokens() -> None:
    whole = ["c</s>", "d e</s>"]
    assert given(whole=whole)["completions"] == COMPLETIONS
    assert given(whole=whole, skip_special_tokens=False)["completions"] == whole


def no_end_token() -> None:
    read = [resolve_reward(tiny_model(), tokenizer=word_tokenizer(), append_eos=end).function for end in (False, True)]
    assert [model.encode(["a "], ["b"]) for model in read] == [[[3, 4]], [[3, 4, 2]]]


ROWS: dict[str, Callable[..., None]] = {
    "`reward_funcs`: one or a list": one_or_a_list,
    "a function `f(prompts, completions, **kwargs)`": a_function,
    "`completion_ids`": completion_ids,
    "`trainer_state`": trainer_state,
    "`log_metric`": log_metric,
    "`log_extra`": log_extra,
    "every column of the data set": every_column,
    "`environments`": environments,
    "a function without `**kwargs`": without_kwargs,
    "`functools.partial`": partials,
    "an object with `__call__`": objects,
    "a lambda, a bound method": lambdas_and_methods,
    "an async function": asynchronous,
    "a callable object whose `__call__` is async, or a function that returns a coroutine": awaitables,
    "a model's name or folder": named_model,
    "a model object": model_object,
    "`reward_processing_classes`": processing_classes,
    '`"package.module:function"`, the URL of a server': names,
    "`None` for a sample": none,
    "`None` from every function": none_from_all,
    "NaN for a sample": nan,
    "a list, tuple, tensor or array of numbers": kinds_of_numbers,
    "another length, infinities, texts, nested lists": wrong_answers,
    "`reward_weights`": weights,
    "special tokens are left out of completions": special_tokens,
    "a reward model reads no end token": no_end_token,
}


def test_the_table_has_these_rows_and_no_others() -> None:
    table = DOCUMENT.read_text(encoding="utf-8").split("## What TRL's GRPO accepts\n")[1].split("\n## ")[0]
    lines = [line for line in table.splitlines() if line.startswith("| ")][1:]
    assert [line.split(" | ")[0].removeprefix("| ") for line in lines] == list(ROWS)


@pytest.mark.parametrize("row", ROWS)
def test_a_row_of_the_table_is_so(row: str, tmp_path: Path) -> None:
    tried = ROWS[row]
    tried(tmp_path) if tried.__code__.co_argcount else tried()
