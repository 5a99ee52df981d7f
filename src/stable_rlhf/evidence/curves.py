"""Curves of arms: the mean over the runs of an arm, step by step, with its interval."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from scipy.special import stdtrit

from stable_rlhf.evidence.statistics import LEVEL
from stable_rlhf.evidence.table import decimals, in_words
from stable_rlhf.report import Axis, Series, band, dots, path, ticks_across, ticks_up, value_axis

BINS = 200
"""Most points of a curve. A plot is at most about 600 pixels wide: a point for every third."""

BEYOND = 0.5
"""Share of the means' range that a plot shows above and below them. The band of two runs is 13 standard errors wide:
it would flatten every line."""

FEWEST = 0.5
"""Share of an arm's runs that must go on for a line to go on: fewer would be another choice of runs."""

FEW_POINTS = 20
"""Points of a line that are drawn as dots as well: few must not look like a measured curve."""

Pair = tuple[np.ndarray, np.ndarray]


@dataclass(frozen=True, kw_only=True)
class Curve:
    """The mean over runs by step, and its interval; NaN where one run is left. `bin`: steps that a point stands for."""

    steps: np.ndarray
    mean: np.ndarray
    low: np.ndarray
    high: np.ndarray
    bin: int


def curve(runs: Sequence[Pair], first: int, last: int, members: int | None = None) -> Curve | None:
    """The mean of the runs that have a value, with the pointwise interval of Student's t. None where fewer than half of
    the `members` (by default the runs given) have any.

    Steps are binned: a run's value is its mean over the bin. A bin that a run passes over between two others, such as
    one that logs more seldom than the rest, gets the value on the line between them.
    """
    members = len(runs) if members is None else members
    size = math.ceil((last - first + 1) / BINS)
    count = math.ceil((last - first + 1) / size)
    known = [_binned(steps, values, first, size, count) for steps, values in runs if len(steps)]
    if not known or len(known) < FEWEST * members:
        return None
    places = np.flatnonzero(np.any([~np.isnan(each) for each in known], axis=0))
    rows = np.array([_bridged(each, places) for each in known])
    going = (~np.isnan(rows)).sum(axis=0)
    kept = going >= max(1, FEWEST * members)
    rows, going, places = rows[:, kept], going[kept], places[kept]
    if not len(places):
        return None
    mean = np.nanmean(rows, axis=0)
    half = np.full(len(places), np.nan)
    several = going >= 2
    half[several] = (
        stdtrit(going[several] - 1, (1 + LEVEL) / 2)
        * np.nanstd(rows[:, several], axis=0, ddof=1)
        / np.sqrt(going[several])
    )
    steps = np.minimum(first + size * places + (size - 1) // 2, last)
    return Curve(steps=steps, mean=mean, low=mean - half, high=mean + half, bin=size)


def within(made: Curve, bounds: tuple[float, float]) -> Curve:
    """The curve with its interval cut at what the figure can be. A mean beyond that, which another trainer's log may
    hold, stays inside its interval."""
    low = np.maximum(made.low, np.minimum(bounds[0], made.mean))
    return replace(made, low=low, high=np.minimum(made.high, np.maximum(bounds[1], made.mean)))


def panel(
    unit: str,
    lines: Sequence[tuple[str, str, Curve]],
    across: Axis,
    *,
    least: float | None = None,
    under: Sequence[tuple[str, Curve]] = (),
    stairs: bool = False,
) -> dict[str, Any]:
    """A panel as the template draws it, of (label, style, curve). `under`: (style, curve) of lines that are drawn but
    not read; `stairs`: a value holds until the next."""
    up = _axis([each for *_, each in lines], least, [each for _, each in under])
    return {
        "unit": unit,
        "ticks": ticks_up(up),
        "spans": [],
        "under": [(style, path(_series(each, each.mean), across, up)) for style, each in under],
        "lines": [_line(label, style, each, across, up, stairs=stairs) for label, style, each in lines],
    }


def plot(title: str, caption: str, panels: Sequence[dict[str, Any]], across: Axis) -> dict[str, Any]:
    """A plot as the template draws it."""
    return {
        "title": title,
        "caption": caption,
        "panels": list(panels),
        "missing": [],
        "phases": {},
        "marks": {},
        "ticks": ticks_across(across),
    }


def _binned(steps: np.ndarray, values: np.ndarray, first: int, size: int, count: int) -> np.ndarray:
    """(count,) the mean of each bin, NaN where it has no value."""
    index = (steps - first) // size
    inside = (index >= 0) & (index < count)
    clear = values[inside].astype(np.float64)
    number = np.bincount(index[inside], minlength=count)
    total = np.bincount(index[inside], clear, minlength=count)
    return np.where(number > 0, total / np.maximum(number, 1), np.nan)


def _bridged(values: np.ndarray, places: np.ndarray) -> np.ndarray:
    known = np.flatnonzero(~np.isnan(values))
    return np.interp(places, known, values[known], left=np.nan, right=np.nan) if len(known) else values[places]


def _axis(curves: Sequence[Curve], least: float | None, under: Sequence[Curve]) -> Axis:
    means = np.concatenate([each.mean for each in (*curves, *under)])
    low, high = float(means.min()), float(means.max())
    room = BEYOND * (high - low)
    edges = np.concatenate([edge for each in curves for edge in (each.low, each.high)])
    edges = np.clip(edges[~np.isnan(edges)], low - room, high + room)
    return value_axis([low, high, *map(float, edges)], least)


def _line(label: str, style: str, made: Curve, across: Axis, up: Axis, *, stairs: bool) -> dict[str, Any]:
    whole = _series(made, made.mean)
    banded = not np.isnan(made.low).all()
    points = [_short(*each) for each in zip(made.mean.tolist(), made.low.tolist(), made.high.tolist(), strict=True)]
    value, low, high = (each[-1] for each in (made.mean, made.low, made.high))
    last = in_words(float(value), *((None, None) if np.isnan(low) else (float(low), float(high))))
    apart = int(np.diff(made.steps).max(initial=1))
    return {
        "label": label,
        "style": style,
        "path": path(_stairs(whole) if stairs else whole, across, up),
        "dots": dots(whole, across, up) if len(made.steps) <= FEW_POINTS else "",
        "band": band(_series(made, made.low), _series(made, made.high), across, up) if banded else "",
        "last": " ".join(filter(None, last)),
        "values": {
            "steps": made.steps.tolist(),
            "values": [point for point, _, _ in points],
            "bin": max(made.bin, apart),
            **({"low": [low for _, low, _ in points], "high": [high for _, _, high in points]} if banded else {}),
        },
    }


def _series(made: Curve, values: np.ndarray) -> Series:
    """The values that are known; a new stretch begins after those that are not."""
    kept = ~np.isnan(values)
    stretches = np.cumsum(~kept)
    return Series(
        steps=made.steps[kept].tolist(), values=values[kept].tolist(), runs=stretches[kept].tolist(), bin=made.bin
    )


def _stairs(made: Series) -> Series:
    """Each value is repeated at the next step."""
    steps = [step for step in made.steps for _ in (0, 1)][1:]
    values = [value for value in made.values for _ in (0, 1)][:-1]
    return Series(steps=steps, values=values, runs=[0] * len(steps))


def _short(value: float, low: float, high: float) -> tuple[float, float | None, float | None]:
    """A value and its interval with the digits that are shown, so that the page stays small."""
    short = float(f"{value:.4g}")
    if math.isnan(low):
        return short, None, None
    digits = decimals(low, high)
    if digits is None:
        return short, float(f"{low:.4g}"), float(f"{high:.4g}")
    return short, round(low, digits), round(high, digits)
