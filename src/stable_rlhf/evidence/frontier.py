"""Reward against the square root of the KL: what an arm gains, and how far from the reference it goes for it.

The square root is the distance in which the gain is about linear near the reference (Gao, Schulman & Hilton, 2023,
"Scaling Laws for Reward Model Overoptimization", section 2).
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from stable_rlhf.evidence.compare import Comparison
from stable_rlhf.evidence.plots import QUIET, arm_label, arm_styles, scatter
from stable_rlhf.report import SIZE, figure, shown, ticks_up, value_axis
from stable_rlhf.text import counted

REWARD, KL = "reward/final", "kl/final"

Box = tuple[float, float, float, float]
"""Left, top, right and bottom."""

NAME_LIMIT = 80
"""Characters of a name."""


@dataclass(frozen=True, kw_only=True)
class Frontier:
    """The drawing: places in per cent of the panel, from the left and from the top."""

    up: list[tuple[float, str]]
    across: list[tuple[float, str]]
    runs: list[tuple[str, str]]
    """(style, `d` of the dots) of each arm's runs."""
    arms: list[dict[str, Any]]
    """number, style, left and top of each arm's mean, the text that is read there, and on which side of it its name
    stands (empty where there is no room)."""
    count: int
    """Points that can be read."""
    points: str
    """JSON of every point that can be read, by place from left to right: left, top, text."""


def frontier(made: Comparison) -> Frontier | None:
    """None where no run has both figures. A KL below 0 (an estimate can be) counts as 0."""
    found: dict[int, list[tuple[float, float, str]]] = {}
    for index, arm in enumerate(made.arms):
        for run in arm.runs.values():
            if REWARD in run.figures and KL in run.figures:
                reward, kl = run.figures[REWARD], run.figures[KL]
                label = shown(arm_label(made, index), NAME_LIMIT)
                seed = shown(run.name, NAME_LIMIT) if run.seed is None else f"seed {run.seed}"
                text = f"{label}, {seed}: reward {figure(reward)}, KL {figure(kl)}"
                found.setdefault(index, []).append((distance(kl), reward, text))
    if not found:
        return None
    styles = arm_styles(made)
    means = {
        index: (
            distance(math.fsum(x**2 for x, *_ in runs) / len(runs)),
            math.fsum(reward for _, reward, _ in runs) / len(runs),
        )
        for index, runs in found.items()
    }
    across = value_axis([0.0, *(x for runs in found.values() for x, *_ in runs)])  # 0 is the reference itself
    up = value_axis([reward for runs in found.values() for _, reward, _ in runs])

    def place(x: float, y: float) -> dict[str, float]:
        return {"left": across.place(x) * 100 / SIZE, "top": 100 - up.place(y) * 100 / SIZE}

    arms = [
        {
            "number": index + 1,
            "style": styles[index],
            "text": f"{shown(arm_label(made, index), NAME_LIMIT)}, mean of {counted(len(found[index]), 'run')}: "
            f"reward {figure(reward)}, KL {figure(x**2)}",
            **place(x, reward),
        }
        for index, (x, reward) in means.items()
    ]
    arms.sort(key=lambda arm: arm["style"] != QUIET)  # those with a colour are drawn on the others
    sides = _sides([(arm["left"], arm["top"], len(shown(made.arms[arm["number"] - 1].name, 40))) for arm in arms])
    arms = [arm | {"side": side} for arm, side in zip(arms, sides, strict=True)]
    points = [place(x, reward) | {"text": text} for runs in found.values() for x, reward, text in runs]
    points += [{key: arm[key] for key in ("left", "top", "text")} for arm in arms]
    return Frontier(
        up=ticks_up(up),
        across=[(100 - place_, text) for place_, text in ticks_up(across)],
        runs=[(styles[index], scatter([(x, y) for x, y, _ in runs], across, up)) for index, runs in found.items()],
        arms=arms,
        count=len(points),
        points=json.dumps(sorted(points, key=lambda point: (point["left"], point["top"]))),
    )


def distance(kl: float) -> float:
    return math.sqrt(max(kl, 0.0))


def _sides(arms: Sequence[tuple[float, float, int]]) -> list[str]:
    """Of (left, top, characters of the name): a side on which the name meets no arm and no other name.

    Sizes are in per cent of a panel of 1,100 x 540 pixels, the page's on a screen; on smaller ones no names are drawn.
    """
    wide, high, letter, line = 2.6, 5.0, 0.7, 3.0  # of an arm's number, and of a letter
    taken = [(x - wide / 2, y - high / 2, x + wide / 2, y + high / 2) for x, y, _ in arms]
    found = []
    for x, y, letters in arms:
        long = letter * letters
        boxes = {
            "right": (x + wide / 2, y - line / 2, x + wide / 2 + long, y + line / 2),
            "left": (x - wide / 2 - long, y - line / 2, x - wide / 2, y + line / 2),
            "above": (x - long / 2, y - high / 2 - line, x + long / 2, y - high / 2),
            "below": (x - long / 2, y + high / 2, x + long / 2, y + high / 2 + line),
        }
        free = (side for side, box in boxes.items() if _inside(box) and not any(_meet(box, other) for other in taken))
        side = next(free, "")
        if side:
            taken.append(boxes[side])
        found.append(side)
    return found


def _inside(box: Box) -> bool:
    return min(box) >= 0 and max(box) <= 100


def _meet(one: Box, other: Box) -> bool:
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]
