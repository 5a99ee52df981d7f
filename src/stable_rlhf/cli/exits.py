"""The last line of a command that failed, and its exit code."""

from __future__ import annotations

import sys
from pathlib import Path

from stable_rlhf.text import ends

SHOWN = 1000
"""Characters of an error that are shown: its beginning and its end. Transformers lists every architecture it knows."""


def typed_command() -> str:
    """What the user typed to get here, so that a printed command can be copied: with its path where it has one."""
    return sys.argv[0] if Path(sys.argv[0]).name == "stable-rlhf" else "stable-rlhf"


def say(message: object, code: int) -> int:
    """One line on stderr, with nothing in it that a terminal would act on and the command as it was typed; returns the
    exit code."""
    text = " ".join(str(message).split()).replace("`stable-rlhf ", f"`{typed_command()} ")
    print(f"stable-rlhf: {ends(text, SHOWN)}", file=sys.stderr)
    return code
