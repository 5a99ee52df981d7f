"""SIGINT and SIGTERM, which end a run after the step in progress."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator
from types import FrameType
from typing import Any

from stable_rlhf.errors import Interrupted, RewardUnavailable
from stable_rlhf.user_code import ours_only

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class GracefulStop:
    """Turns SIGINT and SIGTERM into Interrupted inside the context.

    Inside ``waiting`` a signal waits for the end of the step in progress, and stderr says so at once; a second one
    raises KeyboardInterrupt at once if it is SIGINT. Processes forked inside the context get the handlers from before
    it. Only the main thread can have signal handlers: in any other thread this does nothing.
    """

    def __init__(self) -> None:
        self.signum: int | None = None
        """The signal that came."""
        self._waits = False
        self._before: dict[signal.Signals, Any] = {}
        self._ours = contextlib.ExitStack()

    def asked(self) -> bool:
        """Whether a signal waits for the end of the step in progress, so that nothing else should be waited for."""
        return bool(self._before) and self.signum is not None

    def __enter__(self) -> GracefulStop:
        self.signum = None
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.getsignal(number) for number in SIGNALS}
            self._ours.enter_context(ours_only(self._before))
            for number in SIGNALS:
                signal.signal(number, self._note)
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._ours.close()
        self._before = {}

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Makes signals wait, so that no step is cut in two: look at ``signum`` after each step.

        On leaving, Interrupted is raised for a signal that nobody has looked at, also where a step ended early because
        a reward server gave no scores.
        """
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
        again = "; Ctrl-C again to stop now, without a checkpoint" if signum == signal.SIGINT else ""
        # Not `tell`: the signal may have come in the middle of another write to stderr, which cannot be entered twice.
        # Where stderr is no file, as in a notebook, or is closed, the run stops all the same.
        with contextlib.suppress(OSError, ValueError):
            os.write(sys.stderr.fileno(), f"stopping after this step, with a checkpoint{again}\n".encode())
