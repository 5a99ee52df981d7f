"""Rows of runs as the guard sees them: healthy ones of many kinds of reward, and ones that fail from a known step on.

A run is levels (what would be measured on endlessly many completions) and the noise of a batch around them.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

BEGINS = 150
"""Step from which a failing run fails."""
LENGTH, ENTROPY, DISTINCT = 24.0, 2.5, 0.7
"""Of the policy at the start: tokens, nats per token, share of distinct word pairs."""


@dataclass(frozen=True, kw_only=True)
class Levels:
    """Levels of a step."""

    kl: float
    """Multiple of the threshold."""
    entropy: float = 1.0
    """This and the next two: share of the start."""
    distinct: float = 1.0
    length: float = 1.0
    reward: float = 0.0
    spread: float = 0.5
    """Standard deviation of a completion's reward."""
    moved: float = 0.0
    """What the reward itself has moved down by."""


Law = Callable[[int], Levels]
"""Step -> levels."""


def climbing(step: int) -> Levels:
    """A run at its budget after some 40 steps, whose reward climbs by 1; entropy and variety lose a fourth."""
    share = 1 - math.exp(-step / 60)
    kl = 1 - math.exp(-step / 15)
    return Levels(kl=kl, entropy=1 - 0.25 * share, distinct=1 - 0.25 * share, reward=share)


def towards(last: float, step: int, pace: float) -> float:
    """From 1 at the start to ``last``."""
    return last + (1 - last) * math.exp(-step / pace)


def sparse(step: int) -> Levels:
    rate = 0.03 + 0.5 / (1 + math.exp(-(step - 200) / 30))
    return replace(climbing(step), reward=rate, spread=math.sqrt(rate * (1 - rate)))


HEALTHY: dict[str, Law] = {
    "climbs": climbing,
    "overshoots: KL to 1.6 x the threshold at first": lambda t: replace(
        climbing(t), kl=climbing(t).kl * (1 + 4 * math.exp(-t / 15))
    ),
    "sharpens: entropy to a half": lambda t: replace(climbing(t), entropy=towards(0.5, t, 40)),
    "sharpens: entropy to a tenth": lambda t: replace(climbing(t), entropy=towards(0.1, t, 40)),
    "shortens: length to a third": lambda t: replace(climbing(t), length=towards(1 / 3, t, 40)),
    "shortens: length to a tenth": lambda t: replace(climbing(t), length=towards(0.1, t, 40)),
    "lengthens: four times": lambda t: replace(climbing(t), length=towards(4.0, t, 60)),
    "a template pays: distinct-2 to 0.4, length to a half": lambda t: replace(
        climbing(t), distinct=towards(0.4, t, 40), length=towards(0.5, t, 40)
    ),
    "surprises: entropy doubles and more": lambda t: replace(climbing(t), entropy=towards(2.3, t, 60)),
    "sparse: successes from 3 %": sparse,
    "noisy: spread of 10 x the gain": lambda t: replace(climbing(t), spread=10.0),
    "flat: nothing to gain": lambda t: replace(climbing(t), reward=0.0),
    "oscillates by a fifth of the gain": lambda t: replace(
        climbing(t), reward=climbing(t).reward * (1 + 0.1 * math.sin(t / 15))
    ),
    "the reward moves: 1 lower from step 150": lambda t: _moved(climbing(t), 1.0 if t >= BEGINS else 0.0),
    "the reward moves: half from step 150": lambda t: _moved(
        climbing(t), 0.5 * climbing(t).reward if t >= BEGINS else 0.0
    ),
    "the reward drifts: 0.01 lower a step": lambda t: _moved(climbing(t), 0.01 * max(0, t - BEGINS)),
}


def _moved(levels: Levels, by: float) -> Levels:
    return replace(levels, reward=levels.reward - by, moved=by)


def fails(change: Callable[[Levels, int], Levels]) -> Law:
    """A climbing run that changes from BEGINS on, by the number of steps since."""
    return lambda step: change(climbing(step), step - BEGINS) if step >= BEGINS else climbing(step)


def collapse(half: float, away: float) -> Law:
    """Entropy and variety halve in ``half`` steps; the KL goes to ``away`` x the threshold meanwhile."""

    def change(now: Levels, since: int) -> Levels:
        left = 0.5 ** (since / half)
        kl = away - (away - 1) * left
        return replace(now, kl=kl, entropy=max(0.01, now.entropy * left), distinct=max(0.01, now.distinct * left))

    return fails(change)


def crash(pace: float) -> Law:
    """A policy that loses all of its gain, and as much again below its start."""
    return fails(lambda now, since: replace(now, reward=now.reward - 1.5 * (1 - math.exp(-since / pace))))


FAILING: dict[str, Law] = {
    "collapse to one text, in steps, KL held": collapse(2, 1.0),
    "collapse to one text, slowly, KL held": collapse(40, 1.0),
    "collapse to one text, KL away": collapse(10, 3.0),
    "hack: one phrase pays": fails(
        lambda now, since: replace(now, distinct=towards(0.1, since, 15) * now.distinct, reward=now.reward + since / 50)
    ),
    "hack: half of each text repeats": fails(
        lambda now, since: replace(now, distinct=towards(0.5, since, 15) * now.distinct, reward=now.reward + since / 50)
    ),
    "KL diverges: doubles in 3 steps": fails(lambda now, since: replace(now, kl=min(60.0, 2 ** (since / 3)))),
    "KL diverges: doubles in 10 steps": fails(lambda now, since: replace(now, kl=min(60.0, 2 ** (since / 10)))),
    "KL diverges: doubles in 30 steps": fails(lambda now, since: replace(now, kl=min(60.0, 2 ** (since / 30)))),
    "silence, KL away": fails(lambda now, since: replace(now, length=towards(0.05, since, 10), kl=3.0)),
    "gibberish, KL away": fails(lambda now, since: replace(now, entropy=towards(3.0, since, 10), kl=4.0)),
    "the policy falls in 3 steps": crash(3),
    "the policy falls in 30 steps": crash(30),
    "the policy falls, noisy reward (4 x the gain)": lambda t: replace(crash(10)(t), spread=4.0),
    "NaN": fails(lambda now, since: replace(now, reward=math.nan)),
}


def rows(
    law: Law, steps: int, batch: int, budget: float, seed: int
) -> Iterator[tuple[dict[str, float | None], Levels]]:
    """(row, levels) of each step. The KL sways around its level with a deviation of 10 %, as in recorded runs, and its
    estimate k1 has the noise of ``batch`` completions; the exact KL that of their states only."""
    draw, sway = random.Random(seed), 0.0
    for step in range(steps):
        now = law(step)
        sway = 0.8 * sway + 0.06 * draw.gauss(0, 1)
        length = max(1.0, LENGTH * now.length * (1 + draw.gauss(0, 0.5 / math.sqrt(batch))))
        kl = max(0.0, now.kl * (1 + sway)) * budget
        exact = max(0.0, kl * (1 + draw.gauss(0, 0.4 / math.sqrt(batch))))
        k1 = exact + draw.gauss(0, math.sqrt(2 * kl / (batch * length)))
        row: dict[str, float | None] = {
            "objective/kl": k1,
            "objective/kl_exact": exact,
            "safe/threshold": budget,
            "objective/entropy": max(0.0, ENTROPY * now.entropy * (1 + draw.gauss(0, 0.3 / math.sqrt(batch)))),
            "completions/distinct_2": min(1.0, DISTINCT * now.distinct * (1 + draw.gauss(0, 0.3 / math.sqrt(batch)))),
            "completions/mean_length": length,
            "objective/scores": now.reward + draw.gauss(0, now.spread / math.sqrt(batch)),
            "objective/scores_std": now.spread * math.sqrt(max(0.01, 1 + draw.gauss(0, 1 / math.sqrt(batch)))),
            "rows": batch,
        }
        yield row, now
