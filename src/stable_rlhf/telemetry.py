"""What a run says about itself: metrics.jsonl, timings.jsonl, completions/*.parquet and the console.

Files are strict JSON, one object a line. metrics.jsonl holds no clock reading, so that a resumed run writes the same
bytes as one that was never stopped; times go to timings.jsonl. Text from models and data sets is hostile wherever it is
shown: on a terminal it goes through `printable`, and never through rich's markup.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import rich.progress
from rich.console import Console
from rich.table import Table
from rich.text import Text

from stable_rlhf.control import Decision
from stable_rlhf.display import printable, valid_unicode, visible
from stable_rlhf.metrics import METRICS, TEXT_METRICS, TIMINGS

# Figures of evaluation.json that get a row of their own: label, and the format in which people read it.
EVALUATION: dict[str, tuple[str, str]] = {
    "reward": ("reward", ".4f"),
    "kl": ("KL, nats per token", ".4f"),
    "entropy": ("entropy, nats per token", ".3f"),
    "distinct_2": ("distinct-2", ".3f"),
    "length": ("length, tokens", ".1f"),
}
_REWARD_NAME = re.compile(r"rewards/[^/]+/mean")
_COMPLETIONS = pa.schema(
    [("prompt", "string"), ("completion", "string"), ("score", "float64"), ("length", "int32"), ("kl", "float64")]
)
PLAIN_LINES = 20  # at most, per run: a log file stays readable


def read_rows(path: Path) -> tuple[list[dict[str, Any]], bool]:
    """Rows of a JSON-lines file, and whether its last line is torn (has no newline), which is what a kill leaves.

    A torn line is left out unless it is whole but for the newline. Any other line that is not a JSON object of finite
    numbers, nulls and the texts of TEXT_METRICS, its `step` above the last one, raises ValueError with file and line.
    """
    lines = path.read_bytes().split(b"\n")
    torn = bool(lines[-1])
    rows: list[dict[str, Any]] = []
    for number, line in enumerate(lines if torn else lines[:-1], start=1):
        try:
            row = json.loads(line, parse_float=finite, parse_constant=finite)
        except (ValueError, RecursionError) as error:  # UnicodeDecodeError is a ValueError
            if torn and number == len(lines):
                break
            raise ValueError(f"{path}:{number}: not a JSON object ({error}); repair or remove this line") from error
        step = row.get("step") if isinstance(row, dict) else None
        if not isinstance(step, int) or isinstance(step, bool) or step < 0:
            raise ValueError(f"{path}:{number}: a row needs an integer `step` from 0, found {step!r}; repair this line")
        if rows and step <= rows[-1]["step"]:
            raise ValueError(f"{path}:{number}: step {step} follows step {rows[-1]['step']}; steps must increase")
        for name, value in row.items():
            _check_value(f"{path}:{number}: {name}", value, text=name in TEXT_METRICS)
        rows.append(row)
    return rows, torn


class MetricsWriter:
    """Appends one row a step to metrics.jsonl and timings.jsonl, flushed at once.

    On resume call `truncate(step)` first: rows that the run is about to repeat must not be there twice.
    """

    def __init__(self, run_dir: str | Path) -> None:
        self.run_dir = Path(run_dir)
        self.run_dir.mkdir(parents=True, exist_ok=True)
        self._paths = (self.run_dir / "metrics.jsonl", self.run_dir / "timings.jsonl")
        files = [read_rows(path) for path in self._paths if path.exists()]
        self._torn = any(torn for _, torn in files)
        self._last_step = max((rows[-1]["step"] for rows, _ in files if rows), default=-1)

    def write(self, row: Mapping[str, Any], timing: Mapping[str, Any]) -> None:
        """Append `row` (names of METRICS, `step` required) and `timing` (names of TIMINGS; its step is the row's).

        Numbers are Python's int or float, finite, or None for 'has no value'; safe/phase and safe/reason are text.
        Raises ValueError naming the metric, before anything is written.
        """
        if self._torn:
            raise ValueError(f"{self.run_dir} holds a torn line, the run was stopped: call truncate(step) to resume it")
        for name, value in row.items():
            if name not in METRICS and not _REWARD_NAME.fullmatch(name):
                raise ValueError(
                    f"unknown metric {name!r}: mend it, or add it to telemetry.METRICS and docs/metrics.md"
                )
            _check_value(name, value, text=name in TEXT_METRICS)
        row = {name: valid_unicode(value) if isinstance(value, str) else value for name, value in row.items()}
        step = row.get("step")
        if not isinstance(step, int) or step < 0:
            raise ValueError(f"step is {step!r}: a row needs an integer step from 0")
        if step <= self._last_step:
            raise ValueError(f"step {step} after step {self._last_step}: call truncate({step}) before repeating a step")
        for name, value in timing.items():
            if name not in TIMINGS:
                raise ValueError(f"unknown timing {name!r}: one of {', '.join(TIMINGS)}")
            _check_value(name, value)
        if timing.get("step", step) != step:
            raise ValueError(f"timing of step {timing['step']} given with the metrics of step {step}")
        for path, data in zip(self._paths, (row, {"step": step, **timing}), strict=True):
            with path.open("a", encoding="ascii", newline="\n") as file:  # closed, hence flushed, at every row
                file.write(json.dumps(data, allow_nan=False) + "\n")
        self._last_step = step

    def check(self) -> dict[Path, list[dict[str, Any]]]:
        """The rows of the files that are there. Raises ValueError with file and line on a malformed one."""
        return {path: read_rows(path)[0] for path in self._paths if path.exists()}

    def truncate(self, step: int) -> None:
        """Drop rows and completions with step >= `step`; a torn last line goes too. Each file is replaced atomically.

        Raises ValueError with file and line on a malformed file, before either file is changed.
        """
        kept = {path: [r for r in rows if r["step"] < step] for path, rows in self.check().items()}
        for path, rows in kept.items():
            text = "".join(json.dumps(row, allow_nan=False) + "\n" for row in rows)
            replace_text(path, text)
        for path in (self.run_dir / "completions").glob("step-*.parquet"):
            if int(path.stem.removeprefix("step-")) >= step:
                path.unlink()
        self._torn = False
        self._last_step = max((rows[-1]["step"] for rows in kept.values() if rows), default=-1)


def write_completions(run_dir: str | Path, step: int, rows: Sequence[Mapping[str, Any]]) -> Path:
    """Write completions/step-000010.parquet: prompt, completion (text), score, kl (nats per token), length (tokens).

    Characters that are not valid Unicode (lone surrogates) become U+FFFD. `score` and `kl` may be None; a missing or
    additional key, or a value that is not finite, raises with the row's number. The file appears whole or not at all.
    """
    clean = []
    for number, row in enumerate(rows):
        if set(row) != set(_COMPLETIONS.names):
            raise ValueError(f"completion {number}: keys {sorted(row)}, expected {sorted(_COMPLETIONS.names)}")
        for name in ("score", "length", "kl"):
            _check_value(f"{name} of completion {number}", row[name])
        clean.append({**row, **{name: valid_unicode(row[name]) for name in ("prompt", "completion")}})
    path = Path(run_dir) / "completions" / f"step-{step:06d}.parquet"
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_file(path, partial(pq.write_table, pa.Table.from_pylist(clean, schema=_COMPLETIONS)))
    return path


class Progress:
    """A live bar on a terminal; about PLAIN_LINES plain lines where stdout is not one. Use as a context manager.

    `total` and `first_step` count rollouts (a resumed run starts its bar at `first_step`). `clock` gives seconds.
    """

    def __init__(
        self, total: int, *, first_step: int = 0, console: Console | None = None, clock: Any = time.monotonic
    ) -> None:
        if not 0 <= first_step <= total:
            raise ValueError(f"first_step is {first_step}: it must lie in 0..{total} (total)")
        self.total, self.first_step, self.clock = total, first_step, clock
        self.console = console or Console()
        self.started = clock()
        self._every = max(1, math.ceil((total - first_step) / (PLAIN_LINES - 2)))  # two more: the first and the last
        self._bar: rich.progress.Progress | None = None

    def __enter__(self) -> Progress:
        self.started = self.clock()
        # On a quiet console a bar would swallow what is written to the terminal, and show nothing itself.
        if self.console.is_terminal and not self.console.is_dumb_terminal and not self.console.quiet:
            self._bar = bar = rich.progress.Progress(
                rich.progress.TextColumn("{task.completed:.0f}/{task.total:.0f} steps", markup=False),
                rich.progress.BarColumn(bar_width=12),  # the rest fits beside it in 80 columns
                rich.progress.TextColumn("{task.description}", markup=False),
                rich.progress.TimeRemainingColumn(),
                console=self.console,
                redirect_stderr=False,  # what a person must know of stays there, and in a file that it may go to
            )
            self._task = bar.add_task("", total=self.total, completed=self.first_step)
            bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def update(self, row: Mapping[str, Any]) -> None:
        """Show the row of metrics.jsonl that has just been written; a metric that it lacks shows as a dash."""
        done, figures = row["step"] + 1, _figures(row)
        if self._bar is not None:
            self._bar.update(self._task, completed=done, description=figures)
        elif done in (self.first_step + 1, self.total) or (done - self.first_step) % self._every == 0:
            left = (self.clock() - self.started) / (done - self.first_step) * (self.total - done)
            line = f"{done}/{self.total} steps  {figures}  left {timedelta(seconds=round(left))}"
            self.console.print(Text(line), soft_wrap=True)


def evaluation_rows(evaluation: Mapping[str, Any]) -> list[tuple[str, str, str, str]]:
    """(label, before, after, change) of evaluation.json, for any table. A figure that is null or not there is a dash.

    Raises ValueError when `before` is missing or a figure is not a number. The standard error stands behind its reward
    and the number of prompts in a heading, so these have no row.
    """
    if not isinstance(evaluation.get("before"), Mapping):
        raise ValueError("evaluation.json has no `before`: evaluate the policy before training, or remove the file")
    before, after = evaluation["before"], evaluation.get("after") or {}
    rows = []
    for name, (label, form) in EVALUATION.items():
        shown, values = [], []
        for side, figures in (("before", before), ("after", after)):
            value = figures.get(name)
            _check_value(f"{name} of `{side}` in evaluation.json", value)
            error = figures.get("reward_se") if name == "reward" else None
            shown.append(_number(value, form) + ("" if error is None else f" ± {error:{form}}"))
            values.append(value)
        change = _number(None if None in values else values[1] - values[0], "+" + form)
        rows.append((label, shown[0], shown[1], change))
    return rows


def summary_table(evaluation: Mapping[str, Any]) -> Table:
    """Before and after training on the same prompts; ± is one standard error of the mean reward."""
    prompts = _number(evaluation.get("before", {}).get("prompts"), ".0f")
    table = Table(title=Text(f"Evaluation on {prompts} prompts"))
    for heading in ("", "before", "after", "change"):
        table.add_column(heading, justify="left" if not heading else "right")
    for row in evaluation_rows(evaluation):
        table.add_row(*(Text(cell) for cell in row))
    return table


def samples_table(evaluation: Mapping[str, Any], count: int = 3, limit: int = 240) -> Table:
    """The first `count` samples: prompt, completion before, completion after, each at most `limit` characters."""
    table = Table(title=Text("Samples (reward in brackets)"), show_lines=True)
    for heading in ("prompt", "before", "after"):
        table.add_column(heading, ratio=1, overflow="fold")
    for sample in evaluation.get("samples", [])[:count]:
        cells = [Text(printable(sample["prompt"], limit))]
        for side in ("before", "after"):
            text = printable(sample.get(side) or "", limit)
            cells.append(Text(f"[{_number(sample.get(f'reward_{side}'), '.3f')}] {text}"))
        table.add_row(*cells)
    return table


def print_summary(
    run_dir: str | Path, evaluation: Mapping[str, Any], resume_command: str | None, console: Console | None = None
) -> None:
    """Print both tables (none without held-out prompts), the run's folder, and the command that resumes it if any."""
    console = console or Console()
    if evaluation:
        console.print(summary_table(evaluation))
    if evaluation.get("samples"):
        console.print(samples_table(evaluation))
    lines = {"Run": str(run_dir), "Report": str(Path(run_dir) / "report.html"), "Resume": resume_command}
    for label, line in lines.items():
        if line is not None:  # soft wrap: a path or command that is copied must not contain line breaks
            console.print(Text(f"{label}: {visible(line, '⏎')}"), soft_wrap=True)


def _figures(row: Mapping[str, Any]) -> str:
    kl = _number(row.get("objective/kl"), ".3f")
    if row.get("safe/threshold") is not None:
        kl += f" / {row['safe/threshold']:.3f}"
    reward, entropy = _number(row.get("objective/scores"), ".3f"), _number(row.get("objective/entropy"), ".2f")
    return f"reward {reward}  KL {kl}  entropy {entropy}"


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _check_value(name: str, value: Any, *, text: bool = False) -> None:
    if value is None or (text and isinstance(value, str)):
        return
    if text or isinstance(value, bool) or not isinstance(value, (int, float)):
        kinds = "text" if text else "a Python int, float"
        raise ValueError(f"{name} is {value!r} ({type(value).__name__}): it must be {kinds} or None")
    if not math.isfinite(value):
        raise ValueError(f"{name} is {value}: write None if it has no value here, otherwise mend what computes it")


def finite(number: str) -> float:
    """`number` as json.loads's parse_float and parse_constant: strict JSON has no NaN or Infinity, nor 1e999."""
    if not math.isfinite(float(number)):
        raise ValueError(f"{number} is not a finite number")
    return float(number)


@contextmanager
def said_if_lost(sentence: object) -> Iterator[None]:
    """What is done inside, such as a save, comes before an error that says ``sentence``; where it fails, and another
    error ends the run instead, the sentence is told here."""
    try:
        yield
    except BaseException:
        tell(str(sentence))
        raise


def tell(sentence: str) -> None:
    """One line on stderr whatever ``log.progress`` is: what a person must know of."""
    print(visible(sentence, newline=" "), file=sys.stderr, flush=True)


def decision_metrics(decision: Decision) -> dict[str, Any]:
    """What a controller decided, as the metrics ``safe/...`` that it has among METRICS."""
    fields = dataclasses.asdict(decision)
    return {f"safe/{name}": value for name, value in fields.items() if f"safe/{name}" in METRICS}


def replace_text(path: Path, text: str) -> None:
    """Writes a small file whole or not at all: a kill or a full disk leaves what it was before."""
    replace_file(path, partial(Path.write_text, data=text, encoding="utf-8", newline="\n"))


def replace_file(path: Path, write: Callable[[Path], object]) -> None:
    """Write beside `path`, force to disk, then rename: a reader or a kill sees the old file or the new one."""
    aside = path.with_name(path.name + ".tmp")
    write(aside)
    with aside.open("rb") as file:
        os.fsync(file.fileno())
    os.replace(aside, path)
