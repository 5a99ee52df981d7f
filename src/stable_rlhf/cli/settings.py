"""The `--help` of commands that take settings."""

from __future__ import annotations

from stable_rlhf.config import parser_for
from stable_rlhf.errors import Exit


def asks_for_help(arguments: list[str]) -> bool:
    return "-h" in arguments or "--help" in arguments


def show_settings(command: str, arguments: list[str]) -> int:
    """Prints every setting, with the defaults of the preset and the controller that the arguments name."""
    made = parser_for(arguments, command)
    if command == "doctor":
        made.description = "The first argument may be a FILE of settings: the same as --config FILE."
    made.print_help()
    return Exit.DONE
