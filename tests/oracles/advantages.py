"""Rewards per token, GAE and advantages without a critic by their definitions, in loops; no recursion."""

from __future__ import annotations

import math
from collections.abc import Iterator

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


def groups(rewards: Tensor, valid: Tensor, group: int) -> Iterator[tuple[int, list[float]]]:
    """(row, rewards of its group: its own first, then those of the other valid rows) of every valid row."""
    for row in range(len(rewards)):
        first = row // group * group
        others = [float(rewards[i]) for i in range(first, first + group) if i != row and valid[i]]
        if valid[row]:
            yield row, [float(rewards[row]), *others]


def rloo(rewards: Tensor, valid: Tensor, group: int) -> Tensor:
    advantages = torch.zeros_like(rewards)
    for row, (own, *others) in groups(rewards, valid, group):
        advantages[row] = own - sum(others) / len(others) if others else 0.0
    return advantages


def grpo(rewards: Tensor, valid: Tensor, group: int, epsilon: float) -> Tensor:
    advantages = torch.zeros_like(rewards)
    for row, found in groups(rewards, valid, group):
        mean = math.fsum(found) / len(found)
        variance = math.fsum((x - mean) ** 2 for x in found) / (len(found) - 1) if len(found) > 1 else 0.0
        advantages[row] = (found[0] - mean) / (math.sqrt(variance) + epsilon)
    return advantages


def dr_grpo(rewards: Tensor, valid: Tensor, group: int) -> Tensor:
    advantages = torch.zeros_like(rewards)
    for row, found in groups(rewards, valid, group):
        advantages[row] = found[0] - math.fsum(found) / len(found)
    return advantages


def reinforce_pp(rewards: Tensor, mask: Tensor, gamma: float, floor: float) -> Tensor:
    """Discounted sums of what follows, less their mean over all tokens, over their deviation; prefix masks only."""
    places, returns = [], []
    for row in range(len(mask)):
        length = int(mask[row].sum())
        for t in range(length):
            places.append((row, t))
            returns.append(sum(gamma ** (k - t) * float(rewards[row, k]) for k in range(t, length)))
    advantages = torch.zeros_like(rewards)
    if not returns:
        return advantages
    mean = math.fsum(returns) / len(returns)
    deviation = math.sqrt(math.fsum((x - mean) ** 2 for x in returns) / len(returns))
    for place, value in zip(places, returns, strict=True):
        advantages[place] = (value - mean) / max(deviation, floor)
    return advantages
