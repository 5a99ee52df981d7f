"""What `compare` is given: run folders, sweeps, and logs of other trainers, each read into an outcome."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from stable_rlhf.errors import ConfigError, Exit
from stable_rlhf.evidence.outcome import Outcome, Status, flat, read_outcome
from stable_rlhf.evidence.peers import is_foreign, is_table, read_foreign
from stable_rlhf.runs import sweeps
from stable_rlhf.runs.output import RUN_FILES


def find_outcomes(paths: Sequence[Path], mapping: Path | None = None) -> list[Outcome]:
    """The outcomes of runs, of the cells of sweeps and of foreign logs, each under a name of its own.

    ``mapping``: what the columns of a CSV or JSONL mean (evidence/peers.py). What cannot be read is an outcome that
    says so. Raises ConfigError for a path that is given twice and for a mapping that no path needs, RunError for a
    sweep whose own files cannot be read.
    """
    if mapping is not None and not any(is_table(path) for path in paths):
        raise ConfigError(f"--mapping {mapping}: has no effect, as no CSV or JSON-lines file is given; leave it out")
    seen: set[str] = set()
    found: list[tuple[Path, Outcome]] = []
    for path in paths:
        real = os.path.realpath(path)
        if real in seen:
            raise ConfigError(f"{path} is given twice: give each run and each sweep once")
        seen.add(real)
        if sweeps.is_sweep(path):
            found += [(sweeps.cell_folder(path, each.name), each) for each in _cells(path)]
        elif is_foreign(path):
            found.append((path, replace(read_foreign(path, mapping), name=Path(real).name)))
        else:
            found.append((path, _run(path, Path(real).name)))
    folders = Counter(os.path.realpath(path) for path, _ in found)
    if (folder := folders.most_common(1)[0:1]) and folder[0][1] > 1:
        raise ConfigError(f"{folder[0][0]} is given twice, by itself and as a cell of its sweep: give it once")
    return _named(found)


def _run(path: Path, name: str) -> Outcome:
    """A run of ours. A folder that is none, but holds some or other trainers' logs, says what to give instead."""
    found = read_outcome(path, name)
    if found.status is not Status.MISSING or any(os.path.lexists(path / own) for own in RUN_FILES):
        return found
    inside = [each for each in sorted(path.glob("*")) if _can_be_given(each)] if os.path.isdir(path) else []
    if not inside:
        return found
    named = " ".join(str(each) for each in inside[:2])
    return replace(found, why=f"{path} is no run or log, but holds {len(inside)}: give what it holds, such as {named}")


def _can_be_given(path: Path) -> bool:
    return is_foreign(path) or sweeps.is_sweep(path) or os.path.isfile(path / "metrics.jsonl")


def _cells(sweep: Path) -> list[Outcome]:
    """The cells of a sweep in its order; one that has not begun is missing, one that ended with an error crashed.
    One that somebody stopped goes on with the next sweep: it is unfinished."""
    ends = {end["cell"]: end for end in sweeps.read_outcomes(sweep)}
    made = []
    for name, settings in sweeps.read_cells(sweep).items():
        each = read_outcome(sweeps.cell_folder(sweep, name), name)
        end = ends.get(name)
        failed = end is not None and end["exit_code"] not in (Exit.DONE, *sweeps.STOPPED)
        if end is not None and failed and each.status not in (Status.GIVEN_UP, Status.RUNNING):
            why = f"it ended with exit code {end['exit_code']}: {end['reason'] or 'no reason was recorded'}"
            each = replace(each, status=Status.CRASHED, why=why, figures={**each.figures, "healthy": 0.0})
        elif end is None and each.status is Status.MISSING:
            each = replace(each, why="it has not begun")
        made.append(each if each.settings else replace(each, settings=flat(settings)))
    return made


def _named(found: Sequence[tuple[Path, Outcome]]) -> list[Outcome]:
    """Of several runs of one name, each gets as much of its path as tells them apart."""
    paths = [Path(os.path.realpath(path)) for path, _ in found]
    names = [each.name for _, each in found]
    for depth in range(2, max((len(path.parts) for path in paths), default=0) + 1):
        repeated = {name for name, count in Counter(names).items() if count > 1}
        if not repeated:
            break
        names = [
            "/".join(path.parts[-depth:]) if name in repeated else name for name, path in zip(names, paths, strict=True)
        ]
    return [replace(each, name=name) for name, (_, each) in zip(names, found, strict=True)]
