"""Checks of the run's output folder."""

from __future__ import annotations

import shutil
from pathlib import Path

from stable_rlhf.errors import ConfigError
from stable_rlhf.files import unwritable

NAME = 255
"""Most bytes of a file's name on common file systems."""

RUN_FILES = (
    *("config.yaml", "metrics.jsonl", "timings.jsonl", "incidents.jsonl", "evaluation.json", "report.html"),
    "starts.jsonl",
    *("completions", "checkpoints", "snapshot", "final", ".final"),
)
"""Files and folders that a run writes in its folder, the lock excepted."""


def remove_run(folder: Path) -> None:
    """Removes what a run wrote in its folder; other files stay. The caller holds the run's lock.

    The checkpoints go first: without rows they would still be a run that can be resumed.
    """
    for name in sorted(RUN_FILES, key=lambda name: name != "checkpoints"):
        path = folder / name
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def check_output(folder: Path, setting: str = "output_dir") -> None:
    """Raises ConfigError if the folder cannot be made: a name in the path is too long, or a file is in the way."""
    if any(len(part.encode()) > NAME for part in folder.parts):
        raise ConfigError(f"{setting}={str(folder)!r}: has a name of more than {NAME} bytes; choose a shorter one")
    for path in (folder, *folder.parents):
        if path.exists() and not path.is_dir():
            raise ConfigError(f"{setting}={str(folder)!r}: {path} is a file; choose another folder")


def check_writable(folder: Path, setting: str = "output_dir") -> None:
    """Like ``check_output``; also raises ConfigError if the folder cannot be written to."""
    check_output(folder, setting)
    if (fault := unwritable(folder)) is not None:
        raise ConfigError(f"{setting}={str(folder)!r}: {fault}; choose another folder")
