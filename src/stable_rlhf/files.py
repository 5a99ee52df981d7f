"""Files that are written whole or not at all, strict JSON, and recognising a full disk."""

from __future__ import annotations

import errno
import json
import math
import os
import re
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

ASSETS = Path(__file__).parent / "assets"
"""Files that ship with the package: the built-in policy, reward model and prompts, and the report's template."""

NO_ROOM = {
    errno.ENOSPC: "make room there",
    errno.EDQUOT: "free some of your quota there",
    errno.EFBIG: "raise the limit on the length of a file (ulimit -f)",
}


def error_number(error: BaseException) -> int | None:
    """The system's error number of a disk error; None for any other error."""
    if isinstance(error, OSError):
        return error.errno or 0
    if isinstance(error, SafetensorError) and (match := re.search(r"\(os error ([0-9]+)\)", str(error))):
        return int(match[1])  # safetensors gives it only in the text
    return None


def parsed(content: bytes) -> Any:
    """Strict JSON. Raises ValueError for anything else, including endless nesting and numbers that are not finite."""
    try:
        return json.loads(content, parse_float=finite, parse_constant=finite)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def finite(number: str) -> float:
    """`number` as json.loads's parse_float and parse_constant: strict JSON has no NaN or Infinity, nor 1e999."""
    if not math.isfinite(float(number)):
        raise ValueError(f"{number} is not a finite number")
    return float(number)


def replace_text(path: Path, text: str) -> None:
    """Writes a small file whole or not at all: after a kill or on a full disk the old file is intact."""
    replace_file(path, partial(Path.write_text, data=text, encoding="utf-8", newline="\n"))


def replace_file(path: Path, write: Callable[[Path], object]) -> None:
    """Writes next to `path`, forces the data to disk, then renames: a reader sees the old file or the new one, and so
    does a resume after a kill."""
    aside = path.with_name(path.name + ".tmp")
    write(aside)
    with aside.open("rb") as file:
        os.fsync(file.fileno())
    os.replace(aside, path)


def existing(folder: Path) -> Path:
    """The folder, or its nearest parent that exists."""
    return next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())


def unwritable(folder: Path) -> str | None:
    """The reason why nothing can be written into a folder (or its nearest parent that exists). None if it is writable,
    or only lacks space."""
    try:
        with tempfile.TemporaryFile(dir=existing(folder)):
            return None
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            return None
        return f"{existing(folder)} cannot be written to ({error.strerror})"
