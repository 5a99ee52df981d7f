"""A bound on how far the optimiser steps of one generation move the policy, measured and enforced after each."""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from stable_rlhf.errors import ConfigError
from stable_rlhf.integrations.trl.last_good import check_whole, trainable

ROWS = 4
"""Completions of each process that are looked at: with four, the logarithm of a KL deviates by 0.45 (docs/LOG.md,
2026-11-28), so the length of a step by a quarter."""
POSITIONS = 256
"""Most tokens of a completion that are looked at: their whole distributions are kept, 0.2 GB for 4 completions and a
vocabulary of 50,000."""
LOOKS = 6
"""Most looks after a step. The KL is about quadratic in the length of a step, so two are the rule."""
SLACK = 1.05
"""A step that ends so near to the bound is taken: another look would cost more than it brings."""


class TrustRegion:
    """Keeps KL(policy at the generation's start || policy) within a bound, by shortening what moved beyond it.

    theta = theta_0 + k (theta - theta_0) with k = sqrt(bound / KL), measured again until it is within the bound. KL is
    over the whole vocabulary, mean over the probe's tokens and over all processes, in nats per token.
    """

    def __init__(self, trainer: Any) -> None:
        remedy = "set trust_region=False"
        check_whole(trainer, "the bound on an update", remedy)
        if getattr(trainer, "_is_vlm", False):
            raise ConfigError(f"the bound on an update looks at texts alone, and this model reads images: {remedy}")
        self._trainer = trainer
        self._start: dict[str, torch.Tensor] = {}
        self._probe: Probe | None = None
        self._before: torch.Tensor | None = None
        self._shares: list[float] = []
        self.moved: float | None = None
        """KL of the generation's steps so far, nats per token; None where nothing was looked at."""

    @property
    def scale(self) -> float | None:
        """Mean share that is left of what the optimiser steps of the generation had moved."""
        return sum(self._shares) / len(self._shares) if self._shares else None

    def begin(self) -> None:
        """Remembers the policy before the first optimiser step of a generation."""
        self._probe = Probe.of(self._trainer._buffered_inputs)
        self._start = {name: weight.detach().clone() for name, weight in trainable(self._trainer)}
        self._before = self._log_probs()
        self._shares, self.moved = [], None

    @property
    def begun(self) -> bool:
        return self._before is not None

    def end(self) -> None:
        """Forgets the generation."""
        self._before, self._start, self._probe, self._shares, self.moved = None, {}, None, [], None

    def hold(self, bound: float) -> None:
        """Shortens what the steps since `begin` moved until it is within ``bound``, nats per token.

        A movement whose KL is not finite, or that stays beyond the bound, is undone.
        """
        share, proposed = 1.0, dict[str, torch.Tensor]()
        for look in range(LOOKS):
            self.moved = self._kl()
            if self.moved is None or self.moved <= SLACK * bound:
                break
            if not proposed:  # each share is taken of these: rounding would add up
                proposed = {name: weight.detach().clone() for name, weight in trainable(self._trainer)}
            again = math.isfinite(self.moved) and look < LOOKS - 1
            share *= math.sqrt(bound / self.moved) if again else 0.0
            self._set(proposed, share)
            if not again:
                self.moved = 0.0
                break
        self._shares.append(share)

    def _set(self, proposed: dict[str, torch.Tensor], share: float) -> None:
        with torch.no_grad():
            for name, weight in trainable(self._trainer):
                start = self._start[name]
                if share == 0.0:
                    weight.copy_(start)
                else:
                    weight.copy_(start.float() + share * (proposed[name].float() - start.float()))

    def _kl(self) -> float | None:
        """None without a token on any process."""
        assert self._before is not None
        before, now = self._before, self._log_probs()
        terms = before.exp() * (before - now)
        kl = terms.masked_fill(before.isinf() & ~now.isnan(), 0.0).sum(-1)  # 0 log 0 = 0
        total = torch.stack([kl.sum(), torch.tensor(float(kl.numel()), device=kl.device)])
        summed, count = self._trainer.accelerator.reduce(total, reduction="sum").tolist()
        if count == 0.0:
            return None
        return summed / count if math.isnan(summed) else max(0.0, summed / count)

    @torch.no_grad()
    def _log_probs(self) -> torch.Tensor:
        """Log-probabilities of the probe's completion tokens: (tokens, vocabulary), float32."""
        assert self._probe is not None
        trainer, probe = self._trainer, self._probe
        model = trainer.accelerator.unwrap_model(trainer.model)
        base = model.get_base_model() if hasattr(model, "get_base_model") else model  # of an adapter
        takes = "logits_to_keep" in inspect.signature(type(base).forward).parameters
        less = {"logits_to_keep": probe.length + 1} if takes else {}
        training = model.training
        model.eval()
        try:
            with trainer.accelerator.autocast():
                logits = model(input_ids=probe.ids, attention_mask=probe.attention, use_cache=False, **less).logits
        finally:
            model.train(training)
        return torch.log_softmax(logits[:, -probe.length - 1 : -1][probe.counts].float(), dim=-1)


@dataclass(frozen=True, kw_only=True)
class Probe:
    """Prompts and the beginnings of their completions, of a generation's first rows with tokens that count."""

    ids: torch.Tensor
    """(R, P + T) tokens."""
    attention: torch.Tensor
    """(R, P + T) True at tokens that are no padding."""
    counts: torch.Tensor
    """(R, T) True at the policy's own tokens: no padding, no tool's answer."""

    @property
    def length(self) -> int:
        return self.counts.shape[1]

    @classmethod
    def of(cls, parts: Sequence[Mapping[str, Any]]) -> Probe:
        """Of the micro-batches of a generation, all of one width."""
        whole = {name: torch.cat([part[name] for part in parts]) for name in NAMES}
        counts = whole["completion_mask"].bool()
        if all(part.get("tool_mask") is not None for part in parts):
            counts = counts & torch.cat([part["tool_mask"] for part in parts]).bool()
        rows = counts.any(1).nonzero()[:ROWS, 0]
        prompt, length = whole["prompt_ids"].shape[1], min(POSITIONS, counts.shape[1])
        ids = torch.cat([whole["prompt_ids"], whole["completion_ids"]], dim=1)
        attention = torch.cat([whole["prompt_mask"], whole["completion_mask"]], dim=1)
        if len(rows) == 0:  # the others' processes wait for this one's look; none of its tokens counts
            rows = torch.zeros(1, dtype=torch.long, device=ids.device)
        ids, attention, counts = ids[rows], attention[rows], counts[rows]
        return cls(ids=ids[:, : prompt + length], attention=attention[:, : prompt + length], counts=counts[:, :length])


NAMES = ("prompt_ids", "prompt_mask", "completion_ids", "completion_mask")
"""What a micro-batch of TRL's holds of its rows; prompts are padded on the left, completions on the right."""
