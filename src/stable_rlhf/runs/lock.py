"""The lock of a run folder: one process at a time."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import time
from pathlib import Path

from filelock import FileLock, Timeout

from stable_rlhf.errors import ConfigError
from stable_rlhf.runs.output import check_writable


class RunLock:
    """The lock of a run folder. The system releases it when its process ends, however it ends."""

    def __init__(self, run_dir: Path) -> None:
        self._owner = run_dir / ".owner.json"
        self._lock = FileLock(run_dir / ".lock")

    def take(self) -> None:
        """Takes the lock; a second call does nothing. Raises ConfigError if another process has it (naming that
        process), and for a folder that is not writable."""
        if self._lock.is_locked:
            return
        check_writable(self._owner.parent)
        self._owner.parent.mkdir(parents=True, exist_ok=True)
        try:
            self._lock.acquire(timeout=0)
        except Timeout as error:
            raise ConfigError(
                f"output_dir={str(self._owner.parent)!r}: is in use by {self._who()}; wait for it, stop it, or choose "
                "another folder"
            ) from error
        now = time.strftime("%Y-%m-%d %H:%M:%S")
        with contextlib.suppress(OSError):  # only for the sentence that names the process; the lock is taken
            self._owner.write_text(json.dumps({"pid": os.getpid(), "host": socket.gethostname(), "since": now}))

    def check(self) -> None:
        """Raises ConfigError, naming the process, if another one has the lock. Leaves no trace."""
        if self._owner.exists():  # or nobody trains here, and there may be no folder yet
            self.take()
            self.release()

    def held_elsewhere(self) -> bool:
        """Whether another process is training in the folder."""
        if not self._owner.exists():
            return False
        try:
            self._lock.acquire(timeout=0)
        except Timeout:
            return True
        except PermissionError:  # the run of another user, of which only the note can be read
            return True
        self._lock.release()
        return False

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
