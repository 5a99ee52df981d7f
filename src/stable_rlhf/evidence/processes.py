"""Cells as processes of this machine. They end with the sweep, however it ends."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

from stable_rlhf.evidence.devices import Place

COMMAND = (sys.executable, "-P", "-m", "stable_rlhf")
"""The command line of the running package. -P: as with the installed command, no file of the present folder shadows an
installed package."""

_PR_SET_PDEATHSIG = 1
"""prctl(2): the signal that a process gets when the one that started it ends."""


class Job(Protocol):
    """A cell that was started."""

    def poll(self) -> int | None:
        """The exit code, minus the number of the signal that killed it; None while it runs."""
        ...

    def send_signal(self, number: int, /) -> None: ...


class Launcher(Protocol):
    """Starts cells."""

    places: Sequence[Place]
    """One cell runs at each at a time."""

    def start(self, arguments: list[str], place: Place, log: Path) -> Job:
        """Starts a command of stable-rlhf; what it writes is appended to ``log``."""
        ...


class Processes:
    """Cells as processes. Start them from the main thread: the system ends them with the thread that started them."""

    def __init__(self, places: Sequence[Place], command: Sequence[str] = COMMAND) -> None:
        self.places, self.command = places, command

    def start(self, arguments: list[str], place: Place, log: Path) -> Job:
        # Unbuffered, so that the last line of the log is the last that was written.
        environment = {**os.environ, **place.environment, "PYTHONUNBUFFERED": "1"}
        with log.open("ab") as file:
            return subprocess.Popen(
                [*self.command, *arguments],
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                env=environment,
                # Ctrl-C in a terminal reaches the sweep alone, which passes it on: a cell that got it twice would stop
                # without a checkpoint.
                start_new_session=True,
                preexec_fn=ends_with(os.getpid()),
            )


def ends_with(parent: int) -> Callable[[], None]:
    """What a new process calls so that it is killed when ``parent`` ends: a cell that went on would be in the way of
    the sweep that is started next. Where the system is not Linux it does nothing."""
    library = ctypes.CDLL(None) if sys.platform == "linux" else None

    def bind() -> None:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, (signal.SIGINT, signal.SIGTERM))  # Ray's workers block SIGINT
        if library is not None:
            library.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
            if os.getppid() != parent:  # it ended before this was asked for
                os._exit(128 + signal.SIGKILL)

    return bind


def send(job: Job, number: int) -> None:
    """Sends a signal to a cell, which may have ended."""
    with contextlib.suppress(ProcessLookupError):
        job.send_signal(number)
