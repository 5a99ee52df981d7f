"""What the tests of decoding share: policies of any family, prompts, and a naive loop over tokens."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from peft import LoraConfig
from torch import Tensor

from stable_rlhf.config.algorithm import CriticConfig
from stable_rlhf.config.sections import ModelConfig
from stable_rlhf.policy.actor_critic import ActorCritic
from stable_rlhf.policy.loading import wrap_policy
from stable_rlhf.policy.transformer import causal_lm
from stable_rlhf.rollout.backend import Sampling
from stable_rlhf.rollout.decoder import Decoder
from tests.policy.test_architectures import make

Made = Callable[[ActorCritic], Decoder]
VOCABULARY = 97
ENDS = tuple(range(2, 14))
SAMPLING = Sampling(max_new_tokens=16, temperature=0.3, eos_token_ids=ENDS, pad_token_id=0)
"""At this temperature a tenth of a nat in the logits moves tokens; about every eighth token ends a row."""
COLD = Sampling(max_new_tokens=16, temperature=1e-4, eos_token_ids=ENDS, pad_token_id=0)
"""The likeliest token, whatever the random number: for Transformers' own loop, which draws in a way of its own."""
LONG = Sampling(max_new_tokens=50, temperature=1.0, eos_token_ids=ENDS, pad_token_id=0)
"""Every row ends, at different times."""
LENGTHS = (1, 3, 12, 7, 2, 5, 9, 4)


def make_model(family: str, lora: dict[str, Any] | None = None, **changes: Any) -> ActorCritic:
    adapter = None if lora is None else LoraConfig(**{"r": 2, "target_modules": "all-linear"} | lora)
    if adapter is not None:
        adapter.task_type, adapter.init_lora_weights = "CAUSAL_LM", False  # B is not zero
    return ActorCritic(wrap_policy(make(family, **changes), ModelConfig(), adapter), CriticConfig())


def make_prompts(*lengths: int, width: int | None = None, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Random prompts, padded on the left with a token that would change much if it were seen."""
    width = width or max(lengths)
    mask = torch.arange(width) >= width - torch.tensor(lengths)[:, None]
    ids = torch.full(mask.shape, 50)
    drawn = torch.randint(3, VOCABULARY, (int(mask.sum()),), generator=torch.Generator().manual_seed(seed))
    return ids.masked_scatter(mask, drawn), mask


def uniform_numbers(sampling: Sampling, rows: int, seed: int = 5) -> Tensor:
    """Those that `Decoder.sample` draws after ``torch.manual_seed(seed)``."""
    return torch.rand(sampling.max_new_tokens, rows, dtype=torch.float64, generator=torch.manual_seed(seed))


def sample(decoder: Decoder, prompt: Tensor, mask: Tensor, sampling: Sampling = SAMPLING, seed: int = 5) -> Tensor:
    torch.manual_seed(seed)
    return decoder.sample(prompt, mask, sampling)


@torch.no_grad()
def naive(model: ActorCritic, prompt: Tensor, mask: Tensor, sampling: Sampling = SAMPLING, seed: int = 5) -> Tensor:
    """Row by row the whole sequence again for every token, without padding or cache, by the policy's own forward."""
    uniform, rows = uniform_numbers(sampling, len(prompt), seed), []
    for row in range(len(prompt)):
        given, drawn = prompt[row][mask[row]].tolist(), []
        for turn in range(sampling.max_new_tokens):
            ids = torch.tensor([given + drawn])
            scores = causal_lm(model.policy)(input_ids=ids, use_cache=False).logits[0, -1].double()
            sums = (scores / sampling.temperature).softmax(0).cumsum(0)
            drawn.append(int((sums <= uniform[turn, row] * sums[-1]).sum()))
            if drawn[-1] in sampling.eos_token_ids:
                break
        rows.append(drawn)
    longest = max(map(len, rows))
    return torch.tensor([drawn + [sampling.pad_token_id] * (longest - len(drawn)) for drawn in rows])


def assert_same(found: Tensor, expected: Tensor) -> None:
    assert found.tolist() == expected.tolist()


def ends(tokens: Tensor, sampling: Sampling = SAMPLING) -> list[int]:
    """Tokens of each row, its EOS included."""
    is_eos = torch.isin(tokens, torch.tensor(sampling.eos_token_ids))
    return (is_eos.cumsum(1) - is_eos.long() == 0).sum(1).tolist()


@torch.no_grad()
def move(model: ActorCritic, seed: int = 0) -> None:
    """Changes every trained weight in place, as an optimiser does."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.policy_parameters():
        parameter.add_(0.5 * parameter.abs().mean() * torch.randn(parameter.shape, generator=generator))
