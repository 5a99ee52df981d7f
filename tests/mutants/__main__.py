"""`make mutants`: changes a line of the package, one at a time, and says which changes its tests do not notice."""

from __future__ import annotations

import argparse
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from queue import SimpleQueue

from tests.mutants.changes import ROOT, Change, load

COPIED = ("src", "tests", "benchmarks", "scripts", "docs", "configs", "README.md", "pyproject.toml")
TIMEOUT = 120.0
"""Seconds for the tests of one change. The slowest take a quarter of it; a change that takes more has made an endless
loop, and is noticed."""
LEAST = 0.95
"""Share of the changes that must be noticed."""


@dataclass
class Counts:
    """What became of the changes."""

    noticed: int = 0
    survivors: list[Change] = field(default_factory=list)
    untried: list[Change] = field(default_factory=list)
    """Changes whose tests fail without them, which says nothing about the change."""

    def add(self, other: Counts) -> None:
        self.noticed += other.noticed
        self.survivors += other.survivors
        self.untried += other.untried

    @property
    def share(self) -> float:
        """Noticed / tried; 1 where nothing was tried."""
        tried = self.noticed + len(self.survivors)
        return self.noticed / tried if tried else 1.0


def main(arguments: list[str] | None = None) -> int:
    given = parser().parse_args(arguments)
    listed = [change for change in load() if given.area in (None, change.area)]
    changes = [change for change in listed if not change.equivalent]
    if given.sample is not None:
        changes = random.Random(given.seed).sample(changes, min(given.sample, len(changes)))
    counts = try_all(changes, given.jobs)
    if counts.untried:
        print(f"{len(counts.untried)} not tried: their tests fail without any change")
    tried = counts.noticed + len(counts.survivors)
    equivalent = sum(bool(change.equivalent) for change in listed)
    print(f"{counts.noticed} of {tried} noticed ({100 * counts.share:.1f} %), {equivalent} equivalent")
    return 1 if counts.untried or counts.share < LEAST else 0


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(prog="python -m tests.mutants", description=__doc__)
    made.add_argument("--area", choices=sorted({change.area for change in load()}), help="changes of this folder only")
    made.add_argument("--sample", type=int, help="this many of them, drawn at random (default: all)")
    made.add_argument("--seed", type=int, default=0, help="of the draw (default 0)")
    made.add_argument("--jobs", type=int, default=2, help="how many are tried at a time (default 2)")
    return made


def try_all(changes: Iterable[Change], jobs: int) -> Counts:
    """Tries every change, ``jobs`` at a time, each job in its own copy of the repository."""
    groups = by_tests(changes)
    total = Counts()
    with copies(jobs) as folders, ThreadPoolExecutor(jobs) as pool:
        free: SimpleQueue[Path] = SimpleQueue()
        for folder in folders:
            free.put(folder)
        for counts in pool.map(lambda group: try_group(group, free), groups):
            total.add(counts)
    return total


def by_tests(changes: Iterable[Change]) -> list[list[Change]]:
    """Changes that are noticed by the same tests share one run of the tests without a change; the longest first."""
    groups: dict[tuple[str, ...], list[Change]] = {}
    for change in changes:
        groups.setdefault(change.tests, []).append(change)
    return sorted(groups.values(), key=len, reverse=True)


@contextmanager
def copies(count: int) -> Iterator[list[Path]]:
    """As many copies of the repository, in a temporary folder that is removed at the end."""
    with tempfile.TemporaryDirectory(prefix="mutants-") as parent:
        folders = [Path(parent) / str(number) for number in range(count)]
        for folder in folders:
            copy_repository(folder)
        yield folders


def copy_repository(folder: Path) -> None:
    folder.mkdir()
    for name in COPIED:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy2(source, folder / name)


def try_group(group: Sequence[Change], free: SimpleQueue[Path]) -> Counts:
    """Tries changes that have the same tests, in a copy that is free."""
    folder = free.get()
    try:
        return try_in(folder, group)
    finally:
        free.put(folder)


def try_in(folder: Path, group: Sequence[Change]) -> Counts:
    """Runs the tests without a change, then with each. Prints a failure of the first, and every survivor."""
    failure = failure_of(folder, group[0].tests)
    if failure is not None:
        names = "\n  ".join(change.file for change in group)
        print(
            f"error: {' '.join(group[0].tests)} fails without any change; not tried:\n  {names}\n{failure}", flush=True
        )
        return Counts(untried=list(group))
    counts = Counts()
    for change in group:
        if noticed(folder, change):
            counts.noticed += 1
        else:
            counts.survivors.append(change)
            print(f"survived: {change}", flush=True)
    return counts


def noticed(folder: Path, change: Change) -> bool:
    """Whether the tests fail with the change, which is taken back."""
    path = folder / change.file
    before = path.read_text()
    path.write_text(change.apply(before))
    try:
        return failure_of(folder, change.tests) is not None
    finally:
        path.write_text(before)


def failure_of(folder: Path, tests: Sequence[str]) -> str | None:
    """What pytest prints where the tests fail or take longer than TIMEOUT; None where they pass."""
    # No compiled files: Python tells them by the time to a second and the size, and a changed file may equal both.
    environment = {
        **os.environ,
        "PYTHONPATH": str(folder / "src"),
        "PYTHONDONTWRITEBYTECODE": "1",
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *tests]
    process = subprocess.Popen(
        command,
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,  # so that what the tests have started ends with them
    )
    try:
        output, _ = process.communicate(timeout=TIMEOUT)
    except subprocess.TimeoutExpired:
        output = f"not done after {TIMEOUT:g} s"
    finally:
        end(process)
    return None if process.returncode == 0 else output


def end(process: subprocess.Popen[str]) -> None:
    """Ends a process and those that it has started, where they still run."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


if __name__ == "__main__":
    sys.exit(main())
