"""Running normalisation of rewards, in three ways, with frozen state and a pure update.

`none`     the rewards as they are.
`paper`    the published code's rule [C], to the letter: (x - mean) / (deviation + 1e-8), from a prior of mean 0,
           variance 1 and count 1e-4, over all rewards so far; the batch's variance is the sample variance (n - 1).
`running`  (x - mean) / deviation, with no prior and no constant in the denominator, so that multiplying every reward
           by 10 or adding 5 changes nothing but rounding; a deviation of 0 gives 0. The first 50 rollouts count alike.
           After them the weight of all earlier rewards shrinks by a fiftieth with each rollout, so that the moments
           follow a reward whose scale drifts.

Both merge moments by Chan, Golub and LeVeque 1979 (parallel variance).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from stable_rlhf.control.base import STATE_VERSION, from_dict
from stable_rlhf.control.phase import mean_variance

KINDS = ("none", "paper", "running")
PAPER_COUNT = 1e-4  # [C] weight of the published prior: enough to make the first division defined, too little to matter
PAPER_EPSILON = 1e-8  # [C] keeps the published division finite
# Rollouts that `running` remembers, the time constant of its exponential memory. 50 of 64 rewards give the deviation
# to 1.3 %. A scale that falls is followed by 1 % a rollout, so by a factor of 100 in 460; one that grows, at once.
MEMORY = 50
ROUNDING = 1e-12  # of the mean's size: a smaller deviation is the rounding of equal rewards, not a spread


@dataclass(frozen=True, kw_only=True)
class Moments:
    """Mean, population variance and weight, in rewards, of those seen so far; in the scorer's units."""

    mean: float = 0.0
    variance: float = 0.0
    count: float = 0.0

    @property
    def deviation(self) -> float:
        """Standard deviation; exactly 0 where it is only the rounding of equal values."""
        deviation = math.sqrt(max(0.0, self.variance))
        return deviation if deviation > ROUNDING * abs(self.mean) else 0.0


def merge(moments: Moments, mean: float, variance: float, count: int) -> Moments:
    """Moments with a batch of `count` values of this mean and variance added:

    delta = mean - m;  n = N + count;  m' = m + delta count / n;  v' = (v N + variance count + delta^2 N count / n) / n.
    """
    delta = mean - moments.mean
    total = moments.count + count
    between = delta * delta * moments.count * count / total
    return Moments(
        mean=moments.mean + delta * count / total,
        variance=(moments.variance * moments.count + variance * count + between) / total,
        count=total,
    )


class RewardNormaliser:
    """Normalises a run's rewards. `update` it with a rollout's rewards first, then `normalise` them."""

    def __init__(self, kind: str = "running") -> None:
        if kind not in KINDS:
            raise ValueError(f"kind={kind!r} is not a reward normaliser: choose one of {', '.join(KINDS)}.")
        self.kind = kind
        self.moments = Moments(variance=1.0, count=PAPER_COUNT) if kind == "paper" else Moments()
        self.rollouts = 0

    def update(self, rewards: Sequence[float]) -> None:
        """Adds one rollout's rewards (all ranks together); an empty list changes nothing.

        Raises ValueError for a reward that is not finite, and for a single reward under `paper`, whose rule divides
        by n - 1.
        """
        for position, reward in enumerate(rewards):
            if not math.isfinite(reward):
                raise ValueError(
                    f"reward {position} is {reward!r}: only finite rewards can be normalised. Let the reward function "
                    "return None for a completion that it cannot score."
                )
        if not rewards:
            return
        if self.kind == "paper" and len(rewards) == 1:
            raise ValueError(
                "the reward normaliser 'paper' was given 1 reward: its rule divides by n - 1. Use a batch of 2 or "
                "more, or the kind 'running'."
            )
        self.add(*mean_variance(rewards, 1 if self.kind == "paper" else 0), len(rewards))

    def add(self, mean: float, variance: float, count: int) -> None:
        """Adds one rollout of ``count`` rewards by their finite moments. The variance's denominator is ``count``, of
        `paper` count - 1."""
        before = self.moments
        if self.kind == "running" and self.rollouts >= MEMORY:
            before = dataclasses.replace(before, count=before.count * (1.0 - 1.0 / MEMORY))
        self.moments = merge(before, mean, variance, count)
        self.rollouts += 1

    def normalise(self, rewards: Sequence[float]) -> list[float]:
        """The rewards in units of the remembered deviation around the remembered mean (`none`: unchanged)."""
        if self.kind == "none":
            return list(rewards)
        mean, deviation = self.moments.mean, self.moments.deviation
        if self.kind == "paper":
            return [(reward - mean) / (math.sqrt(self.moments.variance) + PAPER_EPSILON) for reward in rewards]
        return [(reward - mean) / deviation if deviation > 0.0 else 0.0 for reward in rewards]

    @property
    def unit(self) -> float:
        """A normalised reward of 1 in the scorer's units; 1 for `none`, 0 where `running` has seen no spread."""
        if self.kind == "none":
            return 1.0
        return self.moments.deviation + (PAPER_EPSILON if self.kind == "paper" else 0.0)

    def state_dict(self) -> dict[str, Any]:
        """Version, kind, moments and number of rollouts, as plain JSON values."""
        return {
            "version": STATE_VERSION,
            "kind": self.kind,
            "moments": dataclasses.asdict(self.moments),
            "rollouts": self.rollouts,
        }

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Continues from a `state_dict()`. Raises ValueError, and changes nothing, if it does not fit."""
        if set(saved) != {"version", "kind", "moments", "rollouts"}:
            raise ValueError(
                f"normaliser state has the keys {sorted(saved)}: expected kind, moments, rollouts, version."
            )
        if saved["version"] != STATE_VERSION or saved["kind"] != self.kind:
            raise ValueError(
                f"normaliser state is of kind {saved['kind']!r}, version {saved['version']!r}; this run's is "
                f"{self.kind!r}, version {STATE_VERSION}: resume with the release and configuration that wrote it."
            )
        rollouts = saved["rollouts"]
        if type(rollouts) is not int or rollouts < 0:
            raise ValueError(f"normaliser state has rollouts={rollouts!r}: expected a whole number from 0 up.")
        self.moments = from_dict(Moments, saved["moments"], "normaliser state")
        self.rollouts = rollouts
