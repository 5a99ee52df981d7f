"""The preview: a trust region on the whole update, predicted, measured and then kept.

The update of a rollout takes n optimiser steps from theta_0 to theta. Its size is KL(pi_0 || pi) in nats per token,
measured by a look: a forward over a few rows of the rollout (the probe), and the KL over the whole vocabulary at each
of their states. It may be `limit` at most. The sampled tokens alone would not do: they are the ones that the update was
made from, and their log-probs move up to twenty times as far as those of others.

1. Prediction. The KL is about quadratic in the length of the steps, so the last update's measured size says which share
   s of every step will bring this one to AIM x limit:  s = min(1, sqrt(AIM limit / (gain lr^2))), where gain is the
   measured size / (s lr)^2. AdamW runs with s lr: a share of the step and of its decay, the whole for s = 1.
2. Measurement. After the last step the update is looked at. Beyond the limit, or below half of it although s < 1, it is
   put at another point of its line, theta_0 + f (theta - theta_0) with f = sqrt(AIM limit / size), no longer than the
   whole steps would have made it, and looked at again. What is kept was measured.
3. While the prediction cannot be trusted (the first update, and after one that was far beyond its limit), the update is
   looked at after every step, the k-th within k / n of the limit.

In bfloat16 any change of the weights, however small, rounds the hidden states otherwise: that alone is some 2e-5 nats
in a 3B model and 1e-3 in one of 135M, which does not shrink with the step and does not add up. It is measured twice,
with weights moved by NUDGE, and subtracted. Where the limit is not LEVER times as large, the look is at a longer step,
theta_0 + k (theta - theta_0), whose size is k^2 times as large: k^2 = LEVER floor / limit. Then the size is that of the
longer step divided by k^2, and the way there and back has rounded the weights.

So the size of an update grows with the learning rate up to the limit and stays there. An update that is still beyond
the limit after RETRIES corrections, or whose log-probs are not finite, is not taken. Only the policy is scaled: the
critic's part of every step is whole, and AdamW's moments are those of the gradient. Source: SAFE (arXiv 2602.04651),
predictive step scaling, which its published code never calls; the bound on the whole update is that of TRPO (Schulman
et al. 2015, arXiv 1502.05477), the line search too.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from stable_rlhf.config import OptimConfig
from stable_rlhf.learner.microbatches import Grain, Lengths, Microbatch, permutation, up
from stable_rlhf.learner.passes import Passes
from stable_rlhf.ops.logprobs import token_statistics
from stable_rlhf.ops.masked import masked_mean
from stable_rlhf.records import Batch, Tokens

RETRIES = 6
"""Most corrections at a look. One is nearly always enough; log-probs that are far gone no longer grow with the square,
and those that are not finite lose a factor CUT each, so six reach a millionth of the step."""

CUT = 0.1
"""Share that is kept of an update whose log-probs are not finite: its size says nothing."""

AIM = 0.8
"""Share of the limit that is aimed at: the sizes of neighbouring updates differ by some 20 %, and an update beyond the
limit costs another look."""

SHORT = 0.5
"""Share of the limit below which a shortened update is made longer again."""

SURPRISE = 4.0
"""Multiple of the limit from which the prediction is not trusted in the next update: its later steps were computed far
outside the trust region."""

FORGET = 0.5
"""Least share of the gain that one update leaves: one whose gradient said little moves little, and must not let the
next one leap."""

SHARE = 16
"""A look takes one row of the rollout in this many: one look an update and sometimes a second, next to the forwards of
measuring and learning, which are eight over all rows with two passes, and to the sampling (docs/LOG.md has the
price)."""

FEWEST = 4
"""Least rows of a look, where the rollout has as many."""

LEVER = 4.0
"""Least multiple of what rounding alone does that an update at its limit is looked at with: rounding differs by a fifth
from one look to another, so a size is known to some 5 %. A longer step than needed says less, since an adapter that is
new moves the policy 7 times as far at twice its update."""

NUDGE = 1e-5
"""Added to each weight to measure what rounding alone does: far below what moves a policy, and enough to change the
rounding in every layer."""

FLOORS = 2
"""Updates before which that is measured, the larger counts: an adapter that is new adds nothing in the first."""

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
    before: Tensor
    """[n, T, h] the policy's hidden states before the update, as the rollout was measured. That forward had another
    shape, which in bfloat16 rounds otherwise: it is part of the floor."""
    head: Tensor
    """[V, h] the LM head before the update."""
    count: Tensor
    """Scalar: response tokens in the rows."""


class Preview:
    """Keeps each update of a run within its trust region; one object serves the whole run.

    Measuring a rollout calls ``draw`` and then ``keep`` for each microbatch; its update calls ``begin``, then ``take``
    for each optimiser step, then ``metrics``. During the critic's warm-up, and where no row has a reward, there is
    nothing to look at: the steps are taken whole and there are no metrics.
    """

    def __init__(self, passes: Passes) -> None:
        self.passes = passes
        self.gain: float | None = None
        """Size of an update of whole steps / squared learning rate, nats per token; None before it was measured."""
        self.floor = 0.0
        """Size of an update of no length, by rounding alone, nats per token."""
        self.floors = 0
        """How often it has been measured."""
        self.wary = True
        """Whether the next update is looked at after every step."""
        self._drawn = False  # whether a rollout was measured since the last update
        self._rows: Microbatch | None = None  # of its probe; None where no row has a reward
        self._before: Tensor | None = None  # their hidden states
        self._probe: Probe | None = None  # None where this update has nothing to look at
        self._start: list[Tensor] = []  # the policy's weights before the update
        self._stepped: list[Tensor] = []  # whether the optimiser took each step
        self._metrics: dict[str, float | None] = {}

    def draw(self, lengths: Lengths, step: int) -> None:
        """Draws the rows of the looks at the update of a rollout; ``step`` is the run's."""
        learning = self.passes.learning
        self._drawn = True
        self._rows, self._before = probe(lengths, learning.optim, learning.seed, step, self.passes.grain), None

    @torch.no_grad()
    def keep(self, micro: Microbatch, state: Tensor) -> None:
        """Copies the hidden states of its rows from a microbatch's; ``state`` [n, T, h] as ``Output.state``."""
        if self._rows is None:
            return
        if self._before is None:
            self._before = state.new_zeros(len(self._rows.rows), self._rows.length, state.shape[-1])
        places = {row: place for place, row in enumerate(micro.rows[: micro.count].tolist())}
        for number, row in enumerate(self._rows.rows.tolist()):
            if row in places:
                columns = min(state.shape[1], self._rows.length)
                self._before[number, :columns] = state[places[row], :columns]

    @torch.no_grad()
    def begin(self, batch: Batch, limit: float, steps: int) -> None:
        """Begins the update of the rollout that was measured last.

        ``batch`` is on the model's device; ``limit`` bounds the update's KL(before || after), nats per token;
        ``steps``: optimiser steps of the update. Raises RuntimeError where none was measured with this preview since
        the last update: nothing would bound this one.
        """
        if not self._drawn:
            raise RuntimeError("the update has no measured rollout to be compared with: give `measure` the preview")
        rows, self._drawn = self._rows, False
        self._probe, self._start, self._stepped = None, [], []  # an interrupted update may have left some
        self._metrics = {}
        if rows is None:
            return
        # Copies, by a launch for many tensors where `clone` takes one each.
        self._start = list(torch._foreach_mul(self._parameters, 1.0))  # pyright: ignore[reportPrivateImportUsage]
        self._probe = self._made(batch, rows)
        self._limit, self._steps, self._share = limit, steps, 1.0
        self._looks = 0
        if self.floors < FLOORS:
            torch._foreach_add_(self._parameters, NUDGE)  # pyright: ignore[reportPrivateImportUsage]
            try:
                found = self._distance(self._probe).item()
            finally:
                torch._foreach_copy_(self._parameters, self._start)  # pyright: ignore[reportPrivateImportUsage]
            self.floor = max(self.floor, found) if math.isfinite(found) else self.floor
            self.floors += 1

    def _made(self, batch: Batch, rows: Microbatch) -> Probe:
        """The probe at the policy as it is."""
        tokens = batch.tokens.rows(rows.rows.to(batch.logp.device), rows.width, rows.length)
        head = self.passes.model.head()
        trained = (copy for own, copy in zip(self._parameters, self._start, strict=True) if own is head)
        assert self._before is not None
        hidden = self._before.to(self.passes.model.hidden_dtype)  # Output.state is float32, which holds every number
        return Probe(tokens=tokens, before=hidden, head=next(trained, head), count=tokens.mask.sum())

    @torch.no_grad()
    def take(self, optimizer: torch.optim.Optimizer, finite: Tensor, last: bool) -> None:
        """Runs ``optimizer.step()`` with the policy's share of its learning rate, and looks where a look is due.

        ``finite`` (scalar, bool): False where the optimiser skips a gradient that is not finite.
        ``last``: no other step of this update follows.
        """
        if self._probe is None:
            optimizer.step()
            return
        policy = optimizer.param_groups[0]
        rate = policy["lr"]
        if not self._stepped:
            self._share = self._predicted(rate)
        policy["lr"] = rate * self._share  # AdamW's step and its decay are proportional to it
        try:
            optimizer.step()
        finally:
            policy["lr"] = rate
        self._stepped.append(finite)
        if last or self.wary:
            self._judge(self._probe, rate, last)

    @property
    def _parameters(self) -> list[Any]:
        return self.passes.model.policy_parameters()

    def _predicted(self, rate: float) -> float:
        """The share of every step that will make an update of AIM x limit."""
        expected = (self.gain or 0.0) * rate**2
        return 1.0 if expected <= AIM * self._limit else math.sqrt(AIM * self._limit / expected)

    def _judge(self, probe: Probe, rate: float, last: bool) -> None:
        """Looks at the steps so far and corrects their length; after the last one, learns the gain."""
        limit = self._limit * len(self._stepped) / self._steps
        # One wait for the device.
        size, *stepped = torch.stack([self._look(probe, limit), *(step.double() for step in self._stepped)]).tolist()
        if not any(stepped):
            if last:
                self._end(0.0, 0.0)
            return
        surprising = not size <= SURPRISE * limit
        for _ in range(RETRIES):
            fills = not last or self._share in (0.0, 1.0) or size >= SHORT * limit
            if size <= limit and fills:
                break
            self._resize(self._factor(size, limit))
            size = self._look(probe, limit).item()
        if not size <= limit:
            self._resize(0.0)
            size = 0.0
        if last:
            if all(stepped):
                self._learn_gain(size, rate)
            # One so small that nothing is seen of it needs no watching either.
            self.wary = surprising or self._share == 0.0 or (self.gain is None and not (size == 0.0 < rate))
            self._end(size, self._share)

    def _end(self, size: float, share: float) -> None:
        """Makes the metrics of the update, and lets go of its weights and of the probe."""
        self._metrics = {
            "safe/update_kl": self._limit,
            "safe/moved_kl": size,
            "safe/step_scale": share,
            "safe/looks": self._looks,
        }
        self._probe, self._start, self._stepped = None, [], []

    def _factor(self, size: float, limit: float) -> float:
        """The factor on the update's length that brings its KL to AIM x limit, or as near as whole steps reach."""
        if not math.isfinite(size):
            return CUT
        whole = 1.0 / self._share
        return whole if size * whole**2 <= AIM * limit else math.sqrt(AIM * limit / size)

    def _resize(self, factor: float) -> None:
        """theta <- theta_0 + factor (theta - theta_0)."""
        if factor == 0.0:
            torch._foreach_copy_(self._parameters, self._start)  # pyright: ignore[reportPrivateImportUsage]
        else:
            self._stretch(factor)
        share = self._share * factor
        self._share = 1.0 if math.isclose(share, 1.0, rel_tol=1e-12) else share  # 1 / 49 x 49 is just below 1

    def _stretch(self, factor: float) -> None:
        torch._foreach_lerp_(self._parameters, self._start, 1.0 - factor)  # pyright: ignore[reportPrivateImportUsage]

    def _learn_gain(self, size: float, rate: float) -> None:
        """gain <- size / (s lr)^2 where that is larger; smaller ones are averaged in, in the log domain."""
        if self._share == 0.0 or rate == 0.0 or size == 0.0:  # nothing moved: it says nothing of those that move
            return
        found = size / (self._share * rate) ** 2
        if self.gain is None or found >= self.gain:
            self.gain = found
        else:
            self.gain = max(FORGET * self.gain, math.sqrt(self.gain * found))

    def _look(self, probe: Probe, limit: float) -> Tensor:
        """Size of the update so far, nats per token, as exactly as a comparison with ``limit`` needs."""
        lever = math.sqrt(max(1.0, LEVER * self.floor / limit)) if limit > 0.0 else 1.0
        if lever == 1.0:
            found = self._distance(probe)
        else:
            self._stretch(lever)
            try:
                found = self._distance(probe)
            finally:
                self._stretch(1.0 / lever)
        return ((found - self.floor) / lever**2).clamp(min=0.0)  # of NaN it is NaN

    def _distance(self, probe: Probe) -> Tensor:
        """KL(before || now) on the probe, nats per token, with what rounding adds."""
        self._looks += 1
        model, temperature = self.passes.model, self.passes.learning.temperature
        after = self.passes.hidden(probe.tokens)
        found = token_statistics(probe.before, probe.head, probe.tokens.response, temperature, after, model.head())
        assert found.kl is not None
        return masked_mean(found.kl.double(), probe.tokens.mask, probe.count)

    def metrics(self) -> dict[str, float | None]:
        """Metrics of the last update: its limit, its size, the share of its steps that was taken, and the looks."""
        return self._metrics

    def state_dict(self) -> dict[str, float | bool | None]:
        """Everything that the next update depends on."""
        return {"gain": self.gain, "floor": self.floor, "floors": self.floors, "wary": self.wary}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.gain, self.floor, self.floors, self.wary = (state[name] for name in ("gain", "floor", "floors", "wary"))


def make_preview(passes: Passes) -> Preview | None:
    """The preview of a run; None where ``optim.preview`` is off, so that every step is taken whole."""
    return Preview(passes) if passes.learning.optim.preview else None
