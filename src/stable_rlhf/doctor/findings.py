"""The lines that doctor prints."""

from __future__ import annotations

from collections.abc import Callable

from stable_rlhf.text import ends

LINE = 600
"""Characters of a line at most; what a reward or an error says may be of any length."""


class Findings:
    """The lines, printed as they come, and whether a check failed."""

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
