"""What passes between the rooms: frozen records, with the shape, dtype and mask meaning of every field.

Shapes: B rows (prompts of this step), P prompt positions, T response positions, H value heads.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Tokens:
    """Token ids of prompts and responses; every tensor has B rows."""

    prompt: Tensor
    """[B, P] int64, padded on the left."""
    prompt_mask: Tensor
    """[B, P] bool, True for a prompt token, False for padding."""
    response: Tensor
    """[B, T] int64, padded on the right."""
    mask: Tensor
    """[B, T] bool, True for a response token, the EOS that ends it included."""

    def rows(self, index: Tensor | slice) -> Tokens:
        """The given rows, with the columns that are padding in all of them cut off."""
        prompt_mask, mask = self.prompt_mask[index], self.mask[index]
        first = int(prompt_mask.any(0).int().argmax())
        last = max(1, int(mask.any(0).sum()))
        return Tokens(
            prompt=self.prompt[index][:, first:],
            prompt_mask=prompt_mask[:, first:],
            response=self.response[index][:, :last],
            mask=mask[:, :last],
        )


@dataclass(frozen=True, kw_only=True)
class Rollout:
    """One step's prompts, completions and rewards, before anything is learned from them."""

    indices: list[int]
    """B row numbers in the training set."""
    prompts: list[Any]
    """B prompts as the data set has them: text or chat messages."""
    completions: list[str]
    """B completions, decoded without special tokens."""
    tokens: Tokens
    ended: list[bool]
    """B flags: True where the completion ended with EOS within max_completion_length."""
    scores: list[float]
    """B rewards in the scorer's units, weighted and penalised; 0.0 where not valid."""
    valid: list[bool]
    """B flags: False where a reward function gave None; such rows are not learned from."""
    per_function: dict[str, list[float | None]]
    """Each reward function's own B values."""
    truncated: int
    """Prompts of this step that were cut on the left."""


@dataclass(frozen=True, kw_only=True)
class Batch:
    """A rollout with everything the update needs. Every tensor is [B, T] float32 unless said otherwise."""

    tokens: Tokens
    """Rows whose reward is None have an all-False ``mask``: they have no part in any mean."""
    logp: Tensor
    """log pi_old(a_t | s_t), nats."""
    ref_logp: Tensor
    """log pi_ref(a_t | s_t), nats."""
    entropy: Tensor
    """Entropy of pi_old(. | s_t), nats."""
    values: Tensor
    """[H, B, T] each head's V(s_t) at sampling time, normalised reward units."""
    advantages: Tensor
    """Whitened over the batch; 0 outside the mask."""
    returns: Tensor
    """The critic's targets G_t; 0 outside the mask."""

    def rows(self, index: Tensor) -> Batch:
        """The given rows; columns that are padding in all of them are cut off."""
        tokens = self.tokens.rows(index)
        length = tokens.response.shape[1]
        cut = {f.name: getattr(self, f.name)[..., index, :][..., :length] for f in fields(self) if f.name != "tokens"}
        return replace(self, tokens=tokens, **cut)


@dataclass(frozen=True, kw_only=True)
class StepStats:
    """Means over one step's updates, by metric name (docs/metrics.md)."""

    metrics: dict[str, float]
