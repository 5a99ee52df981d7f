"""The `--help` and `--help-all` of commands that take settings."""

from __future__ import annotations

from stable_rlhf.config import HELP, HELP_ALL, help_text
from stable_rlhf.errors import Exit


def asks_for_help(arguments: list[str]) -> bool:
    return any(name in arguments for name in (*HELP, HELP_ALL))


def show_settings(command: str, arguments: list[str]) -> int:
    """Prints the settings that are asked for, as `help_text` has them."""
    print(help_text(arguments, command), end="")
    return Exit.DONE
