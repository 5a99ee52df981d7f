"""The preview: measures how far an optimiser step moves the policy, and scales the step down to a bound.

A look measures the KL(pi_before || pi_after) of a step theta_before -> theta_after on a few rows of the rollout (the
probe). If it is above ``optim.max_preview_kl``, only a part of the step is taken, theta_before + s (theta_after -
theta_before) with s = max_preview_kl / KL. Another look follows, until the KL is within the bound. A step that is still
too long after RETRIES scalings, or whose log-probs are not finite, is not taken. The optimiser's moments are those of
the whole step, and the critic's part of it is taken whole. Source: SAFE (arXiv 2602.04651), predictive step scaling;
its published code never calls it.

The last step of an update is always looked at. After a look that scaled nothing (the preview is then quiet), in this
update or at the end of the one before, the next steps share one look at the update's last step: n of them are bounded
by n times the bound. So a policy that moves slowly costs one look per update, and one that moves fast two or more per
step.
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
"""Most scalings of one step. The KL is about quadratic in the step, so one scaling by max / KL shortens it more than
enough. The second serves steps so long that this did not hold; a step that is too long after four has no useful
direction."""

SHARE = 32
"""A look takes one row of the rollout in this many. With two passes of two minibatches, an update whose
steps are all looked at and never scaled runs four looks, a forward over an eighth of the rows, next to two forwards and
backwards over all of them. With a sixteenth of the rows per look the four cost the built-in policy 6 % of its step's
CPU time (docs/LOG.md)."""

FEWEST = 2
"""Least rows of a look, where the rollout has as many: torch.compile makes a separate program for a single row."""

ORDER = 1_008
"""Number of the permutation that the probe is taken from; no pass over the rollout has it (see
`microbatches.permutation`)."""


def probe(lengths: Lengths, optim: OptimConfig, seed: int, step: int, grain: Grain) -> Microbatch | None:
    """Draws the rows of a step's looks; None where no row has a reward."""
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
    """The rows of the rollout on which an update's looks measure the KL, on the model's device."""

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
    """Bounds the KL of a run's optimiser steps; one object serves the whole run.

    An update calls ``begin``, then ``take`` for each optimiser step, then ``metrics``. During the critic's warm-up, and
    where no row has a reward, there is nothing to look at: the steps are taken whole and there are no metrics.
    """

    def __init__(self, passes: Passes, limit: float) -> None:
        """``limit``: bound on the KL of one optimiser step, nats per token."""
        self.passes, self.limit = passes, limit
        self.quiet = False
        """Whether the last look scaled nothing; the next look then waits for the update's last step."""
        self.proposed: list[float] = []
        """KL of the proposed steps at each look of this update, nats per token; not finite where the log-probs were
        not."""
        self.scales: list[float] = []
        """Share of each optimiser step of this update that was taken, except those whose gradient was not finite."""
        self._probe: Probe | None = None  # None where this update has nothing to look at
        self._before: Tensor  # [n, T] log-probs of the probe at the last look
        self._start: list[Tensor] = []  # the policy's weights at the last look; empty where no step was taken since
        self._stepped: list[Tensor] = []  # whether the optimiser took each step since

    def begin(self, batch: Batch, lengths: Lengths, step: int) -> None:
        """Draws the rows for the looks of this update.

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
        """Runs ``optimizer.step()`` and scales the policy's part of it until its KL is within the bound.

        ``finite`` (scalar, bool): False where the optimiser skips a gradient that is not finite; there is then nothing
        to measure.
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
        """Looks at the steps since the last look, and scales them to the bound."""
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
        """Scales the step from the weights ``start`` until its KL, ``size`` at first, is within the limit.

        Returns (share of the step that is taken, the probe's log-probs after it).
        """
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
        """Metrics of this update's optimiser steps so far, without those whose gradient was not finite.

        They are the largest KL of the proposed steps at a look (None where it was not finite), the mean share of a step
        that was taken, and the number of steps that were not taken whole.
        """
        if self._probe is None:
            return {}
        largest = max(self.proposed, key=lambda kl: kl if math.isfinite(kl) else math.inf, default=math.inf)
        return {
            "safe/preview_kl": largest if math.isfinite(largest) else None,
            "safe/step_scale": math.fsum(self.scales) / len(self.scales) if self.scales else None,
            "safe/scaled_steps": sum(scale < 1.0 for scale in self.scales),
        }

    def state_dict(self) -> dict[str, bool]:
        """Everything that the next update depends on."""
        return {"quiet": self.quiet}

    def load_state_dict(self, state: Mapping[str, bool]) -> None:
        self.quiet = state["quiet"]


def make_preview(passes: Passes) -> Preview | None:
    """The preview of a run; None where ``optim.max_preview_kl`` is None, so that every step is taken whole."""
    limit = passes.learning.optim.max_preview_kl
    return None if limit is None else Preview(passes, limit)
