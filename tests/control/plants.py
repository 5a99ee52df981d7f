"""Simulated policies for a controller to hold: one parameter theta, pushed by the reward, pulled back by the
coefficient."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import dataclass

from stable_rlhf.control import Controller, Decision, Observation


@dataclass(frozen=True, kw_only=True)
class Plant:
    """theta <- theta + lr * momentum-average(force), KL = theta^2 / 2 (or theta, where `linear`), nats per token.

    The change of theta is at most sqrt(2 update_kl), where the decision sets that bound.

    gradient    force = g - beta theta: at its rest KL = (g / beta)^2 / 2.
    adam        force = tanh of the same over 0.3 g, plus noise: bounded steps, about the sign of the gradient.
    saturating  force = g exp(-theta) - beta theta: the reward has less to give as KL grows.
    """

    kind: str = "gradient"
    g: float = 1.0
    lr: float = 0.1
    delay: int = 0
    momentum: float = 0.0
    noise: float = 0.05
    """Relative noise of the KL that is observed, plus 0.04 of it in nats per token, which is what is left near 0."""
    linear: bool = False
    reward_noise: float = 0.1
    schedule: Callable[[int], float] = lambda step: 1.0
    """Factor on the learning rate."""

    def force(self, theta: float, beta: float, rng: random.Random) -> float:
        if self.kind == "adam":
            return math.tanh((self.g - beta * theta) / (0.3 * self.g) + 0.3 * rng.gauss(0, 1))
        push = self.g * math.exp(-theta) if self.kind == "saturating" else self.g
        return push - beta * theta


def run(plant: Plant, controller: Controller, steps: int, seed: int = 0) -> tuple[list[float], list[Decision]]:
    """True KL and decision of every step."""
    rng = random.Random(seed)
    theta = average = 0.0
    waiting = [0.0] * plant.delay
    kls, decisions = [], []
    for step in range(steps):
        kl = theta if plant.linear else theta * theta / 2
        seen = kl * (1 + plant.noise * rng.gauss(0, 1)) + 0.04 * plant.noise * rng.gauss(0, 1)
        reward = plant.g * (math.tanh(theta) + plant.reward_noise * rng.gauss(0, 1))
        decision = controller.observe(Observation(step, reward, seen, 3.0 - 0.3 * kl))
        waiting.append(decision.kl_coef)
        average += (1 - plant.momentum) * (plant.force(theta, waiting.pop(0), rng) - average)
        change = plant.lr * plant.schedule(step) * average
        if decision.update_kl is not None:
            most = math.sqrt(2 * decision.update_kl)
            change = max(-most, min(most, change))
        theta += change
        if plant.linear:
            theta = max(0.0, theta)
        kls.append(kl)
        decisions.append(decision)
    return kls, decisions
