"""The plots of a report as the template draws them: lines, ticks, shading, and the values that the pointer reads.

Every plot shows where the guard acted: a dotted line where an update was skipped, a dashed one where the run was
rolled back, a solid one where it was stopped.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

from stable_rlhf.control import WINDOW
from stable_rlhf.report import chart
from stable_rlhf.report.chart import Axis, Series
from stable_rlhf.report.crashes import RewardCrash, Rows, moving_average
from stable_rlhf.report.figures import AVERAGE, Line, Plot, sections

PHASE_STYLES = 6
"""Background colours of the phases (.p0 to .p5 in assets/report.css), in the order of their first appearance."""

INCIDENTS = {"skip": "skip", "rebase": "rebase", "roll back": "back", "stop": "stop"}
"""How the line of an incident is drawn, by its action: a class of assets/report.css."""

TICKS_UP, TICKS_ACROSS = 5, 6
"""Most numbers on an axis: more would touch each other at 400 pixels' width."""


def series(rows: Rows, metric: str) -> tuple[list[int], list[float]]:
    """The steps that have a value, and the values."""
    pairs = [(row["step"], value) for row in rows if (value := row.get(metric)) is not None]
    return [step for step, _ in pairs], [value for _, value in pairs]


def draw_plots(
    rows: Rows,
    timings: Rows = (),
    crashes: Sequence[RewardCrash] = (),
    incidents: Rows = (),
    measured: Rows = (),
) -> dict[str, list[dict[str, Any]]]:
    """The plots for the template, by section. A plot of which nothing is recorded has no `panels`.

    `measured`: the figures of evaluations. One after n steps stands at step n, whose completions the same policy
    samples; that at the end of the run stands at its last step.
    """
    last = rows[-1]["step"]
    recorded = _recorded(rows, timings, _within(measured, last))
    across = chart.step_axis([row["step"] for row in rows])
    shared = {
        "ticks": ticks_across(across),
        "marks": {
            style: chart.uprights((each["step"] for each in incidents if each["action"] == action), across)
            for action, style in INCIDENTS.items()
        },
    }
    return {
        section: [_drawn(plot, recorded, rows, crashes, across) | shared for plot in plots]
        for section, plots in sections(rows, measured).items()
    }


def _within(measured: Rows, last: int) -> Rows:
    """Evaluations by steps that the plots have: the one after the last step takes the place of one before it."""
    inside = [row for row in measured if row["step"] <= last]
    beyond = [{**row, "step": last} for row in measured if row["step"] > last][-1:]
    return [row for row in inside if row["step"] < last or not beyond] + beyond


def _recorded(rows: Rows, timings: Rows, measured: Rows = ()) -> dict[str, Series]:
    """The series of every figure that has a value."""
    found: dict[str, tuple[list[int], list[float], list[int]]] = {}
    for source in (rows, timings, measured):
        for number, row in enumerate(source):
            for name, value in row.items():
                if isinstance(value, int | float):
                    steps, values, numbers = found.setdefault(name, ([], [], []))
                    steps.append(row["step"])
                    values.append(value)
                    numbers.append(number - len(numbers))  # the same as long as no row lacks the value
    made = {name: Series(steps=steps, values=values, runs=runs) for name, (steps, values, runs) in found.items()}
    if rewards := made.get("objective/scores"):
        averages = moving_average(rewards.values)
        steps = rewards.steps[WINDOW - 1 :]
        made |= {AVERAGE: Series(steps=steps, values=averages, runs=[0] * len(steps))} if averages else {}
    return made


def _drawn(
    plot: Plot, recorded: dict[str, Series], rows: Rows, crashes: Sequence[RewardCrash], across: Axis
) -> dict[str, Any]:
    lines = {line: recorded[line.metric] for line in plot.lines if line.metric in recorded}
    missing = [line.metric for line in plot.lines if line not in lines and line.metric != AVERAGE]
    phases = _phases(rows) if plot.phases else []
    panels = []
    for number, unit in enumerate(plot.units):
        of_panel = {line: each for line, each in lines.items() if line.panel == number}
        if of_panel:
            least = plot.least if number + 1 == len(plot.units) else None
            shading = [_span(across, style, first - 0.5, last + 0.5) for _, style, first, last in phases]
            if plot.title == "Reward" and (rewards := recorded.get("objective/scores")):
                shading += [
                    _span(across, "crash", rewards.steps[crash.begin], rewards.steps[crash.end or -1])
                    for crash in crashes
                ]
            panels.append(_panel(unit, of_panel, across, least) | {"spans": shading})
    return {
        "title": plot.title,
        "caption": plot.caption,
        "panels": panels,
        "missing": missing,
        "phases": {phase: style for phase, style, *_ in phases},
    }


def _panel(unit: str, lines: dict[Line, Series], across: Axis, least: float | None) -> dict[str, Any]:
    up = chart.value_axis((value for each in lines.values() for value in each.values), least)
    drawn = []
    for line, whole in lines.items():
        few = len(whole.steps) <= WINDOW  # few points must not look like a measured curve
        each = chart.thinned(whole)
        drawn.append(
            {
                "label": line.label,
                "style": line.style,
                "path": chart.path(each, across, up),
                "dots": chart.dots(each, across, up) if few else "",
                "last": figure(whole.values[-1]),
                "values": {"steps": each.steps, "values": [_short(v) for v in each.values], "bin": each.bin},
            }
        )
    return {"unit": unit, "lines": drawn, "ticks": ticks_up(up)}


def ticks_up(up: Axis) -> list[tuple[float, str]]:
    """(place from the top in per cent, text) of the numbers next to a plot."""
    return [(100 - up.place(tick) * 100 / chart.SIZE, figure(tick)) for tick in chart.ticks(up, TICKS_UP)]


def ticks_across(across: Axis) -> list[tuple[float, str]]:
    """(place from the left in per cent, text) of the steps below a plot."""
    found = chart.ticks(across, TICKS_ACROSS, whole=True)
    return [(across.place(tick) * 100 / chart.SIZE, f"{tick:.0f}") for tick in found]


def _span(across: Axis, style: str, first: float, last: float) -> dict[str, Any]:
    left, right = across.place(first), across.place(last)
    return {"style": style, "left": left, "width": round(right - left, 1)}


def _phases(rows: Rows) -> list[tuple[str, str, int, int]]:
    """(phase, its style, first step, last step) of each unbroken span."""
    styles: dict[str, str] = {}
    spans = []
    for phase, group in itertools.groupby(rows, key=lambda row: row.get("safe/phase")):
        steps = [row["step"] for row in group]
        if phase is not None:
            style = styles.setdefault(phase, f"p{len(styles) % PHASE_STYLES}")
            spans.append((phase, style, steps[0], steps[-1]))
    return spans


def figure(value: float) -> str:
    """A value as people read it: four digits."""
    return f"{value:.4g}"


def _short(value: float) -> float:
    """A value with the digits that are shown, so that the page stays small."""
    return float(f"{value:.5g}")
