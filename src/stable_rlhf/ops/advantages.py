"""Rewards per token and advantages: of a critic (`gae`), of a group of completions (`rloo`, `grpo`, `dr_grpo`), or of
the batch (`reinforce_pp`). All results are targets: they carry no gradient.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .masked import DEVIATION_FLOOR, check_mask, whiten

GRPO_EPSILON = 1e-4
"""Added to a group's deviation: TRL's figure. A group whose rewards are equal has advantages of 0, not of 0 / 0."""


@torch.no_grad()
def token_rewards(scores: Tensor, log_ratio: Tensor, kl_coef: float, mask: Tensor) -> Tensor:
    """r_t = -kl_coef * l_t, and the score is added at the last response token.

    l_t = logp - ref is k1, whose expectation under the policy is the exact KL: as a reward, which reaches the policy
    through the score function, its gradient is that of the KL of the whole sequence. Source: Ziegler et al. 2019,
    "Fine-Tuning Language Models from Human Preferences", section 2, equation 2, spread over the tokens.

    Args:
        scores: [B], the scorer's units.
        log_ratio: l [B, T], nats.
        kl_coef: reward per nat; 0 when the KL acts elsewhere.
        mask: bool [B, T], True on response tokens. A row without any (a skipped sample) gets zeros, whatever its score.

    Returns:
        [B, T], 0 outside the mask.

    Raises:
        TypeError, ValueError: see `masked.check_mask`; ValueError when scores are not [B].
    """
    check_mask(mask, log_ratio=log_ratio)
    if scores.shape != mask.shape[:1]:
        raise ValueError(f"scores has shape {tuple(scores.shape)}: give one score a row, ({mask.shape[0]},)")
    still_to_come = mask.flip(1).cumsum(1).flip(1)  # response tokens from t on, t included
    last = mask & (still_to_come == 1)
    return torch.where(mask, -kl_coef * log_ratio, 0) + torch.where(last, scores[:, None], 0)


@torch.no_grad()
def gae(
    rewards: Tensor, values: Tensor, bootstrap_values: Tensor, mask: Tensor, gamma: float, lam: float | Tensor
) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation (Schulman et al. 2016, section 3, equations 11 and 16).

    delta_t = r_t + gamma * bootstrap_{t+1} - V(s_t)   when t+1 is a response token,
    delta_t = r_t - V(s_t)                             at the last response token;
    A_t = delta_t + gamma * lam * A_{t+1},   G_t = A_t + V(s_t).

    Args:
        rewards: [B, T], the scorer's units (`token_rewards`).
        values: V(s_t) [B, T], s_t being the prompt and the tokens before t.
        bootstrap_values: [B, T]; entry t is the value of s_t by the critic that bootstraps (the target critic, or
            `values` again). Entry 0 is never read.
        mask: bool [B, T], True on response tokens, contiguous from 0. (A hole ends the sequence before it, and what
            follows is a sequence of its own.) A row without any (a skipped sample) gets zeros.
        gamma: discount per token, 0 to 1.
        lam: lambda, 0 (one step) to 1 (Monte-Carlo), per token; one for all rows, or [B], one a row.

    Returns:
        Advantages A and returns G, both [B, T], exactly 0 outside the mask, where no input is read, NaN or not.

    Raises:
        TypeError, ValueError: see `masked.check_mask`; ValueError for gamma or lam outside 0 to 1.
    """
    check_mask(mask, rewards=rewards, values=values, bootstrap_values=bootstrap_values)
    for name, setting in (("gamma", torch.tensor(gamma)), ("lam", torch.as_tensor(lam))):
        if not bool(((setting >= 0.0) & (setting <= 1.0)).all()):
            raise ValueError(f"{name} is {setting.tolist()}: give a number from 0 to 1")
    values = torch.where(mask, values, 0)
    next_values = torch.nn.functional.pad(torch.where(mask, bootstrap_values, 0)[:, 1:], (0, 1))
    deltas = torch.where(mask, rewards, 0) + gamma * next_values - values
    advantages = torch.zeros_like(deltas)
    following = torch.zeros_like(deltas[:, 0])
    for t in reversed(range(mask.shape[1])):
        following = torch.where(mask[:, t], deltas[:, t] + gamma * lam * following, 0)
        advantages[:, t] = following
    return advantages, advantages + values


@torch.no_grad()
def length_adaptive_lam(mask: Tensor, alpha: float) -> Tensor:
    """lambda = max(0, 1 - 1 / (alpha T)) of each row, T its response tokens: [B].

    Sum_t lambda^t = 1 / (1 - lambda) = alpha T then: a TD error is spread over the same share of a short response and
    of a long one. Where alpha T < 1 that is less than a token, and lambda is 0. Source: Yue et al. 2025, "VAPO"
    (arXiv 2504.05118), length-adaptive GAE.

    Args:
        mask: bool [B, T], True on response tokens.
        alpha: share of the response, positive.
    """
    if not alpha > 0:
        raise ValueError(f"alpha is {alpha}: give a positive number")
    return (1 - 1 / (alpha * mask.sum(1).clamp(min=1))).clamp(min=0.0)


@torch.no_grad()
def rloo(rewards: Tensor, valid: Tensor, group: int) -> Tensor:
    """A_i = R_i - mean of R_j over the other valid completions j of the prompt: REINFORCE, leave-one-out.

    Source: Ahmadian et al. 2024, "Back to Basics" (arXiv 2402.14740), RLOO.

    Args:
        rewards: R [B], one a completion; the sum of its tokens' (`token_rewards`), so the KL is in it where it
            acts in the reward.
        valid: bool [B], True where the completion has a reward. What stands in the other entries is never read.
        group: completions of a prompt; those of one prompt are next to each other.

    Returns:
        [B]: 0 where not valid, and for a valid completion that has no other in its group. The denominator is the
        number of the group's other valid completions.

    Raises:
        TypeError, ValueError: see `masked.check_mask`; ValueError for a group below 2 or one that does not divide B.
    """
    kept, counted = _groups(rewards, valid, group)
    others = (counted.sum(1, keepdim=True) - 1).clamp(min=0)
    baselines = (kept.sum(1, keepdim=True) - kept) / others.clamp(min=1)
    return _ungrouped(torch.where(others > 0, kept - baselines, 0), rewards, valid)


@torch.no_grad()
def grpo(rewards: Tensor, valid: Tensor, group: int, epsilon: float = GRPO_EPSILON) -> Tensor:
    """A_i = (R_i - mean) / (deviation + epsilon), mean and deviation of the prompt's valid completions.

    Source: Shao et al. 2024, "DeepSeekMath" (arXiv 2402.03300), section 4.1.2. The paper names neither the denominator
    of the variance nor epsilon: as in TRL, the variance is unbiased (n - 1), and epsilon 1e-4.

    Args:
        rewards, valid, group: as in `rloo`.
        epsilon: added to the deviation, in the units of the rewards; positive.

    Returns:
        [B]: 0 where not valid, and in a group of a single valid completion or of equal rewards. The denominators are
        n for the mean and n - 1 for the variance, n the group's valid completions.

    Raises:
        TypeError, ValueError: as `rloo`; ValueError for an epsilon that is not positive.
    """
    if not epsilon > 0:
        raise ValueError(f"epsilon is {epsilon}: give a positive number, or a group of equal rewards divides by 0")
    centred, counted = _centred(rewards, valid, group)
    freedom = (counted.sum(1, keepdim=True) - 1).clamp(min=1)
    deviation = (centred.square().sum(1, keepdim=True) / freedom).sqrt()
    return _ungrouped(centred / (deviation + epsilon), rewards, valid)


@torch.no_grad()
def dr_grpo(rewards: Tensor, valid: Tensor, group: int) -> Tensor:
    """A_i = R_i - mean, the mean of the prompt's valid completions: GRPO without the division by the deviation.

    Dividing gives prompts that are nearly solved, or hardly ever, the most weight. Source: Liu et al. 2025,
    "Understanding R1-Zero-Like Training" (arXiv 2503.20783), section 3, Dr. GRPO.

    Args:
        rewards, valid, group: as in `rloo`.

    Returns:
        [B]: 0 where not valid. The mean's denominator is the number of the group's valid completions.

    Raises:
        TypeError, ValueError: as `rloo`.
    """
    return _ungrouped(_centred(rewards, valid, group)[0], rewards, valid)


@torch.no_grad()
def reinforce_pp(rewards: Tensor, mask: Tensor, gamma: float, floor: float = DEVIATION_FLOOR) -> Tensor:
    """A_t = (G_t - mean) / max(deviation, floor),  G_t = r_t + gamma G_{t+1}: REINFORCE++.

    Mean and deviation are of all tokens of the batch, so it needs no group. Source: Hu 2025, "REINFORCE++" (arXiv
    2501.03262), section 3: the KL in the rewards of the tokens, and advantages normalised over the whole batch.

    Args:
        rewards: [B, T], the scorer's units (`token_rewards`, with the KL in it).
        mask: bool [B, T], True on response tokens, contiguous from 0.
        gamma: discount per token, 0 to 1.
        floor: see `masked.whiten`.

    Returns:
        [B, T], 0 outside the mask. The denominator of mean and variance is the number of True entries.

    Raises:
        TypeError, ValueError: as `gae` and `masked.whiten`.
    """
    nothing = torch.zeros_like(rewards)
    returns, _ = gae(rewards, nothing, nothing, mask, gamma, 1.0)
    return whiten(returns, mask, floor)


@torch.no_grad()
def zero_variance(rewards: Tensor, valid: Tensor, group: int) -> Tensor:
    """Bool [B], True in the rows of a group whose valid rewards are all equal: comparing them teaches nothing.

    So are the groups with a single valid completion, or with none. Arguments and errors are those of `rloo`.
    """
    kept, counted = _groups(rewards, valid, group)
    highest = torch.where(counted, kept, -torch.inf).amax(1)
    lowest = torch.where(counted, kept, torch.inf).amin(1)
    return (highest <= lowest).repeat_interleave(group)


def _groups(rewards: Tensor, valid: Tensor, group: int) -> tuple[Tensor, Tensor]:
    """(rewards, 0 where not valid; valid), both [B / group, group], in float64."""
    check_mask(valid, rewards=rewards)
    if group < 2 or len(rewards) % group:
        raise ValueError(f"group is {group}: give 2 or more completions a prompt, a divisor of the {len(rewards)} rows")
    return torch.where(valid, rewards, 0).double().view(-1, group), valid.view(-1, group)


def _centred(rewards: Tensor, valid: Tensor, group: int) -> tuple[Tensor, Tensor]:
    """(R - mean of the group's valid rewards, 0 where not valid; valid), both [B / group, group]."""
    kept, counted = _groups(rewards, valid, group)
    mean = kept.sum(1, keepdim=True) / counted.sum(1, keepdim=True).clamp(min=1)
    return torch.where(counted, kept - mean, 0), counted


def _ungrouped(grouped: Tensor, rewards: Tensor, valid: Tensor) -> Tensor:
    return torch.where(valid, grouped.flatten(), 0).to(rewards.dtype)
