"""Which column of a foreign log is which metric: mapping files, and rows made with them.

step: iteration                                     # metric: column
objective/scores: reward
objective/kl: {column: kl_sum, per: answer_length}  # a sum over the answer, divided by another column
objective/entropy: {column: entropy_bits, scale: 0.693147}
total_s: seconds
seed: 3
max_steps: 500
settings: {framework: OpenRLHF, optim.learning_rate: 1e-6}
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from stable_rlhf.config.files import read_settings
from stable_rlhf.errors import ConfigError, NoRunError, RunError
from stable_rlhf.evidence.foreign_rows import Table, number, step_number
from stable_rlhf.evidence.outcome import CURVES, flat
from stable_rlhf.runs import METRICS, TEXT_METRICS, TIMINGS
from stable_rlhf.text import quoted

CONSTANTS = ("settings", "seed", "max_steps")
"""Keys of a mapping file that are no metric."""

FIELDS = ("column", "scale", "per")

READ = (
    *("step", "episode", *CURVES, "objective/scores_std", "objective/kl_exact", "completions/skipped"),
    *("policy/skipped_steps", "total_s", "tokens_per_s", "memory_gb"),
)
"""Names of ours that are understood without a mapping: what an outcome and the guard's verdicts are made from. Another
column may hold anything."""

_OWN_REWARD = re.compile(r"rewards/[^/]+/mean|user/.+")

_OTHERS = {
    **dict.fromkeys(("reward", "rewards", "mean_reward", "reward_mean", "score", "return"), "objective/scores"),
    **dict.fromkeys(("reward_std", "rewards_std"), "objective/scores_std"),
    **dict.fromkeys(("length", "completion_length", "response_length"), "completions/mean_length"),
    **dict.fromkeys(("step_time", "seconds"), "total_s"),
    **dict.fromkeys(("global_step", "iteration", "epoch"), "step"),
}
"""Names of TRL and other trainers that are no part of ours -> the metric that is meant."""

SHOWN = 20
"""Columns that an error lists."""


@dataclass(frozen=True)
class Column:
    """Where a metric stands: value = scale * column / per."""

    name: str
    scale: float = 1.0
    per: str | None = None


@dataclass(frozen=True, kw_only=True)
class MetricMapping:
    """Metric of ours (or timing) -> column, and what the log itself does not hold."""

    columns: Mapping[str, Column]
    settings: Mapping[str, Any] = field(default_factory=dict)
    seed: int | None = None
    max_steps: int | None = None


def read_mapping(path: Path) -> MetricMapping:
    """A mapping file. Raises ConfigError that names the key, its value and the remedy."""
    given = read_settings(path)
    columns = {str(key): _column(path, str(key), value) for key, value in given.items() if key not in CONSTANTS}
    if "step" not in columns:
        raise ConfigError(f"{path}: no column of the steps is named; add `step: COLUMN`")
    if len(columns) < 2:
        raise ConfigError(f"{path}: no metric is named; add one, such as `objective/scores: COLUMN`")
    settings = given.get("settings") or {}
    if not isinstance(settings, Mapping):
        raise ConfigError(
            f"{path}: settings is {quoted(settings)}; give a mapping, such as `settings: {{framework: NAME}}`"
        )
    for name, least in (("seed", 0), ("max_steps", 1)):
        value = given.get(name)
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < least):
            raise ConfigError(f"{path}: {name} is {quoted(value)}; give an integer from {least}, or leave it out")
    return MetricMapping(
        columns=columns,
        settings={str(name): value for name, value in flat(settings).items()},
        seed=given.get("seed"),
        max_steps=given.get("max_steps"),
    )


def apply(
    columns: Mapping[str, Column], table: Table, *, finite: bool = True
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """(rows of metrics, rows of timings), with steps from 0: a log that begins above 0 counts finished steps.

    Rows without any of the metrics (such as those of evaluations) are left out; NoRunError where none is left. Raises
    RunError with file and line for a value that is not a finite number (finite=False: that is not a number), a step
    that is missing, repeats or falls, and for a column that is not there.
    """
    for metric, column in columns.items():
        for name in (column.name, *([column.per] if column.per else [])):
            if name not in table.columns:
                close = difflib.get_close_matches(name, table.columns, n=1)
                remedy = f"did you mean {quoted(close[0])}?" if close else _listed(table.columns)
                raise RunError(f"{table.path}: there is no column {quoted(name)} for {metric}: {remedy}")
    rest = [(metric, column) for metric, column in columns.items() if metric != "step"]
    rows: list[dict[str, Any]] = []
    timings: list[dict[str, Any]] = []
    for place, record in enumerate(table.rows):
        values = {
            metric: value
            for metric, column in rest
            if (value := _value(table, place, record, column, finite)) is not None
        }
        if not values:
            continue
        step = _step(table, place, record, columns["step"].name, rows[-1]["step"] if rows else -1)
        rows.append({"step": step, **{name: value for name, value in values.items() if name not in TIMINGS}})
        if times := {name: value for name, value in values.items() if name in TIMINGS}:
            timings.append({"step": step, **times})
    if not rows:
        raise NoRunError(f"{table.path}: no row has a value of {', '.join(metric for metric, _ in rest[:SHOWN])}")
    if rows[0]["step"] > 0:
        for row in (*rows, *timings):
            row["step"] -= 1
    return rows, timings


def understood(columns: Iterable[str], names: Mapping[str, tuple[str, ...]]) -> dict[str, Column]:
    """Metric -> column, by the names that a metric may have, the first that is there; with `train/` before it too, as
    Transformers reports to trackers."""
    there = {name.removeprefix("train/"): name for name in columns}
    return {metric: Column(there[found]) for metric, known in names.items() if (found := _first(known, there))}


def own_columns(columns: Iterable[str]) -> dict[str, Column]:
    """Columns with our own names."""
    names = {name: (name,) for name in READ}
    return understood(columns, {**names, "step": ("step", "global_step")})


def not_understood(table: Table) -> RunError:
    """The error of a log whose columns need a mapping, with one to write."""
    guess = {
        "step": next((name for name in table.columns if re.search(r"step|iter|epoch|update", name, re.I)), "COLUMN"),
        "objective/scores": next((name for name in table.columns if re.search(r"rew|score", name, re.I)), "COLUMN"),
    }
    example = ", ".join(f"{metric}: {quoted(name)}" for metric, name in guess.items())
    return RunError(
        f"{table.path}: its columns are neither ours nor TRL's: {_listed(table.columns)}. Name them in a YAML file "
        f"and give it as --mapping FILE, such as {{{example}}}"
    )


def _column(path: Path, metric: str, given: Any) -> Column:
    known = [name for name in (*METRICS, *TIMINGS) if name not in TEXT_METRICS and "<" not in name]
    if metric not in known and not _OWN_REWARD.fullmatch(metric):
        meant = _meant(metric, (*known, *CONSTANTS))
        hint = "docs/metrics.md has the names" if meant is None else f"did you mean {meant}?"
        raise ConfigError(f"{path}: {metric} is not a metric (a mapping is `metric: column`); {hint}")
    if isinstance(given, str):
        return Column(given)
    fields = given if isinstance(given, Mapping) else {}
    unknown = sorted(str(name) for name in fields if name not in FIELDS)
    texts = all(isinstance(fields.get(name, ""), str) for name in ("column", "per"))
    if not fields.get("column") or unknown or not texts:
        raise ConfigError(
            f"{path}: {metric} is {quoted(given)}; give a column, or {{column: NAME, scale: NUMBER, per: COLUMN}}"
        )
    scale = fields.get("scale", 1.0)
    if isinstance(scale, bool) or not isinstance(scale, int | float) or not math.isfinite(scale) or not scale:
        raise ConfigError(f"{path}: scale of {metric} is {quoted(scale)}; give a finite number other than 0")
    if metric == "step" and len(fields) > 1:
        raise ConfigError(f"{path}: step is {quoted(given)}; steps are not scaled: give their column")
    return Column(fields["column"], float(scale), fields.get("per"))


def _meant(name: str, known: Iterable[str]) -> str | None:
    """The name of ours that was meant: that of another trainer's name, one that ends like it, or the nearest."""
    names = list(known)
    short = name.removeprefix("train/")
    ends = [each for each in names if each.rpartition("/")[2] == short]
    close = difflib.get_close_matches(name, names, n=1)
    return _OTHERS.get(short) or next(iter(ends or close), None)


def _step(table: Table, place: int, record: Mapping[str, Any], name: str, last: int) -> int:
    try:
        step = step_number(record.get(name))
    except ValueError as error:
        raise RunError(f"{table.where(place, name)}: {name} is {error}") from None
    if step <= last:
        remedy = "steps must increase: remove the rows of the earlier try"
        raise RunError(f"{table.where(place, name)}: step {step} follows step {last}; {remedy}")
    return step


def _value(table: Table, place: int, record: Mapping[str, Any], column: Column, finite: bool) -> float | None:
    """None for an empty cell, and where the column that it is divided by is empty or 0."""
    name = column.name
    try:
        value = number(record.get(name), finite=finite)
        if value is None:
            return None
        if column.per is not None:
            name = column.per
            by = number(record.get(name), finite=finite)
            if not by:
                return None
            name, value = f"{column.name} / {column.per}", value / by
        return number(value * column.scale, finite=finite)  # both may overflow
    except ValueError as error:
        raise RunError(f"{table.where(place, column.name)}: {name} is {error}") from None


def _first(names: tuple[str, ...], there: Mapping[str, str]) -> str | None:
    return next((name for name in names if name in there), None)


def _listed(columns: Iterable[str]) -> str:
    names = list(columns)
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return f"the columns are {', '.join(map(quoted, names[:SHOWN]))}{more}"
