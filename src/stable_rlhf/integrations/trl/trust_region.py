"""A bound on how far the optimiser steps of one generation move the policy, measured and enforced after each."""

from __future__ import annotations

import math
from typing import Any

import torch

from stable_rlhf.integrations.trl.last_good import check_whole, trainable

ROWS = 4
"""Rows of a process's first micro-batch that are looked at: with four, the logarithm of a KL deviates by 0.45
(docs/LOG.md, 2026-11-28), so the length of a step by a quarter."""
POSITIONS = 256
"""Most tokens of a row: whole distributions are kept, 0.2 GB for 4 rows and a vocabulary of 50,000."""
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
        check_whole(trainer, "the bound on an update", "set trust_region=False")
        self._trainer = trainer
        self._start: dict[str, torch.Tensor] = {}
        self._probe: dict[str, torch.Tensor] = {}
        self._before: torch.Tensor | None = None
        self.moved: float | None = None
        """KL of the generation's steps so far, nats per token."""
        self.scale = 1.0
        """Share that is left of the steps so far."""

    def begin(self) -> None:
        """Remembers the policy before the first optimiser step of a generation."""
        rows = self._trainer._buffered_inputs[0]
        names = ("prompt_ids", "prompt_mask", "completion_ids", "completion_mask")
        self._probe = {name: rows[name][:ROWS] for name in names}
        self._start = {name: weight.detach().clone() for name, weight in trainable(self._trainer)}
        self._before = self._log_probs()
        self.moved, self.scale = 0.0, 1.0

    @property
    def begun(self) -> bool:
        return self._before is not None

    def end(self) -> None:
        """Forgets the generation."""
        self._before, self._start, self._probe = None, {}, {}

    def hold(self, bound: float) -> None:
        """Shortens what the steps since `begin` moved until it is within ``bound``, nats per token."""
        for _ in range(LOOKS):
            self.moved = self._kl()
            if self.moved <= SLACK * bound:
                return
            self._shorten(math.sqrt(bound / self.moved) if math.isfinite(self.moved) else 0.0)
        self._shorten(0.0)
        self.moved = 0.0

    def _shorten(self, share: float) -> None:
        self.scale *= share
        with torch.no_grad():
            for name, weight in trainable(self._trainer):
                start = self._start[name]
                if share == 0.0:
                    weight.copy_(start)
                else:
                    weight.copy_(start.float() + share * (weight.float() - start.float()))

    def _kl(self) -> float:
        assert self._before is not None
        before, now = self._before, self._log_probs()
        kl = (before.exp() * (before - now)).sum(-1)
        total = torch.stack([kl.sum(), torch.tensor(float(kl.numel()), device=kl.device)])
        total = self._trainer.accelerator.reduce(total, reduction="sum")
        return max(0.0, float(total[0] / total[1].clamp(min=1.0)))

    @torch.no_grad()
    def _log_probs(self) -> torch.Tensor:
        """Log-probabilities of the probe's completion tokens that are no padding: (tokens, vocabulary), float32."""
        trainer, probe = self._trainer, self._probe
        ids = torch.cat([probe["prompt_ids"], probe["completion_ids"]], dim=1)
        mask = torch.cat([probe["prompt_mask"], probe["completion_mask"]], dim=1)
        count = min(POSITIONS, probe["completion_ids"].shape[1])
        model = trainer.accelerator.unwrap_model(trainer.model)
        training = model.training
        model.eval()
        try:
            with trainer.accelerator.autocast():
                first = probe["prompt_ids"].shape[1] - 1
                hidden = model(input_ids=ids, attention_mask=mask, logits_to_keep=ids.shape[1] - first).logits
        finally:
            model.train(training)
        kept = probe["completion_mask"][:, :count].bool()
        return torch.log_softmax(hidden[:, :count][kept].float(), dim=-1)
