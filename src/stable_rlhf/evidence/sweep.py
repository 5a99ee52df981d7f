"""Runs the cells of a sweep: complete ones are skipped, broken ones resumed, the end of each is recorded."""

from __future__ import annotations

import contextlib
import enum
import os
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

from stable_rlhf.config import complete_settings, read_settings, settings_text
from stable_rlhf.errors import ConfigError, Exit, Interrupted, RunError, SaveError
from stable_rlhf.evidence.devices import Place
from stable_rlhf.evidence.grid import Cell, Sweep, difference
from stable_rlhf.evidence.processes import Job, Launcher, send
from stable_rlhf.evidence.progress import Clock, ended_line, share_left
from stable_rlhf.files import replace_text
from stable_rlhf.runs import RunLock, check_output, sweeps
from stable_rlhf.text import counted, quoted

VERSION = 1
"""Of sweep.yaml."""

POLL = 0.1
"""Seconds between two looks at the running cells: little next to the seconds in which a cell starts."""

PATIENCE = 60.0
"""Seconds to wait for a cell's process of an earlier sweep: one that was killed may still be giving back its GPU."""


class State(enum.StrEnum):
    """How far a cell is."""

    COMPLETE = "complete"
    FAILED = "failed"
    BROKEN = "to be resumed"
    NEW = "to be started"


@dataclass
class Standing:
    """A sweep in its folder: the state of each cell, and the line of outcomes.jsonl that holds."""

    states: dict[str, State]
    last: dict[str, dict[str, Any]]
    outcomes: list[dict[str, Any]] = field(default_factory=list)

    def count(self, state: State) -> int:
        return sum(found is state for found in self.states.values())


def standing(sweep: Sweep, out: Path) -> Standing:
    """Reads the folder of a sweep, which may not exist yet. Changes nothing.

    Raises ConfigError for a folder that is another's, naming the difference, and RunError for a file that cannot be
    read.
    """
    check_output(out, "--out")
    if not sweeps.is_sweep(out):
        own = {".lock", ".owner.json", f"{sweeps.ASKED}.tmp"}  # of a sweep that was killed before it wrote anything
        if out.is_dir() and any(path.name not in own for path in out.iterdir()):
            raise ConfigError(f"--out={str(out)!r}: is not empty and no sweep; choose a new folder")
        return Standing({cell.name: State.NEW for cell in sweep.cells}, {})
    if (differs := difference(sweep, _asked(out))) is not None:
        raise ConfigError(f"--out={str(out)!r}: holds another sweep: {differs}; choose a new folder")
    outcomes = sweeps.read_outcomes(out)
    last = {outcome["cell"]: outcome for outcome in outcomes}
    return Standing({cell.name: _state(out, cell, last.get(cell.name)) for cell in sweep.cells}, last, outcomes)


def _state(out: Path, cell: Cell, last: Mapping[str, Any] | None) -> State:
    run = sweeps.cell_folder(out, cell.name)
    if last is not None and last["exit_code"] == Exit.DONE and run.is_dir():
        return State.COMPLETE
    if last is not None and last["exit_code"] != Exit.DONE and last["exit_code"] not in sweeps.STOPPED:
        return State.FAILED
    return State.BROKEN if _has_checkpoint(run) else State.NEW


def _has_checkpoint(run: Path) -> bool:
    """Whether `resume` finds a checkpoint, whole or not: one that is being written has another name."""
    kept = (*run.glob("checkpoints/step-*"), *run.glob("checkpoints/.replaced-step-*"))
    return (run / "config.yaml").is_file() and any(kept)


def run_sweep(
    sweep: Sweep, out: Path, launcher: Launcher, *, retry: bool = False, say: Callable[[str], object] = print
) -> Standing:
    """Runs every cell that is not complete, and records how each ends; ``say`` gets a line for each.

    ``retry``: failed cells too. Raises Interrupted after SIGINT or SIGTERM, once the cells have saved their
    checkpoints; ConfigError if another sweep runs in ``out``.
    """
    lock = RunLock(out, "--out")
    with contextlib.ExitStack() as held:
        standing(sweep, out)  # what is refused leaves no trace
        lock.take()
        held.callback(lock.release)
        now = standing(sweep, out)
        again = {State.NEW, State.BROKEN, *([State.FAILED] if retry else [])}
        waiting = [cell for cell in sweep.cells if now.states[cell.name] in again]
        with _failures_named(out):
            replace_text(out / sweeps.ASKED, settings_text(_content(sweep)))
            for folder in (sweeps.CELLS, sweeps.LOGS, sweeps.SETTINGS):
                (out / folder).mkdir(exist_ok=True)
            for cell in waiting:
                run = sweeps.cell_folder(out, cell.name)
                sweeps.write_settings(out, cell.name, settings_text(complete_settings(cell.config, run)))
            _wait_for_others(out, waiting)
            return _Running(sweep, out, launcher, now, waiting, say).run()


class _Running:
    """The cells that run, and those that wait."""

    def __init__(
        self,
        sweep: Sweep,
        out: Path,
        launcher: Launcher,
        now: Standing,
        waiting: list[Cell],
        say: Callable[[str], object],
    ) -> None:
        self.sweep, self.out, self.launcher, self.now, self.waiting, self.say = sweep, out, launcher, now, waiting, say
        self.free = list(launcher.places)
        self.running: list[_Started] = []
        self.clock = Clock(sweep.cells, now.outcomes)
        self.stopped: list[int] = []

    def run(self) -> Standing:
        with _signals(self._stop):
            try:
                while self.running or (self.waiting and not self.stopped):
                    while self.waiting and self.free and not self.stopped:
                        self._start(self.waiting.pop(0))
                    time.sleep(POLL)
                    for started in [*self.running]:
                        if (code := started.job.poll()) is not None:
                            self._end(started, code)
            finally:
                self._end_all()
        if self.stopped:
            done = self.now.count(State.COMPLETE) + self.now.count(State.FAILED)
            cells = counted(len(self.sweep.cells), "cell")
            sentence = f"interrupted after {done} of {cells}. The same command continues the sweep"
            raise Interrupted(self.stopped[0], sentence)
        return self.now

    def _start(self, cell: Cell) -> None:
        run, place = sweeps.cell_folder(self.out, cell.name), self.free.pop(0)
        if _has_checkpoint(run):
            arguments = ["resume", str(run)]
        else:  # what a try without a checkpoint has left is replaced
            file = sweeps.settings_file(self.out, cell.name)
            arguments = ["train", str(file), "--overwrite_output_dir", "true"]
        log = self.out / sweeps.LOGS / f"{cell.name}.txt"
        began = log.stat().st_size if log.exists() else 0
        share = share_left(cell, self.out)
        job = self.launcher.start(arguments, place, log)
        self.running.append(_Started(cell, job, place, log, began, time.monotonic(), share))
        for number in self.stopped:  # it came while the cell was started
            send(job, number)

    def _end(self, started: _Started, code: int) -> None:
        cell, seconds = started.cell, time.monotonic() - started.at
        self.running.remove(started)
        self.free.append(started.place)
        reason = None if code == Exit.DONE else _reason(started, code)
        if self.stopped and code == Exit.FAILED:  # a library may turn Ctrl-C while it loads into an error of its own
            code = 128 + self.stopped[0]
        outcome = sweeps.record_outcome(self.out, cell.name, code, reason, seconds)
        self.clock.learn(outcome)
        self.now.last[cell.name] = outcome
        self.now.states[cell.name] = _state(self.out, cell, outcome)
        ended = len(self.sweep.cells) - len(self.waiting) - len(self.running)
        run = sweeps.cell_folder(self.out, cell.name)
        self.say(ended_line(ended, len(self.sweep.cells), cell, run, outcome, self._left()))

    def _left(self) -> float | None:
        to_do = [(cell, share_left(cell, self.out)) for cell in self.waiting]
        for started in self.running:
            whole, spent = self.clock.seconds(started.cell), time.monotonic() - started.at
            to_do.append((started.cell, max(0.0, started.share - spent / whole) if whole else started.share))
        return self.clock.left(to_do, len(self.launcher.places)) if to_do else None

    def _stop(self, number: int) -> None:
        self.stopped.append(number)
        for started in self.running:
            send(started.job, number)

    def _end_all(self) -> None:
        """After an error of the sweep itself: the cells save their checkpoints."""
        for started in self.running:
            send(started.job, signal.SIGTERM)
        while any(started.job.poll() is None for started in self.running):
            time.sleep(POLL)


@dataclass
class _Started:
    cell: Cell
    job: Job
    place: Place
    log: Path
    began: int
    """Length of the log when it was started."""
    at: float
    """time.monotonic() then."""
    share: float
    """Share of the steps that were to do then."""


def _reason(started: _Started, code: int) -> str:
    """Why a cell ended: the last line that its command said, else the last line of its log."""
    if code < 0:
        return f"killed by {signal.Signals(-code).name}"
    with started.log.open("rb") as file:
        file.seek(max(started.began, os.fstat(file.fileno()).st_size - TAIL))
        lines = [line.strip() for line in file.read().decode(errors="replace").splitlines() if line.strip()]
    return _last_words(lines) or f"it ended with {code} and said nothing"


def _last_words(lines: Sequence[str]) -> str:
    """The error of a command in its output: its own last line, which a library may follow, or that of a traceback."""
    for line in reversed(lines):
        if line.startswith("stable-rlhf: "):
            return line.removeprefix("stable-rlhf: ")
        if line.startswith("Traceback "):
            break
    return lines[-1] if lines else ""


TAIL = 100_000
"""Bytes of the end of a log in which the reason is looked for."""


# -- the folder -----------------------------------------------------------------------------------------------------


def _content(sweep: Sweep) -> dict[str, Any]:
    cells = [cell.name for cell in sweep.cells]  # for those who read the sweep without making it again
    return {"version": VERSION, "base": sweep.base, "grid": sweep.grid, "seeds": sweep.seeds, "cells": cells}


def _asked(out: Path) -> dict[Any, Any]:
    """The content of sweep.yaml. Raises RunError where it is not one."""
    file = out / sweeps.ASKED
    try:
        content = read_settings(file)
    except ConfigError as error:
        raise RunError(f"{error}; restore it from a copy, or choose a new folder") from error
    shape = {"version": int, "base": dict, "grid": dict, "seeds": list}
    wrong = [name for name, kind in shape.items() if not isinstance(content.get(name), kind)]
    wrong += (
        [f"grid.{n}" for n, values in content.get("grid", {}).items() if not isinstance(values, list)]
        if not wrong
        else []
    )
    if wrong:
        raise RunError(f"{file}: {wrong[0]} is missing or of the wrong kind; restore it from a copy")
    if content["version"] != VERSION:
        raise RunError(f"{file}: version {quoted(content['version'])} is not {VERSION}: use the version that made it")
    return content


def _wait_for_others(out: Path, cells: Sequence[Cell]) -> None:
    """Waits until no process of an earlier sweep holds a cell's folder."""
    until = time.monotonic() + PATIENCE
    for cell in cells:
        lock = RunLock(sweeps.cell_folder(out, cell.name))
        while True:
            try:
                lock.check()
                break
            except ConfigError:  # it names the process
                if time.monotonic() > until:
                    raise
            time.sleep(POLL)


@contextlib.contextmanager
def _signals(stop: Callable[[int], None]) -> Iterator[None]:
    """Calls ``stop`` on SIGINT and SIGTERM."""

    def note(number: int, frame: FrameType | None) -> None:
        stop(number)

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def _failures_named(out: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if isinstance(error, RunError):
            raise
        raise SaveError(
            f"{out} could not be written to: {error.strerror or error}; the cells have stopped, and the same command "
            "continues the sweep"
        ) from error
