"""The last line of a command that failed, and its exit code."""

from __future__ import annotations

import sys
from pathlib import Path

from stable_rlhf.text import ends

SHOWN = 1000
"""Characters of an error that are shown, from its beginning and its end. Transformers' messages can list every
architecture."""


def typed_command() -> str:
    """The command name as the user typed it, with its path if it had one, so that a printed command can be copied."""
    return sys.argv[0] if Path(sys.argv[0]).name == "stable-rlhf" else "stable-rlhf"


def say(message: object, code: int) -> int:
    """Prints one line on stderr and returns the exit code. Terminal codes are escaped and the command is named as it
    was typed."""
    text = " ".join(str(message).split()).replace("`stable-rlhf ", f"`{typed_command()} ")
    print(f"stable-rlhf: {ends(text, SHOWN)}", file=sys.stderr)
    return code
