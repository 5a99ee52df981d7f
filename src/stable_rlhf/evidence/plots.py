"""The plots of a comparison as the template draws them: curves of arms, and how many runs reached a reward by when."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from stable_rlhf.evidence import curves
from stable_rlhf.evidence.compare import Comparison
from stable_rlhf.evidence.curves import Curve, Pair
from stable_rlhf.report import COLOURS, SIZE, Axis, step_axis

MOST_ARMS = 2 * COLOURS
"""Arms that have curves: each colour twice, whole and dashed. More lines cannot be told apart."""

MOST_GOLD = 6
"""Gold rewards that have a plot."""

QUIET = "quiet"
"""The style of an arm without curves."""


@dataclass(frozen=True, kw_only=True)
class _Drawn:
    title: str
    metric: str
    unit: str
    caption: str
    bounds: tuple[float, float] = (-math.inf, math.inf)
    """No value lies outside: the interval is cut there."""
    least: float | None = None
    """Where the axis is cut."""
    limit: str | None = None
    """A metric that is drawn dotted next to it."""


_NATS = "nats per token"
_FROM_0 = (0.0, math.inf)

COURSE = (
    _Drawn(title="Reward", metric="objective/scores", unit="reward", caption="Mean reward of a step."),
    _Drawn(
        title="KL from the reference",
        metric="objective/kl",
        unit=_NATS,
        caption="Mean log-ratio (k1). Dotted: the threshold, where there is one.",
        limit="safe/threshold",
    ),
    _Drawn(
        title="Entropy",
        metric="objective/entropy",
        unit=_NATS,
        caption="Mean entropy of the sampling policy.",
        bounds=_FROM_0,
    ),
    _Drawn(
        title="Variety",
        metric="completions/distinct_2",
        unit="share",
        caption="distinct-2: different token pairs / all token pairs of a step.",
        bounds=(0.0, 1.0),
    ),
    _Drawn(
        title="NLL of the reference",
        metric="objective/ref_nll",
        unit=_NATS,
        caption="How unlikely the reference finds the text. A climb is gibberish or a reward hack.",
        bounds=_FROM_0,
    ),
    _Drawn(
        title="Completion length",
        metric="completions/mean_length",
        unit="tokens",
        caption="Mean tokens of a response.",
        bounds=_FROM_0,
    ),
    _Drawn(
        title="Explained variance",
        metric="val/explained_variance",
        unit="share",
        caption="Share of the returns' variance that the critic explains; below -1 it is cut.",
        bounds=(-math.inf, 1.0),
        least=-1,
    ),
)
CONTROLLER = (
    _Drawn(
        title="Threshold",
        metric="safe/threshold",
        unit=_NATS,
        caption="The KL above which the controller acts.",
        bounds=_FROM_0,
    ),
    _Drawn(
        title="Gate",
        metric="safe/gate",
        unit="factor",
        caption="Factor on the coefficient at low entropy.",
        bounds=_FROM_0,
    ),
    _Drawn(
        title="KL coefficient",
        metric="safe/kl_coef",
        unit="coefficient",
        caption="Weight of the KL.",
        bounds=_FROM_0,
    ),
)


@dataclass(frozen=True, kw_only=True)
class Plots:
    """The plots by section, and the steps that all of them share."""

    first: int
    last: int
    sections: dict[str, list[dict[str, Any]]]


def best_arms(made: Comparison) -> list[int]:
    """The arms that have curves, in order: those of the best final reward where there are more than MOST_ARMS."""
    final = {index: made.cells[index, "reward/final"].mean.value for index in range(len(made.arms))
             if (index, "reward/final") in made.cells}  # fmt: skip
    by_reward = sorted(range(len(made.arms)), key=lambda index: -final.get(index, -np.inf))
    return sorted(by_reward[:MOST_ARMS])


def arm_styles(made: Comparison) -> list[str]:
    """The style of each arm, the same in all plots."""
    found = [QUIET] * len(made.arms)
    for place, index in enumerate(best_arms(made)):
        found[index] = f"c{1 + place % COLOURS}" + (" dashed" if place >= COLOURS else "")
    return found


def arm_label(made: Comparison, index: int) -> str:
    """The number of an arm, which is the same on the whole page, and its name."""
    return f"{index + 1}: {made.arms[index].name}"


def draw_plots(made: Comparison) -> Plots:
    """All curves of a comparison. A plot of which no arm has a line is left out."""
    courses = [pair[0] for arm in made.arms for run in arm.runs.values() for pair in run.curves.values()]
    golds = [pair[0] for arm in made.arms for run in arm.runs.values() for pair in run.gold.values()]
    ends = [steps for steps in (*courses, *golds) if len(steps)]
    first = min((int(steps[0]) for steps in ends), default=0)
    last = max((int(steps[-1]) for steps in ends), default=0)
    across = step_axis([first, last])
    names = list(dict.fromkeys(name for arm in made.arms for run in arm.runs.values() for name in run.gold))
    gold = [
        _plot(made, f"Gold reward, {name}", "reward", "Mean over the held-out prompts; nothing was trained on it.",
              {index: [run.gold[name] for run in made.arms[index].runs.values() if name in run.gold]
               for index in best_arms(made)}, (first, last), across)
        for name in names[:MOST_GOLD]
    ]  # fmt: skip
    reward, *policy = [_course(made, drawn, first, last, across) for drawn in COURSE]
    sections = {
        "Reward": [reward, *gold, _reached(made, first, last, across)],
        "Policy": policy,
        "Controller": [_course(made, drawn, first, last, across) for drawn in CONTROLLER],
    }
    kept = {name: [plot for plot in plots if plot is not None] for name, plots in sections.items()}
    return Plots(first=first, last=last, sections={name: plots for name, plots in kept.items() if plots})


def _course(made: Comparison, drawn: _Drawn, first: int, last: int, across: Axis) -> dict[str, Any] | None:
    chosen = best_arms(made)
    pairs = {index: _pairs(made, index, drawn.metric) for index in chosen}
    limits = {index: _pairs(made, index, drawn.limit) for index in chosen} if drawn.limit else {}
    return _plot(made, drawn.title, drawn.unit, drawn.caption, pairs, (first, last), across, drawn.least, limits,
                 drawn.bounds)  # fmt: skip


def _pairs(made: Comparison, index: int, metric: str) -> list[Pair]:
    return [run.curves[metric] for run in made.arms[index].runs.values() if metric in run.curves]


def _plot(
    made: Comparison,
    title: str,
    unit: str,
    caption: str,
    pairs: dict[int, list[Pair]],
    span: tuple[int, int],
    across: Axis,
    least: float | None = None,
    limits: dict[int, list[Pair]] | None = None,
    bounds: tuple[float, float] = (-math.inf, math.inf),
) -> dict[str, Any] | None:
    styles = arm_styles(made)
    lines, dotted = [], []
    for index, runs in pairs.items():
        members = len(made.arms[index].runs)
        if found := curves.curve(runs, *span, members):
            lines.append((arm_label(made, index), styles[index], curves.within(found, bounds)))
        if limits and (limit := curves.curve(limits[index], *span, members)):
            dotted.append((f"{styles[index]} dotted", limit))
    if not lines:
        return None
    return curves.plot(title, caption, [curves.panel(unit, lines, across, least=least, under=dotted)], across)


def _reached(made: Comparison, first: int, last: int, across: Axis) -> dict[str, Any] | None:
    """The share of an arm's runs that had reached the target by each step."""
    if made.target is None:
        return None
    size = -(-(last - first + 1) // curves.BINS)
    steps = np.minimum(np.arange(first + size - 1, last + size, size), last)
    lines: list[tuple[str, str, Curve]] = []
    styles = arm_styles(made)
    for index in best_arms(made):
        runs = list(made.arms[index].runs.values())
        times = (
            np.array([run.figures.get("reward/steps_to", np.inf) for run in runs]) - 1
        )  # after step n, n + 1 are done
        share = (times[:, None] <= steps).mean(axis=0)
        none = np.full(len(steps), np.nan)
        lines.append(
            (arm_label(made, index), styles[index], Curve(steps=steps, mean=share, low=none, high=none, bin=size))
        )
    caption = (
        f"Share of an arm's runs whose 20-step mean of the reward has been at least {made.target:.4g}: 90 % of the way "
        "from where all runs start to the final reward of the best arm. A run that never is stays below."
    )
    drawn = curves.panel("share of the runs", lines, across, stairs=True)
    return curves.plot("Time to the reward", caption, [drawn], across)


def scatter(values: Sequence[tuple[float, float]], across: Axis, up: Axis) -> str:
    """The `d` of a dot at each (across, up)."""
    return "".join(f"M{across.place(x):g} {SIZE - up.place(y):g}h0" for x, y in values)
