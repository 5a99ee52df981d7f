"""Each way of sampling tried on a few tokens: its log-probs must be those of the forward that is trained."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import LogitsProcessor

from stable_rlhf.console import tell
from stable_rlhf.errors import ConfigError
from stable_rlhf.hardware import attention, cpu_matmul
from stable_rlhf.policy import apart, foreign_errors, lm_head, probe, tolerance
from stable_rlhf.rollout.attend import ATTENTION
from stable_rlhf.rollout.backend import Sampling

if TYPE_CHECKING:
    from stable_rlhf.rollout.decoder import Decoder

CRASHES = (RuntimeError, ValueError, TypeError, AttributeError, IndexError)
"""What a model's code raises where our loop gives it a cache or a mask that it was not written for."""


@torch.no_grad()
def choose_ways(decoder: Decoder) -> None:
    """Sets the decoder's ``loops`` and ``pads`` to the fastest way of sampling that agrees, and says a slower one.

    The generators' states stay. Raises ConfigError where no way agrees.
    """
    model, device = decoder.model, decoder.device
    prompt, mask, tokens = probe(lm_head(decoder.lm).shape[0], device)
    bound, name = tolerance(model.policy, model.autocast), type(decoder.lm).__name__

    def difference(logp: Tensor) -> float:
        return apart(trained, logp, tokens.mask)

    autocast = torch.autocast(device.type, torch.bfloat16, enabled=decoder.autocast)
    generators = [device] if device.type == "cuda" else []
    trained = model(tokens, temperature=1.0).logp
    with torch.random.fork_rng(generators), cpu_matmul.exact_products(device), autocast:
        decoder.refresh()
        if decoder.loops and (fault := _fault_of_loop(decoder, prompt, mask, tokens.response, difference, bound)):
            tell(f"{name}: completions are sampled by Transformers' loop, which is slower: ours {fault}")
            decoder.loops = False
        if decoder.loops and model.span == attention.UNBOUNDED:
            return  # Transformers' loop is never used
        with foreign_errors(decoder.lm, "sampling a few tokens"):
            if difference(_generated(decoder, prompt, mask, tokens.response)) <= bound:
                return
            decoder.pads = False
            if (off := difference(_generated(decoder, prompt, mask, tokens.response))) <= bound:
                tell(f"{name}: prompts of each length are sampled apart, which is slower: it does not allow padding")
                return
    raise ConfigError(
        f"{name}: what Transformers samples is {off:.2g} nats off the forward that would be trained; choose another "
        "model"
    )


def _fault_of_loop(
    decoder: Decoder, prompt: Tensor, mask: Tensor, response: Tensor, difference: Any, bound: float
) -> str | None:
    rows, count = response.shape
    sampling = Sampling(max_new_tokens=count, temperature=1.0, eos_token_ids=(), pad_token_id=0)
    room = decoder.forced(prompt.shape[1], sampling, response)
    try:
        with attention.attending(decoder.lm, ATTENTION):
            room.run(prompt, mask, torch.zeros(count, rows, dtype=torch.float64, device=prompt.device))
    except torch.OutOfMemoryError:
        raise
    except CRASHES as error:
        return f"fails on it ({type(error).__name__}: {error})"
    off = difference(torch.stack(room.logp, 1))
    return None if off <= bound else f"is {off:.2g} nats off the forward that trains"


def _generated(decoder: Decoder, prompt: Tensor, mask: Tensor, response: Tensor) -> Tensor:
    """[B, T] log-probs of the responses by Transformers' loop."""
    out = torch.zeros(response.shape, device=response.device)
    sampling = Sampling(max_new_tokens=response.shape[1], temperature=1.0, eos_token_ids=(), pad_token_id=0)
    for rows in decoder.groups(mask):
        wide, forced = mask[rows].any(0), Forced(response[rows])
        decoder.generate_tokens(prompt[rows][:, wide], mask[rows][:, wide], sampling, forced)
        out[rows] = torch.stack(forced.logp, 1)
    return out


class Forced(LogitsProcessor):
    """Has Transformers' loop write given tokens [B, T], and keeps their log-probs."""

    def __init__(self, tokens: Tensor) -> None:
        self.tokens = tokens
        self.logp: list[Tensor] = []

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        token = self.tokens[:, len(self.logp), None]
        self.logp.append(scores.float().log_softmax(-1).gather(1, token)[:, 0])
        return torch.full_like(scores, -torch.inf).scatter(1, token, 0.0)
