"""Rows of a foreign log, a CSV or JSON-lines file, as they stand there, with the place of each."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stable_rlhf.errors import NoRunError, RunError
from stable_rlhf.evidence.outcome import flat
from stable_rlhf.runs import LARGEST_FIGURE, STEP_LIMIT
from stable_rlhf.text import counted, quoted

CSV = (".csv", ".tsv")
JSON_LINES = (".jsonl", ".ndjson")
DELIMITERS = ",;\t|"


@dataclass(frozen=True, kw_only=True)
class Table:
    """Rows by column name. `where(row, column)` names file and line of a value, for errors."""

    path: Path
    columns: Sequence[str]
    rows: Sequence[Mapping[str, Any]]
    where: Callable[[int, str], str]
    notes: tuple[str, ...] = ()


def read_table(path: Path, *, growing: bool = False) -> Table:
    """A CSV or JSON-lines file. A torn last line is left out and noted; nested objects have columns `outer.inner`.

    growing: whether somebody is writing the file. A last line without its newline is then left out, even where it could
    be read: `0.25` may be the beginning of `0.2561`.
    Raises RunError with file and line for what is neither, NoRunError for a file without a row.
    """
    try:
        content = path.read_bytes()
        text = (content[: content.rfind(b"\n") + 1] if growing else content).decode("utf-8-sig")
    except OSError as error:
        raise RunError(f"{path}: {error.strerror}; check the path") from error
    except UnicodeDecodeError as error:
        raise RunError(f"{path}: is not UTF-8 text; save it as UTF-8") from error
    table = _read_csv(path, text) if path.suffix.lower() in CSV else _read_json_lines(path, text)
    if not table.rows:
        raise NoRunError(f"{path}:1: no complete row yet; give a log with at least one step")
    return table


def number(value: Any, *, finite: bool = True) -> float | None:
    """A cell as a number; None for an empty one. Raises ValueError, which says what it is, for text, NaN, infinity, and
    for more than LARGEST_FIGURE.

    finite: if not, NaN and infinity are numbers too, and what is more than LARGEST_FIGURE is infinite.
    """
    if value is None or (isinstance(value, str) and not value.strip()):
        return None
    try:
        found = math.nan if isinstance(value, bool) else float(value)
    except (ValueError, TypeError, OverflowError):
        raise ValueError(f"{quoted(value)}, which is not a number; correct the value") from None
    if not abs(found) <= LARGEST_FIGURE:
        if not finite and not isinstance(value, bool):
            return found if math.isnan(found) else math.copysign(math.inf, found)
        what = "a figure of a run" if math.isfinite(found) else "a finite number"
        raise ValueError(f"{quoted(value)}, which is not {what}; correct it, or leave it empty if the step has none")
    return found


def step_number(value: Any) -> int:
    """A cell as a step: an integer from 0. Raises ValueError, which says what it is, for anything else."""
    found = number(value)
    if found is None:
        raise ValueError("empty; a row with figures needs its step")
    if found != int(found) or not 0 <= found < STEP_LIMIT:
        raise ValueError(f"{quoted(value)}; a step is an integer from 0: correct it")
    return int(found)


def _read_csv(path: Path, text: str) -> Table:
    head = text[: text.find("\n") + 1] or text
    try:
        delimiter = max(DELIMITERS, key=lambda mark: len(next(csv.reader([head], delimiter=mark), [])))
        reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter)
        columns = [name.strip() for name in next(reader, [])]
        twice = [name for number, name in enumerate(columns) if name and name in columns[:number]]
        if twice:
            raise RunError(f"{path}:1: the column {quoted(twice[0])} is there twice; rename one")
        rows: list[dict[str, str]] = []
        lines: list[int] = []
        short = None
        for cells in reader:
            if short is not None:
                raise RunError(short)
            if not cells:
                continue
            if len(cells) != len(columns):
                short = f"{path}:{reader.line_num}: {counted(len(cells), 'cell')}, but {len(columns)} columns; "
                short += "repair or remove this line"
                continue
            rows.append(dict(zip(columns, cells, strict=True)))
            lines.append(reader.line_num)
    except csv.Error as error:
        raise RunError(f"{path}: is not CSV ({error}); save it as CSV again") from error
    torn = short is not None and not text.endswith("\n")
    if short is not None and not torn:
        raise RunError(short)
    return Table(
        path=path,
        columns=columns,
        rows=rows,
        where=lambda row, column: f"{path}:{lines[row]}",
        notes=_torn(path) if torn else (),
    )


def _read_json_lines(path: Path, text: str) -> Table:
    given = text.split("\n")
    torn = bool(given[-1].strip())
    rows: list[dict[str, Any]] = []
    lines: list[int] = []
    notes: tuple[str, ...] = ()
    for place, line in enumerate(given, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)  # NaN, which JSON does not have, is refused where the value is used
            row = flat(row) if isinstance(row, dict) else row
        except (ValueError, RecursionError) as error:
            if torn and place == len(given):
                notes = _torn(path)
                break
            raise RunError(f"{path}:{place}: not a JSON object ({error}); repair or remove this line") from error
        if not isinstance(row, dict):
            raise RunError(f"{path}:{place}: not a JSON object but {quoted(row)}; repair or remove this line")
        rows.append(row)
        lines.append(place)
    columns: dict[str, None] = {}
    for row in rows:
        columns |= dict.fromkeys(row)
    return Table(
        path=path, columns=list(columns), rows=rows, where=lambda row, column: f"{path}:{lines[row]}", notes=notes
    )


def _torn(path: Path) -> tuple[str, ...]:
    return (f"{path.name} ends in an incomplete line, which is left out.",)
