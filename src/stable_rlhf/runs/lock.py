"""The lock of a run folder, or of a sweep's: one process at a time."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import time
from pathlib import Path
from typing import Any

import psutil
from filelock import FileLock, Timeout

from stable_rlhf.errors import ConfigError
from stable_rlhf.runs.output import check_writable

SAME_START = 10.0
"""Seconds within which two start times of a process are one: the system counts them from a clock that may be set. A
number of a process is not given again so soon."""


class RunLock:
    """The lock of a folder. The system releases it when its process ends, however it ends.

    ``setting``: what names the folder, for the messages.
    """

    FILES = (".owner.json", ".lock")
    """The note of who holds it, and the lock itself, which stays in the folder when it is released."""

    def __init__(self, run_dir: Path, setting: str = "output_dir") -> None:
        self._setting = setting
        self._owner, lock = (run_dir / name for name in self.FILES)
        self._lock = FileLock(lock)

    def take(self) -> None:
        """Takes the lock; a second call does nothing. Raises ConfigError if another process has it (naming that
        process), and for a folder that is not writable."""
        if self._lock.is_locked:
            return
        check_writable(self._owner.parent, self._setting)
        self._owner.parent.mkdir(parents=True, exist_ok=True)
        try:
            self._lock.acquire(timeout=0)
        except Timeout as error:
            raise ConfigError(
                f"{self._setting}={str(self._owner.parent)!r}: is in use by {self._who()}; wait for it, stop it, or "
                "choose another folder"
            ) from error
        own = {"pid": os.getpid(), "host": socket.gethostname(), "since": time.strftime("%Y-%m-%d %H:%M:%S")}
        own["started"] = psutil.Process().create_time()
        with contextlib.suppress(OSError):  # only for those who look; the lock is taken
            self._owner.write_text(json.dumps(own))

    def check(self) -> None:
        """Raises ConfigError, naming the process, if another one has the lock. Leaves no trace."""
        if self._owner.exists():  # or nobody trains here, and there may be no folder yet
            self.take()
            self.release()

    def held_elsewhere(self) -> bool:
        """Whether a process is training in the folder, by the note that it leaves there. The lock is not touched: a run
        that begins at this moment would be refused.

        A process of another machine cannot be looked up, and its note is believed.
        """
        try:
            owner = self._noted()
            if owner["host"] != socket.gethostname():
                return True
            process = psutil.Process(owner["pid"])
            is_same = abs(process.create_time() - owner["started"]) < SAME_START
            return is_same and process.status() != psutil.STATUS_ZOMBIE
        except (OSError, ValueError, KeyError, TypeError, psutil.NoSuchProcess):  # no note, or of a killed process
            return False

    def release(self) -> None:
        if self._lock.is_locked:
            self._owner.unlink(missing_ok=True)
            self._lock.release()

    def _noted(self) -> dict[str, Any]:
        return json.loads(self._owner.read_text())

    def _who(self) -> str:
        try:
            owner = self._noted()
            if owner["pid"] == os.getpid() and owner["host"] == socket.gethostname():
                return "this process itself, by a run that was not ended"
            return f"process {owner['pid']} on {owner['host']}, training since {owner['since']}"
        except (OSError, ValueError, KeyError, TypeError):  # it is only just beginning, or not ours to read
            return "another process"
