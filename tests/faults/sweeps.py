"""Sweeps that are killed at random moments, alone or with their cells, and what the same command makes of the rest.

The commands are the real ones. Only the start of a cell is another: a fork of the sweep, which has torch, in place of a
Python that loads it for seconds.
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import tempfile
import time
import traceback
from collections.abc import Iterable, Sequence
from pathlib import Path

import psutil
import torch

from stable_rlhf.cli import sweep as command
from stable_rlhf.cli.main import main
from stable_rlhf.errors import Exit
from stable_rlhf.evidence.devices import Place
from stable_rlhf.evidence.processes import ends_with
from tests.faults import children
from tests.faults.checkpoints import MEMORY
from tests.faults.counts import Counts
from tests.faults.training import LOSSES, Tiny, assert_same, result

GRID = ("--preset", "ppo,safe", "--seeds", "2")
STEPS = 2


class Forked:
    """A launcher whose cells are forks of the sweep."""

    def __init__(self, places: Sequence[Place]) -> None:
        self.places = places

    def start(self, arguments: list[str], place: Place, log: Path) -> _Fork:
        bind = ends_with(os.getpid())
        pid = os.fork()
        if pid:
            return _Fork(pid)
        code = 1
        try:
            os.setsid()
            bind()
            signal.signal(signal.SIGINT, signal.default_int_handler)
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            file = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
            os.dup2(file, 1), os.dup2(file, 2)
            os.closerange(3, 256)  # a new program has none of the sweep's files, its lock among them
            os.environ.update(place.environment)
            torch.set_num_threads(1)
            code = main(arguments)
        except BaseException:  # noqa: BLE001
            traceback.print_exc()
        finally:
            os._exit(code)


class _Fork:
    def __init__(self, pid: int) -> None:
        self.pid, self._code = pid, None

    def poll(self) -> int | None:
        if self._code is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self._code = os.waitstatus_to_exitcode(status) if pid else None
        return self._code

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)


def use_forks() -> None:
    command.Processes = Forked  # pyright: ignore[reportAttributeAccessIssue]


class Sweeps:
    """Sweeps of a tiny run, in a folder."""

    def __init__(self, tiny: Tiny) -> None:
        self.tiny = tiny

    def arguments(self, sweep: str, *more: str) -> list[str]:
        """Of a sweep of two arms x two seeds of two steps, with a checkpoint after each."""
        run = self.tiny.arguments("", "--max_steps", str(STEPS), "--save_steps", "1")[1:]
        given = dict(zip(run[::2], run[1::2], strict=True))
        varied = [f"--{value.partition('=')[0]}" for value in more]
        for name in ("--output_dir", "--guard.snapshot_steps", *varied):  # ppo has no guard
            given.pop(name, None)
        settings = [part for pair in given.items() for part in pair]
        return ["sweep", *settings, "--out", str(self.tiny.folder / sweep), *(more or GRID)]

    def start(self, sweep: str, *more: str) -> children.Child:
        return children.start(self.arguments(sweep, *more), self.tiny.folder / f"{sweep}.said.txt", use_forks)

    def run(self, sweep: str, *more: str) -> str:
        """A sweep that ends by itself; what it said."""
        child = self.start(sweep, *more)
        code = child.end()
        assert code == Exit.DONE, child.said
        return child.said

    def results(self, sweep: str) -> dict[str, dict[str, bytes]]:
        cells = sorted((self.tiny.folder / sweep / "cells").iterdir())
        return {cell.name: result(cell) for cell in cells}

    def assert_same(self, sweep: str, expected: dict[str, dict[str, bytes]]) -> None:
        cells = self.tiny.folder / sweep / "cells"
        assert sorted(path.name for path in cells.iterdir()) == sorted(expected)
        for name, files in expected.items():
            assert_same(cells / name, files)


def kill_sweeps(count: int, seed: int) -> Counts:
    """Sweeps killed at random moments, every second one together with its cells, against one that was left alone.

    Every third is killed twice. The same command is given again at once, as a scheduler would.
    """
    chance, survived, lost, resumed = random.Random(seed), 0, [], 0
    with tempfile.TemporaryDirectory(dir=MEMORY) as made:
        sweeps = Sweeps(Tiny.make(Path(made)))
        sweeps.tiny.run(["--help"])  # the server of children is there: how long a sweep takes is measured below
        began = time.monotonic()
        sweeps.run("whole")
        took, expected = time.monotonic() - began, sweeps.results("whole")
        for number in range(count):
            name, how = f"killed-{number}", []
            try:
                for _ in range(2 if number % 3 == 2 else 1):
                    after, cells = chance.uniform(0, took), bool(number % 2)
                    how.append(f"killed {'with its cells ' if cells else ''}after {after:.3f} s")
                    child = sweeps.start(name)
                    time.sleep(after)
                    kill(child, cells, chance)
                said = sweeps.run(name)
                assert "4 of 4 cells complete" in said
                resumed += "to be resumed" in said
                sweeps.assert_same(name, expected)
                survived += 1
            except LOSSES as error:
                lost.append(f"{', '.join(how)}: {error!r}")
    return Counts(count, survived, tuple(lost), f"{resumed} with a cell to be resumed")


def kill(child: children.Child, cells: bool, chance: random.Random) -> None:
    """Kills a sweep, with its cells in any order if ``cells``."""
    with contextlib.suppress(psutil.NoSuchProcess):
        found = psutil.Process(child.pid).children(recursive=True) if cells else []
        _kill_all(chance.sample([psutil.Process(child.pid), *found], len(found) + 1))
    child.end()


def _kill_all(processes: Iterable[psutil.Process]) -> None:
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()


FAULTS = {"sweeps killed at random": kill_sweeps}
