"""The help of the commands that take settings."""

from __future__ import annotations

from stable_rlhf.config import parser_for
from stable_rlhf.errors import Exit


def asks_for_help(arguments: list[str]) -> bool:
    return "-h" in arguments or "--help" in arguments


def show_settings(command: str, arguments: list[str]) -> int:
    """Every setting, with the defaults of the preset and the controller that are asked for."""
    made = parser_for(arguments, command)
    if command == "doctor":
        made.description = "A FILE in front, without an option's name, is --config FILE."
    made.print_help()
    return Exit.DONE
