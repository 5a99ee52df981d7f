"""Sampling: masks from the first EOS, the distribution at the temperature and nothing else, scored rows."""

from __future__ import annotations

import dataclasses

import datasets
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from stable_rlhf.config import CriticConfig, RolloutConfig
from stable_rlhf.decoding import Decoder
from stable_rlhf.models import ActorCritic
from stable_rlhf.prompts import EncodedPrompts
from stable_rlhf.rollout import Sampler, pad_left, response_mask
from stable_rlhf.scoring import Scorer, resolve_reward

EOS = 2


def length_reward(prompts, completions, **columns):
    return [float(len(c)) for c in completions]


def make_sampler(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, **settings) -> Sampler:
    return Sampler(
        tokenizer=tokenizer,
        scorer=Scorer([resolve_reward(length_reward)], None, None),
        config=RolloutConfig(**settings),
        eos_token_ids=[EOS],
        decoder=Decoder(ActorCritic(model, CriticConfig())),
    )


def test_the_mask_ends_with_the_first_eos_included() -> None:
    response = torch.tensor([[5, EOS, 7, EOS], [5, 6, 7, 8], [EOS, EOS, EOS, EOS]])
    mask, ended = response_mask(response, [EOS])
    assert mask.int().tolist() == [[1, 1, 0, 0], [1, 1, 1, 1], [1, 0, 0, 0]]
    assert ended.tolist() == [True, False, True]


def test_pad_equal_to_eos_leaves_the_eos_in_the_mask_and_a_sampled_pad_token_counts() -> None:
    padded_with_eos = torch.tensor([[5, EOS, EOS, EOS]])
    assert response_mask(padded_with_eos, [EOS])[0].int().tolist() == [[1, 1, 0, 0]]
    pad_said_in_earnest = torch.tensor([[5, 0, 6, EOS]])
    assert response_mask(pad_said_in_earnest, [EOS])[0].int().tolist() == [[1, 1, 1, 1]]


def test_any_of_several_eos_ids_ends_a_completion() -> None:
    assert response_mask(torch.tensor([[5, 9, 6, EOS]]), [EOS, 9])[0].int().tolist() == [[1, 1, 0, 0]]


def test_prompts_are_padded_on_the_left() -> None:
    ids, mask = pad_left([[7], [8, 9, 10]], pad=0)
    assert ids.tolist() == [[0, 0, 7], [8, 9, 10]]
    assert mask.int().tolist() == [[0, 0, 1], [1, 1, 1]]


@pytest.mark.parametrize("own", [{}, {"top_k": 3, "min_p": 0.3, "temperature": 0.1, "repetition_penalty": 3.0}])
def test_first_tokens_follow_the_softmax_at_the_temperature_whatever_the_model_prefers(
    llama: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, own: dict
) -> None:
    """Chi-squared over 20,000 draws; the model's own generation settings must not reach the sampler."""
    for name, value in own.items():
        setattr(llama.generation_config, name, value)
    sampler = make_sampler(llama, tokenizer, max_completion_length=1, temperature=1.5)
    prompt = torch.tensor([[40, 41]]).repeat(20_000, 1)
    torch.manual_seed(0)
    drawn = sampler.generate(prompt, torch.ones_like(prompt, dtype=torch.bool))[:, 0]
    with torch.no_grad():
        expected = 20_000 * (llama(input_ids=prompt[:1]).logits[0, -1] / 1.5).softmax(-1).double()
    common = expected > 20
    counts = torch.bincount(drawn, minlength=len(expected)).double()
    chi = ((counts - expected).square() / expected)[common].sum().item()
    degrees = int(common.sum())
    assert degrees > 50
    assert chi < degrees + 4 * (2 * degrees) ** 0.5  # 4 standard deviations of the chi-squared distribution
    assert all(getattr(llama.generation_config, name) == value for name, value in own.items())


def test_a_rollout_carries_prompts_completions_columns_and_scores_in_order(
    llama: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> None:
    seen: dict = {}

    def reward(prompts, completions, answer):
        seen.update(prompts=prompts, completions=completions, answer=answer)
        return [1.0, None, 3.0]

    sampler = make_sampler(llama, tokenizer, max_completion_length=4)
    sampler = dataclasses.replace(sampler, scorer=Scorer([resolve_reward(reward)], [2.0], 0.5))
    dataset = datasets.Dataset.from_dict({"prompt": ["a", "bb", "ccc", "d"], "answer": [10, 11, 12, 13]})
    encoded = EncodedPrompts(
        input_ids=[tokenizer(p)["input_ids"] for p in dataset["prompt"]], truncated=[False, True, True, False]
    )
    torch.manual_seed(1)
    rollout, seconds = sampler.collect(dataset, encoded, [2, 0, 1])
    assert seen["prompts"] == rollout.prompts == ["ccc", "a", "bb"]
    assert seen["answer"] == [12, 10, 11]
    assert seen["completions"] == rollout.completions
    penalties = [0.0 if ended else 0.5 for ended in rollout.ended]
    assert rollout.scores == [2.0 - penalties[0], 0.0, 6.0 - penalties[2]]
    assert rollout.valid == [True, False, True]
    assert rollout.truncated == 2
    assert set(seconds) == {"rollout_s", "scoring_s"}
    for row, text in enumerate(rollout.completions):
        kept = rollout.tokens.response[row][rollout.tokens.mask[row]]
        assert text == tokenizer.decode(kept, skip_special_tokens=True)


def test_a_completion_keeps_the_space_that_it_begins_with_under_a_sentencepiece_like_tokenizer(
    llama: LlamaForCausalLM,
) -> None:
    core = Tokenizer(models.WordLevel({"<pad>": 0, "</s>": 1, "▁the": 2, "▁soup": 3, "▁was": 4, "▁good": 5}, "<pad>"))
    core.pre_tokenizer = pre_tokenizers.Metaspace()
    core.decoder = decoders.Metaspace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", eos_token="</s>")
    prompt, mask = torch.tensor([[0, 2, 3], [2, 3, 4]]), torch.tensor([[False, True, True], [True, True, True]])
    response, kept = torch.tensor([[4, 5, 1], [5, 1, 0]]), torch.tensor([[True, True, True], [True, True, False]])
    assert tokenizer.decode([4, 5]) == "was good"  # decoded alone the space is lost
    assert make_sampler(llama, tokenizer).decode(prompt, mask, response, kept) == [" was good", " good"]
