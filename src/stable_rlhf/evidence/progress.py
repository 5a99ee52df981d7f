"""What a sweep says of its cells: a line for each end, and the time that is left."""

from __future__ import annotations

import contextlib
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

from stable_rlhf.errors import Exit
from stable_rlhf.evidence.grid import Cell
from stable_rlhf.evidence.outcome import read_outcome
from stable_rlhf.runs import read_rows, sweeps
from stable_rlhf.text import formatted, printable

SHOWN = 300
"""Characters of a reason on a line; outcomes.jsonl has more."""


def ended_line(number: int, count: int, cell: Cell, run: Path, outcome: Mapping[str, Any], left: float | None) -> str:
    """``number`` of ``count`` cells have ended. ``left``: seconds until all have, if known."""
    how = how_it_ended(outcome["exit_code"])
    if outcome["reason"] is not None and outcome["exit_code"] not in sweeps.STOPPED:
        how += f": {printable(outcome['reason'], SHOWN)}"
    reward = formatted(read_outcome(run, run.name).figures.get("reward/final"), ".3f")
    place = f"[{number:>{len(str(count))}}/{count}]"
    took = f"{how} after {clock(outcome['seconds'])}" if outcome["reason"] is None else how
    return f"{place} {cell.arm}  seed {cell.seed}  reward {reward}  {took}" + (
        "" if left is None else f"  left {clock(left)}"
    )


def how_it_ended(exit_code: int) -> str:
    """An exit code in words."""
    if exit_code in sweeps.STOPPED:  # 128 + the signal where the command ended itself, -signal where it was killed
        return f"stopped by signal {-exit_code if exit_code < 0 else exit_code - 128}; the same command resumes it"
    words: dict[int, str] = {Exit.DONE: "finished", Exit.GUARD: "given up by the guard"}
    return words.get(exit_code, f"failed ({exit_code})")


class Clock:
    """Seconds that cells take, learned from those that have finished."""

    def __init__(self, cells: Sequence[Cell], outcomes: Iterable[Mapping[str, Any]]) -> None:
        self._cells = {cell.name: cell for cell in cells}
        self._spent: dict[str, float] = {}  # by the tries of a cell so far
        self._per_step: dict[str, list[float]] = {}  # arm, preset or "" for all -> seconds a step of finished cells
        for outcome in outcomes:
            self.learn(outcome)

    def learn(self, outcome: Mapping[str, Any]) -> None:
        name = outcome["cell"]
        self._spent[name] = self._spent.get(name, 0.0) + outcome["seconds"]
        if outcome["exit_code"] == Exit.DONE and (cell := self._cells.get(name)) is not None:
            self.learn_seconds(cell, self._spent[name])

    def learn_seconds(self, cell: Cell, seconds: float) -> None:
        """``seconds``: of the whole cell."""
        for key in _keys(cell):
            self._per_step.setdefault(key, []).append(seconds / cell.config.max_steps)

    def knows(self, cell: Cell) -> bool:
        """Whether a cell of the same preset has been timed."""
        return _keys(cell)[1] in self._per_step

    def seconds(self, cell: Cell) -> float | None:
        """Of a whole cell, as cells of its arm, else of its preset, else all took; None before the first."""
        for key in _keys(cell):
            if key in self._per_step:
                return statistics.fmean(self._per_step[key]) * cell.config.max_steps
        return None

    def left(self, waiting: Iterable[tuple[Cell, float]], places: int) -> float | None:
        """Seconds until all cells have ended. ``waiting``: cells with the share of each that is still to do."""
        whole = [(self.seconds(cell), share) for cell, share in waiting]
        if any(seconds is None for seconds, _ in whole):
            return None
        parts = [seconds * share for seconds, share in whole if seconds is not None]
        return max(math.fsum(parts) / places, max(parts, default=0.0))


def share_left(cell: Cell, sweep: Path) -> float:
    """Share of a cell's steps that are not done, by the rows it has."""
    with contextlib.suppress(OSError, ValueError):
        rows, _ = read_rows(sweeps.cell_folder(sweep, cell.name) / "metrics.jsonl")
        return 1 - min(len(rows), cell.config.max_steps) / cell.config.max_steps
    return 1.0


def clock(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds)))


def _keys(cell: Cell) -> tuple[str, str, str]:
    return f"arm {cell.arm}", f"preset {cell.config.preset}", ""
