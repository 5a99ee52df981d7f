"""The optimiser steps on a batch."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from stable_rlhf.config import Config
from stable_rlhf.control import Decision
from stable_rlhf.learner.measure import learns_policy, lengths
from stable_rlhf.learner.microbatches import plan
from stable_rlhf.learner.objective import Scale
from stable_rlhf.learner.passes import Passes
from stable_rlhf.learner.preview import Preview, probe
from stable_rlhf.policy import ActorCritic
from stable_rlhf.records import Batch, StepStats, on


def optimizer_groups(model: ActorCritic, config: Config) -> list[dict]:
    """AdamW's two groups: the policy, then the critic, with the same learning rate unless the critic has its own."""
    lr = config.optim.learning_rate
    decay = config.optim.weight_decay
    return [
        {"params": model.policy_parameters(), "lr": lr, "weight_decay": decay},
        {"params": model.critic_parameters(), "lr": config.critic.learning_rate or lr, "weight_decay": 0.0},
    ]


def update(
    passes: Passes,
    optimizer: torch.optim.Optimizer,
    batch: Batch,
    decision: Decision,
    config: Config,
    step: int,
    quiet: bool = False,
) -> StepStats:
    """num_iterations passes x num_mini_batches optimiser steps on the batch; means over them as metrics.

    ``quiet``: the last update's ``StepStats.quiet``.

    A minibatch in which no row has a reward takes no step and is in no mean, and so it is with one whose gradient is
    not finite, which is counted. Nothing here waits for the device but the preview and the end, where the metrics are
    read.
    """
    device, learns = passes.model.device, learns_policy(config, step)
    of_rows = lengths(batch.tokens)
    work = [
        minibatch
        for iteration in range(config.optim.num_iterations)
        for minibatch in plan(of_rows, config, step, iteration, device, passes.grain)
        if minibatch  # no row has a reward: AdamW would move the weights by its momentum alone
    ]
    seen = probe(of_rows, config, step, passes) if learns and config.optim.max_preview_kl is not None else None
    batch = on(batch, device)
    preview = None if seen is None else Preview(passes, batch, seen, config, quiet)
    sizes = [len(micro.rows) for minibatch in work for micro in minibatch]
    rows = iter(torch.cat([micro.rows for minibatch in work for micro in minibatch]).to(device).split(sizes))
    kl_coef = torch.full((), decision.kl_coef, device=device)
    names: list[str] = []
    steps: list[Tensor] = []
    with passes.training():
        for number, minibatch in enumerate(work, start=1):
            tokens = sum(of_rows.response[row] for micro in minibatch for row in micro.rows[: micro.count].tolist())
            scale = Scale(kl_coef=kl_coef, tokens=torch.full((), float(tokens), device=device))
            sums: list[Tensor] = []
            for micro in minibatch:
                part = batch.rows(next(rows), micro.width, micro.length, micro.count)
                names, figures = passes.learn(part, scale, learns)
                sums.append(figures)
            norms = _clipped_step(passes, optimizer, config, learns, preview, last=number == len(work))
            steps.append(torch.cat([torch.stack(sums).sum(0), norms]))
    names = [*names, "grad_norm/policy", "grad_norm/critic"]
    taken = torch.stack([figures[-2:].isfinite().all() for figures in steps])
    total = torch.stack([torch.where(ok, figures, 0.0) for ok, figures in zip(taken, steps, strict=True)]).sum(0)
    *means, count = torch.cat([total / taken.sum().clamp(min=1), taken.sum()[None]]).tolist()
    figures = dict(zip(names, means, strict=True))
    figures["val/ratio_var"] = max(0.0, figures["val/ratio_var"] - (figures["val/ratio"] - 1) ** 2)
    known: dict[str, float | None] = {**figures} if count else dict.fromkeys(names)
    known["policy/skipped_steps"] = len(work) - round(count)
    if preview is None:
        return StepStats(metrics=known, quiet=False)
    return StepStats(metrics=known | preview.metrics(), quiet=preview.quiet)


def _clipped_step(
    passes: Passes,
    optimizer: torch.optim.Optimizer,
    config: Config,
    learns: bool,
    preview: Preview | None,
    last: bool,
) -> Tensor:
    """Clips each group's gradient to its own norm, steps, moves the target heads; [2] norms of policy and critic.

    Where a norm is not finite, weights, moments and target heads stay as they are, without the host's looking.
    """
    model = passes.model
    policy, critic = model.policy_parameters(), model.critic_parameters()
    held = [parameter.grad for parameter in policy]
    if not learns:
        for parameter in policy:
            parameter.grad = None  # AdamW passes over what has no gradient: no momentum, no decay
    found = [
        nn.utils.clip_grad_norm_(policy, config.optim.max_grad_norm),
        nn.utils.clip_grad_norm_(critic, config.critic.max_grad_norm),
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
