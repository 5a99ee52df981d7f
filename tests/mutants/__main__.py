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
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue

from tests.mutants.changes import ROOT, Change, load

COPIED = ("src", "tests", "benchmarks", "scripts", "docs", "configs", "README.md", "pyproject.toml")
TIMEOUT = 120.0
"""Seconds for the tests of one change: one that takes longer has most likely made an endless loop, and is noticed."""
LEAST = 0.95
"""Share of the changes that must be noticed."""


@dataclass
class Counts:
    """What became of the changes."""

    noticed: int = 0
    survived: int = 0
    untried: int = 0
    """Changes whose tests fail without them, which says nothing about the change."""

    @property
    def tried(self) -> int:
        return self.noticed + self.survived

    @property
    def share(self) -> float:
        """Noticed / tried; 1 where nothing was tried."""
        return self.noticed / self.tried if self.tried else 1.0


def main(arguments: list[str] | None = None) -> int:
    given = parser().parse_args(arguments)
    listed = [change for change in load() if given.area in (None, change.area)]
    changes = [change for change in listed if not change.equivalent]
    if given.sample is not None:
        changes = random.Random(given.seed).sample(changes, min(given.sample, len(changes)))
    counts = try_all(changes, given.jobs)
    if counts.untried:
        print(f"{counts.untried} not tried: their tests fail without any change")
    equivalent = sum(bool(change.equivalent) for change in listed)
    print(f"{counts.noticed} of {counts.tried} noticed ({100 * counts.share:.1f} %), {equivalent} equivalent")
    return 1 if counts.untried or counts.share < LEAST else 0


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(prog="python -m tests.mutants", description=__doc__)
    made.add_argument("--area", choices=sorted({change.area for change in load()}), help="changes of this folder only")
    made.add_argument("--sample", type=int, help="this many of them, drawn at random (default: all)")
    made.add_argument("--seed", type=int, default=0, help="of the draw (default 0)")
    made.add_argument("--jobs", type=int, default=2, help="how many are tried at a time (default 2)")
    return made


def try_all(changes: Sequence[Change], jobs: int) -> Counts:
    """Tries every change, ``jobs`` at a time; prints every survivor.

    The tests run without a change first, once for all the changes that name the same ones. Where they fail, that is
    printed, and these changes are not tried.
    """
    counts = Counts()
    with copies(jobs) as free, ThreadPoolExecutor(jobs) as pool:
        sets = list(dict.fromkeys(change.tests for change in changes))
        failures = dict(zip(sets, pool.map(lambda tests: unchanged(tests, free), sets), strict=True))
        for tests, failure in failures.items():
            if failure is not None:
                print(f"error: {' '.join(tests)}: fails without any change\n{failure}", flush=True)
        sound = [change for change in changes if failures[change.tests] is None]
        counts.untried = len(changes) - len(sound)
        for change, seen in zip(sound, pool.map(lambda change: noticed(change, free), sound), strict=True):
            counts.noticed += seen
            counts.survived += not seen
            if not seen:
                print(f"survived: {change}", flush=True)
    return counts


@contextmanager
def copies(count: int) -> Iterator[SimpleQueue[Path]]:
    """As many copies of the repository, for whoever takes one to put back; they are removed at the end."""
    free: SimpleQueue[Path] = SimpleQueue()
    with tempfile.TemporaryDirectory(prefix="mutants-") as parent:
        for number in range(count):
            folder = Path(parent) / str(number)
            copy_repository(folder)
            free.put(folder)
        yield free


@contextmanager
def one_of(free: SimpleQueue[Path]) -> Iterator[Path]:
    """A copy that nobody else has inside."""
    folder = free.get()
    try:
        yield folder
    finally:
        free.put(folder)


def copy_repository(folder: Path) -> None:
    folder.mkdir()
    for name in COPIED:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy2(source, folder / name)


def unchanged(tests: Sequence[str], free: SimpleQueue[Path]) -> str | None:
    """``failure_of`` the tests without any change."""
    with one_of(free) as folder:
        return failure_of(folder, tests)


def noticed(change: Change, free: SimpleQueue[Path]) -> bool:
    """Whether the tests fail with the change, which is taken back."""
    with one_of(free) as folder:
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
    with process:
        try:
            output, _ = process.communicate(timeout=TIMEOUT)
        except subprocess.TimeoutExpired:
            output = f"not done after {TIMEOUT:g} s"
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
    return None if process.returncode == 0 else output


if __name__ == "__main__":
    sys.exit(main())
