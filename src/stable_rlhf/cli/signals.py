"""Signals that end a command which waits, and not its process."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Callable, Iterator


@contextlib.contextmanager
def noted_signals(act: Callable[[], object]) -> Iterator[list[int]]:
    """Gives the list of the SIGINT and SIGTERM that come within it; each calls ``act``, and the process goes on."""
    signals = list[int]()

    def note(number: int, frame: object) -> None:
        signals.append(number)
        act()

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield signals
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
