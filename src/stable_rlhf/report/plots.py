"""The plots of a report, each as an image's data address, drawn only from figures, never from text of the run.

Every plot shows where the guard acted: a dotted line where an update was skipped, a dashed one where the run was
rolled back, a solid one where it was stopped.
"""

from __future__ import annotations

import base64
import io
import itertools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from stable_rlhf.control import WINDOW
from stable_rlhf.report.crashes import RewardCrash, Rows, moving_average

POINTS = 1200  # more points on a plot of this width cannot be told apart
ACCENT, SECOND, DANGER, QUIET = "#1f6feb", "#b35900", "#c62828", "#9fb3c8"

# Text as paths looks the same where a font is missing; a fixed salt gives the same bytes for the same run.
_STYLE: Any = {"svg.fonttype": "path", "svg.hashsalt": "stable-rlhf", "font.size": 9, "axes.edgecolor": QUIET}
PHASE_COLOURS = ("#dbeafe", "#dcf5e3", "#fdf0d5", "#ede4f7", "#fbe0e3", "#e3e8ee")
INCIDENTS = {"skip": ":", "roll back": "--", "stop": "-"}  # how the line of an incident is drawn, by its action
Series = tuple[list[int], list[float]]


class _Line(NamedTuple):
    metric: str
    label: str
    colour: str
    style: str = "-"
    panel: int = 0


class _Plot(NamedTuple):
    title: str
    caption: str
    labels: tuple[str, ...]  # of the y axes, one per panel
    lines: tuple[_Line, ...]


_PLOTS = (
    _Plot(
        "Reward",
        "Mean raw reward; crashes are shaded red.",
        ("reward",),
        (_Line("objective/scores", "each step", QUIET),),
    ),
    _Plot(
        "KL from the reference",
        "Mean log-ratio (k1); background colours are the phases of the reward.",
        ("nats per token",),
        (
            _Line("objective/kl", "each step", QUIET),
            _Line("safe/kl_short", "fast filter", ACCENT),
            _Line("safe/threshold", "threshold", DANGER, "--"),
        ),
    ),
    _Plot(
        "Entropy",
        "Mean entropy of the sampling policy; below the floor the gate acts.",
        ("nats per token",),
        (_Line("objective/entropy", "entropy", ACCENT), _Line("safe/entropy_floor", "floor", DANGER, "--")),
    ),
    _Plot(
        "Gate and KL coefficient",
        "Gate: factor on the coefficient at low entropy; coefficient: weight of the KL.",
        ("gate", "coefficient"),
        (_Line("safe/gate", "gate", SECOND), _Line("safe/kl_coef", "coefficient", ACCENT, panel=1)),
    ),
    _Plot(
        "Critic",
        "Loss, and share of the returns' variance explained (cut at -1).",
        ("loss", "expl. variance"),
        (_Line("loss/value_avg", "loss", SECOND), _Line("val/explained_variance", "explained", ACCENT, panel=1)),
    ),
    _Plot(
        "Completion length",
        "Tokens of a response: mean, shortest and longest of each step.",
        ("tokens",),
        (
            _Line("completions/mean_length", "mean", ACCENT),
            _Line("completions/min_length", "shortest", QUIET),
            _Line("completions/max_length", "longest", QUIET, "--"),
        ),
    ),
)


def series(rows: Rows, metric: str) -> Series:
    pairs = [(row["step"], row[metric]) for row in rows if row.get(metric) is not None]
    return [step for step, _ in pairs], [value for _, value in pairs]


def draw_plots(rows: Rows, crashes: Sequence[RewardCrash], incidents: Rows = ()) -> list[dict[str, Any]]:
    """The plots for the template: title, caption, image (None if nothing is recorded), missing metrics, phase ->
    colour."""
    plots = []
    for plot in _PLOTS:
        data = {line: series(rows, line.metric) for line in plot.lines}
        missing = [line.metric for line, (steps, _) in data.items() if not steps]
        image = None if len(missing) == len(plot.lines) else _draw(plot, data, rows, crashes, incidents)
        phases = {phase: colour for phase, colour, *_ in _phases(rows)} if plot.title.startswith("KL") else {}
        plots.append({**plot._asdict(), "image": image, "missing": missing, "phases": phases})
    return plots


def _phases(rows: Rows) -> list[tuple[str, str, int, int]]:
    """(phase, its colour, first step, last step) of each unbroken span."""
    colours, cycle, spans = {}, itertools.cycle(PHASE_COLOURS), []
    for phase, group in itertools.groupby(rows, key=lambda row: row.get("safe/phase")):
        steps = [row["step"] for row in group]
        if phase is not None:
            colours[phase] = colours.get(phase) or next(cycle)
            spans.append((phase, colours[phase], steps[0], steps[-1]))
    return spans


def _thin(steps: list[int], values: list[float]) -> Series:
    """The smallest and the largest value of each bin, in order: spikes stay, the file stays small."""
    if len(steps) <= POINTS:
        return steps, values
    size = math.ceil(2 * len(steps) / POINTS)
    bins = (range(start, min(start + size, len(steps))) for start in range(0, len(steps), size))
    kept = sorted({pick(each, key=values.__getitem__) for each in bins for pick in (min, max)})
    return [steps[i] for i in kept], [values[i] for i in kept]


def _draw(plot: _Plot, data: dict[_Line, Series], rows: Rows, crashes: Sequence[RewardCrash], incidents: Rows) -> str:
    """One figure as a data address. Only this module's own labels are drawn, never text of the run."""
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(6.2, 2.9), layout="constrained")  # inches; two side by side fill 1180 px
        axes = figure.subplots(len(plot.labels), sharex=True, squeeze=False)[:, 0]
        for line, (steps, values) in data.items():
            marker = "o" if len(steps) <= WINDOW else ""  # few points must not look like a measured curve
            x, y = _thin(steps, values)
            axes[line.panel].plot(x, y, line.style, color=line.colour, label=line.label, marker=marker, ms=4, lw=1.3)
        for axis, label in zip(axes, plot.labels, strict=True):
            _decorate(axis, plot, label, rows, crashes)
            for incident in incidents:
                if style := INCIDENTS.get(incident["action"]):
                    axis.axvline(incident["step"], ls=style, color=DANGER, lw=1, gid=f"incident-{incident['step']}")
        axes[-1].set_xlabel("step")
        buffer = io.BytesIO()
        FigureCanvasSVG(figure).print_svg(buffer, metadata={"Date": None})
    return "data:image/svg+xml;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


def _decorate(axis: Axes, plot: _Plot, label: str, rows: Rows, crashes: Sequence[RewardCrash]) -> None:
    if label == "reward":
        steps, rewards = series(rows, "objective/scores")
        if averages := moving_average(rewards):
            axis.plot(*_thin(steps[WINDOW - 1 :], averages), color=ACCENT, lw=1.8, label=f"{WINDOW}-step average")
        for crash in crashes:
            axis.axvspan(steps[crash.begin], steps[crash.end or -1], color=DANGER, alpha=0.14, lw=0)
    if plot.title.startswith("KL"):
        for _, colour, first, last in _phases(rows):
            axis.axvspan(first - 0.5, last + 0.5, color=colour, lw=0, zorder=0)
    if label == "expl. variance" and axis.get_ylim()[0] < -1:
        axis.set_ylim(-1, 1.05)
    axis.set_ylabel(label)
    axis.grid(color=QUIET, alpha=0.3, lw=0.6)
    axis.spines[["top", "right"]].set_visible(False)
    axis.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    if len(axis.lines) > 1:
        axis.legend(frameon=False, fontsize=8, ncols=3, loc="upper left", bbox_to_anchor=(0, 1.16), borderaxespad=0)
