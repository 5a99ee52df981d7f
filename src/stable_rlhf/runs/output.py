"""The folder that a run is given."""

from __future__ import annotations

from pathlib import Path

from stable_rlhf.errors import ConfigError
from stable_rlhf.files import unwritable

NAME = 255
"""Bytes of a file's name, on every file system in use."""


def check_output(folder: Path) -> None:
    """Raises ConfigError for a folder that cannot be made: a name in it is too long, or a file is in its way."""
    if any(len(part.encode()) > NAME for part in folder.parts):
        raise ConfigError(f"output_dir={str(folder)!r}: has a name of more than {NAME} bytes; choose a shorter one")
    for path in (folder, *folder.parents):
        if path.exists() and not path.is_dir():
            raise ConfigError(f"output_dir={str(folder)!r}: {path} is a file; choose another folder")


def check_writable(folder: Path) -> None:
    """As ``check_output``, and raises ConfigError for a folder that cannot be written to."""
    check_output(folder)
    if (fault := unwritable(folder)) is not None:
        raise ConfigError(f"output_dir={str(folder)!r}: {fault}; choose another folder")
