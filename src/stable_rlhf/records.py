"""The records that pass between parts of the package: frozen, with shape, dtype and mask meaning of every field.

Shapes: B rows (completions of this step, those of one prompt next to each other), P prompt positions, T response
positions, S positions of both, H value heads.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Tokens:
    """Token ids of prompts and responses; every tensor has B rows."""

    ids: Tensor
    """[B, S] int64: a row's prompt and then, without a gap, its response. Columns after it hold any token: with all
    padding on the right a causal model needs no attention mask, and positions count from 0."""
    start: Tensor
    """[B] int64, the number of prompt tokens: ``ids[b, start[b]]`` is the first of the response."""
    response: Tensor
    """[B, T] int64, the response again, padded on the right."""
    mask: Tensor
    """[B, T] bool, True for a response token, the EOS that ends it included."""

    @classmethod
    def pack(cls, prompt: Tensor, prompt_mask: Tensor, response: Tensor, mask: Tensor) -> Tokens:
        """Packs prompts [B, P], padded on the left (True in ``prompt_mask`` is a token), and responses [B, T]."""
        padded = torch.cat([prompt, response], 1)
        skipped = (~prompt_mask).sum(1, keepdim=True)
        at = torch.arange(padded.shape[1], device=padded.device) + skipped
        ids = padded.gather(1, at.clamp(max=padded.shape[1] - 1))
        return cls(ids=ids, start=prompt_mask.sum(1), response=response, mask=mask)

    def padded(self, columns: int) -> Tokens:
        """The tokens with columns added on the right, up to the next multiple of ``columns``."""

        def wider(grid: Tensor) -> Tensor:
            return torch.nn.functional.pad(grid, (0, -grid.shape[1] % columns))

        return replace(self, ids=wider(self.ids), response=wider(self.response), mask=wider(self.mask))

    def rows(
        self, index: Tensor, width: int | None = None, length: int | None = None, count: int | None = None
    ) -> Tokens:
        """The given rows, cut to ``width`` columns of ``ids`` and ``length`` of the response (None leaves all).

        The mask is all False after the first ``count`` of them.
        """
        counted = torch.arange(len(index), device=self.mask.device) < (len(index) if count is None else count)
        return Tokens(
            ids=self.ids[index, :width],
            start=self.start[index],
            response=self.response[index, :length],
            mask=self.mask[index, :length] & counted[:, None],
        )


@dataclass(frozen=True, kw_only=True)
class Rollout:
    """One step's prompts, completions and rewards, before anything is learned from them."""

    indices: list[int]
    """B row numbers in the training set; a prompt with several completions has its number several times."""
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
    """B flags: False where every reward function gave None; such rows are not learned from."""
    per_function: dict[str, list[float | None]]
    """Each reward function's own B values."""
    disagreement: float | None = None
    """Mean over valid rows of the deviation over rewards, with reward.aggregate; None for a sum."""
    truncated: int
    """Prompts of this step that were cut on the left."""
    metrics: dict[str, float] = field(default_factory=dict)
    """Figures that reward functions recorded, by name."""
    extra: dict[str, list[Any]] = field(default_factory=dict)
    """Columns of B texts, numbers or None that reward functions recorded."""
    gold: dict[str, list[float | None]] = field(default_factory=dict)
    """Each gold reward's B values, in an evaluation; never learned from."""
    columns: dict[str, list[Any]] = field(default_factory=dict)
    """B values of each of the data set's other columns, as the rewards were given them."""
    whole: list[str] | None = None
    """B completions with their special tokens, where a reward asks for them."""


@dataclass(frozen=True, kw_only=True)
class Measured:
    """The policy, reference and critic on a rollout, as they were when it was sampled. On the CPU.

    Every tensor is [B, T] float32 unless said otherwise.
    """

    tokens: Tokens
    """``mask`` is all False in rows whose reward is None."""
    logp: Tensor
    """log pi(a_t | s_t), nats."""
    ref_logp: Tensor
    """log pi_ref(a_t | s_t), nats."""
    entropy: Tensor
    """Entropy of pi(. | s_t), nats."""
    values: Tensor
    """[H, B, T] each head's V(s_t), normalised reward units; H is 0 without a critic."""
    targets: Tensor
    """[H, B, T] each target head's V(s_t), normalised reward units."""
    kl: Tensor | None = None
    """KL(pi(. | s_t) || pi_ref(. | s_t)) over the whole vocabulary, nats, where it is observed."""

    @property
    def log_ratio(self) -> Tensor:
        """log pi(a_t | s_t) - log pi_ref(a_t | s_t), nats, float64: k1, whose mean is a KL and may be negative."""
        return (self.logp - self.ref_logp).double()

    @property
    def observed_kl(self) -> Tensor:
        """The KL that the controller sees, nats, float64: the exact one where it was measured, else k1."""
        return self.log_ratio if self.kl is None else self.kl.double()


@dataclass(frozen=True, kw_only=True)
class Batch:
    """A rollout with everything the update needs. Every tensor is [B, T] float32 unless said otherwise."""

    tokens: Tokens
    """Rows whose reward is None have an all-False ``mask`` and enter no mean."""
    logp: Tensor
    """log pi_old(a_t | s_t), nats."""
    ref_logp: Tensor
    """log pi_ref(a_t | s_t), nats."""
    entropy: Tensor
    """Entropy of pi_old(. | s_t), nats."""
    values: Tensor
    """[H, B, T] each head's V(s_t) at sampling time, normalised reward units."""
    advantages: Tensor
    """As ``optim.advantage`` makes them; 0 outside the mask."""
    returns: Tensor
    """The critic's targets G_t; 0 outside the mask, and everywhere without a critic."""
    counts: Tensor
    """[B, T] bool, False in the rows that ``optim.skip_zero_variance_groups`` leaves out of loss and denominators."""

    def rows(
        self, index: Tensor, width: int | None = None, length: int | None = None, count: int | None = None
    ) -> Batch:
        """The given rows, cut as ``Tokens.rows`` says."""
        cut = {f.name: getattr(self, f.name)[..., index, :length] for f in fields(self) if f.name != "tokens"}
        return Batch(tokens=self.tokens.rows(index, width, length, count), **cut)


@dataclass(frozen=True, kw_only=True)
class StepStats:
    """Means over one step's updates, by metric name (docs/metrics.md)."""

    metrics: dict[str, float | None]


def on(record: Any, device: torch.device) -> Any:
    """Copies a record of tensors, and the records in it, to a device."""
    parts = {field.name: getattr(record, field.name) for field in fields(record)}
    moved = {n: part.to(device) if isinstance(part, Tensor) else on(part, device) for n, part in parts.items()}
    return type(record)(**moved)
