"""The losses, one token at a time, in Python's float64."""

from __future__ import annotations

import math


def soft_min(v1: float, v2: float, temperature: float) -> float:
    """-a (logsumexp(-v1/a, -v2/a) - log 2), with the largest term taken out of the sum."""
    x, y = -v1 / temperature, -v2 / temperature
    top = max(x, y)
    return -temperature * (top + math.log(math.exp(x - top) + math.exp(y - top)) - math.log(2.0))


def ppo_token_loss(logp: float, old_logp: float, advantage: float, epsilon: float) -> float:
    """-min(rho A, clip(rho) A)."""
    ratio = math.exp(logp - old_logp)
    clipped = min(max(ratio, 1.0 - epsilon), 1.0 + epsilon)
    return -min(ratio * advantage, clipped * advantage)


def value_token_loss(
    value: float,
    old_value: float,
    target: float,
    kind: str,
    delta: float,
    cliprange: float | None,
    reduction: str,
) -> float:
    def error(predicted: float) -> float:
        size = abs(predicted - target)
        return 0.5 * size**2 if kind == "mse" or size <= delta else delta * (size - 0.5 * delta)

    if cliprange is None:
        return error(value)
    near = min(max(value, old_value - cliprange), old_value + cliprange)
    pair = (error(value), error(near))
    return max(pair) if reduction == "max" else sum(pair) / 2.0


def ratios(change: list[float], level: str) -> list[float]:
    """The ratio at each token of a completion; ``change``: logp - old_logp of its tokens."""
    if level == "token":
        return [math.exp(x) for x in change]
    total = math.fsum(change) / (len(change) if level == "sequence" else 1)
    return [math.exp(total)] * len(change)


def cispo_token_loss(logp: float, ratio: float, advantage: float, epsilon_high: float) -> float:
    return -min(ratio, 1.0 + epsilon_high) * advantage * logp


def mean_over(losses: list[list[float]], kind: str, most: int) -> float:
    """The mean of losses per token, a list for each completion that has a token."""
    if kind == "sequence":
        return math.fsum(math.fsum(row) / len(row) for row in losses) / len(losses)
    count = len(losses) * most if kind == "length" else sum(map(len, losses))
    return math.fsum(math.fsum(row) for row in losses) / count
