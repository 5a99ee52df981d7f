"""Sampling token by token: the tokens of the policy's own forward, for any family, padding and shape."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

from stable_rlhf.policy.transformer import causal_lm
from stable_rlhf.rollout import decoder as rollout_decoder
from stable_rlhf.rollout.backend import Sampling
from stable_rlhf.rollout.decoder import Decoder
from tests import graphs_on_cpu as reruns
from tests.policy.test_architectures import FAMILIES, PARTICULAR, PECULIAR, WINDOWED
from tests.tiny_decoders import (
    COLD,
    ENDS,
    LENGTHS,
    LONG,
    SAMPLING,
    VOCABULARY,
    Made,
    assert_same,
    ends,
    make_model,
    make_prompts,
    move,
    naive,
    sample,
    uniform_numbers,
)

pytestmark = pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False:UserWarning")  # peft sets it itself


# -- the tokens are those of the policy's own forward ---------------------------------------------------------------


@pytest.mark.parametrize("lora", [None, {}], ids=["full", "lora"])
@pytest.mark.parametrize("family", FAMILIES)
def test_tokens_are_those_of_the_models_own_forward_without_padding(family: str, lora: dict | None, made: Made) -> None:
    model = make_model(family, lora)
    prompt, mask = make_prompts(*LENGTHS)
    found = sample(made(model), prompt, mask)
    assert_same(found, naive(model, prompt, mask))
    assert len(set(ends(found))) > 2  # rows end in the middle, one after another


@pytest.mark.parametrize("name", PARTICULAR)
def test_other_kinds_of_full_attention_too(name: str, made: Made) -> None:
    """Shared key heads, experts, latent attention, layers without positions."""
    family, changes = PARTICULAR[name]
    model = make_model(family, **changes)
    prompt, mask = make_prompts(*LENGTHS)
    assert_same(sample(made(model), prompt, mask), naive(model, prompt, mask))


# -- what the loop cannot run is left to Transformers ---------------------------------------------------------------


@pytest.mark.parametrize("lora", [None, {}], ids=["full", "lora"])
@pytest.mark.parametrize("name", WINDOWED)
def test_beyond_a_sliding_window_tokens_are_still_those_of_the_models_own_forward(
    name: str, lora: dict | None, made: Made
) -> None:
    family, changes = WINDOWED[name]
    model = make_model(family, lora, **changes)
    decoder, (prompt, mask) = made(model), make_prompts(*LENGTHS)
    assert_same(sample(decoder, prompt, mask, COLD), naive(model, prompt, mask, COLD))
    move(model)
    assert_same(sample(decoder, prompt, mask, COLD), naive(model, prompt, mask, COLD))


@pytest.mark.parametrize("width", range(1, 12))
def test_a_window_as_long_as_the_text_or_a_token_shorter(
    width: int, made: Made, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prompts of 1 to 11 tokens with 8 more: 9 to 19 in a window of 12, or of 20 with a cache of 4, 8 or 16 + 8."""
    monkeypatch.setattr(rollout_decoder, "SHORTEST", 4)
    few = Sampling(max_new_tokens=8, temperature=1e-4, eos_token_ids=(0,), pad_token_id=0)
    prompt, mask = make_prompts(*[width] * 8, 1)
    for window in (12, 20):
        model = make_model("mistral", sliding_window=window, initializer_range=0.5)
        assert_same(sample(made(model), prompt, mask, few), naive(model, prompt, mask, few))


@pytest.mark.parametrize(("window", "fixed"), [(28, False), (32, True)])
def test_a_text_that_just_fits_the_window_is_drawn_by_our_own_loop(
    window: int, fixed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """12 columns of prompts, or 16 in a graph, and 16 more: Transformers' loop would draw other tokens."""
    if fixed:
        reruns.use(monkeypatch)
        monkeypatch.setattr(rollout_decoder, "SHORTEST", 4)
    model, (prompt, mask) = make_model("mistral", sliding_window=window), make_prompts(*LENGTHS)
    assert_same(sample(Decoder(model, cuda_graphs=fixed), prompt, mask), naive(model, prompt, mask))


def test_a_model_whose_texts_may_be_left_to_transformers_is_not_compiled() -> None:
    model = make_model("mistral", sliding_window=4)
    decoder, (prompt, mask) = Decoder(model, torch_compile=True), make_prompts(*LENGTHS)
    assert_same(sample(decoder, prompt, mask, COLD), naive(model, prompt, mask, COLD))


@pytest.mark.parametrize("name", PECULIAR)
def test_other_layers_and_attention_of_another_kind_give_the_models_own_tokens(name: str, made: Made) -> None:
    family, changes = PECULIAR[name]
    model = make_model(family, **changes)
    prompt, mask = make_prompts(*LENGTHS)
    assert_same(sample(made(model), prompt, mask, COLD), naive(model, prompt, mask, COLD))


def test_transformers_loop_draws_from_the_whole_distribution_too(made: Made) -> None:
    """Chi-squared over 20,000 draws; what the model's own generation settings prefer must not reach the sampler."""
    model = make_model("mistral", sliding_window=2)
    own = {
        "top_k": 3,
        "min_p": 0.3,
        "typical_p": 0.5,
        "temperature": 0.1,
        "repetition_penalty": 3.0,
        "no_repeat_ngram_size": 1,
    }
    for name, value in own.items():
        setattr(causal_lm(model.policy).generation_config, name, value)
    prompt = torch.tensor([[40, 41, 42, 43]]).repeat(20_000, 1)
    single = Sampling(max_new_tokens=1, temperature=1.5, eos_token_ids=ENDS, pad_token_id=0)
    drawn = sample(made(model), prompt, torch.ones_like(prompt).bool(), single)[:, 0]
    with torch.no_grad():
        expected = 20_000 * (causal_lm(model.policy)(input_ids=prompt[:1]).logits[0, -1] / 1.5).double().softmax(-1)
    common = expected > 20
    counts = torch.bincount(drawn, minlength=VOCABULARY).double()
    chi = ((counts - expected).square() / expected)[common].sum().item()
    degrees = int(common.sum())
    assert degrees > 80
    assert chi < degrees + 4 * (2 * degrees) ** 0.5  # 4 standard deviations of the chi-squared distribution
    assert all(getattr(causal_lm(model.policy).generation_config, name) == value for name, value in own.items())


# -- a row depends on nothing but itself ----------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["gpt2", "opt", "qwen2"])
def test_a_row_has_the_tokens_that_it_has_alone_whatever_the_padding(
    family: str, made: Made, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoder = made(make_model(family))
    numbers = uniform_numbers(SAMPLING, len(LENGTHS))
    prompt, mask = make_prompts(*LENGTHS)
    together = sample(decoder, prompt, mask)
    widened, wider_mask = (torch.nn.functional.pad(part, (9, 0)) for part in (prompt, mask))
    assert_same(sample(decoder, widened, wider_mask), together)
    turned = torch.arange(len(LENGTHS)).flip(0)
    given: list[Tensor] = []
    monkeypatch.setattr(torch, "rand", lambda *shape, **kwargs: given.pop())
    given.append(numbers[:, turned])
    assert_same(decoder.sample(prompt[turned], mask[turned], SAMPLING), together[turned])
    for row, count in enumerate(ends(together)):
        given.append(numbers[:, row : row + 1])
        only = prompt[row : row + 1, -LENGTHS[row] :]  # a prompt of one token has one column
        assert_same(decoder.sample(only, torch.ones_like(only).bool(), SAMPLING), together[row : row + 1, :count])


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_when_rows_leave_the_batch_changes_no_token(share: float, monkeypatch: pytest.MonkeyPatch) -> None:
    model, (prompt, mask) = make_model("qwen2"), make_prompts(*LENGTHS)
    monkeypatch.setattr(rollout_decoder, "LEAVE_AT", share)
    assert_same(sample(Decoder(model), prompt, mask, LONG), naive(model, prompt, mask, LONG))


def test_rows_that_have_ended_leave_the_batch_when_a_quarter_has_and_the_loop_ends_with_the_last() -> None:
    decoder, (prompt, mask) = Decoder(make_model("qwen2")), make_prompts(*LENGTHS)
    batches: list[int] = []
    decoder.lm.get_decoder().register_forward_pre_hook(
        lambda module, args, kwargs: batches.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    counts = ends(sample(decoder, prompt, mask, LONG))
    assert max(counts) < 50
    expected = [8]
    for turn in range(1, max(counts)):
        running = sum(count > turn for count in counts)
        expected.append(running if running <= rollout_decoder.LEAVE_AT * expected[-1] else expected[-1])
    assert batches == expected
    assert len(set(batches)) > 2


def test_one_number_of_the_global_generator_is_drawn_for_each_token_that_there_could_be(made: Made) -> None:
    prompt, mask = make_prompts(2, 1)
    sample(made(make_model("qwen2")), prompt, mask, seed=9)
    after = torch.rand(3)
    uniform_numbers(SAMPLING, 2, seed=9)
    assert torch.equal(torch.rand(3), after)


# -- ends -----------------------------------------------------------------------------------------------------------


def test_a_pad_token_equal_to_eos_stands_after_every_end(made: Made) -> None:
    model, (prompt, mask) = make_model("qwen2"), make_prompts(*LENGTHS)
    sampling = Sampling(max_new_tokens=16, temperature=0.3, eos_token_ids=ENDS, pad_token_id=2)
    found = sample(made(model), prompt, mask, sampling)
    assert_same(found, naive(model, prompt, mask, sampling))
    after = torch.arange(found.shape[1]) >= torch.tensor(ends(found))[:, None]
    assert after.any()
    assert set(found[after].tolist()) == {2}


def test_a_pad_token_that_is_said_in_earnest_ends_nothing(made: Made) -> None:
    model, (prompt, mask) = make_model("qwen2"), make_prompts(*LENGTHS)
    free = sample(made(model), prompt, mask)
    said = int(free[:, :4].flatten().mode().values)
    sampling = Sampling(max_new_tokens=16, temperature=0.3, eos_token_ids=SAMPLING.eos_token_ids, pad_token_id=said)
    assert said not in sampling.eos_token_ids
    found = sample(made(model), prompt, mask, sampling)
    assert ends(found) == ends(free)
    assert_same(found, naive(model, prompt, mask, sampling))


def test_any_of_the_eos_ids_ends_a_row_and_no_other_token(made: Made) -> None:
    model, (prompt, mask) = make_model("qwen2"), make_prompts(*LENGTHS)
    never = Sampling(max_new_tokens=16, temperature=0.3, eos_token_ids=(0,), pad_token_id=0)
    whole = sample(made(model), prompt, mask, never)
    assert whole.shape == (8, 16)
    ids = (int(whole[0, 4]), int(whole[1, 7]))
    sampling = Sampling(max_new_tokens=16, temperature=0.3, eos_token_ids=ids, pad_token_id=1)
    found = sample(made(model), prompt, mask, sampling)
    counts = ends(found, sampling)
    assert {found[row, count - 1].item() for row, count in enumerate(counts) if count < 16} == set(ids)
    for row, count in enumerate(counts):
        assert found[row, :count].tolist() == whole[row, :count].tolist()
        assert set(found[row, count:].tolist()) <= {1}


@pytest.mark.parametrize("count", [1, 2, 3])
def test_few_tokens_are_the_first_of_many(count: int, made: Made) -> None:
    model, (prompt, mask) = make_model("qwen2"), make_prompts(*LENGTHS)
    sampling = Sampling(max_new_tokens=count, temperature=0.3, eos_token_ids=(0,), pad_token_id=0)
    found = sample(made(model), prompt, mask, sampling)
    assert found.shape == (8, count)
    assert_same(found, naive(model, prompt, mask, sampling))


def test_when_every_row_ends_at_once_there_is_one_column(made: Made) -> None:
    everything = Sampling(max_new_tokens=40, temperature=1.0, eos_token_ids=tuple(range(VOCABULARY)), pad_token_id=0)
    assert sample(made(make_model("qwen2")), *make_prompts(3, 5), everything).shape == (2, 1)


def test_prompts_of_one_token_alone(made: Made) -> None:
    model, (prompt, mask) = make_model("qwen2"), make_prompts(1, 1, 1)
    assert prompt.shape == (3, 1)
    assert_same(sample(made(model), prompt, mask), naive(model, prompt, mask))


# -- fixed shapes ---------------------------------------------------------------------------------------------------


@pytest.fixture
def captured(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    return reruns.use(monkeypatch)


def test_a_power_of_two_is_captured_once_and_serves_every_shorter_prompt_and_rollout(
    captured: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rollout_decoder, "SHORTEST", 8)
    model = make_model("qwen2")
    decoder = Decoder(model, cuda_graphs=True)
    rooms = []
    for longest, seed in ((3, 0), (8, 1), (1, 2), (3, 3), (9, 4), (16, 5), (17, 6), (5, 7), (12, 8)):
        before, (prompt, mask) = len(captured), make_prompts(1, longest, seed=seed)
        assert_same(sample(decoder, prompt, mask, seed=seed), naive(model, prompt, mask, seed=seed))
        if len(captured) > before:
            rooms.append(longest)
    assert rooms == [3, 9, 17]


def test_another_number_of_rows_or_another_sampling_is_captured_anew(captured: list[Any]) -> None:
    model = make_model("qwen2")
    decoder = Decoder(model, cuda_graphs=True)
    short = Sampling(max_new_tokens=5, temperature=1.0, eos_token_ids=(2,), pad_token_id=0)
    grew = []
    hotter, other = (
        dataclasses.replace(SAMPLING, **change) for change in ({"temperature": 2.0}, {"eos_token_ids": (2,)})
    )
    cases = [((2, 3), SAMPLING), ((2, 3, 4), SAMPLING), *(((2, 3), each) for each in (short, hotter, other, SAMPLING))]
    for lengths, sampling in cases:
        before, (prompt, mask) = len(captured), make_prompts(*lengths)
        assert_same(sample(decoder, prompt, mask, sampling), naive(model, prompt, mask, sampling))
        grew.append(len(captured) > before)
    assert grew == [True, True, True, True, True, False]


def test_the_shape_not_used_for_longest_is_the_one_captured_anew(
    captured: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rollout_decoder, "ROOMS", 2)
    model = make_model("qwen2")
    decoder, grew = Decoder(model, cuda_graphs=True), []
    for rows in (1, 2, 1, 3, 1, 2):  # three rows take the place of two
        before, (prompt, mask) = len(captured), make_prompts(*[3] * rows)
        assert_same(sample(decoder, prompt, mask), naive(model, prompt, mask))
        grew.append(len(captured) > before)
    assert grew == [True, True, False, True, False, True]


@pytest.mark.usefixtures("captured")
def test_a_rollout_leaves_the_prompts_and_the_tokens_of_the_one_before(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rollout_decoder, "SHORTEST", 4)
    model = make_model("qwen2")
    decoder = Decoder(model, cuda_graphs=True)
    first, mask = make_prompts(4, 4, 4)
    drawn = sample(decoder, first, mask)
    given, expected = first.clone(), drawn.clone()
    second, _ = make_prompts(4, 4, 4, seed=1)
    assert_same(sample(decoder, second, mask, seed=6), naive(model, second, mask, seed=6))
    assert_same(drawn, expected)
    assert_same(first, given)


def test_without_graphs_nothing_is_captured(captured: list[Any]) -> None:
    sample(Decoder(make_model("qwen2")), *make_prompts(2, 3))
    assert captured == []


@pytest.mark.usefixtures("captured")
@pytest.mark.parametrize("every", [1, 2, 5, 1000])
def test_how_often_the_end_is_looked_for_changes_no_token(every: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rollout_decoder, "CHECK_EVERY", every)
    model, (prompt, mask) = make_model("qwen2"), make_prompts(*LENGTHS)
    decoder, expected = Decoder(model, cuda_graphs=True), naive(model, prompt, mask, LONG)
    last = expected.shape[1]
    assert 16 < last < 45  # so that there is an end to look for
    assert_same(sample(decoder, prompt, mask, LONG), expected)
    forwards: list[int] = []
    decoder.lm.get_decoder().register_forward_hook(lambda *_: forwards.append(1))
    assert_same(sample(decoder, prompt, mask, LONG), expected)
    # A forward for each token, up to the first look after the last row's end.
    assert len(forwards) == min(50, every * -(-last // every))
