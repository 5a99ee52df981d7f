"""From a rollout to a changed policy: log-probs, advantages, objective, clipped optimiser steps."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from stable_rlhf.config import Config
from stable_rlhf.control import Decision, Observation
from stable_rlhf.models import ActorCritic, Output
from stable_rlhf.ops.advantages import gae, token_rewards
from stable_rlhf.ops.masked import distinct_n, masked_mean, masked_sum, whiten
from stable_rlhf.ops.objective import approx_kl, explained_variance, kl_estimate, kl_penalty, ppo_clip_loss, value_loss
from stable_rlhf.prompts import prompt_text
from stable_rlhf.records import Batch, Rollout, StepStats, Tokens


class DivergenceError(ArithmeticError):
    """A figure of the policy or of its update is not finite. What is on disk is from before."""


@dataclass(frozen=True, kw_only=True)
class Measured:
    """The policy, reference and critic on a rollout, as they were when it was sampled. [B, T] float32 unless said."""

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


def permutation(rows: int, seed: int, step: int, iteration: int) -> Tensor:
    """[rows] int64: the order of a pass over the rollout, given by its arguments alone, so that resume repeats it."""
    # Primes keep the seeds of neighbouring steps and iterations apart.
    generator = torch.Generator().manual_seed((seed * 1_000_003 + step * 1_009 + iteration) % 2**63)
    return torch.randperm(rows, generator=generator)


def minibatches(order: Tensor, config: Config) -> Iterator[list[Tensor]]:
    """The microbatches (row indices) of each minibatch of a pass; the configuration has checked that B divides."""
    for rows in order.chunk(config.optim.num_mini_batches):
        yield list(rows.chunk(config.optim.gradient_accumulation_steps))


@torch.no_grad()
def measure(model: ActorCritic, rollout: Rollout, config: Config, step: int) -> Measured:
    """One pass of the training forward over the rollout, in the first pass's microbatches.

    The same rows go through the same computation again in the first update, so its ratio is exactly 1.
    """
    tokens = rollout.tokens
    valid = torch.tensor(rollout.valid, device=tokens.mask.device)
    tokens = Tokens(
        prompt=tokens.prompt,
        prompt_mask=tokens.prompt_mask,
        response=tokens.response,
        mask=tokens.mask & valid[:, None],
    )
    shape, heads = tokens.response.shape, len(model.heads)
    zeros = torch.zeros(shape, device=tokens.mask.device)
    logp, ref_logp, entropy = zeros.clone(), zeros.clone(), zeros.clone()
    values, targets = zeros.repeat(heads, 1, 1), zeros.repeat(heads, 1, 1)
    for microbatches in minibatches(permutation(shape[0], config.seed, step, 0), config):
        for rows in microbatches:
            part = tokens.rows(rows)
            out = model(part, temperature=config.rollout.temperature, reference=True, targets=True)
            length = part.response.shape[1]
            for whole, piece in ((logp, out.logp), (ref_logp, out.ref_logp), (entropy, out.entropy)):
                whole[rows, :length] = piece
            values[:, rows, :length], targets[:, rows, :length] = out.values, out.targets
    return Measured(tokens=tokens, logp=logp, ref_logp=ref_logp, entropy=entropy, values=values, targets=targets)


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
                "from the last checkpoint, or start anew with a lower optim.learning_rate"
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
    score = torch.tensor(scores, device=mask.device, dtype=torch.float32)
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
    model: ActorCritic,
    optimizer: torch.optim.Optimizer,
    batch: Batch,
    decision: Decision,
    config: Config,
    step: int,
) -> StepStats:
    """num_iterations passes x num_mini_batches optimiser steps on the batch; means over them as metrics.

    A minibatch in which no row has a reward takes no step and is in no mean.
    """
    learns_policy = step >= config.critic.warmup_steps
    sums: dict[str, Tensor] = {}
    steps = 0
    with model.checkpointing(config.model.gradient_checkpointing):
        for iteration in range(config.optim.num_iterations):
            order = permutation(len(batch.logp), config.seed, step, iteration)
            for microbatches in minibatches(order, config):
                # One denominator for the whole minibatch, so that accumulation changes nothing.
                tokens = batch.tokens.mask[torch.cat(microbatches)].sum()
                if tokens == 0:  # no row has a reward: AdamW would move the weights by its momentum alone
                    continue
                steps += 1
                metrics: dict[str, Tensor] = {}
                for rows in microbatches:
                    part = batch.rows(rows)
                    out = model(
                        part.tokens,
                        temperature=config.rollout.temperature,
                        exact_kl=config.kl.in_loss == "exact" and learns_policy,
                    )
                    loss, figures = objective(out, part, model, decision, config, tokens, learns_policy)
                    loss.backward()
                    _add(metrics, figures)
                _add(metrics, _clipped_step(model, optimizer, config, learns_policy))
                _add(sums, metrics)
    figures = {name: float(value) / steps for name, value in sums.items()}
    figures["val/ratio_var"] = max(0.0, figures["val/ratio_var"] - (figures["val/ratio"] - 1) ** 2)
    return StepStats(metrics=figures)


def objective(
    out: Output,
    batch: Batch,
    model: ActorCritic,
    decision: Decision,
    config: Config,
    tokens: Tensor,
    learns_policy: bool,
) -> tuple[Tensor, dict[str, Tensor]]:
    """(loss of a microbatch, its metrics); both are this microbatch's share: sums over its tokens / ``tokens``.

    L = L_clip + vf_coef L_V + kl_coef KL(kl.in_loss) - entropy_coef H; during the critic's warm-up, vf_coef L_V alone.
    """
    mask, critic, optim = batch.tokens.mask, config.critic, config.optim
    fitted = zip(out.values, batch.values, strict=True)
    if critic.heads == 2 and critic.regress == "soft_min":
        fitted = [(model.combine(out.values), model.combine(batch.values))]
    losses = [
        value_loss(
            new, old, batch.returns, mask,
            kind=critic.loss, huber_delta=critic.huber_delta, cliprange=critic.cliprange_value,
            reduction=critic.clip_reduction, denominator=tokens,
        )
        for new, old in fitted
    ]  # fmt: skip
    value = sum((v.loss for v in losses), torch.zeros(())) / len(losses)
    policy = ppo_clip_loss(out.logp, batch.logp, batch.advantages, mask, optim.epsilon, tokens)
    entropy = masked_mean(out.entropy, mask, tokens)
    loss = critic.vf_coef * value
    metrics = {
        "loss/policy_avg": policy.loss,
        "loss/value_avg": value,
        "policy/clipfrac_avg": policy.clip_fraction,
        "policy/approxkl_avg": approx_kl(out.logp, batch.logp, mask, tokens),
        "policy/entropy_avg": entropy,
        "val/clipfrac_avg": torch.stack([v.clip_fraction for v in losses]).mean(),
        "val/ratio": masked_mean(policy.ratio, mask, tokens),
        # About 1, where the ratios are, so that little is lost when `update` makes it the variance about their mean.
        "val/ratio_var": masked_mean((policy.ratio - 1).square(), mask, tokens),
    }
    if learns_policy:
        loss = loss + policy.loss
        if optim.entropy_coef > 0:
            loss = loss - optim.entropy_coef * entropy
        if config.kl.in_loss != "none":
            kl = kl_penalty(out.logp, batch.ref_logp, out.exact_kl, config.kl.in_loss, mask, tokens)
            loss = loss + decision.kl_coef * kl
            metrics["loss/kl_avg"] = decision.kl_coef * kl
    return loss, {name: figure.detach() for name, figure in metrics.items()}


def _clipped_step(
    model: ActorCritic, optimizer: torch.optim.Optimizer, config: Config, learns_policy: bool
) -> dict[str, Tensor]:
    """Clips each group's gradient to its own norm, steps, and moves the target heads."""
    policy, critic = model.policy_parameters(), model.critic_parameters()
    if not learns_policy:
        for parameter in policy:
            parameter.grad = None  # AdamW passes over what has no gradient: no momentum, no decay
    norms = {
        "grad_norm/policy": nn.utils.clip_grad_norm_(policy, config.optim.max_grad_norm),
        "grad_norm/critic": nn.utils.clip_grad_norm_(critic, config.critic.max_grad_norm),
    }
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    model.update_targets()
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


def _add(sums: dict[str, Tensor], figures: dict[str, Tensor]) -> None:
    for name, figure in figures.items():
        sums[name] = sums[name] + figure if name in sums else figure
