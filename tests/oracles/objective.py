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
