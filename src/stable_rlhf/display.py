"""Text of models, data sets, settings and errors, made safe to look at: on a terminal, in a log, in the report.

Standard library only. Everything that such text could do beside showing (colour a terminal, set its title, fill the
clipboard, turn the writing direction, cover other lines) needs one of the characters that `visible` writes as escapes.
"""

from __future__ import annotations

import io
import logging
import sys
import traceback
import unicodedata
import warnings
from collections.abc import Iterator
from types import TracebackType
from typing import Any

MARKS = 8
"""Combining marks that are shown on one character: Tibetan, which stacks most, has 8 on its largest; a flood of them
covers the lines above and below."""
QUOTED = 80
"""Characters of a value that an error message repeats: one terminal line."""
TRACEBACK = 20_000
"""Characters shown of each end of a traceback: its first and its last frames, whatever is in the message."""
_formatwarning = warnings.formatwarning


def visible(text: str, newline: str = "\n") -> str:
    """`text` with every character that could act instead of show written as an escape; newlines become `newline`.

    Escaped are Unicode's categories C* (controls, format characters such as bidi overrides and zero-width ones,
    surrogates, private and unassigned code points), the line and paragraph separators, and combining marks after the
    MARKS-th in a row.
    """
    return "".join(_pieces(text, newline))


def printable(text: str, limit: int) -> str:
    """`text` on one line, safe on a terminal, at most `limit` characters; a shortened text ends in an ellipsis.

    Newlines show as a return mark, the rest as in `visible`; an escape is never cut in two. The result is plain text:
    hand it to rich as `rich.text.Text`, never as markup. Raises ValueError when limit < 1.
    """
    if limit < 1:
        raise ValueError(f"limit is {limit}: it must be 1 or more")
    shown, taken = _first(text, limit, "⏎")
    return shown if taken == len(text) else _first(text, limit - 1, "⏎")[0] + "…"


def excerpt(text: str, limit: int) -> str:
    """`visible` text of at most `limit` characters, and how many more there are. Costs no more for a longer text."""
    shown, taken = _first(text, limit, "\n")
    return shown if taken == len(text) else f"{shown}… ({len(text) - taken} more characters)"


def ends(text: str, limit: int) -> str:
    """`visible` text, the middle left out where it has more than about `limit` characters."""
    if len(text) > limit:
        text = f"{text[: limit // 2]} ... {text[-(limit // 2) :]}"
    return visible(text)


def quoted(value: object) -> str:
    """repr() of a value, which escapes control characters; of a long one the middle is left out."""
    text = repr(value)
    return text if len(text) <= QUOTED else f"{text[: QUOTED - 4]}...{text[-1]}"


def valid_unicode(text: str) -> str:
    """`text` as any file and tool can hold it: a pair of surrogates becomes the character it stands for, a lone one
    U+FFFD."""
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


def clipped(text: str, limit: int) -> str:
    """`valid_unicode` text, at most its first `limit` characters, and how many more there were."""
    text = valid_unicode(text)
    return text if len(text) <= limit else f"{text[:limit]}… ({len(text) - limit} more characters)"


def protect_terminal() -> None:
    """For a command: whatever this process writes to its terminal beside its own lines shows and does not act.

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


def _first(text: str, limit: int, newline: str) -> tuple[str, int]:
    """(the visible beginning of `text` that fits `limit` characters, characters of `text` in it)."""
    shown, length = [], 0
    for taken, piece in enumerate(_pieces(text, newline)):
        if (length := length + len(piece)) > limit:
            return "".join(shown), taken
        shown.append(piece)
    return "".join(shown), len(text)


def _pieces(text: str, newline: str) -> Iterator[str]:
    """What shows for each character of `text`."""
    marks = 0
    for character in text:
        category = unicodedata.category(character)[0]
        marks = marks + 1 if category == "M" else 0
        if character == "\n":
            yield newline
        elif category == "C" or character in "\u2028\u2029" or marks > MARKS:
            yield character.encode("unicode_escape").decode("ascii")
        else:
            yield character
