"""From a rollout to a changed policy: log-probs, advantages, objective, clipped optimiser steps."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from stable_rlhf.config import Config
from stable_rlhf.control import Decision, Observation
from stable_rlhf.microbatches import Lengths, plan
from stable_rlhf.models import ActorCritic
from stable_rlhf.ops.advantages import gae, token_rewards
from stable_rlhf.ops.masked import distinct_n, masked_mean, masked_sum, whiten
from stable_rlhf.ops.objective import explained_variance, kl_estimate
from stable_rlhf.passes import Passes, Scale
from stable_rlhf.preview import Preview, probe
from stable_rlhf.prompts import prompt_text
from stable_rlhf.records import Batch, Rollout, StepStats, Tokens, on


class DivergenceError(ArithmeticError):
    """A figure of the policy or of its update is not finite. What is on disk is from before.

    ``figures``: name -> value of all that were looked at together.
    """

    def __init__(self, message: str, figures: Mapping[str, float | None]) -> None:
        super().__init__(message)
        self.figures = dict(figures)


@dataclass(frozen=True, kw_only=True)
class Measured:
    """The policy, reference and critic on a rollout, as they were when it was sampled; on the CPU.

    [B, T] float32 unless said."""

    tokens: Tokens
    """``mask`` is all False in rows whose reward is None."""
    logp: Tensor
    ref_logp: Tensor
    entropy: Tensor
    values: Tensor
    """[H, B, T]"""
    targets: Tensor
    """[H, B, T]"""


def optimizer_groups(model: ActorCritic, config: Config) -> list[dict]:
    """AdamW's two groups: the policy, then the critic, with the same learning rate unless the critic has its own."""
    lr = config.optim.learning_rate
    decay = config.optim.weight_decay
    return [
        {"params": model.policy_parameters(), "lr": lr, "weight_decay": decay},
        {"params": model.critic_parameters(), "lr": config.critic.learning_rate or lr, "weight_decay": 0.0},
    ]


@torch.no_grad()
def measure(passes: Passes, rollout: Rollout, config: Config, step: int) -> Measured:
    """The forward of the update and the reference's over the rollout, in the microbatches of the first pass.

    The same rows go through the same computation again in the first update, so its ratio is exactly 1. The result is on
    the CPU, copied there at once: what follows on it is small, and would wait for the device at every figure.
    """
    model, device = passes.model, passes.model.device
    tokens = dataclasses.replace(rollout.tokens, mask=rollout.tokens.mask & torch.tensor(rollout.valid)[:, None])
    tokens = tokens.padded(passes.grain.columns)
    shape, heads = tokens.response.shape, len(model.heads)
    names = ("logp", "ref_logp", "entropy")
    figures = torch.zeros(len(names) + 2 * heads, *shape, device=device)
    there = on(tokens, device)
    for minibatch in plan(lengths(tokens), config, step, 0, device, passes.grain):
        for micro in minibatch:
            rows = micro.rows.to(device)
            part = there.rows(rows, micro.width, micro.length, micro.count)
            out, ref_logp = passes.measure(part, learns_policy(config, step))
            parts = [out.logp[None], ref_logp[None], out.entropy[None], out.values, model.target_values(out.state)]
            figures[:, rows[: micro.count], : micro.length] = torch.cat(parts)[:, : micro.count]
    figures = figures.cpu()
    named = dict(zip(names, figures, strict=False))
    return Measured(tokens=tokens, values=figures[3 : 3 + heads], targets=figures[3 + heads :], **named)


def lengths(tokens: Tokens) -> Lengths:
    return Lengths(prompt=tokens.start.tolist(), response=tokens.mask.sum(1).tolist())


def learns_policy(config: Config, step: int) -> bool:
    """Whether the step is past the critic's warm-up."""
    return step >= config.critic.warmup_steps


def observe(step: int, rollout: Rollout, measured: Measured) -> Observation:
    """What the controller is given: mean reward of the valid rows, mean k1 and mean entropy over response tokens."""
    scores = [score for score, valid in zip(rollout.scores, rollout.valid, strict=True) if valid]
    mask = measured.tokens.mask
    kl = masked_mean((measured.logp - measured.ref_logp).double(), mask).item()
    entropy = masked_mean(measured.entropy.double(), mask).item()
    check_finite(step, {"objective/kl": kl, "objective/entropy": entropy})
    return Observation(step=step, reward=sum(scores) / len(scores), kl=kl, entropy=entropy)


def check_finite(step: int, figures: Mapping[str, float | None]) -> None:
    """Raises DivergenceError, with the step, the figure and the remedy, for the first that is NaN or infinite."""
    for name, figure in figures.items():
        if figure is not None and not math.isfinite(figure):
            raise DivergenceError(
                f"step {step}: {name} is {figure}, so the policy has diverged and the step is not recorded; resume "
                "from the last checkpoint, or start anew with a lower optim.learning_rate",
                figures,
            )


@torch.no_grad()
def make_batch(
    model: ActorCritic, measured: Measured, scores: list[float], decision: Decision, config: Config
) -> tuple[Batch, dict[str, float | None]]:
    """(batch to learn from, its metrics): rewards per token, GAE, whitening over the batch.

    ``scores`` [B] are normalised. critic.bootstrap says whose values stand on which side of delta.
    """
    mask = measured.tokens.mask
    log_ratio = measured.logp - measured.ref_logp
    kl_coef = decision.kl_coef if config.kl.in_reward else 0.0
    score = torch.tensor(scores, dtype=torch.float32)
    # With c = E sum_t l_t / E T, the gradient of E sum_t (l_t - c) is E T times that of c, the mean per token.
    level = masked_mean(log_ratio, mask) if config.kl.length_neutral else 0.0
    rewards = token_rewards(score, log_ratio - level, kl_coef, mask)
    online, target = model.combine(measured.values), model.combine(measured.targets)
    values = target if config.critic.bootstrap == "target" else online
    bootstrap = online if config.critic.bootstrap == "online" else target
    optim = config.optim
    advantages, returns = gae(rewards, values, bootstrap, mask, optim.gamma, optim.lam)
    if config.critic.lam is not None:
        _, returns = gae(rewards, values, bootstrap, mask, optim.gamma, config.critic.lam)
    batch = Batch(
        tokens=measured.tokens,
        logp=measured.logp,
        ref_logp=measured.ref_logp,
        entropy=measured.entropy,
        values=measured.values,
        advantages=whiten(advantages, mask, optim.whiten_floor),
        returns=returns,
    )
    rows = mask.any(1).sum()
    penalty = (-kl_coef * log_ratio * mask).sum() / rows
    metrics = {
        "objective/non_score_reward": penalty,
        "val/explained_variance": explained_variance(returns, online, mask),
        "val/mean": masked_mean(online, mask),
        "val/returns_mean": masked_mean(returns, mask),
        "safe/target_gap": masked_mean((online - target).abs(), mask),
    }
    if len(measured.values) == 2:
        metrics["safe/head_gap"] = masked_mean((measured.values[0] - measured.values[1]).abs(), mask)
    return batch, plain(metrics)


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


def rollout_metrics(rollout: Rollout, measured: Measured) -> dict[str, float | None]:
    """Metrics of the sampled text and of its distance to the reference (docs/metrics.md)."""
    mask, log_ratio = measured.tokens.mask, measured.logp - measured.ref_logp
    scores = torch.tensor([s for s, v in zip(rollout.scores, rollout.valid, strict=True) if v], dtype=torch.float64)
    lengths = rollout.tokens.mask.sum(1).double()
    distinct = distinct_n(rollout.tokens.response, rollout.tokens.mask, 2)
    metrics = {
        "objective/scores": scores.mean(),
        "objective/scores_std": scores.std(correction=0),
        "objective/kl": masked_mean(log_ratio.double(), mask),
        "objective/kl_k3": masked_mean(kl_estimate(measured.logp, measured.ref_logp, "k3").double(), mask),
        "objective/kl_per_sequence": (log_ratio.double() * mask).sum() / mask.any(1).sum(),
        "objective/entropy": masked_mean(measured.entropy.double(), mask),
        "objective/ref_nll": masked_mean(-measured.ref_logp.double(), mask),
        "completions/mean_length": lengths.mean(),
        "completions/min_length": lengths.min(),
        "completions/max_length": lengths.max(),
        "completions/clipped_ratio": 1 - sum(rollout.ended) / len(rollout.ended),
        "completions/distinct_2": distinct,
        "completions/skipped": len(rollout.valid) - sum(rollout.valid),
        "prompts/truncated": rollout.truncated,
    }
    for name, values in rollout.per_function.items():
        given = [value for value in values if value is not None]
        if given:
            metrics[f"rewards/{name}/mean"] = sum(given) / len(given)
    return plain(metrics)


def completion_rows(rollout: Rollout, measured: Measured) -> list[dict[str, Any]]:
    """Rows of completions/*.parquet; score and kl (nats per token) are None where there is no reward."""
    mask = measured.tokens.mask
    kl = masked_sum(measured.logp - measured.ref_logp, mask, dim=1) / mask.sum(1).clamp(min=1)
    return [
        {
            "prompt": prompt_text(rollout.prompts[row]),
            "completion": rollout.completions[row],
            "score": rollout.scores[row] if valid else None,
            "length": int(rollout.tokens.mask[row].sum()),
            "kl": float(kl[row]) if valid else None,
        }
        for row, valid in enumerate(rollout.valid)
    ]


def plain(metrics: Mapping[str, Tensor | float]) -> dict[str, float | None]:
    """Numbers; None where the figure is undefined (constant returns, no completion of two tokens, a single reward)."""
    undefined = ("val/explained_variance", "completions/distinct_2", "distinct_2", "reward_se")
    plain = {name: float(value) for name, value in metrics.items()}
    return {name: None if name in undefined and value != value else value for name, value in plain.items()}
