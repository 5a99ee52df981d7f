"""A way of sampling is used only where its log-probs are those that are trained; a slower one is said."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM

from stable_rlhf.config.algorithm import CriticConfig
from stable_rlhf.errors import ConfigError
from stable_rlhf.policy.actor_critic import ActorCritic
from stable_rlhf.rollout import agreement
from stable_rlhf.rollout.backend import Sampling
from stable_rlhf.rollout.decoder import Decoder
from tests.policy.test_architectures import make

BART = {"d_model": 16, "decoder_layers": 2, "decoder_attention_heads": 2, "decoder_ffn_dim": 32, "init_std": 0.3,
        "scale_embedding": False}  # fmt: skip
GREEDY = Sampling(max_new_tokens=5, temperature=1e-4, eos_token_ids=(2,), pad_token_id=0)
"""So cold that every draw is the likeliest token."""


def likeliest(lm: Any, prompt: list[int], count: int) -> list[int]:
    """The naive loop: the whole text is read again for each token."""
    ids = list(prompt)
    for _ in range(count):
        with torch.no_grad():
            token = int(lm(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax())
        ids.append(token)
        if token == 2:
            break
    return ids[len(prompt) :]


@pytest.mark.parametrize("family", ["bart", "llama", "bloom"])
def test_prompts_of_any_length_get_the_tokens_of_each_alone(family: str, capsys: pytest.CaptureFixture[str]) -> None:
    lm = make(family, **{"bart": BART, "bloom": {"n_head": 2, "n_layer": 2}}.get(family, {}))
    decoder = Decoder(ActorCritic(lm, CriticConfig()))
    prompts = [[11], [21, 22, 23], [31, 32], [41, 42, 43]]
    prompt = torch.tensor([[0] * (3 - len(ids)) + ids for ids in prompts])
    mask = torch.tensor([[False] * (3 - len(ids)) + [True] * len(ids) for ids in prompts])
    sampled = decoder.sample(prompt, mask, GREEDY)
    for row, ids in enumerate(prompts):
        expected = likeliest(lm, ids, 5)
        assert sampled[row, : len(expected)].tolist() == expected
    said = "BartForCausalLM: prompts of each length are sampled apart, which is slower: it does not allow padding"
    assert (said in capsys.readouterr().err) == (family == "bart") == (not decoder.pads)


def test_rows_of_the_last_length_that_end_first_do_not_cut_the_others() -> None:
    lm = make("bart", **BART)
    decoder = Decoder(ActorCritic(lm, CriticConfig()))
    prompts = [[11], [21, 22, 23]]
    ends = likeliest(lm, prompts[1], 1)[0]
    sampling = Sampling(max_new_tokens=5, temperature=1e-4, eos_token_ids=(ends,), pad_token_id=0)
    expected = likeliest(lm, prompts[0], 5)
    assert ends not in expected[:2]  # the first row goes on where the second has ended
    sampled = decoder.sample(
        torch.tensor([[0, 0, 11], prompts[1]]), torch.tensor([[False, False, True], [True] * 3]), sampling
    )
    assert sampled[1].tolist() == [ends, *[0] * (sampled.shape[1] - 1)]
    assert sampled[0, :2].tolist() == expected[:2]


class Halts(LlamaForCausalLM):
    """Cannot be given the mask of one new token."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.model.register_forward_pre_hook(self._look, with_kwargs=True)

    def _look(self, module: Any, arguments: Any, named: dict[str, Any]) -> None:
        mask = named.get("attention_mask")
        if mask is not None and mask.dim() == 4 and mask.shape[2] == 1:
            raise IndexError("a mask of one row")


class Shifts(Halts):
    """Gives a wrong answer for it instead."""

    def _look(self, module: Any, arguments: Any, named: dict[str, Any]) -> Any:
        mask = named.get("attention_mask")
        if mask is not None and mask.dim() == 4 and mask.shape[2] == 1:
            return arguments, named | {"position_ids": 3 * named["position_ids"] + 20}
        return None


@pytest.mark.parametrize(("kind", "fault"), [(Halts, "fails on it (IndexError: a mask"), (Shifts, "nats off the fo")])
def test_where_our_loop_does_not_agree_transformers_loop_samples_and_that_is_said(
    kind: type, fault: str, capsys: pytest.CaptureFixture[str]
) -> None:
    lm = kind(make("llama").config).eval()
    decoder = Decoder(ActorCritic(lm, CriticConfig()))
    assert not decoder.loops
    said = capsys.readouterr().err
    assert f"{kind.__name__}: completions are sampled by Transformers' loop, which is slower: ours" in said
    assert fault in said
    prompt = torch.tensor([[0, 11, 12]])
    sampled = decoder.sample(prompt, torch.tensor([[False, True, True]]), GREEDY)
    expected = likeliest(lm, [11, 12], 5)
    assert sampled[0, : len(expected)].tolist() == expected


def test_a_model_that_no_way_samples_as_it_is_trained_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = ActorCritic(make("bloom", n_head=2, n_layer=2), CriticConfig())
    forward = LlamaForCausalLM.generate

    def bent(self: Any, **named: Any) -> Any:
        named["attention_mask"] = None
        return forward(self, **named | {"input_ids": named["input_ids"].flip(1)})

    monkeypatch.setattr(type(model.policy), "generate", bent)
    with pytest.raises(
        ConfigError, match=r"what Transformers samples is .* nats off the forward that would be trained"
    ):
        Decoder(model)
    Decoder(model, self_check=False)


def test_the_check_draws_no_random_number() -> None:
    model = ActorCritic(make("bart", **BART), CriticConfig())
    before = torch.get_rng_state()
    Decoder(model)
    assert torch.get_rng_state().equal(before)


def test_given_tokens_are_written_by_transformers_loop_and_their_log_probs_kept() -> None:
    forced = agreement.Forced(torch.tensor([[2], [0]]))
    scores = torch.tensor([[0.1, 0.2, 0.3], [0.5, 0.0, 1.0]])
    out = forced(None, scores)
    assert out.softmax(-1).tolist() == [[0.0, 0.0, 1.0], [1.0, 0.0, 0.0]]
    expected = scores.log_softmax(-1)[[0, 1], [2, 0]]
    assert torch.equal(forced.logp[0], expected)
