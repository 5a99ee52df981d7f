"""The frontier of hand-tuned PPO, reward against KL, and how far runs lie above it."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

from study.runs import Run, Values, values
from study.tables import select


def is_tuned_ppo(arm: str) -> bool:
    return arm.startswith("ppo ")


def mostly_healthy(runs: Sequence[Run]) -> bool:
    found = values(runs, "healthy")
    return bool(found) and 2 * sum(found.values()) >= len(found)


def best_setting(runs: Sequence[Run]) -> tuple[str, float] | None:
    """(arm, rate) with the best mean final reward of those whose runs mostly end healthy."""
    cells: dict[tuple[str, float], list[Run]] = {}
    for run in runs:
        cells.setdefault((run.arm, run.rate), []).append(run)
    ends = {
        at: math.fsum(found.values()) / len(found)
        for at, cell in cells.items()
        if mostly_healthy(cell) and (found := values(cell, "reward/final"))
    }
    return max(ends, key=ends.__getitem__, default=None)


def best_ppo(runs: Sequence[Run]) -> tuple[str, float] | None:
    """The best setting of the tuned PPO."""
    return best_setting([run for run in select(runs, "main") if is_tuned_ppo(run.arm)])


def method(arm: str) -> str:
    """The method whose settings are tuned: `ppo` of `ppo 0.05`, `TRL grpo` of `TRL grpo 0.04`."""
    name, _, last = arm.rpartition(" ")
    return name if name and last.replace(".", "").isdigit() else arm


def frontier_reward(points: Sequence[tuple[float, float]], kl: float) -> float:
    """The reward at this KL of the line through (KL, reward) points, straight over the square root of the KL (Gao et
    al. 2023). Beyond the ends it is the end's reward."""
    line = sorted((math.sqrt(max(0.0, x)), y) for x, y in points)
    at = math.sqrt(max(0.0, kl))
    if at <= line[0][0]:
        return line[0][1]
    for (left, low), (right, high) in itertools.pairwise(line):
        if at <= right:
            return high if right == left else low + (high - low) * (at - left) / (right - left)
    return line[-1][1]


def above_frontier(ours: Sequence[Run], ppo: Sequence[Run]) -> Values:
    """Final reward less that of the PPO runs of the same seed at the same KL, for each run. Only healthy PPO runs make
    the frontier: a reward that only a collapsed policy gets is none to aim for."""
    gaps: Values = {}
    for run in ours:
        points = [
            (other.figures["kl/final"], other.figures["reward/final"])
            for other in ppo
            if other.seed == run.seed and other.figures.get("healthy") and "kl/final" in other.figures
        ]
        if len(points) >= 2 and "kl/final" in run.figures:
            at = frontier_reward(points, run.figures["kl/final"])
            gaps[f"{run.rate:g}", run.seed] = run.figures["reward/final"] - at
    return gaps
