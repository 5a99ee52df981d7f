"""The optimiser steps on a batch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from stable_rlhf.config import CriticConfig, OptimConfig
from stable_rlhf.control import Decision
from stable_rlhf.learner.batch import says_something
from stable_rlhf.learner.measure import learns_policy, lengths
from stable_rlhf.learner.microbatches import Lengths, Microbatch, plan
from stable_rlhf.learner.objective import Scale
from stable_rlhf.learner.passes import Passes
from stable_rlhf.learner.settings import Learning
from stable_rlhf.learner.step_preview import Preview
from stable_rlhf.ops.objective import loss_denominator
from stable_rlhf.policy import ActorCritic
from stable_rlhf.records import Batch, StepStats, on


def optimizer_groups(model: ActorCritic, optim: OptimConfig, critic: CriticConfig) -> list[dict]:
    """AdamW's two groups: the policy, then the critic, with the same learning rate unless the critic has its own.

    Without a critic there is only the first.
    """
    lr = optim.learning_rate
    policy = {"params": model.policy_parameters(), "lr": lr, "weight_decay": optim.weight_decay}
    if not critic.heads:
        return [policy]
    return [policy, {"params": model.critic_parameters(), "lr": critic.learning_rate or lr, "weight_decay": 0.0}]


def update(
    passes: Passes,
    optimizer: torch.optim.Optimizer,
    batch: Batch,
    decision: Decision,
    step: int,
    preview: Preview | None = None,
) -> StepStats:
    """Takes num_iterations x num_mini_batches optimiser steps on the batch; returns the means of their metrics.

    ``step`` is the number of the run's step. ``preview`` is the run's; None takes every optimiser step whole.

    The policy takes no step on a batch that says nothing (`says_something`); the critic does. A minibatch in which no
    row has a reward, or only rows that are left out, takes no step and enters no mean; where that is every one, no mean
    has a value. A step whose gradient is not finite is not taken either, but is counted. The host waits for the device
    only in the preview, and at the end, where the metrics are read.
    """
    device = passes.model.device
    learns = learns_policy(passes.learning.critic, step) and says_something(batch, decision, passes.learning)
    counted = (batch.tokens.mask & batch.counts).sum(1).tolist()
    work = _minibatches(passes, lengths(batch.tokens), counted, step)
    if not work:
        return StepStats(metrics=_no_step(passes.learning))
    batch = on(batch, device)
    preview = preview if learns else None  # else there is nothing to look at, and nothing to learn from it
    if preview is not None:
        assert decision.update_kl is not None, "Config refuses a preview without a bound"
        preview.begin(batch, decision.update_kl, len(work))
    rows = _rows_on(device, work)
    kl_coef = torch.full((), decision.kl_coef, device=device)
    names: list[str] = []
    steps: list[Tensor] = []
    with passes.training():
        for number, minibatch in enumerate(work, start=1):
            scale = _scale(passes, minibatch, counted, kl_coef)
            names, figures = _gradient(passes, batch, minibatch, rows, scale, learns)
            norms = _clipped_step(passes, optimizer, learns, preview, last=number == len(work))
            steps.append(torch.cat([figures, norms]))
    metrics = _means([*names, "grad_norm/policy", "grad_norm/critic"], steps)
    if not passes.learning.critic.heads:
        del metrics["grad_norm/critic"]
    return StepStats(metrics=metrics if preview is None else metrics | preview.metrics())


def _rows_of(minibatch: Sequence[Microbatch]) -> list[int]:
    return [row for micro in minibatch for row in micro.rows[: micro.count].tolist()]


def _scale(passes: Passes, minibatch: Sequence[Microbatch], counted: Sequence[int], kl_coef: Tensor) -> Scale:
    """The denominators of a minibatch; ``counted``: each row's tokens that enter the loss."""
    learning = passes.learning
    tokens = [counted[row] for row in _rows_of(minibatch) if counted[row]]
    policy = loss_denominator(learning.optim.denominator, sum(tokens), len(tokens), learning.max_completion_length)
    numbers = [torch.full((), float(number), device=kl_coef.device) for number in (sum(tokens), policy)]
    return Scale(kl_coef=kl_coef, tokens=numbers[0], policy=numbers[1])


def _minibatches(passes: Passes, of_rows: Lengths, counted: Sequence[int], step: int) -> list[list[Microbatch]]:
    """The microbatches of every optimiser step of an update; ``counted``: each row's tokens that enter the loss."""
    learning, device = passes.learning, passes.model.device
    return [
        minibatch
        for iteration in range(learning.optim.num_iterations)
        for minibatch in plan(of_rows, learning.optim, learning.seed, step, iteration, device, passes.grain)
        # Where no row enters the loss, such as one with a reward, AdamW would move the weights by momentum only.
        if any(counted[row] for row in _rows_of(minibatch))
    ]


def _rows_on(device: torch.device, work: Sequence[Sequence[Microbatch]]) -> Iterator[Tensor]:
    """Moves ``rows`` of all microbatches to the device in one copy; yields them in order."""
    rows = [micro.rows for minibatch in work for micro in minibatch]
    return iter(torch.cat(rows).to(device).split([len(own) for own in rows]))


def _gradient(
    passes: Passes, batch: Batch, minibatch: Sequence[Microbatch], rows: Iterator[Tensor], scale: Scale, learns: bool
) -> tuple[list[str], Tensor]:
    """Adds the gradient of a minibatch to the parameters, microbatch by microbatch.

    ``rows`` yields the rows of its microbatches, on the device, and then of those that follow. Returns (names of its
    metrics, their values [K]).
    """
    names: list[str] = []
    shares: list[Tensor] = []
    for micro in minibatch:
        part = batch.rows(next(rows), micro.width, micro.length, micro.count)
        names, figures = passes.learn(part, scale, learns)
        shares.append(figures)
    return names, torch.stack(shares).sum(0)


def _clipped_step(
    passes: Passes, optimizer: torch.optim.Optimizer, learns: bool, preview: Preview | None, last: bool
) -> Tensor:
    """Clips each group's gradient to its own norm, takes the step and updates the target heads.

    Returns [2], the norms of policy and critic before clipping. Where a norm is not finite, weights, moments and target
    heads stay as they are; the host does not wait to find out.
    """
    model, learning = passes.model, passes.learning
    policy, critic = model.policy_parameters(), model.critic_parameters()
    held = [parameter.grad for parameter in policy]
    if not learns:
        for parameter in policy:
            parameter.grad = None  # AdamW passes over what has no gradient: no momentum, no decay
    found = [
        nn.utils.clip_grad_norm_(policy, learning.optim.max_grad_norm),
        nn.utils.clip_grad_norm_(critic, learning.critic.max_grad_norm),
    ]
    norms = torch.stack([norm.to(model.device, torch.float32) for norm in found])  # of no gradient: a 0 on the CPU
    finite = norms.isfinite().all()
    setattr(optimizer, "found_inf", 1.0 - finite.float())  # noqa: B010  the name by which AdamW reads it
    if preview is None:
        optimizer.step()
    else:
        preview.take(optimizer, finite, last)
    for parameter, gradient in zip(policy, held, strict=True):
        parameter.grad = gradient
    passes.zero_grad()
    model.update_targets(finite)
    return norms


def _no_step(learning: Learning) -> dict[str, float | None]:
    """The metrics of an update without a step: every row is of a group that ``optim.skip_zero_variance_groups`` leaves
    out, which is only without a critic."""
    names = ["loss/policy_avg", "policy/clipfrac_avg", "policy/approxkl_avg", "policy/entropy_avg", "val/ratio"]
    names += ["val/ratio_var", *([] if learning.kl.in_loss == "none" else ["loss/kl_avg"]), "grad_norm/policy"]
    return {**dict.fromkeys(names), "policy/skipped_steps": 0}


def _means(names: Sequence[str], steps: Sequence[Tensor]) -> dict[str, float | None]:
    """Means of the figures over the optimiser steps that were taken, and the number of steps that were not.

    The means are None where no step was taken. ``steps``: figures [K] of each optimiser step; the last two are the
    gradient's norms, and a step whose norm is not finite was not taken.
    """
    taken = torch.stack([figures[-2:].isfinite().all() for figures in steps])
    total = torch.stack([torch.where(ok, figures, 0.0) for ok, figures in zip(taken, steps, strict=True)]).sum(0)
    *means, count = torch.cat([total / taken.sum().clamp(min=1), taken.sum()[None]]).tolist()  # waits for the device
    figures = dict(zip(names, means, strict=True))
    # `objective` gives the mean of (ratio - 1)^2: less the square of their mean it is the variance.
    figures["val/ratio_var"] = max(0.0, figures["val/ratio_var"] - (figures["val/ratio"] - 1) ** 2)
    known: dict[str, float | None] = {**figures} if count else dict.fromkeys(names)
    known["policy/skipped_steps"] = len(steps) - round(count)
    return known
