"""Rewards per token and GAE by their definitions: a sum of discounted deltas for every token, no recursion."""

from __future__ import annotations

import torch
from torch import Tensor


def gae(
    rewards: Tensor, values: Tensor, bootstrap_values: Tensor, mask: Tensor, gamma: float, lam: float
) -> tuple[Tensor, Tensor]:
    """A_t = sum_k (gamma lam)^k delta_{t+k} over the response of `lengths` tokens; prefix masks only."""
    advantages, returns = torch.zeros_like(values), torch.zeros_like(values)
    for row in range(len(mask)):
        length = int(mask[row].sum())
        deltas = []
        for t in range(length):
            following = float(bootstrap_values[row, t + 1]) if t + 1 < length else 0.0
            deltas.append(float(rewards[row, t]) + gamma * following - float(values[row, t]))
        for t in range(length):
            advantages[row, t] = sum((gamma * lam) ** k * delta for k, delta in enumerate(deltas[t:]))
            returns[row, t] = advantages[row, t] + values[row, t]
    return advantages, returns


def token_rewards(scores: Tensor, log_ratio: Tensor, kl_coef: float, mask: Tensor) -> Tensor:
    rewards = torch.zeros_like(log_ratio)
    for row in range(len(mask)):
        positions = [t for t in range(mask.shape[1]) if mask[row, t]]
        for t in positions:
            rewards[row, t] = -kl_coef * float(log_ratio[row, t])
        if positions:
            rewards[row, positions[-1]] += float(scores[row])
    return rewards
