"""The lines that doctor prints."""

from __future__ import annotations

from collections.abc import Callable

from stable_rlhf.text import ends

LINE = 600
"""Most characters of a line, because a reward's or an error's text may have any length."""


class Findings:
    """Prints the lines as they come, and remembers whether a check failed."""

    def __init__(self, say: Callable[[str], object] = print) -> None:
        self._say = say
        self.failed = False

    def ok(self, text: str) -> None:
        self._line("ok", text)

    def warning(self, text: str) -> None:
        self._line("warning", text)

    def fail(self, text: str) -> None:
        self.failed = True
        self._line("failed", text)

    def detail(self, text: str) -> None:
        self._line("", text)

    def _line(self, verdict: str, text: str) -> None:
        self._say(f"{verdict:<9}{ends(' '.join(text.split()), LINE)}")
