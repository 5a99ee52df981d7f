"""Reward models, answers and totals: what a model reads, in which batches, and what becomes of its numbers."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification

from stable_rlhf.data.chat import plain_text
from stable_rlhf.errors import RewardError, RewardUnavailable
from stable_rlhf.rewards.checks import LARGEST, checked
from stable_rlhf.rewards.functions import resolve_reward
from stable_rlhf.rewards.model import RewardModel
from tests.rewards.test_scorer import CHAT, WORDS, alone, length, named, score, tiny_model, word_tokenizer

# -- answers --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [LARGEST, -LARGEST])
def test_the_largest_score_is_one_and_the_next_number_is_not(value: float) -> None:
    assert checked("f", [value], ["a"]) == [value]
    beyond = value * (1 + 2**-52)
    with pytest.raises(RewardError, match=r"for sample 1, whose prompt is 'a'"):
        checked("f", [beyond], ["a"])


def test_a_function_that_found_no_server_says_so_itself() -> None:
    """As the error that a run can be resumed from, in its own words."""

    def away(prompts: list[Any], completions: list[Any]) -> list[float]:
        raise RewardUnavailable("the judge is away")

    with pytest.raises(RewardUnavailable, match=r"^the judge is away$"):
        score(named(away=away))


def test_other_roles_are_speakers_with_a_capital() -> None:
    chat = [{"role": role, "content": role[0]} for role in ("system", "user", "assistant", "tool")]
    assert plain_text(chat) == "\n\nSystem: s\n\nHuman: u\n\nAssistant: a\n\nTool: t"


# -- totals ---------------------------------------------------------------------------------------------------------


def test_a_total_is_the_weighted_sum_of_three_rewards_with_a_negative_weight() -> None:
    functions = named(
        first=lambda prompts, completions: [1.0, None, 3.0],
        second=lambda prompts, completions: [10.0, 20.0, 30.0],
        third=lambda prompts, completions: [100.0, 200.0, None],
    )
    given = {"prompts": "abc", "completions": "xyz", "ended": [False, False, True]}
    scores = score(functions, weights=[3.0, -0.5, 0.25], missing_eos_penalty=2.0, **given)
    assert scores.total == [3.0 - 5.0 + 25.0 - 2.0, -10.0 + 50.0 - 2.0, 9.0 - 15.0]
    assert scores.valid == [True, True, True]


def test_no_penalty_and_a_penalty_of_nothing_are_the_same() -> None:
    for penalty in (None, 0.0, 0):
        assert score(named(f=length), ended=[False, False], missing_eos_penalty=penalty).total == [1.0, 2.0]


def test_an_async_function_that_raises_lets_the_others_finish_first() -> None:
    done: list[str] = []

    async def broken(prompts: list[Any], completions: list[Any]) -> list[float]:
        raise ConnectionError("refused")

    async def slow(prompts: list[Any], completions: list[Any]) -> list[float]:
        try:
            await asyncio.sleep(0.05)
            done.append("finished")
        except asyncio.CancelledError:
            done.append("cancelled")
            raise
        return [0.0, 0.0]

    with pytest.raises(RewardError, match="'broken' raised ConnectionError"):
        score(named(broken=broken, slow=slow))
    assert done == ["finished"]


# -- models ---------------------------------------------------------------------------------------------------------


def encoder() -> BertForSequenceClassification:
    """A model that reads in both directions: what it pays attention to changes every score."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = BertConfig(
        vocab_size=len(WORDS), max_position_embeddings=12, num_labels=1, pad_token_id=2, initializer_range=0.5, **sizes
    )
    return BertForSequenceClassification(config).eval()


def test_an_encoder_does_not_read_the_padding() -> None:
    model, tokenizer = encoder(), word_tokenizer()
    texts = ["a b c d e f", "a", "g h"]
    with torch.no_grad():
        expected = [model(input_ids=torch.tensor([tokenizer(text)["input_ids"]])).logits.item() for text in texts]
    assert RewardModel(model, tokenizer)(texts, [""] * 3) == pytest.approx(expected, abs=1e-5)


def read_by(model: Any) -> list[torch.Tensor]:
    """The token ids of each batch that the model is given from now on."""
    seen: list[torch.Tensor] = []
    model.register_forward_pre_hook(lambda _, given, named: seen.append(named["input_ids"].clone()), with_kwargs=True)
    return seen


def test_batches_are_cut_at_the_size_with_the_longest_first() -> None:
    model = tiny_model()
    seen = read_by(model)
    RewardModel(model, word_tokenizer(), batch_size=2)(["a", "b b b", "c c", "d d d d", "e e e e e"], [""] * 5)
    assert [batch.tolist() for batch in seen] == [
        [[7] * 5, [6] * 4 + [2]],
        [[4] * 3, [5] * 2 + [2]],
        [[3]],
    ]


@pytest.mark.parametrize(
    ("of_model", "pad", "end", "expected"), [(5, "d", "e", 5), (None, "d", "e", 6), (None, None, "e", 7)]
)
def test_the_models_pad_token_comes_before_the_tokenizers_and_its_end_token(
    of_model: int | None, pad: str | None, end: str, expected: int
) -> None:
    model, tokenizer = tiny_model(pad_token_id=of_model), word_tokenizer()
    tokenizer.pad_token, tokenizer.eos_token = pad, end
    reward = RewardModel(model, tokenizer)
    seen = read_by(model)
    assert model.config.pad_token_id == expected
    scores = reward(["a b", "a"], ["", ""])
    assert seen[0].tolist() == [[3, 4], [3, expected]]
    assert scores == pytest.approx([alone(model, [3, 4]), alone(model, [3])], abs=1e-5)


@pytest.mark.parametrize(("of_model", "of_tokenizer", "expected"), [(12, 7, 7), (12, 20, 12), (12, 10**30, 12)])
def test_a_text_is_cut_at_the_shorter_of_the_models_and_the_tokenizers_limits(
    of_model: int, of_tokenizer: int, expected: int
) -> None:
    tokenizer = word_tokenizer()
    tokenizer.model_max_length = of_tokenizer
    reward = RewardModel(tiny_model(max_position_embeddings=of_model), tokenizer)
    assert reward.max_length == expected
    assert len(reward.encode(["a " * 30], ["b"])[0]) == expected


def test_settings_reach_a_model_that_is_given_and_one_that_is_loaded(tmp_path: Any) -> None:
    tiny_model().save_pretrained(tmp_path)
    word_tokenizer().save_pretrained(tmp_path)
    other = word_tokenizer(chat=True)
    for reward in (
        resolve_reward(tiny_model(), tokenizer=other, max_length=3, batch_size=2),
        resolve_reward(tmp_path, tokenizer=other, max_length=3, batch_size=2),
    ):
        function = reward.function
        assert function.encode(["a b c d"], [""]) == [[4, 5, 6]]
        assert (
            function.encode([CHAT], [""])[0] == RewardModel(tiny_model(), other, max_length=3).encode([CHAT], [""])[0]
        )
        seen = read_by(function.model)
        function(["a", "b", "c"], ["", "", ""])
        assert [len(batch) for batch in seen] == [2, 1]


def test_a_model_in_training_mode_is_scored_without_dropout_and_keeps_no_gradient() -> None:
    model = tiny_model(attention_dropout=0.5)
    expected = [alone(model.eval(), [3, 4, 5])]
    scores = RewardModel(model.train(), word_tokenizer())(["a b"], [" c"])
    assert scores == pytest.approx(expected, abs=1e-5)
