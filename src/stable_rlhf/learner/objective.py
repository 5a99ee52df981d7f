"""The loss of a microbatch and its metrics."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from stable_rlhf.config import OptimConfig
from stable_rlhf.learner.settings import Learning
from stable_rlhf.ops.critic import value_loss
from stable_rlhf.ops.masked import masked_mean
from stable_rlhf.ops.objective import PolicyLoss, approx_kl, cispo_loss, kl_penalty, ppo_clip_loss
from stable_rlhf.policy import ActorCritic, Output
from stable_rlhf.records import Batch


@dataclass(frozen=True, kw_only=True)
class Scale:
    """Numbers that change from step to step: 0-dimensional float32 tensors, which a CUDA graph reads at each replay."""

    kl_coef: Tensor
    """The controller's coefficient of the KL in the loss, reward per nat."""
    tokens: Tensor
    """Response tokens of the whole minibatch: one denominator, so that accumulation changes nothing."""
    policy: Tensor
    """Denominator of the policy's loss and of the KL in the loss, of the whole minibatch (``optim.denominator``)."""


def objective(
    out: Output, batch: Batch, model: ActorCritic, scale: Scale, learning: Learning, learns_policy: bool
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of a microbatch and its metrics, both as its share: sums over its tokens / a denominator of ``scale``.

    L = L_policy + vf_coef L_V + kl_coef KL(kl.in_loss) - entropy_coef H; during the critic's warm-up, only vf_coef L_V.
    Without a critic there is no L_V.
    """
    optim, kl = learning.optim, learning.kl
    mask, tokens = batch.tokens.mask & batch.counts, scale.tokens
    policy = _policy_loss(out, batch, mask, scale, optim)
    entropy = masked_mean(out.entropy, mask, tokens)
    value, values_clipped = _value_loss(out, batch, model, mask, tokens)
    # Without a critic a gradient of 0, for `backward`, where the policy does not learn either.
    loss = 0.0 * policy.loss if value is None else learning.critic.vf_coef * value
    metrics = {
        "loss/policy_avg": policy.loss,
        "loss/value_avg": value,
        "policy/clipfrac_avg": masked_mean(policy.clipped, mask, tokens),
        "policy/approxkl_avg": approx_kl(out.logp, batch.logp, mask, tokens),
        "policy/entropy_avg": entropy,
        "val/clipfrac_avg": values_clipped,
        "val/ratio": masked_mean(policy.ratio, mask, tokens),
        # About 1, where the ratios are, so that little is lost when `update` makes it the variance about their mean.
        "val/ratio_var": masked_mean((policy.ratio - 1).square(), mask, tokens),
    }
    if learns_policy:
        loss = loss + policy.loss
        if optim.entropy_coef > 0:
            loss = loss - optim.entropy_coef * entropy
        if kl.in_loss != "none":
            of = optim.denominator
            penalty = kl_penalty(out.logp, batch.ref_logp, out.exact_kl, kl.in_loss, mask, scale.policy, of)
            loss = loss + scale.kl_coef * penalty
            metrics["loss/kl_avg"] = scale.kl_coef * penalty
    return loss, {name: figure.detach() for name, figure in metrics.items() if figure is not None}


def _policy_loss(out: Output, batch: Batch, mask: Tensor, scale: Scale, optim: OptimConfig) -> PolicyLoss:
    given = (out.logp, batch.logp, batch.advantages, mask)
    level, of = optim.importance, optim.denominator
    if optim.loss == "cispo":
        bound = optim.epsilon if optim.epsilon_high is None else optim.epsilon_high
        return cispo_loss(*given, bound, scale.policy, level, of)
    return ppo_clip_loss(*given, optim.epsilon, scale.policy, optim.epsilon_high, level, of)


def _value_loss(
    out: Output, batch: Batch, model: ActorCritic, mask: Tensor, tokens: Tensor
) -> tuple[Tensor | None, Tensor | None]:
    """(the critic's loss, the share of tokens whose value was clipped), means over the heads that are fitted.

    Without a critic they are None.
    """
    critic = model.critic
    if not critic.heads:
        return None, None
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
    clipped = torch.stack([v.clip_fraction for v in losses]).mean()
    return torch.stack([v.loss for v in losses]).mean(), clipped
