"""Geometry of a plot: ticks, thinned series and SVG paths, from numbers only.

A drawing is SIZE units wide and high, and the page stretches it: lines keep their width (`non-scaling-stroke`) and
every text is HTML next to the drawing, so that a plot can be read at any width.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

SIZE = 1000
"""Width and height of a drawing, in its own units: finer than a pixel of any plot on the page."""

POINTS = 600
"""Most points of a line. A plot is at most about 560 pixels wide, and a bin has two points."""

LARGEST = 1e300
"""Values beyond it are drawn on the edge: the difference of two that are larger is not finite."""

MARGIN = 0.06
"""Share of the values' range that is left free above and below them, so that no line lies on an edge."""


@dataclass(frozen=True, kw_only=True)
class Series:
    """Values by step, both in order. `runs` numbers each unbroken stretch: where a row had no value, a new one
    begins, and no line is drawn across. `bin` is how many points one pair of points stands for, 1 unless thinned."""

    steps: Sequence[int]
    values: Sequence[float]
    runs: Sequence[int]
    bin: int = 1


@dataclass(frozen=True)
class Axis:
    """Maps values to a drawing: `low` to 0, `high` to SIZE."""

    low: float
    high: float

    def place(self, value: float) -> float:
        """The coordinate of a value, to a tenth of a unit; values outside are put on the edge."""
        share = (value - self.low) / (self.high - self.low)
        return round(SIZE * min(1.0, max(0.0, share)), 1)


def thinned(series: Series, points: int = POINTS) -> Series:
    """The smallest and the largest value of each bin, in order: spikes stay, the file stays small."""
    count = len(series.steps)
    if count <= points:
        return series
    size = math.ceil(2 * count / points)
    bins = (range(start, min(start + size, count)) for start in range(0, count, size))
    kept = sorted({pick(each, key=series.values.__getitem__) for each in bins for pick in (min, max)})
    return Series(
        steps=[series.steps[i] for i in kept],
        values=[series.values[i] for i in kept],
        runs=[series.runs[i] for i in kept],
        bin=size,
    )


def value_axis(values: Iterable[float], least: float | None = None) -> Axis:
    """An axis around values, with MARGIN on both sides; `least` bounds it from below, and LARGEST on both sides."""
    values = [max(-LARGEST, min(LARGEST, value)) for value in values]
    low, high = min(values), max(values)
    if low == high == 0:
        high = 1.0  # a count that stays 0
    if least is not None:
        low, high = max(low, least), max(high, least)
    margin = MARGIN * (high - low) or abs(high) * 0.1 or 1.0  # of a constant line: a tenth of it
    return Axis(low - margin, high + margin)


def step_axis(steps: Sequence[int]) -> Axis:
    """An axis from the first step to the last; a single step stands in the middle."""
    return Axis(steps[0], steps[-1]) if steps[0] < steps[-1] else Axis(steps[0] - 1, steps[0] + 1)


def ticks(axis: Axis, most: int, *, whole: bool = False) -> list[float]:
    """At most `most` round numbers (1, 2 or 5 times a power of ten apart) on the axis; `whole` ones where asked."""
    power = 10.0 ** math.floor(math.log10(max((axis.high - axis.low) / most, 1 / LARGEST)))
    for step in (factor * power * scale for scale in (1, 10) for factor in (1, 2, 5)):
        if whole and step < 1:
            continue
        first, last = math.ceil(axis.low / step), math.floor(axis.high / step)
        if last - first < most:
            return [float(f"{number * step:.12g}") for number in range(first, last + 1)]
    return []


def path(series: Series, across: Axis, up: Axis) -> str:
    """The `d` of an SVG path through the points, y downwards. A point without neighbours is drawn as a dot."""
    parts: list[str] = []
    for number, (step, value, run) in enumerate(zip(series.steps, series.values, series.runs, strict=True)):
        begins = number == 0 or series.runs[number - 1] != run
        alone = begins and (number + 1 == len(series.steps) or series.runs[number + 1] != run)
        parts.append(
            f"{'M' if begins else 'L'}{across.place(step):g} {SIZE - up.place(value):g}{'h0' if alone else ''}"
        )
    return "".join(parts)


def band(low: Series, high: Series, across: Axis, up: Axis) -> str:
    """The `d` of areas between two series of the same steps, one for each unbroken stretch."""
    parts: list[str] = []
    for run in dict.fromkeys(low.runs):
        points = [index for index, each in enumerate(low.runs) if each == run]
        edge = [(index, low) for index in points] + [(index, high) for index in reversed(points)]
        places = [f"{across.place(of.steps[i]):g} {SIZE - up.place(of.values[i]):g}" for i, of in edge]
        parts.append(f"M{'L'.join(places)}Z")
    return "".join(parts)


def dots(series: Series, across: Axis, up: Axis) -> str:
    """The `d` of an SVG path with a dot at each point: lines of length 0, which round caps make visible."""
    pairs = zip(series.steps, series.values, strict=True)
    return "".join(f"M{across.place(step):g} {SIZE - up.place(value):g}h0" for step, value in pairs)


def uprights(steps: Iterable[int], across: Axis) -> str:
    """The `d` of upright lines at steps. Those that fall on one pixel are one."""
    places = sorted({round(across.place(step) / 2) * 2 for step in steps})  # 500 places across a plot
    return "".join(f"M{place:g} 0V{SIZE}" for place in places)
