"""Make text of models, data sets, settings and errors safe to show: on a terminal, in a log, in the report.

Standard library only. Text can do more than show: colour a terminal, set its title, fill the clipboard, turn the
writing direction, cover other lines. All of these need one of the characters that `visible` writes as escapes.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator

MARKS = 8
"""Combining marks that are shown on one character. Tibetan, which stacks the most, has up to 8; many more would cover
the lines above and below."""

QUOTED = 80
"""Characters of a value that an error message repeats: one terminal line."""


_URL = re.compile(r"""([a-z][a-z0-9+.-]*://)((?:[^\s'"]|['"](?![\s,;:.)\]}]|$))*)""", re.IGNORECASE)
"""A URL in a text. A quotation mark ends it only before punctuation or white space: a query can hold one."""

_HOST = re.compile(r"([^:]*|\[.*\])(:\d*)?")
_PUNCTUATION = re.compile(r"[.,;:)\]}]*$")
"""The sentence's, after a URL."""


def visible(text: str, newline: str = "\n") -> str:
    """`text` with every character that could act on a terminal written as an escape; newlines become `newline`.

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
    """At most `limit` characters of `visible` text, and the number of those left out. The cost does not depend on the
    length of the text."""
    shown, taken = _first(text, limit, "\n")
    return shown if taken == len(text) else f"{shown}… ({counted(len(text) - taken, 'more character')})"


def ends(text: str, limit: int) -> str:
    """`visible` text. If it has more than about `limit` characters, the middle is left out."""
    if len(text) > limit:
        text = f"{text[: limit // 2]} ... {text[-(limit // 2) :]}"
    return visible(text)


def quoted(value: object) -> str:
    """repr() of a value, which escapes control characters. The middle of a long one is left out."""
    text = repr(value)
    return text if len(text) <= QUOTED else f"{text[: QUOTED - 4]}...{text[-1]}"


def without_secrets(text: str) -> str:
    """`text` with every URL in it cut to scheme, host, port and path: its name, password and query may be secret."""
    return _URL.sub(_shown_url, text)


def _shown_url(match: re.Match[str]) -> str:
    scheme, rest = match.groups()
    address = re.split(r"[?#]", rest, maxsplit=1)[0]
    host = address.partition("/")[0]
    if "@" in host:
        address = address[host.rindex("@") + 1 :]
    elif not _HOST.fullmatch(host):  # what follows its colon is not a port, but a password with one of / ? #
        address = (address if "@" in address else rest).rpartition("@")[2] if "@" in rest else host.partition(":")[0]
    end = "" if address == rest else _PUNCTUATION.search(rest)
    return f"{scheme}{address.removesuffix(end[0])}{end[0]}" if end else f"{scheme}{address}"


def valid_unicode(text: str) -> str:
    """`text` in a form that any file and tool can hold: a pair of surrogates becomes its character, a single one
    U+FFFD."""
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


def clipped(text: str, limit: int) -> str:
    """At most the first `limit` characters of `valid_unicode` text, and the number of those left out."""
    text = valid_unicode(text)
    return text if len(text) <= limit else f"{text[:limit]}… ({counted(len(text) - limit, 'more character')})"


def _first(text: str, limit: int, newline: str) -> tuple[str, int]:
    """(the visible beginning of `text` that fits `limit` characters, characters of `text` in it)."""
    shown, length = [], 0
    for taken, piece in enumerate(_pieces(text, newline)):
        if (length := length + len(piece)) > limit:
            return "".join(shown), taken
        shown.append(piece)
    return "".join(shown), len(text)


def _pieces(text: str, newline: str) -> Iterator[str]:
    """The visible form of each character of `text`."""
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


def readable_size(size: float) -> str:
    """Bytes in GB, MB or kB, with three digits: 1 GB is 10^9."""
    for unit, factor in (("GB", 1e9), ("MB", 1e6)):
        if size >= factor:
            return f"{size / factor:.3g} {unit}"
    return f"{size / 1e3:.3g} kB"


def counted(count: int, noun: str) -> str:
    """A number with its noun: 1 step, 2 steps."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def kind_of(value: object) -> str:
    """The type of a value with its article: an int, a list, None."""
    name = type(value).__name__
    return "None" if value is None else f"{'an' if name[0].lower() in 'aeiou' else 'a'} {name}"


def formatted(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)
