"""The preview: how far an optimiser step moves the policy, seen before the next one is taken, and bounded.

Of a proposed step theta_before -> theta_after the KL(pi_before || pi_after) is measured on a few rows of the rollout
(a look). Above ``optim.max_preview_kl`` the step is taken in part, theta_before + s (theta_after - theta_before) with
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
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from stable_rlhf.config import OptimConfig
from stable_rlhf.learner.measure import learns_policy
from stable_rlhf.learner.microbatches import Grain, Lengths, Microbatch, permutation, up
from stable_rlhf.learner.passes import Passes
from stable_rlhf.ops.objective import step_kl
from stable_rlhf.records import Batch, Tokens

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


def probe(lengths: Lengths, optim: OptimConfig, seed: int, step: int, grain: Grain) -> Microbatch | None:
    """The rows that are looked at, drawn anew at every step; None where no row has a reward."""
    order = permutation(len(lengths.prompt), seed, step, ORDER).tolist()
    scored = [row for row in order if lengths.response[row] > 0]
    rows = scored[: max(FEWEST, len(order) // SHARE)]
    if not rows:
        return None
    exact = max(lengths.prompt[row] + lengths.response[row] - 1 for row in rows)
    # The bound on a pass's memory holds here too; of the exact width, so that the rows are the same with graphs.
    rows = rows[: max(1, optim.microbatch_tokens // exact)]
    return Microbatch(
        rows=torch.tensor(rows),
        count=len(rows),
        width=max(exact, min(up(exact, grain.columns), grain.limit)),
        length=up(max(lengths.response[row] for row in rows), grain.columns),
    )


@dataclass(frozen=True, kw_only=True)
class Probe:
    """The rows of an update's rollout that its looks are at, on the model's device."""

    tokens: Tokens
    sampled: Tensor
    """[n, T] log-probs of the policy that sampled them, nats."""
    count: Tensor
    """Scalar: response tokens in the rows."""

    @classmethod
    def of(cls, batch: Batch, rows: Microbatch) -> Probe:
        index = rows.rows.to(batch.logp.device)
        tokens = batch.tokens.rows(index, rows.width, rows.length)
        # As `measure` found them, not by another forward: in bfloat16 the two differ by the rounding of another shape,
        # about 1e-4 nats, far below any bound of use.
        return cls(tokens=tokens, sampled=batch.logp[index, : rows.length], count=tokens.mask.sum())


class Preview:
    """The preview of a run's optimiser steps, one object from its first update to its last.

    An update calls ``begin``, then ``take`` for each optimiser step, then ``metrics``. An update that has nothing to
    look at, during the critic's warm-up or where no row has a reward, takes its steps whole and has no metrics.
    """

    def __init__(self, passes: Passes, limit: float) -> None:
        """``limit``: bound on the KL of one optimiser step, nats per token."""
        self.passes, self.limit = passes, limit
        self.quiet = False
        """Whether the last look had nothing to scale: then the next waits for the update's last step."""
        self.proposed: list[float] = []
        """KL of what each look of this update found, as proposed, nats per token; not finite where its logits were
        not."""
        self.scales: list[float] = []
        """Share of each optimiser step of this update that was taken, except those whose gradient was not finite."""
        self._probe: Probe | None = None  # None where this update has nothing to look at
        self._before: Tensor  # [n, T] log-probs of the probe at the last look
        self._start: list[Tensor] = []  # the policy's weights at the last look; empty where no step was taken since
        self._stepped: list[Tensor] = []  # whether the optimiser took each step since

    def begin(self, batch: Batch, lengths: Lengths, step: int) -> None:
        """Draws the rows that the looks of this update are at.

        ``batch`` is on the model's device; ``lengths`` are those of its rows; ``step`` is the run's.
        """
        learning = self.passes.learning
        self.proposed, self.scales = [], []
        self._probe, self._start, self._stepped = None, [], []  # an interrupted update may have left some
        rows = probe(lengths, learning.optim, learning.seed, step, self.passes.grain)
        if rows is None or not learns_policy(learning.critic, step):
            self.quiet = False
            return
        self._probe = Probe.of(batch, rows)
        self._before = self._probe.sampled

    @torch.no_grad()
    def take(self, optimizer: torch.optim.Optimizer, finite: Tensor, last: bool) -> None:
        """``optimizer.step()``, of which the policy's part is scaled until its KL is within the bound.

        ``finite`` (scalar, bool): False where the optimiser steps over its gradient; there is then nothing to measure.
        ``last``: no other step of this update follows.
        """
        if self._probe is None:
            optimizer.step()
            return
        if not self._start:
            parameters: list[Any] = self.passes.model.policy_parameters()
            # Copies, by a launch for many tensors where `clone` takes one each.
            self._start = list(torch._foreach_mul(parameters, 1.0))  # pyright: ignore[reportPrivateImportUsage]
        optimizer.step()
        self._stepped.append(finite)
        if last or not self.quiet:
            self._judge(self._probe)

    def _judge(self, probe: Probe) -> None:
        """Looks at the steps since the last look, and takes of them what is within the bound."""
        after, kl = self._look(probe)
        # One wait for the device.
        size, *stepped = torch.stack([kl, *(step.double() for step in self._stepped)]).tolist()
        start, self._start, self._stepped = self._start, [], []
        if not any(stepped):
            return
        count = round(sum(stepped))
        limit = self.limit * count
        self.proposed.append(size)
        self.quiet = size <= limit
        scale, self._before = self._scaled(probe, start, after, size, limit)
        self.scales += [scale] * count

    def _scaled(
        self, probe: Probe, start: list[Tensor], after: Tensor, size: float, limit: float
    ) -> tuple[float, Tensor]:
        """Scales the step from the weights ``start`` until its KL, ``size`` at first, is within the limit; (share of it
        that is taken, the probe's log-probs then)."""
        parameters: list[Any] = self.passes.model.policy_parameters()
        scale = 1.0
        for _ in range(RETRIES):
            if size <= limit or not math.isfinite(size):
                break
            share = limit / size
            scale *= share
            torch._foreach_lerp_(parameters, start, 1.0 - share)  # pyright: ignore[reportPrivateImportUsage]
            after, kl = self._look(probe)
            size = kl.item()
        if size <= limit:
            return scale, after
        torch._foreach_copy_(parameters, start)  # pyright: ignore[reportPrivateImportUsage]
        return 0.0, self._before

    def _look(self, probe: Probe) -> tuple[Tensor, Tensor]:
        """(the probe's log-probs, KL of the step so far)."""
        after = self.passes.logp(probe.tokens).clone()
        return after, step_kl(self._before, after, probe.sampled, probe.tokens.mask, probe.count)

    def metrics(self) -> dict[str, float | None]:
        """Over this update's optimiser steps so far, without those whose gradient was not finite: the largest KL that a
        look found proposed (None where it was not finite), the mean share taken, and how many were not taken whole."""
        if self._probe is None:
            return {}
        largest = max(self.proposed, key=lambda kl: kl if math.isfinite(kl) else math.inf, default=math.inf)
        return {
            "safe/preview_kl": largest if math.isfinite(largest) else None,
            "safe/step_scale": math.fsum(self.scales) / len(self.scales) if self.scales else None,
            "safe/scaled_steps": sum(scale < 1.0 for scale in self.scales),
        }

    def state_dict(self) -> dict[str, bool]:
        """All that the next update depends on."""
        return {"quiet": self.quiet}

    def load_state_dict(self, state: Mapping[str, bool]) -> None:
        self.quiet = state["quiet"]


def make_preview(passes: Passes) -> Preview | None:
    """The preview of a run; None where ``optim.max_preview_kl`` is None: every step is then taken whole."""
    limit = passes.learning.optim.max_preview_kl
    return None if limit is None else Preview(passes, limit)
