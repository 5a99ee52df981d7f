"""What reaches the disk, in its order: flushes and renames of files, for a test to compare with a list."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest


def recorded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A list that grows from now on: "NAME: N bytes flushed" and "NAME -> OTHER", of every flush and every rename."""
    events: list[str] = []
    fsync = os.fsync

    def flushed(opened: int) -> None:
        name = Path(f"/proc/self/fd/{opened}").readlink().name
        events.append(f"{name}: {os.fstat(opened).st_size} bytes flushed")
        fsync(opened)

    def renaming(rename: Any) -> Any:
        def renamed(source: Any, target: Any, **named: Any) -> None:
            events.append(f"{Path(source).name} -> {Path(target).name}")
            rename(source, target, **named)

        return renamed

    monkeypatch.setattr(os, "fsync", flushed)
    monkeypatch.setattr(os, "rename", renaming(os.rename))
    monkeypatch.setattr(os, "replace", renaming(os.replace))
    return events


def as_replaced(path: Path) -> list[str]:
    """The events of one file that was written aside, flushed with all of its content, and only then renamed."""
    aside = path.name + ".tmp"
    return [f"{aside}: {path.stat().st_size} bytes flushed", f"{aside} -> {path.name}"]
