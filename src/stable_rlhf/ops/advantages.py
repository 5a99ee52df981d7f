"""Rewards per token and generalised advantage estimation. All results are targets: they carry no gradient."""

from __future__ import annotations

import torch
from torch import Tensor

from .masked import check_mask


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
