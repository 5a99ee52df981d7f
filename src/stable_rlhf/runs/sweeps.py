"""A sweep on disk: the names of its files, and outcomes.jsonl, which has a line for each end of a cell."""

from __future__ import annotations

import datetime
import json
import os
import signal
from pathlib import Path
from typing import Any

import yaml

from stable_rlhf.errors import Exit, RunError
from stable_rlhf.files import parsed, replace_text
from stable_rlhf.text import clipped

ASKED = "sweep.yaml"
"""What was asked for: version, base (settings), grid (setting -> values) and seeds."""

CELLS = "cells"
"""Folder of the cells' run folders, which have the cells' names."""

OUTCOMES = "outcomes.jsonl"
LOGS = "logs"
"""Folder of NAME.txt: what a cell's process wrote to stdout and stderr."""

SETTINGS = "settings"
"""Folder of NAME.yaml: every setting of a cell, as `train` is given it."""

STOPPED = {
    Exit.INTERRUPTED,
    Exit.TERMINATED,
    *(-n for n in (signal.SIGHUP, signal.SIGINT, signal.SIGKILL, signal.SIGTERM)),
}
"""Exit codes of a cell that somebody stopped: it goes on with the next sweep. Any other except 0 is a result."""

REASON = 1000
"""Characters of a reason that are kept, as many as a command shows of an error."""


def read_outcomes(sweep: Path) -> list[dict[str, Any]]:
    """The ends of cells, oldest first: ``cell``, ``exit_code``, ``reason``, ``seconds``, ``ended``. The last line of a
    cell holds.

    A last line without its newline, as a kill leaves it, is left out. Raises RunError with file and line for a line
    that is not an outcome.
    """
    path = sweep / OUTCOMES
    lines = path.read_bytes().split(b"\n")[:-1] if path.exists() else []
    found = []
    for number, line in enumerate(lines, start=1):
        try:
            outcome = parsed(line)
            if not isinstance(outcome, dict) or not _is_outcome(outcome):
                raise ValueError("expected an object with cell, exit_code, reason, seconds, ended")
        except ValueError as error:
            raise RunError(f"{path}:{number}: not an outcome ({error}); repair or remove this line") from error
        found.append(outcome)
    return found


def record_outcome(sweep: Path, cell: str, exit_code: int, reason: str | None, seconds: float) -> dict[str, Any]:
    """Appends the end of a cell; returns its line. A line that a kill tore is removed first."""
    path = sweep / OUTCOMES
    outcome = {
        "cell": cell,
        "exit_code": exit_code,
        "reason": None if reason is None else clipped(reason, REASON),
        "seconds": round(seconds, 3),
        "ended": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
    }
    before = path.read_bytes() if path.exists() else b""
    with path.open("ab") as file:
        file.truncate(before.rfind(b"\n") + 1)
        file.write(json.dumps(outcome).encode("ascii") + b"\n")
        file.flush()
        os.fsync(file.fileno())
    return outcome


def settings_file(sweep: Path, cell: str) -> Path:
    """The file of a cell's settings."""
    return sweep / SETTINGS / f"{cell}.yaml"


def write_settings(sweep: Path, cell: str, text: str) -> None:
    """Writes the settings of a cell. A file that has them already is left as it is."""
    file = settings_file(sweep, cell)
    if not file.exists() or file.read_text(encoding="utf-8") != text:
        replace_text(file, text)


def read_cells(sweep: Path) -> dict[str, dict[str, Any]]:
    """Cell -> its settings, in the order of the sweep; empty settings where their file is missing.

    Raises RunError where a file cannot be read.
    """
    asked = _mapping(sweep / ASKED)
    names = asked.get("cells")
    if not isinstance(names, list) or not all(isinstance(name, str) and "/" not in name for name in names):
        remedy = "run the sweep's command again, which repeats no complete cell, or give the runs in its folder `cells`"
        raise RunError(f"{sweep / ASKED}: it has no list `cells` of names, as older versions wrote it; {remedy}")
    files = {name: settings_file(sweep, name) for name in names}
    return {name: _mapping(file) if file.exists() else {} for name, file in files.items()}


def cell_folder(sweep: Path, cell: str) -> Path:
    return sweep / CELLS / cell


def is_sweep(folder: Path) -> bool:
    """Whether a folder is a sweep's."""
    return os.path.isfile(folder / ASKED)  # unlike Path.is_file, a name that is too long is not an error


def _is_outcome(outcome: dict[str, Any]) -> bool:
    texts = isinstance(outcome.get("cell"), str) and isinstance(outcome.get("ended"), str)
    code, reason, seconds = (outcome.get(name) for name in ("exit_code", "reason", "seconds"))
    numbers = type(code) is int and isinstance(seconds, int | float) and not isinstance(seconds, bool)
    return texts and numbers and (reason is None or isinstance(reason, str))


def _mapping(file: Path) -> dict[str, Any]:
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError, RecursionError) as error:
        raise RunError(f"{file}: cannot be read as YAML ({error}); run the sweep's command again") from error
    if not isinstance(content, dict):
        raise RunError(f"{file}: holds {type(content).__name__} instead of a mapping; run the sweep's command again")
    return content
