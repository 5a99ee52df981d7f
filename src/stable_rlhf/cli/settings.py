"""The `--help` of commands that take settings."""

from __future__ import annotations

from stable_rlhf.config import help_text
from stable_rlhf.errors import Exit


def asks_for_help(arguments: list[str]) -> bool:
    return "-h" in arguments or "--help" in arguments


def show_settings(command: str, arguments: list[str]) -> int:
    """Prints every setting, with the defaults of the preset and the controller that the arguments name."""
    print(help_text(arguments, command), end="")
    return Exit.DONE
