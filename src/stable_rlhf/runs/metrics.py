"""The records of a run: metrics.jsonl, timings.jsonl and completions/*.parquet.

Files are strict JSON, one object a line. metrics.jsonl holds no clock reading, so that a resumed run writes the same
bytes as one that was never stopped; times go to timings.jsonl.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from stable_rlhf.control import Decision
from stable_rlhf.errors import RunError
from stable_rlhf.files import finite, replace_file, replace_text
from stable_rlhf.runs.names import METRICS, TEXT_METRICS, TIMINGS
from stable_rlhf.text import quoted, valid_unicode

_REWARD_NAME = re.compile(r"rewards/[^/]+/mean|user/.+")

_COMPLETIONS = pa.schema(
    [("prompt", "string"), ("completion", "string"), ("score", "float64"), ("length", "int32"), ("kl", "float64")]
)

LARGEST_FIGURE = 1e100
"""Squares and sums of larger ones leave the numbers of a float, and none is a reward or a KL."""

STEP_LIMIT = 2**53
"""Steps from here on are not exact as a float, and no run has so many."""

_DECODER = json.JSONDecoder(parse_constant=finite)
"""One for all lines. A number beyond float64 becomes infinite, which is looked for afterwards."""


def read_rows(path: Path) -> tuple[list[dict[str, Any]], bool]:
    """Rows of a JSON-lines file, and whether its last line is torn: without a newline, as a kill leaves it.

    A torn line is left out unless only its newline is missing. Any other line that is not a JSON object of finite
    numbers, nulls and the texts of TEXT_METRICS, its `step` above the last one, raises ValueError with file and line.
    """
    lines = path.read_bytes().split(b"\n")
    torn = bool(lines[-1])
    rows: list[dict[str, Any]] = []
    for number, line in enumerate(lines if torn else lines[:-1], start=1):
        try:
            row = _DECODER.decode(line.decode("utf-8"))
        except (ValueError, RecursionError) as error:  # UnicodeDecodeError is a ValueError
            if torn and number == len(lines):
                break
            raise RunError(f"{path}:{number}: not a JSON object ({error}); repair or remove this line") from error
        step = row.get("step") if isinstance(row, dict) else None
        if not isinstance(step, int) or isinstance(step, bool) or not 0 <= step < STEP_LIMIT:
            found = quoted(step)
            raise RunError(f"{path}:{number}: a row needs an integer `step` from 0, found {found}; repair this line")
        if rows and step <= rows[-1]["step"]:
            raise RunError(f"{path}:{number}: step {step} follows step {rows[-1]['step']}; steps must increase")
        for name, value in row.items():
            text, kind = name in TEXT_METRICS, type(value)
            if kind is float and -LARGEST_FIGURE <= value <= LARGEST_FIGURE and not text:  # comparisons read millions
                continue
            if kind is int and -STEP_LIMIT < value < STEP_LIMIT and not text:
                continue
            try:
                check_value(f"{path}:{number}: {name}", value, text=text)
                if not name.startswith("user/"):
                    check_size(f"{path}:{number}: {name}", value)
            except ValueError as error:
                raise RunError(str(error)) from error
        rows.append(row)
    return rows, torn


class MetricsWriter:
    """Appends one row per step to metrics.jsonl and timings.jsonl, and flushes it at once.

    On resume call `truncate(step)` first, or rows that the run repeats would be there twice.
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
            if not is_metric(name):
                raise ValueError(
                    f"unknown metric {name!r}: correct it, or add it to METRICS in runs/names.py and to docs/metrics.md"
                )
            check_value(name, value, text=name in TEXT_METRICS)
        row = {name: valid_unicode(value) if isinstance(value, str) else value for name, value in row.items()}
        step = row.get("step")
        if not isinstance(step, int) or step < 0:
            raise ValueError(f"step is {step!r}: a row needs an integer step from 0")
        if step <= self._last_step:
            raise ValueError(f"step {step} after step {self._last_step}: call truncate({step}) before repeating a step")
        for name, value in timing.items():
            if name not in TIMINGS:
                raise ValueError(f"unknown timing {name!r}: choose one of {', '.join(TIMINGS)}")
            check_value(name, value)
        if timing.get("step", step) != step:
            raise ValueError(f"timing of step {timing['step']} given with the metrics of step {step}")
        for path, data in zip(self._paths, (row, {"step": step, **timing}), strict=True):
            with path.open("a", encoding="ascii", newline="\n") as file:  # closed, hence flushed, at every row
                file.write(json.dumps(data, allow_nan=False) + "\n")
        self._last_step = step

    def check(self) -> dict[Path, list[dict[str, Any]]]:
        """The rows of the files that exist. Raises ValueError with file and line for a malformed one."""
        return {path: read_rows(path)[0] for path in self._paths if path.exists()}

    def truncate(self, step: int) -> None:
        """Removes rows and completions with step >= `step`, and a torn last line. Each file is replaced atomically.

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

    Further keys are columns of numbers or texts that reward functions recorded. Characters that are not valid Unicode
    (lone surrogates) become U+FFFD. `score` and `kl` may be None; a missing key, or a value that is not finite, raises
    with the row's number. The file appears whole or not at all.
    """
    clean = []
    for number, row in enumerate(rows):
        if not set(row) >= set(_COMPLETIONS.names) or row.keys() != rows[0].keys():
            raise ValueError(f"completion {number}: keys {sorted(row)}, expected {sorted(_COMPLETIONS.names)}")
        for name in ("score", "length", "kl"):
            check_value(f"{name} of completion {number}", row[name])
        clean.append({name: valid_unicode(value) if isinstance(value, str) else value for name, value in row.items()})
    path = Path(run_dir) / "completions" / f"step-{step:06d}.parquet"
    path.parent.mkdir(parents=True, exist_ok=True)
    schema = _COMPLETIONS
    for name in sorted(set(rows[0] if rows else ()) - set(_COMPLETIONS.names)):
        text = any(isinstance(row[name], str) for row in rows)
        schema = schema.append(pa.field(valid_unicode(name), "string" if text else "float64"))
    replace_file(path, partial(pq.write_table, pa.Table.from_pylist(clean, schema=schema)))
    return path


def is_metric(name: str) -> bool:
    """Whether a row of metrics.jsonl may have a figure of this name."""
    return name in METRICS or _REWARD_NAME.fullmatch(name) is not None


def decision_metrics(decision: Decision) -> dict[str, Any]:
    """A controller's decision as metrics ``safe/...``: those of its fields that METRICS lists."""
    fields = dataclasses.asdict(decision)
    return {f"safe/{name}": value for name, value in fields.items() if f"safe/{name}" in METRICS}


def check_value(name: str, value: Any, *, text: bool = False) -> None:
    if value is None or (text and isinstance(value, str)):
        return
    if text or isinstance(value, bool) or not isinstance(value, (int, float)):
        kinds = "text" if text else "a Python int, float"
        raise ValueError(f"{name} is {value!r} ({type(value).__name__}): it must be {kinds} or None")
    try:
        known = math.isfinite(value)
    except OverflowError:  # of a whole number beyond float64
        known = False
    if not known:
        remedy = "write None if it has no value here, otherwise fix its computation"
        raise ValueError(f"{name} is {quoted(value)}: {remedy}")


def check_size(name: str, value: float | str | None) -> None:
    """Raises ValueError for a number of which no sum or square can be taken."""
    if isinstance(value, (int, float)) and abs(value) > LARGEST_FIGURE:
        limit = f"a figure of a run is at most {LARGEST_FIGURE:g} in size"
        raise ValueError(f"{name} is {quoted(value)}: {limit}: repair it")
