"""The policy as it will be trained, tried on a few tokens when it is loaded: what training assumes of a model.

Each function returns a fault in words, or None. Log-probs are compared in nats, on prompts of different lengths.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from stable_rlhf.errors import ConfigError
from stable_rlhf.policy.transformer import causal_lm
from stable_rlhf.records import Tokens

FLOAT32_TOLERANCE = 1e-3
"""Largest difference of two log-probs, in nats, that is rounding in float32: it stays below 1e-4, and a wrong mask,
position or adapter is far above."""

BFLOAT16_TOLERANCE = 0.5
"""The same in bfloat16, whose 8 bits of mantissa move a log-prob of a model with 3 billion weights by up to 0.1."""

PROMPTS, RESPONSES = (1, 4, 2), (3, 2, 4)
"""Lengths of the rows that are tried: all different, and 8 columns in all, which every model can read."""

USUAL = 200
"""The tried token ids are below this: in a vocabulary, special tokens (of images, of padding) are mostly the last."""


def tolerance(policy: Any, autocast: bool) -> float:
    narrow = autocast or any(parameter.dtype != torch.float32 for parameter in policy.parameters())
    return BFLOAT16_TOLERANCE if narrow else FLOAT32_TOLERANCE


def probe(vocabulary: int, device: torch.device) -> tuple[Tensor, Tensor, Tokens]:
    """Rows of different lengths: (prompts [B, P] padded on the left, their mask, prompts and responses packed)."""
    rows, width, length = len(PROMPTS), max(PROMPTS), max(RESPONSES)
    few = max(1, min(vocabulary, USUAL) - 3)
    ids = 3 + torch.arange(rows * (width + length), device=device).view(rows, -1) * 7 % few
    ids = ids.clamp(max=vocabulary - 1)
    prompt, response = ids[:, :width], ids[:, width:]
    prompt_mask = torch.arange(width, device=device) >= width - torch.tensor(PROMPTS, device=device)[:, None]
    mask = torch.arange(length, device=device) < torch.tensor(RESPONSES, device=device)[:, None]
    return prompt, prompt_mask, Tokens.pack(prompt, prompt_mask, response, mask)


@contextlib.contextmanager
def foreign_errors(lm: Any, doing: str) -> Iterator[None]:
    """Turns whatever a model's own code raises into a ConfigError; running out of memory stays what it is."""
    try:
        yield
    except (torch.OutOfMemoryError, ConfigError):
        raise
    except Exception as error:
        raise ConfigError(
            f"{type(lm).__name__}: {doing} fails with {type(error).__name__}: {error}; choose another model, or "
            "mend its configuration"
        ) from error


@torch.no_grad()
def own_logp(policy: nn.Module, tokens: Tokens, autocast: bool) -> Tensor:
    """[B, T] log-probs of the responses by the policy's whole forward, one row at a time and without padding."""
    out = torch.zeros(tokens.response.shape, device=tokens.ids.device)
    for row, (start, count) in enumerate(zip(tokens.start.tolist(), tokens.mask.sum(1).tolist(), strict=True)):
        ids = tokens.ids[row : row + 1, : start + count]
        with torch.autocast(ids.device.type, torch.bfloat16, enabled=autocast):
            logits = policy(input_ids=ids, use_cache=False).logits
        logp = logits[0, start - 1 : -1].float().log_softmax(-1)
        out[row, :count] = logp.gather(1, ids[0, start:, None])[:, 0]
    return out


def apart(one: Tensor, other: Tensor, mask: Tensor) -> float:
    """The largest difference under the mask, nats; infinite where one is not a number."""
    difference = ((one - other).abs() * mask).nan_to_num(nan=float("inf"), posinf=float("inf"))
    return float(difference.masked_fill(~mask, 0.0).amax())


@torch.no_grad()
def forward_fault(model: Any) -> str | None:
    """What is wrong with the forward that trains: it must be the model's own, row by row, and causal."""
    policy, lm = model.policy, causal_lm(model.policy)
    _, _, tokens = probe(lm.get_input_embeddings().weight.shape[0], model.device)
    bound = tolerance(policy, model.autocast)
    with foreign_errors(lm, "a forward of a few tokens"):
        own, ours = own_logp(policy, tokens, model.autocast), model(tokens, temperature=1.0).logp
        last = tokens.start + tokens.mask.sum(1) - 1
        other = tokens.ids.scatter(1, last[:, None], tokens.ids.gather(1, last[:, None]) - 1)
        changed = Tokens(ids=other, start=tokens.start, response=tokens.response, mask=tokens.mask)
        moved = model(changed, temperature=1.0).logp
    earlier = tokens.mask & tokens.mask.roll(-1, 1)
    earlier[:, -1] = False
    if (difference := apart(ours, moved, earlier)) > bound:
        return f"a changed last token changes the log-probs before it by {difference:.2g} nats: it is not causal"
    if (difference := apart(own, ours, tokens.mask)) > bound:
        return f"rows side by side have log-probs {difference:.2g} nats off those of each row alone"
    return None


@torch.no_grad()
def reference_fault(model: Any) -> str | None:
    """What is wrong with the reference: before training it must be the policy."""
    lm = causal_lm(model.policy)
    _, _, tokens = probe(lm.get_input_embeddings().weight.shape[0], model.device)
    ours = model(tokens, temperature=1.0).logp
    difference = apart(ours, model.reference_logp(tokens, temperature=1.0), tokens.mask)
    if difference > tolerance(model.policy, model.autocast):
        return f"the reference's log-probs are {difference:.2g} nats off the policy's before training"
    return None


def check_checkpointing(model: Any) -> None:
    """Raises ConfigError where gradient checkpointing changes the forward."""
    lm = causal_lm(model.policy)
    _, _, tokens = probe(lm.get_input_embeddings().weight.shape[0], model.device)
    with torch.no_grad():
        ours = model(tokens, temperature=1.0).logp
    with foreign_errors(lm, "a forward with model.gradient_checkpointing=true"), model.checkpointing(True):
        again = model(tokens, temperature=1.0).logp.detach()
    difference = apart(ours, again, tokens.mask)
    if difference > tolerance(model.policy, model.autocast):
        raise ConfigError(
            f"model.gradient_checkpointing=true: changes log-probs of {type(lm).__name__} by {difference:.2g} nats; "
            "set model.gradient_checkpointing=false"
        )
