"""Rewards per token, advantages and returns of a measured rollout."""

from __future__ import annotations

import torch
from torch import Tensor

from stable_rlhf.control import Decision
from stable_rlhf.learner.figures import plain
from stable_rlhf.learner.settings import Learning
from stable_rlhf.ops.advantages import (
    dr_grpo,
    gae,
    grpo,
    length_adaptive_lam,
    reinforce_pp,
    rloo,
    token_rewards,
    zero_variance,
)
from stable_rlhf.ops.critic import explained_variance
from stable_rlhf.ops.masked import masked_mean, masked_sum, masked_var, whiten
from stable_rlhf.policy import ActorCritic
from stable_rlhf.records import Batch, Measured

# Units of the rewards as `reward.normalise` leaves them: what float32 leaves of log-ratios that are equal, times a
# coefficient. AdamW takes a full step along a gradient of any size, so that nothing must be nothing exactly.
NEGLIGIBLE = 1e-6

GROUPED = {"rloo": rloo, "grpo": grpo, "dr_grpo": dr_grpo}


@torch.no_grad()
def make_batch(
    model: ActorCritic, measured: Measured, scores: list[float], decision: Decision, learning: Learning
) -> tuple[Batch, dict[str, float | None]]:
    """Makes the batch to learn from: rewards per token, and advantages as ``optim.advantage`` says.

    ``scores`` [B] are normalised rewards. Returns (batch, its metrics).
    """
    kl, mask = learning.kl, measured.tokens.mask
    log_ratio = measured.logp - measured.ref_logp
    kl_coef = decision.kl_coef if kl.in_reward else 0.0
    score = torch.tensor(scores, dtype=torch.float32)
    # With c = E sum_t l_t / E T, the gradient of E sum_t (l_t - c) is E T times that of c, the mean per token.
    level = masked_mean(log_ratio, mask) if kl.length_neutral else 0.0
    rewards = token_rewards(score, log_ratio - level, kl_coef, mask)
    metrics: dict[str, Tensor | float] = {
        "objective/non_score_reward": (-kl_coef * log_ratio * mask).sum() / mask.any(1).sum()
    }
    if learning.optim.advantage == "gae":
        of_kl = token_rewards(torch.zeros_like(score), log_ratio - level, kl_coef, mask)
        without_signal = learning.optim.skip_equal_scores and _equal(score[mask.any(1)])
        advantages, returns, figures = _of_critic(model, measured, rewards, of_kl if without_signal else None, learning)
        metrics |= figures
    else:
        advantages, returns = _without_critic(rewards, mask, learning), torch.zeros_like(rewards)
    counts = torch.ones_like(mask)
    if learning.num_generations > 1:
        equal = zero_variance(score, mask.any(1), learning.num_generations)
        metrics["frac_reward_zero_std"] = equal[mask.any(1)].double().mean()
        if learning.optim.skip_zero_variance_groups:
            counts &= ~equal[:, None]
    batch = Batch(
        tokens=measured.tokens,
        logp=measured.logp,
        ref_logp=measured.ref_logp,
        entropy=measured.entropy,
        values=measured.values,
        advantages=advantages,
        returns=returns,
        counts=counts,
    )
    return batch, plain(metrics)


def _of_critic(
    model: ActorCritic, measured: Measured, rewards: Tensor, of_kl: Tensor | None, learning: Learning
) -> tuple[Tensor, Tensor, dict[str, Tensor | float]]:
    """(GAE's advantages whitened over the batch, returns, metrics of the critic).

    ``critic.bootstrap`` chooses whose values, the online or the target heads', enter the TD error as V(s_t) and as
    V(s_{t+1}). ``of_kl`` are the rewards of the KL alone where no score differs from another: the advantages are then
    theirs, which no critic has to know, or 0.
    """
    optim, critic, mask = learning.optim, learning.critic, measured.tokens.mask
    online, target = model.combine(measured.values), model.combine(measured.targets)
    values = target if critic.bootstrap == "target" else online
    bootstrap = online if critic.bootstrap == "online" else target
    lam = optim.lam if optim.length_alpha is None else length_adaptive_lam(mask, optim.length_alpha)
    advantages, returns = gae(rewards, values, bootstrap, mask, optim.gamma, lam)
    if critic.lam is not None:
        _, returns = gae(rewards, values, bootstrap, mask, optim.gamma, critic.lam)
    if of_kl is not None:
        none = torch.zeros_like(values)
        advantages, _ = gae(of_kl, none, none, mask, optim.gamma, lam)
        if masked_var(advantages, mask).sqrt() <= NEGLIGIBLE:
            advantages = none
    metrics: dict[str, Tensor | float] = {
        "val/explained_variance": explained_variance(returns, online, mask),
        "val/mean": masked_mean(online, mask),
        "val/returns_mean": masked_mean(returns, mask),
        "safe/target_gap": masked_mean((online - target).abs(), mask),
    }
    if len(measured.values) == 2:
        metrics["safe/head_gap"] = masked_mean((measured.values[0] - measured.values[1]).abs(), mask)
    return whiten(advantages, mask, optim.whiten_floor), returns, metrics


def _without_critic(rewards: Tensor, mask: Tensor, learning: Learning) -> Tensor:
    """Advantages [B, T] that no critic has a part in; 0 where the rewards differ by no more than rounding."""
    optim = learning.optim
    if optim.advantage == "reinforce_pp":
        nothing = torch.zeros_like(rewards)
        returns, _ = gae(rewards, nothing, nothing, mask, optim.gamma, 1.0)
        if masked_var(returns, mask).sqrt() <= NEGLIGIBLE:
            return nothing
        return reinforce_pp(rewards, mask, optim.gamma, optim.whiten_floor)
    whole, valid, group = masked_sum(rewards, mask, dim=1), mask.any(1), learning.num_generations
    if dr_grpo(whole, valid, group).abs().max() <= NEGLIGIBLE:
        return torch.zeros_like(rewards)
    return torch.where(mask, GROUPED[optim.advantage](whole, valid, group)[:, None], 0)


def _equal(scores: Tensor) -> bool:
    """Whether no score differs from another by more than rounding; scores [N], normalised."""
    return bool(scores.max() - scores.min() <= NEGLIGIBLE)


def says_something(batch: Batch, decision: Decision, learning: Learning) -> bool:
    """Whether the loss has a gradient for the policy: from an advantage, a KL in the loss or an entropy bonus.

    Without one AdamW would still move the policy, by the momentum of earlier batches. ``batch`` is on the CPU.
    """
    in_loss = learning.kl.in_loss != "none" and decision.kl_coef > 0
    return in_loss or learning.optim.entropy_coef > 0 or bool(batch.advantages.any())
