"""The console: one line on stderr, the progress bar, and protection of the terminal from text that it shows."""

from __future__ import annotations

import io
import logging
import math
import sys
import time
import traceback
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from types import TracebackType
from typing import Any

import rich.progress
from rich.console import Console
from rich.text import Text

from stable_rlhf.control import observed_kl
from stable_rlhf.text import ends, formatted, visible, without_secrets

TRACEBACK = 20_000
"""Characters shown of each end of a traceback: its first and last frames, however long the message is."""

_formatwarning = warnings.formatwarning


def protect_terminal() -> None:
    """For a command: makes everything else that this process writes to its terminal harmless.

    That is tracebacks, Python's warnings and every library's log lines, which quote models' settings and data. A
    character that the terminal's encoding lacks is written as an escape, instead of ending the run.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    sys.excepthook = _show_error
    warnings.formatwarning = lambda *arguments, **named: ends(_formatwarning(*arguments, **named), TRACEBACK)
    logging.setLogRecordFactory(_LogRecord)


class _LogRecord(logging.LogRecord):
    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        if self.exc_info and self.exc_info[0]:
            self.exc_text = ends("".join(traceback.format_exception(*self.exc_info)).rstrip(), TRACEBACK)

    def getMessage(self) -> str:
        return ends(super().getMessage(), TRACEBACK)


def _show_error(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> Any:
    sys.stderr.write(ends("".join(traceback.format_exception(kind, error, trace)), 2 * TRACEBACK))


PLAIN_LINES = 20  # at most, per run: a log file stays readable


class Progress:
    """A progress bar on a terminal, or about PLAIN_LINES plain lines if stdout is not a terminal. A context manager.

    `total` and `first_step` count rollouts (a resumed run starts its bar at `first_step`). `clock` gives seconds.
    """

    def __init__(
        self, total: int, *, first_step: int = 0, console: Console | None = None, clock: Any = time.monotonic
    ) -> None:
        if not 0 <= first_step <= total:
            raise ValueError(f"first_step is {first_step}: it must lie in 0..{total} (total)")
        self.total, self.first_step, self.clock = total, first_step, clock
        self.console = console or Console()
        self.started = clock()
        self._every = max(1, math.ceil((total - first_step) / (PLAIN_LINES - 2)))  # two more: the first and the last
        self._bar: rich.progress.Progress | None = None

    def __enter__(self) -> Progress:
        self.started = self.clock()
        # On a quiet console a bar would swallow what is written to the terminal, and show nothing itself.
        if self.console.is_terminal and not self.console.is_dumb_terminal and not self.console.quiet:
            self._bar = bar = rich.progress.Progress(
                rich.progress.TextColumn("{task.completed:.0f}/{task.total:.0f} steps", markup=False),
                rich.progress.BarColumn(bar_width=12),  # the rest fits next to it in 80 columns
                rich.progress.TextColumn("{task.description}", markup=False),
                rich.progress.TimeRemainingColumn(),
                console=self.console,
                redirect_stderr=False,  # what a person must know of stays there, and in a file that it may go to
            )
            self._task = bar.add_task("", total=self.total, completed=self.first_step)
            bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def update(self, row: Mapping[str, Any]) -> None:
        """Shows the row of metrics.jsonl that was just written. A metric that is missing shows as a dash."""
        done, figures = row["step"] + 1, _figures(row)
        if self._bar is not None:
            self._bar.update(self._task, completed=done, description=figures)
        elif done in (self.first_step + 1, self.total) or (done - self.first_step) % self._every == 0:
            left = (self.clock() - self.started) / (done - self.first_step) * (self.total - done)
            line = f"{done}/{self.total} steps  {figures}  left {timedelta(seconds=round(left))}"
            self.console.print(Text(line), soft_wrap=True)


def _figures(row: Mapping[str, Any]) -> str:
    kl = formatted(observed_kl(row), ".3f")
    if row.get("safe/threshold") is not None:
        kl += f" / {row['safe/threshold']:.3f}"
    reward, entropy = formatted(row.get("objective/scores"), ".3f"), formatted(row.get("objective/entropy"), ".2f")
    return f"reward {reward}  KL {kl}  entropy {entropy}"


@contextmanager
def said_if_lost(sentence: object) -> Iterator[None]:
    """Prints ``sentence`` if the block fails. The block, such as a save, runs before an error with that sentence is
    raised; if it fails with another error, the sentence would be lost."""
    try:
        yield
    except BaseException:
        tell(str(sentence))
        raise


def tell(sentence: str) -> None:
    """Prints one line on stderr even if ``log.progress`` is off: for messages that a user must see. URLs are shown
    without their secrets."""
    print(visible(without_secrets(sentence), newline=" "), file=sys.stderr, flush=True)
