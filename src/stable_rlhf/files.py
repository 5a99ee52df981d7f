"""Files that are written whole or not at all, strict JSON, and a full disk told apart."""

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
"""What ships with the package: the built-in policy, reward model and prompts, and the report's template."""

NO_ROOM = {
    errno.ENOSPC: "make room there",
    errno.EDQUOT: "free some of your quota there",
    errno.EFBIG: "raise the limit on the length of a file (ulimit -f)",
}


def error_number(error: BaseException) -> int | None:
    """The system's number for an error of the disk; None for any other error."""
    if isinstance(error, OSError):
        return error.errno or 0
    if isinstance(error, SafetensorError) and (match := re.search(r"\(os error ([0-9]+)\)", str(error))):
        return int(match[1])  # which safetensors has in the text alone
    return None


def parsed(content: bytes) -> Any:
    """Strict JSON. ValueError for anything else, nesting without end and numbers that are not finite included."""
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
    """Writes a small file whole or not at all: a kill or a full disk leaves what it was before."""
    replace_file(path, partial(Path.write_text, data=text, encoding="utf-8", newline="\n"))


def replace_file(path: Path, write: Callable[[Path], object]) -> None:
    """Write beside `path`, force to disk, then rename: a reader or a kill sees the old file or the new one."""
    aside = path.with_name(path.name + ".tmp")
    write(aside)
    with aside.open("rb") as file:
        os.fsync(file.fileno())
    os.replace(aside, path)


def existing(folder: Path) -> Path:
    """The folder, or the nearest above it that is there."""
    return next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())


def unwritable(folder: Path) -> str | None:
    """Why nothing can be written into a folder, or into the nearest above it that is there; None where it can be, or
    could be if there were room."""
    try:
        with tempfile.TemporaryFile(dir=existing(folder)):
            return None
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            return None
        return f"{existing(folder)} cannot be written to ({error.strerror})"
