"""One run folder -> one report.html: no script, no network, no torch; every text from models and data is escaped.

Reading (`read_run`), figures (`reward_crashes`, `headline`) and drawing (`write_report`) are separate, so that a
comparison of runs uses the same figures. What a run did not record is named in the report, not drawn as an empty plot.
"""

from __future__ import annotations

import base64
import io
import itertools
import json
import math
import reprlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
import matplotlib as mpl
import pyarrow.parquet as pq
import yaml
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from stable_rlhf import telemetry
from stable_rlhf.display import excerpt

WINDOW = 20  # steps of the moving average R in the definition of a reward crash
CRASH_SHARE = 0.25  # of the reward gained, max R - R_20: smaller falls are oscillation
CRASH_ERRORS = 3.0  # standard errors of D: what is left of chance is about one in a thousand
SAMPLES, COMPLETIONS, TEXT_LIMIT = 12, 8, 1500  # rows shown, and characters of each text: the file stays small
POINTS = 1200  # more points on a plot of this width cannot be told apart
ACCENT, SECOND, DANGER, QUIET = "#1f6feb", "#b35900", "#c62828", "#9fb3c8"
# Text as paths looks the same where a font is missing; a fixed salt gives the same bytes for the same run.
_STYLE: Any = {"svg.fonttype": "path", "svg.hashsalt": "stable-rlhf", "font.size": 9, "axes.edgecolor": QUIET}
PHASE_COLOURS = ("#dbeafe", "#dcf5e3", "#fdf0d5", "#ede4f7", "#fbe0e3", "#e3e8ee")
_Rows = Sequence[dict[str, Any]]
_Series = tuple[list[int], list[float]]


@dataclass(frozen=True, kw_only=True)
class Run:
    """A run folder as read: rows of metrics.jsonl, texts as they are (hostile), `notes` on what is missing or torn."""

    path: Path
    rows: tuple[dict[str, Any], ...]
    config_text: str | None
    config: dict[str, Any]
    evaluation: dict[str, Any] | None
    completions: tuple[dict[str, Any], ...]
    completions_step: int | None
    notes: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class RewardCrash:
    """A fall of R: indices into the rewards (`end` is None when R never recovered), `depth` = the largest D in it."""

    begin: int
    end: int | None
    depth: float


@dataclass(frozen=True, kw_only=True)
class Headline:
    """The figures at the top of a report; None where the run lacks what they need. Rewards in the scorer's units."""

    steps: int
    reward: float | None  # R at the last step; over fewer steps in a run shorter than WINDOW
    kl_end: float | None  # nats per token
    kl_max: float | None
    entropy: float | None
    crashes: tuple[RewardCrash, ...]
    errors_known: bool  # False: no standard errors, so that only the first condition for a crash was applied
    largest_fall: float | None  # max_t D_t, crash or not


def read_run(run_dir: str | Path) -> Run:
    """Read a run folder; metrics.jsonl is required and must have a row, the rest is noted when missing.

    Raises FileNotFoundError without metrics.jsonl, ValueError naming file and line for what cannot be read.
    """
    path, notes = Path(run_dir), []
    if not (path / "metrics.jsonl").is_file():
        raise FileNotFoundError(f"{path / 'metrics.jsonl'} does not exist: give the folder of a run")
    rows, torn = telemetry.read_rows(path / "metrics.jsonl")
    if not rows:
        raise ValueError(f"{path / 'metrics.jsonl'}:1: no complete row yet: nothing to report before the first step")
    if torn:
        notes.append("metrics.jsonl ends in a torn line: the run was stopped while it wrote.")
    config_text, config = _read_config(path / "config.yaml", notes)
    evaluation = _read_evaluation(path / "evaluation.json", notes)
    step, completions = _read_completions(path / "completions", notes)
    if isinstance(planned := config.get("max_steps"), int) and (done := rows[-1]["step"] + 1) < planned:
        notes.append(f"The run has not finished: {done} of {planned} steps.")
    return Run(
        path=path,
        rows=tuple(rows),
        config_text=config_text,
        config=config,
        evaluation=evaluation,
        completions=completions,
        completions_step=step,
        notes=tuple(notes),
    )


def moving_average(values: Sequence[float]) -> list[float]:
    """R_t = mean of the last WINDOW values, for t >= WINDOW - 1 only (entry 0 is R at that t)."""
    return [math.fsum(values[end - WINDOW : end]) / WINDOW for end in range(WINDOW, len(values) + 1)]


def reward_crashes(rewards: Sequence[float], standard_errors: Sequence[float] | None = None) -> list[RewardCrash]:
    """Crashes of a run: R = 20-step moving average of `rewards`, D_t = max_{s<=t} R_s - R_t.

    A crash begins at the first t with D_t > 25 % of (max R - R_20), max over the whole run, and D_t > 3 standard errors
    of D_t. It ends at the first t where R has recovered half of the crash's largest D. From there on the maximum starts
    anew, or the half still lost would count as a second crash. R needs 20 rewards: no crash begins before the 21st.

    `standard_errors` holds one value per reward, that of the step's mean: scores_std / sqrt(completions scored). Steps
    being independent, Var(D_t) = (sum of se_i^2 over the steps i that lie in one of the two windows, of s and of t, but
    not in both) / 20^2. None drops this condition. Raises ValueError on another length and on values not finite.
    """
    errors = [0.0] * len(rewards) if standard_errors is None else list(standard_errors)
    if len(errors) != len(rewards):
        raise ValueError(f"{len(rewards)} rewards but {len(errors)} standard errors")
    if not all(map(math.isfinite, [*rewards, *errors])):
        raise ValueError("rewards and standard errors must be finite: leave out the steps that have none")
    averages = moving_average(rewards)
    least_fall = CRASH_SHARE * (max(averages) - averages[0]) if averages else 0.0
    crashes: list[RewardCrash] = []
    peak, begin, depth = 0, None, 0.0
    for now, average in enumerate(averages):
        if begin is None and average >= averages[peak]:
            peak = now
        fall = averages[peak] - average
        if begin is None:
            if fall > least_fall and fall > CRASH_ERRORS * _error_of_fall(errors, peak, now):
                begin, depth = now, fall
        elif fall <= depth / 2:
            crashes.append(RewardCrash(begin=begin + WINDOW - 1, end=now + WINDOW - 1, depth=depth))
            peak, begin = now, None
        else:
            depth = max(depth, fall)
    if begin is not None:
        crashes.append(RewardCrash(begin=begin + WINDOW - 1, end=None, depth=depth))
    return crashes


def _error_of_fall(errors: Sequence[float], peak: int, now: int) -> float:
    before, after = set(range(peak, peak + WINDOW)), set(range(now, now + WINDOW))
    return math.sqrt(math.fsum(errors[i] ** 2 for i in before ^ after)) / WINDOW


def step_errors(rows: _Rows) -> list[float] | None:
    """Standard error of each row's objective/scores, scores_std / sqrt(n); None when a row lacks what this needs.

    n = prompts of the step - completions/skipped. Every step takes as many prompts, hence episode / (step + 1) of them.
    """
    errors = []
    for row in rows:
        deviation, episode = row.get("objective/scores_std"), row.get("episode")
        scored = (episode or 0) / (row["step"] + 1) - (row.get("completions/skipped") or 0)
        if deviation is None or scored <= 0:
            return None
        errors.append(deviation / math.sqrt(scored))
    return errors


def headline(run: Run) -> Headline:
    """The figures of a run by the definitions of docs/metrics.md."""
    errors = step_errors([row for row in run.rows if row.get("objective/scores") is not None])
    rewards, kl, entropy = (_series(run.rows, f"objective/{name}")[1] for name in ("scores", "kl", "entropy"))
    averages = moving_average(rewards)
    falls = [peak - now for peak, now in zip(itertools.accumulate(averages, max), averages, strict=True)]
    return Headline(
        steps=run.rows[-1]["step"] + 1,
        reward=math.fsum(rewards[-WINDOW:]) / min(WINDOW, len(rewards)) if rewards else None,
        kl_end=kl[-1] if kl else None,
        kl_max=max(kl, default=None),
        entropy=entropy[-1] if entropy else None,
        crashes=tuple(reward_crashes(rewards, errors)),
        errors_known=errors is not None,
        largest_fall=max(falls, default=None),
    )


def write_report(run_dir: str | Path) -> Path:
    """Write `report.html` into the run folder, whole or not at all, and return its path. Raises as `read_run` does."""
    run = read_run(run_dir)
    head = headline(run)
    folder = jinja2.FileSystemLoader(Path(__file__).parent / "assets")
    environment = jinja2.Environment(loader=folder, autoescape=True, undefined=jinja2.StrictUndefined)
    environment.filters["shown"] = _shown
    environment.filters["number"] = lambda value, form=".3f": "-" if value is None else format(float(value), form)
    page = environment.get_template("report.html.j2").render(
        run=run,
        head=head,
        window=WINDOW,
        evaluation=telemetry.evaluation_rows(run.evaluation) if run.evaluation else [],
        samples=(run.evaluation or {}).get("samples", [])[:SAMPLES],
        completions=run.completions[:COMPLETIONS],
        plots=_plots(run, head.crashes),
        metrics=telemetry.METRICS,
    )
    aside = run.path / "report.html.tmp"
    aside.write_text(page, encoding="utf-8")
    return aside.replace(run.path / "report.html")


def _shown(value: Any, limit: int = TEXT_LIMIT) -> str:
    """Any value as text that only shows: escapes made visible, long texts cut. Jinja escapes the HTML in it."""
    return excerpt(value if isinstance(value, str) else reprlib.repr(value), limit)  # a list in YAML can be 10^9 items


def _read_config(path: Path, notes: list[str]) -> tuple[str | None, dict[str, Any]]:
    if not path.is_file():
        notes.append("config.yaml is missing: the preset and the number of steps are unknown.")
        return None, {}
    try:
        text = path.read_text(encoding="utf-8")
        config = yaml.safe_load(text)
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        raise ValueError(f"{path}:{mark.line + 1 if mark else 1}: not YAML ({error})") from error
    if not isinstance(config, dict):
        raise ValueError(f"{path}:1: a configuration is a mapping of settings, found {type(config).__name__}")
    return text, config


def _read_evaluation(path: Path, notes: list[str]) -> dict[str, Any] | None:
    if not path.is_file():
        notes.append("evaluation.json is missing: nothing to compare before and after, and no samples.")
        return None
    try:
        evaluation = json.loads(path.read_bytes(), parse_float=telemetry.finite, parse_constant=telemetry.finite)
        if not isinstance(evaluation, dict):
            raise TypeError(f"expected an object, found {type(evaluation).__name__}")
        telemetry.evaluation_rows(evaluation)
        if not all(isinstance(sample, dict) for sample in evaluation.get("samples", [])):
            raise TypeError("`samples` must be a list of objects")
    except (ValueError, TypeError, RecursionError) as error:
        raise ValueError(f"{path}:{getattr(error, 'lineno', 1)}: {error}") from error
    if not evaluation.get("after"):
        notes.append("evaluation.json has no `after`: the run stopped before its last evaluation.")
    return evaluation


def _read_completions(folder: Path, notes: list[str]) -> tuple[int | None, tuple[dict[str, Any], ...]]:
    files = sorted(folder.glob("step-[0-9]*.parquet"), key=lambda file: int(file.stem.removeprefix("step-")))
    if not files:
        notes.append("completions/ holds no file: no completions to show.")
        return None, ()
    try:
        rows = pq.read_table(files[-1], columns=["prompt", "completion", "score", "length", "kl"]).to_pylist()
    except (OSError, ValueError) as error:  # pyarrow's own errors are ValueErrors
        raise ValueError(f"{files[-1]}: not a file of completions ({error}); remove it") from error
    return int(files[-1].stem.removeprefix("step-")), tuple(rows)


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
        "Mean log-ratio (k1); the colours behind are the phases.",
        ("nats per token",),
        (
            _Line("objective/kl", "each step", QUIET),
            _Line("safe/kl_short", "fast filter", ACCENT),
            _Line("safe/threshold", "threshold", DANGER, "--"),
        ),
    ),
    _Plot(
        "Entropy",
        "Mean entropy of the sampling policy; below the floor the gate tightens.",
        ("nats per token",),
        (_Line("objective/entropy", "entropy", ACCENT), _Line("safe/entropy_floor", "floor", DANGER, "--")),
    ),
    _Plot(
        "Gate and KL coefficient",
        "Entropy's factor on the penalty, and the KL coefficient chosen.",
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


def _plots(run: Run, crashes: Sequence[RewardCrash]) -> list[dict[str, Any]]:
    """For the template: title, caption, image (None when nothing is recorded), missing metrics, phase -> colour."""
    plots = []
    for plot in _PLOTS:
        data = {line: _series(run.rows, line.metric) for line in plot.lines}
        missing = [line.metric for line, (steps, _) in data.items() if not steps]
        image = None if len(missing) == len(plot.lines) else _draw(plot, data, run.rows, crashes)
        phases = {phase: colour for phase, colour, *_ in _phases(run.rows)} if plot.title.startswith("KL") else {}
        plots.append({**plot._asdict(), "image": image, "missing": missing, "phases": phases})
    return plots


def _series(rows: _Rows, metric: str) -> _Series:
    pairs = [(row["step"], row[metric]) for row in rows if row.get(metric) is not None]
    return [step for step, _ in pairs], [value for _, value in pairs]


def _phases(rows: _Rows) -> list[tuple[str, str, int, int]]:
    """(phase, its colour, first step, last step) of each unbroken span."""
    colours, cycle, spans = {}, itertools.cycle(PHASE_COLOURS), []
    for phase, group in itertools.groupby(rows, key=lambda row: row.get("safe/phase")):
        steps = [row["step"] for row in group]
        if phase is not None:
            colours[phase] = colours.get(phase) or next(cycle)
            spans.append((phase, colours[phase], steps[0], steps[-1]))
    return spans


def _thin(steps: list[int], values: list[float]) -> _Series:
    """The smallest and the largest value of each bin, in order: spikes stay, the file stays small."""
    if len(steps) <= POINTS:
        return steps, values
    size = math.ceil(2 * len(steps) / POINTS)
    bins = (range(start, min(start + size, len(steps))) for start in range(0, len(steps), size))
    kept = sorted({pick(each, key=values.__getitem__) for each in bins for pick in (min, max)})
    return [steps[i] for i in kept], [values[i] for i in kept]


def _draw(plot: _Plot, data: dict[_Line, _Series], rows: _Rows, crashes: Sequence[RewardCrash]) -> str:
    """One figure as the text of a data: address. Only this module's own labels are drawn, never text of the run."""
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(6.2, 2.9), layout="constrained")  # inches; two beside each other fill 1180 px
        axes = figure.subplots(len(plot.labels), sharex=True, squeeze=False)[:, 0]
        for line, (steps, values) in data.items():
            marker = "o" if len(steps) <= WINDOW else ""  # few points must not look like a measured curve
            x, y = _thin(steps, values)
            axes[line.panel].plot(x, y, line.style, color=line.colour, label=line.label, marker=marker, ms=4, lw=1.3)
        for axis, label in zip(axes, plot.labels, strict=True):
            _decorate(axis, plot, label, rows, crashes)
        axes[-1].set_xlabel("step")
        buffer = io.BytesIO()
        FigureCanvasSVG(figure).print_svg(buffer, metadata={"Date": None})
    return "data:image/svg+xml;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


def _decorate(axis: Axes, plot: _Plot, label: str, rows: _Rows, crashes: Sequence[RewardCrash]) -> None:
    if label == "reward":
        steps, rewards = _series(rows, "objective/scores")
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
