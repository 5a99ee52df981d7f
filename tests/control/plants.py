"""Simulated policies for a controller to hold, pushed by the reward, pulled back by the coefficient.

`Plant` is one parameter theta with a learning rate. `Policy` is a distance in a space of many dimensions, moved by
steps of a bounded size that are for the greater part noise, with the figures of recorded runs. `Saturating` is one that
has less to gain the farther it is, and goes on in its direction for a while: it swings as recorded runs did.
"""

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


@dataclass(frozen=True, kw_only=True)
class Policy:
    """KL = distance^2 / 2 + diffused, nats per token: noise in many dimensions diffuses, only the pull back ends it.

    An update is a step of one size in the direction of its gradient, which is the force (pull - beta distance) in the
    direction of the reward, - beta times the diffused distance, and noise that does not shrink with the force:

        norm = sqrt(force^2 + 2 diffused beta^2 + noise^2),   distance += size force / norm,
        diffused <- diffused (1 - size beta / norm)^2 + (size noise / norm)^2 / 2.
    """

    pull: float = 0.045
    """Reward per distance at a pull of 1: what coefficient times distance was at rest in recorded runs (fit.py)."""
    size: float = 0.1
    """Distance that one update moves the policy where no bound acts; about what recorded runs show."""
    signal: float = 0.6
    """Cosine of an update with the reward's gradient at the start: recorded runs advance by 0.6 of what they move."""
    kl_noise: float = 0.04
    """Relative error of the exact KL of one rollout; k1 of 1,200 tokens has sqrt(2 / (1200 KL))."""
    delay: int = 0
    momentum: float = 0.0
    schedule: Callable[[int], float] = lambda step: 1.0
    """Factor on the pull."""
    effect: Callable[[int], float] = lambda step: 1.0
    """Factor on the coefficient: 0 where it has no effect."""


@dataclass(frozen=True, kw_only=True)
class Saturating:
    """A policy at a distance u from its reference, KL = u^2 / 2, whose updates have one length L and go on for a while:

        force = pull exp(-(u / reach)^2) - beta u,   course <- momentum course + (1 - momentum) force / norm,
        u <- u + advance L (course + wander z), z normal,   norm = sqrt(force^2 + noise^2), L = sqrt(2 update_kl),

    with beta of `delay` rollouts ago. Its reward is 1.6 (1 - exp(-3 u)) - 0.1, with noise of 0.05.
    """

    pull: float
    reach: float
    """Distance at which the reward pulls with a third of that."""
    noise: float
    """Length of the gradient's noise, in the unit of the pull."""
    advance: float
    """Share of an update's length that goes in the direction of the force."""
    momentum: float
    wander: float
    """Share of it that goes anywhere."""
    delay: int
    kl_noise: float
    """Relative error of the exact KL of one rollout."""


BUILT_IN = Saturating(
    pull=0.18, reach=0.58, noise=0.1, advance=0.69, momentum=0.58, wander=0.19, delay=0, kl_noise=0.05
)
"""With the figures of recorded runs of the built-in pair at budgets of 0.05 to 0.3 (docs/deviations.md): rollouts to
the threshold, largest KL, deviation and autocorrelation of KL / threshold, swing of the coefficient, steps within
15 %."""
SMOLLM2 = Saturating(
    pull=0.09, reach=0.65, noise=0.009, advance=0.63, momentum=0.36, wander=0.3, delay=1, kl_noise=0.03
)
"""The same of SmolLM2-135M on sentiment at 0.1 to 0.3, whose updates hardly have noise: each goes its whole length, up
or down."""


@dataclass(frozen=True)
class Seen:
    """One rollout of a `Policy`: its true KL, the coefficient that followed, and the threshold in force."""

    kl: float
    coefficient: float
    threshold: float | None = None


Law = Callable[[Observation], tuple[float, float | None]]
"""Gives the coefficient and the bound on the update, or None."""


def hold(policy: Policy, law: Law, steps: int, seed: int = 0) -> list[Seen]:
    """The run of a policy under a law."""
    rng = random.Random(seed)
    distance = diffused = velocity = 0.0
    noise = policy.pull * math.sqrt(1 / policy.signal**2 - 1)
    waiting: list[float] = []
    found = []
    for step in range(steps):
        kl = distance * distance / 2 + diffused
        error = policy.kl_noise * kl
        coefficient, bound = law(Observation(step, 0.0, kl + error * rng.gauss(0, 1), 3.0, kl_error=error, length=20.0))
        found.append(Seen(kl, coefficient))
        waiting.append(coefficient)
        beta = (waiting.pop(0) if len(waiting) > policy.delay else waiting[0]) * policy.effect(step)
        force = policy.pull * policy.schedule(step) - beta * distance
        norm = math.sqrt(force * force + 2 * diffused * beta * beta + noise * noise)
        size = policy.size if bound is None else min(policy.size, math.sqrt(2 * bound))
        change = size * (force + 0.1 * noise * rng.gauss(0, 1)) / norm
        velocity = policy.momentum * velocity + (1 - policy.momentum) * change
        distance += velocity
        diffused = diffused * max(0.0, 1 - size * beta / norm) ** 2 + (size * noise / norm) ** 2 / 2
    return found


def follow(policy: Saturating, controller: Controller, steps: int, seed: int = 0) -> list[Seen]:
    """The run of such a policy under a controller that may move its threshold."""
    rng = random.Random(seed)
    distance = course = 0.0
    waiting: list[float] = []
    found = []
    for step in range(steps):
        kl = distance * distance / 2
        reward = 1.6 * (1 - math.exp(-3 * distance)) - 0.1 + 0.05 * rng.gauss(0, 1)
        error = policy.kl_noise * kl
        decision = controller.observe(Observation(step, reward, kl + error * rng.gauss(0, 1), 2.0, kl_error=error))
        found.append(Seen(kl, decision.kl_coef, decision.threshold))
        waiting.append(decision.kl_coef)
        beta = waiting.pop(0) if len(waiting) > policy.delay else waiting[0]
        force = policy.pull * math.exp(-((distance / policy.reach) ** 2)) - beta * distance
        course = policy.momentum * course + (1 - policy.momentum) * force / math.hypot(force, policy.noise)
        length = policy.advance * math.sqrt(2 * (decision.update_kl or 0.0))
        distance = max(0.0, distance + length * (course + policy.wander * rng.gauss(0, 1)))
    return found
