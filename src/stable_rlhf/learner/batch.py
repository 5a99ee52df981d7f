"""Rewards per token, advantages and returns of a measured rollout."""

from __future__ import annotations

import torch
from torch import Tensor

from stable_rlhf.control import Decision
from stable_rlhf.learner.figures import plain
from stable_rlhf.learner.settings import Learning
from stable_rlhf.ops.advantages import gae, length_adaptive_lam, token_rewards
from stable_rlhf.ops.masked import masked_mean, masked_var, whiten
from stable_rlhf.ops.objective import explained_variance
from stable_rlhf.policy import ActorCritic
from stable_rlhf.records import Batch, Measured

# Normalised reward units: what float32 leaves of log-ratios that are equal, times a coefficient. AdamW takes a full
# step along a gradient of any size, so that nothing must be nothing exactly.
NEGLIGIBLE = 1e-6


@torch.no_grad()
def make_batch(
    model: ActorCritic, measured: Measured, scores: list[float], decision: Decision, learning: Learning
) -> tuple[Batch, dict[str, float | None]]:
    """Makes the batch to learn from: rewards per token, GAE, advantages whitened over the batch.

    ``scores`` [B] are normalised rewards. ``critic.bootstrap`` chooses whose values, the online or the target heads',
    enter the TD error as V(s_t) and as V(s_{t+1}). With ``optim.skip_equal_scores``, where no score differs from
    another, the advantages are those of the KL alone, which no critic has to know, or 0. Returns (batch, its metrics).
    """
    optim, critic, kl = learning.optim, learning.critic, learning.kl
    mask = measured.tokens.mask
    log_ratio = measured.logp - measured.ref_logp
    kl_coef = decision.kl_coef if kl.in_reward else 0.0
    score = torch.tensor(scores, dtype=torch.float32)
    # With c = E sum_t l_t / E T, the gradient of E sum_t (l_t - c) is E T times that of c, the mean per token.
    level = masked_mean(log_ratio, mask) if kl.length_neutral else 0.0
    rewards = token_rewards(score, log_ratio - level, kl_coef, mask)
    online, target = model.combine(measured.values), model.combine(measured.targets)
    values = target if critic.bootstrap == "target" else online
    bootstrap = online if critic.bootstrap == "online" else target
    lam = optim.lam if optim.length_alpha is None else length_adaptive_lam(mask, optim.length_alpha)
    advantages, returns = gae(rewards, values, bootstrap, mask, optim.gamma, lam)
    if critic.lam is not None:
        _, returns = gae(rewards, values, bootstrap, mask, optim.gamma, critic.lam)
    if optim.skip_equal_scores and _equal(score[mask.any(1)]):
        of_kl, none = token_rewards(torch.zeros_like(score), log_ratio - level, kl_coef, mask), torch.zeros_like(values)
        advantages, _ = gae(of_kl, none, none, mask, optim.gamma, lam)
        if masked_var(advantages, mask).sqrt() <= NEGLIGIBLE:
            advantages = none
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


def _equal(scores: Tensor) -> bool:
    """Whether no score differs from another by more than rounding; scores [N], normalised."""
    return bool(scores.max() - scores.min() <= NEGLIGIBLE)


def says_something(batch: Batch, decision: Decision, learning: Learning) -> bool:
    """Whether the loss has a gradient for the policy: from an advantage, a KL in the loss or an entropy bonus.

    Without one AdamW would still move the policy, by the momentum of earlier batches. ``batch`` is on the CPU.
    """
    in_loss = learning.kl.in_loss != "none" and decision.kl_coef > 0
    return in_loss or learning.optim.entropy_coef > 0 or bool(batch.advantages.any())
