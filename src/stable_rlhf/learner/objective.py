"""The loss of a microbatch and its metrics."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from stable_rlhf.learner.settings import Learning
from stable_rlhf.ops.masked import masked_mean
from stable_rlhf.ops.objective import approx_kl, kl_penalty, ppo_clip_loss, value_loss
from stable_rlhf.policy import ActorCritic, Output
from stable_rlhf.records import Batch


@dataclass(frozen=True, kw_only=True)
class Scale:
    """Numbers that change from step to step: 0-dimensional float32 tensors, which a CUDA graph reads at each replay."""

    kl_coef: Tensor
    """The controller's coefficient of the KL in the loss, reward per nat."""
    tokens: Tensor
    """Response tokens of the whole minibatch: one denominator, so that accumulation changes nothing."""


def objective(
    out: Output, batch: Batch, model: ActorCritic, scale: Scale, learning: Learning, learns_policy: bool
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of a microbatch and its metrics, both as its share: sums over its tokens / ``scale.tokens``.

    L = L_clip + vf_coef L_V + kl_coef KL(kl.in_loss) - entropy_coef H; during the critic's warm-up, only vf_coef L_V.
    """
    optim, critic, kl = learning.optim, learning.critic, learning.kl
    mask, tokens = batch.tokens.mask, scale.tokens
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
    value = torch.stack([v.loss for v in losses]).mean()
    policy = ppo_clip_loss(out.logp, batch.logp, batch.advantages, mask, optim.epsilon, tokens, optim.epsilon_high)
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
        if kl.in_loss != "none":
            penalty = kl_penalty(out.logp, batch.ref_logp, out.exact_kl, kl.in_loss, mask, tokens)
            loss = loss + scale.kl_coef * penalty
            metrics["loss/kl_avg"] = scale.kl_coef * penalty
    return loss, {name: figure.detach() for name, figure in metrics.items()}
