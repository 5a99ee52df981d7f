"""Sampling: masks from the first EOS, the distribution at the temperature and nothing else, scored rows."""

from __future__ import annotations

import copy
import dataclasses
import time

import datasets
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from stable_rlhf.config.algorithm import CriticConfig
from stable_rlhf.config.sections import RolloutConfig
from stable_rlhf.data.encoding import EncodedPrompts
from stable_rlhf.policy.actor_critic import ActorCritic
from stable_rlhf.rewards.functions import resolve_reward
from stable_rlhf.rewards.scorer import Scorer
from stable_rlhf.rollout.decoder import Decoder
from stable_rlhf.rollout.sampler import Sampler, pad_left, response_mask

EOS = 2


def length_reward(prompts, completions, **columns):
    return [float(len(c)) for c in completions]


def make_sampler(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, ends: tuple[int, ...] = (EOS,), **settings
) -> Sampler:
    return Sampler(
        tokenizer=tokenizer,
        scorer=Scorer([resolve_reward(length_reward)], None, None),
        config=RolloutConfig(**settings),
        eos_token_ids=list(ends),
        decoder=Decoder(ActorCritic(model, CriticConfig())),
    )


def test_the_mask_ends_with_the_first_eos_included() -> None:
    response = torch.tensor([[5, EOS, 7, EOS], [5, 6, 7, 8], [EOS, EOS, EOS, EOS]])
    mask, ended = response_mask(response, [EOS])
    assert mask.int().tolist() == [[1, 1, 0, 0], [1, 1, 1, 1], [1, 0, 0, 0]]
    assert ended.tolist() == [True, False, True]
    assert response_mask(torch.tensor([[5, EOS, 7, 8]]), [EOS])[1].tolist() == [True]


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


def test_sampling_ends_at_any_of_the_eos_ids_and_is_followed_by_the_tokenizers_own_pad(
    llama: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> None:
    padded = copy.deepcopy(tokenizer)
    padded.pad_token = padded.bos_token
    ends = tuple(range(2, 130))
    sampler = make_sampler(llama, padded, ends, max_completion_length=6)
    prompt = torch.tensor([[40, 41]]).repeat(32, 1)
    torch.manual_seed(0)
    drawn = sampler.generate(prompt, torch.ones_like(prompt, dtype=torch.bool)).tolist()
    first = [next((at for at, token in enumerate(row) if token in ends), 6) for row in drawn]
    assert len({row[at] for row, at in zip(drawn, first, strict=True) if at < 6}) > 4  # many of them end a row
    after = [token for row, at in zip(drawn, first, strict=True) for token in row[at + 1 :]]
    assert len(after) > 20
    assert set(after) == {padded.bos_token_id}


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
        time.sleep(0.2)
        return [1.0, None, 3.0]

    sampler = make_sampler(llama, tokenizer, max_completion_length=4)
    sampler = dataclasses.replace(sampler, scorer=Scorer([resolve_reward(reward)], [2.0], 0.5))
    dataset = datasets.Dataset.from_dict({"prompt": ["a", "bb", "ccc", "d"], "answer": [10, 11, 12, 13]})
    encoded = EncodedPrompts(
        input_ids=[tokenizer(p)["input_ids"] for p in dataset["prompt"]], truncated=[False, True, True, True]
    )
    torch.manual_seed(1)
    began = time.perf_counter()
    rollout, seconds = sampler.collect(dataset, encoded, [2, 0, 1])
    elapsed = time.perf_counter() - began
    assert seen["prompts"] == rollout.prompts == ["ccc", "a", "bb"]
    assert seen["answer"] == [12, 10, 11]
    assert seen["completions"] == rollout.completions
    penalties = [0.0 if ended else 0.5 for ended in rollout.ended]
    assert rollout.scores == [2.0 - penalties[0], 0.0, 6.0 - penalties[2]]
    assert rollout.valid == [True, False, True]
    assert rollout.truncated == 2
    assert rollout.indices == [2, 0, 1]
    assert set(seconds) == {"rollout_s", "scoring_s"}
    assert seconds["rollout_s"] > 0
    assert seconds["scoring_s"] >= 0.2
    assert sum(seconds.values()) <= elapsed  # each second is counted once
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


def test_special_tokens_of_a_prompt_take_nothing_from_its_completions_text(llama: LlamaForCausalLM) -> None:
    vocabulary = {"<pad>": 0, "</s>": 1, "▁the": 2, "▁soup": 3, "▁was": 4, "▁good": 5, "<s>": 6}
    core = Tokenizer(models.WordLevel(vocabulary, "<pad>"))
    core.pre_tokenizer = pre_tokenizers.Metaspace()
    core.decoder = decoders.Metaspace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", bos_token="<s>", eos_token="</s>")
    everything = torch.ones(1, 3, dtype=torch.bool)
    text = make_sampler(llama, tokenizer).decode(
        torch.tensor([[6, 2, 3]]), everything, torch.tensor([[4, 5, 1]]), everything
    )
    assert text == [" was good"]


def test_a_prompt_cut_inside_a_character_keeps_its_completions_whole_text(
    llama: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> None:
    """The prompt ends with the first byte of "é" and the completion begins with the second: together they are one
    character, and the prompt's own text, a replacement character, does not begin it."""
    ids = tokenizer("aéz")["input_ids"]
    assert len(ids) == 4
    prompt, response = torch.tensor([ids[:2]]), torch.tensor([[*ids[2:], EOS]])
    everything = torch.ones(1, 2, dtype=torch.bool), torch.ones(1, 3, dtype=torch.bool)
    text = make_sampler(llama, tokenizer).decode(prompt, everything[0], response, everything[1])
    assert text == ["\N{REPLACEMENT CHARACTER}z"]
