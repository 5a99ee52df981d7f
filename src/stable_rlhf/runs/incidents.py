"""Incidents: what the guard saw and did. One JSON object a line in incidents.jsonl, and one sentence on stderr."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from stable_rlhf.console import tell
from stable_rlhf.control import Action, Verdict
from stable_rlhf.errors import RunError
from stable_rlhf.files import finite, replace_text

FILE = "incidents.jsonl"

FIELDS = ("step", "action", "rule", "seen", "done", "advice", "figures")
"""Fields of every line: the step's number; the verdict's action and rule; three clauses; the step's row."""

UNDOES = ("roll back", "stop")
"""Actions that take back the step, and others before it."""

NOT_FINITE = ("nan", "inf", "-inf")
"""Texts that stand for figures that are not finite, because JSON has no such numbers."""


def of_verdict(step: int, verdict: Verdict, action: Action, done: str, figures: Mapping[str, Any]) -> dict[str, Any]:
    """The line of incidents.jsonl for a verdict: what was seen at ``step`` (from 0), what was ``done``, and figures."""
    seen = {"step": step, "action": action.value, "rule": verdict.rule, "seen": verdict.seen}
    return seen | {"done": done, "advice": verdict.advice, "figures": dict(figures)}


def record(run_dir: Path, incident: Mapping[str, Any]) -> None:
    """Appends an incident to the file and prints it on stderr, even if log.progress is off. A stop is not printed: the
    error that ends the run says it."""
    append(run_dir, incident)
    if incident["action"] != "stop":
        tell(sentence(incident))


def append(run_dir: Path, incident: Mapping[str, Any]) -> None:
    """Appends an incident (FIELDS) to the file. The line is on the disk when this returns.

    A figure that is not finite is written as one of the texts NOT_FINITE.
    """
    known = {name: _plain(value) for name, value in incident["figures"].items()}
    line = json.dumps({**{name: incident[name] for name in FIELDS}, "figures": known}, allow_nan=False)
    with (run_dir / FILE).open("a", encoding="ascii", newline="\n") as file:
        file.write(line + "\n")
        file.flush()
        os.fsync(file.fileno())


def sentence(incident: Mapping[str, Any]) -> str:
    """The incident as one sentence: what was seen, what was done and what to try."""
    when = "In a new run" if incident["action"] == "stop" else "If it continues"
    return f"step {incident['step']}: {incident['seen']}: {incident['done']}. {when}: {incident['advice']}."


def read(run_dir: Path) -> list[dict[str, Any]]:
    """The incidents of a run, oldest first. An incomplete last line, which a kill leaves, is left out.

    Raises ValueError with file and line for any other line that is not an incident.
    """
    path = run_dir / FILE
    if not path.exists():
        return []
    lines = path.read_bytes().split(b"\n")[:-1]
    found = []
    for number, line in enumerate(lines, start=1):
        try:
            incident = json.loads(line, parse_float=finite, parse_constant=finite)
            _check(incident)
        except (ValueError, TypeError, RecursionError) as error:
            raise RunError(f"{path}:{number}: not an incident ({error}); repair or remove this line") from error
        found.append(incident)
    return found


def truncate(run_dir: Path, step: int) -> None:
    """Removes the incidents of ``step`` and later, which a resumed run will repeat, and an incomplete last line."""
    path = run_dir / FILE
    if not path.exists():
        return
    kept = [incident for incident in read(run_dir) if incident["step"] < step]
    replace_text(path, "".join(json.dumps(incident, allow_nan=False) + "\n" for incident in kept))


def _check(incident: Any) -> None:
    if not isinstance(incident, dict) or set(incident) != set(FIELDS):
        raise ValueError(f"expected an object with {', '.join(FIELDS)}")
    if type(incident["step"]) is not int or incident["step"] < 0:
        raise ValueError(f"its step is {incident['step']!r}, expected a whole number from 0 up")
    for name in ("action", "rule", "seen", "done", "advice"):
        if not isinstance(incident[name], str):
            raise ValueError(f"its {name} is {incident[name]!r}, expected a text")
    figures = incident["figures"]
    if not isinstance(figures, dict) or any(
        isinstance(value, bool) or not (value is None or isinstance(value, int | float) or value in NOT_FINITE)
        for value in figures.values()
    ):
        raise ValueError(f"its figures are {figures!r}, expected numbers by their names")


def _plain(value: Any) -> Any:
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
