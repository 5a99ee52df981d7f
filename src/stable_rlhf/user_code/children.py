"""Processes that user code forks: they have the signal handlers from before the run, and end where they began."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import traceback
from collections.abc import Iterator, Mapping
from typing import Any

_handlers: list[Mapping[signal.Signals, Any]] = []
"""For each run in this process: the signals that it handles, with the handlers from before it."""

_forking = threading.local()
"""The signal mask of the thread that forks."""


@contextlib.contextmanager
def ours_only(before: Mapping[signal.Signals, Any]) -> Iterator[None]:
    """Keeps this process's signal handlers from its children, inside the context.

    ``before``: signal -> the handler that a forked child gets. A child that kept the run's, which only take note of a
    signal, could not be ended by it: ``Process.terminate()`` and ``Pool`` would wait forever.
    """
    _handlers.append(before)
    try:
        yield
    finally:
        if before in _handlers:  # not in a child
            _handlers.remove(before)


def _before() -> None:
    # A signal that reaches the child before it has its own handlers must not be lost: Python drops what is pending.
    numbers = {number for before in _handlers for number in before}
    _forking.mask = signal.pthread_sigmask(signal.SIG_BLOCK, numbers)


def _in_parent() -> None:
    signal.pthread_sigmask(signal.SIG_SETMASK, _forking.mask)


def _in_child() -> None:
    for before in reversed(_handlers):
        for number, handler in before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
    _handlers.clear()
    signal.pthread_sigmask(signal.SIG_SETMASK, _forking.mask)


os.register_at_fork(before=_before, after_in_parent=_in_parent, after_in_child=_in_child)


@contextlib.contextmanager
def children_end_here() -> Iterator[None]:
    """Ends a child that was forked inside the context and leaves it: by a return, ``sys.exit()`` or an exception.

    It would go on as a second run in the same folder, or remove what the run needs on its way out.
    """
    parent, code = os.getpid(), 0
    try:
        yield
    except BaseException as error:
        if os.getpid() == parent:
            raise
        code = 1
        if isinstance(error, SystemExit):
            code = error.code if isinstance(error.code, int) else int(error.code is not None)
        else:
            traceback.print_exc()
    if os.getpid() != parent:
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(Exception):  # the child ends, whatever its streams are
                stream.flush()
        os._exit(code)
