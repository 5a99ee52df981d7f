"""How a run ends from outside, and that it is alone: signals that wait for the step's end, and the run's lock."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

from filelock import FileLock, Timeout

from stable_rlhf.answers import RewardUnavailable
from stable_rlhf.config import ConfigError

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupted(KeyboardInterrupt):
    """A signal ended the run. ``signum``: which; what was done is in its last checkpoint."""

    def __init__(self, signum: int) -> None:
        super().__init__(f"stopped by {signal.Signals(signum).name}")
        self.signum = signum


class GracefulStop:
    """Inside, SIGINT and SIGTERM raise Interrupted; inside ``waiting`` they wait for the end of the step in hand, and
    only a second one that is SIGINT raises KeyboardInterrupt at once.

    A thread other than the main one cannot have signals' handlers: there it does nothing.
    """

    def __init__(self) -> None:
        self.signum: int | None = None
        """The signal that came."""
        self._waits = False
        self._before: dict[signal.Signals, Any] = {}

    def asked(self) -> bool:
        """Whether a signal waits for the end of the step in hand: what cannot be had now is then not waited for."""
        return bool(self._before) and self.signum is not None

    def __enter__(self) -> GracefulStop:
        self.signum = None
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._note) for number in SIGNALS}
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Where a step must not be cut in two: inside, look at ``signum`` after each. On leaving, Interrupted is raised
        for a signal that nobody has looked at, also where a step ended early for want of a reward server."""
        self._waits = True
        try:
            yield
        except RewardUnavailable as error:
            if self.signum is not None:
                raise Interrupted(self.signum) from error
            raise
        finally:
            self._waits = False
        if self.signum is not None:
            raise Interrupted(self.signum)

    def _note(self, signum: int, frame: FrameType | None) -> None:
        if self.signum is not None and signum == signal.SIGINT:
            raise KeyboardInterrupt
        self.signum = signum
        if not self._waits:
            raise Interrupted(signum)


class RunLock:
    """One process to a run folder: the system takes the lock from a process that dies, whatever it dies of."""

    def __init__(self, run_dir: Path) -> None:
        self._owner = run_dir / ".owner.json"
        self._lock = FileLock(run_dir / ".lock")

    def take(self) -> None:
        """Raises ConfigError, with the owner, while another process has it. Taking it twice is taking it once."""
        if self._lock.is_locked:
            return
        self._owner.parent.mkdir(parents=True, exist_ok=True)
        try:
            self._lock.acquire(timeout=0)
        except Timeout as error:
            raise ConfigError(
                f"output_dir={str(self._owner.parent)!r}: is in use by {self._who()}; wait for it, stop it, or choose "
                "another folder"
            ) from error
        now = time.strftime("%Y-%m-%d %H:%M:%S")
        self._owner.write_text(json.dumps({"pid": os.getpid(), "host": socket.gethostname(), "since": now}))

    def check(self) -> None:
        """Raises ConfigError, with the owner, while another process has it; nothing is left of the asking."""
        if self._owner.exists():  # or nobody trains here, and there may be no folder yet
            self.take()
            self.release()

    def release(self) -> None:
        if self._lock.is_locked:
            self._owner.unlink(missing_ok=True)
            self._lock.release()

    def _who(self) -> str:
        try:
            owner = json.loads(self._owner.read_text())
            return f"process {owner['pid']} on {owner['host']}, training since {owner['since']}"
        except (OSError, ValueError, KeyError, TypeError):  # it is only just beginning, or not ours to read
            return "another process"
