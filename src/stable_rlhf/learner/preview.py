"""The preview: how far an optimiser step moves the policy, seen before the next one is taken, and bounded.

Of a proposed step theta_before -> theta_after the KL(pi_before || pi_after) is measured on a few rows of the rollout.
Above ``optim.max_preview_kl`` the step is taken in part, theta_before + s (theta_after - theta_before) with
s = max_preview_kl / KL, and measured again, until it is within the bound; a step that is not after RETRIES scalings, or
whose log-probs are not finite, is not taken at all. The optimiser's moments are those of the whole step, and the
critic's part of it is taken whole. Source: SAFE (arXiv 2602.04651), predictive step scaling; its published code never
calls it.

The last step of an update is always looked at. After a look that had nothing to scale, in this update or at the end of
the one before, the next steps are looked at together, at the last: n of them are bounded by n times the bound. So a
policy that moves slowly pays for one look an update, and one that moves fast for two or more a step.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from stable_rlhf.config import Config
from stable_rlhf.learner.microbatches import Lengths, Microbatch, permutation, up
from stable_rlhf.learner.passes import Passes
from stable_rlhf.ops.objective import step_kl
from stable_rlhf.records import Batch

RETRIES = 4
"""Scalings of one step. The KL is about quadratic in the step, so one by max / KL overshoots downwards: the second is
for steps so long that they were not, and what is still too long after four has no useful direction."""


SHARE = 32
"""One row of the rollout in this many is looked at. With two passes of two minibatches a look at each step, where
none is scaled, is an eighth of the rows forward, beside two forward and backward; with a sixteenth of the rows these
four cost the built-in policy 6 % of its step's CPU time (docs/LOG.md)."""


FEWEST = 2
"""Rows that are looked at at least, where there are as many: torch.compile makes a program of its own for one row."""


ORDER = 1_008
"""Which permutation of the rows the probe is taken from: no pass has this number (`microbatches.permutation`)."""


def probe(lengths: Lengths, config: Config, step: int, passes: Passes) -> Microbatch | None:
    """The rows that are looked at, drawn anew at every step; None where no row has a reward."""
    order = permutation(len(lengths.prompt), config.seed, step, ORDER).tolist()
    scored = [row for row in order if lengths.response[row] > 0]
    rows = scored[: max(FEWEST, len(order) // SHARE)]
    if not rows:
        return None
    grain = passes.grain
    exact = max(lengths.prompt[row] + lengths.response[row] - 1 for row in rows)
    # The bound on a pass's memory holds here too; of the exact width, so that the rows are the same with graphs.
    rows = rows[: max(1, config.optim.microbatch_tokens // exact)]
    return Microbatch(
        rows=torch.tensor(rows),
        count=len(rows),
        width=max(exact, min(up(exact, grain.columns), grain.limit)),
        length=up(max(lengths.response[row] for row in rows), grain.columns),
    )


class Preview:
    """The preview of one update's optimiser steps."""

    def __init__(self, passes: Passes, batch: Batch, rows: Microbatch, config: Config, quiet: bool) -> None:
        self.passes, self.limit = passes, config.optim.max_preview_kl or math.inf
        self.tokens = batch.tokens.rows(rows.rows.to(batch.logp.device), rows.width, rows.length)
        # What `measure` found, not another forward: in bfloat16 the two differ by the rounding of another shape, about
        # 1e-4 nats, far below any bound of use.
        self.sampled = batch.logp[rows.rows.to(batch.logp.device), : rows.length]
        self.before = self.sampled
        self.count = self.tokens.mask.sum()
        self.proposed: list[float] = []
        """KL of what each look found, as proposed, nats per token; not finite where its logits were not."""
        self.scales: list[float] = []
        """Share of each optimiser step that was taken, but for those whose gradient was not finite."""
        self._parameters: list[Any] = []
        self._start: list[Tensor] = []  # the weights at the last look; empty where nothing has been proposed since
        self._stepped: list[Tensor] = []  # whether the optimiser took each step since
        self.quiet = quiet
        """Whether the last look had nothing to scale: then the next waits for the update's last step."""

    @torch.no_grad()
    def take(self, optimizer: torch.optim.Optimizer, finite: Tensor, last: bool) -> None:
        """``optimizer.step()``, of which the policy's part is scaled until its KL is within the bound.

        ``finite`` (scalar, bool): False where the optimiser steps over its gradient; there is then nothing to measure.
        ``last``: no other step of this update follows.
        """
        if not self._start:
            self._parameters = self.passes.model.policy_parameters()
            # Copies, by a launch for many tensors where `clone` takes one each.
            self._start = list(torch._foreach_mul(self._parameters, 1.0))  # pyright: ignore[reportPrivateImportUsage]
        optimizer.step()
        self._stepped.append(finite)
        if last or not self.quiet:
            self._judge()

    def _judge(self) -> None:
        """Looks at the steps since the last look, and takes of them what is within the bound."""
        parameters, start = self._parameters, self._start
        after, kl = self._look()
        size, *stepped = torch.stack(
            [kl, *(step.double() for step in self._stepped)]
        ).tolist()  # one wait for the device
        self._start, self._stepped = [], []
        if not any(stepped):
            return
        self.proposed.append(size)
        count = round(sum(stepped))
        limit, scale = self.limit * count, 1.0
        self.quiet = size <= limit
        for _ in range(RETRIES):
            if size <= limit or not math.isfinite(size):
                break
            share = limit / size
            scale *= share
            torch._foreach_lerp_(parameters, start, 1.0 - share)  # pyright: ignore[reportPrivateImportUsage]
            after, kl = self._look()
            size = kl.item()
        if not size <= limit:
            scale, after = 0.0, self.before
            torch._foreach_copy_(parameters, start)  # pyright: ignore[reportPrivateImportUsage]
        self.before = after
        self.scales += [scale] * count

    def metrics(self) -> dict[str, float | None]:
        """Over the optimiser steps so far, without those whose gradient was not finite: the largest KL that a look
        found proposed (None where it was not finite), the mean share taken, and how many were not taken whole."""
        largest = max(self.proposed, key=lambda kl: kl if math.isfinite(kl) else math.inf, default=math.inf)
        return {
            "safe/preview_kl": largest if math.isfinite(largest) else None,
            "safe/step_scale": math.fsum(self.scales) / len(self.scales) if self.scales else None,
            "safe/scaled_steps": sum(scale < 1.0 for scale in self.scales),
        }

    def _look(self) -> tuple[Tensor, Tensor]:
        """(the probe's log-probs, KL of the step so far)."""
        after = self.passes.logp(self.tokens).clone()
        return after, step_kl(self.before, after, self.sampled, self.tokens.mask, self.count)
