"""The folder of a watched log: its rows and incidents as a run has them, so that `report` and `compare` read it."""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from stable_rlhf.config import read_settings, settings_text
from stable_rlhf.errors import ConfigError, NoRoomError, SaveError
from stable_rlhf.files import NO_ROOM, replace_text
from stable_rlhf.runs import MetricsWriter, RunLock, incidents

ROWS = ("metrics.jsonl", "timings.jsonl", incidents.FILE)

WRITTEN = (*ROWS, "config.yaml", "report.html")


class WatchFolder:
    """Writes metrics.jsonl, timings.jsonl, incidents.jsonl and config.yaml. One process at a time.

    What an earlier `watch` wrote there is replaced: it can be made again from its log. Raises ConfigError for a folder
    in which somebody else has such files, for that of the log itself, and for one that is in use or cannot be written.
    """

    def __init__(self, folder: Path, log: Path) -> None:
        self.path = folder
        if os.path.realpath(log) in [os.path.realpath(path) for path in (folder, *(folder / name for name in WRITTEN))]:
            raise ConfigError(f"--out={str(folder)!r}: has the log itself; choose another folder")
        there = [name for name in WRITTEN if os.path.lexists(folder / name)]
        if there and not _is_watched(folder):
            raise ConfigError(
                f"--out={str(folder)!r}: has a {there[0]} that `watch` did not write; choose another folder"
            )
        self._lock = RunLock(folder, "--out")
        self._lock.take()
        self._writer: MetricsWriter | None = None

    def begin(self, config: Mapping[str, Any]) -> None:
        """Begins the folder, or begins it anew."""
        with self._saving():
            for name in ROWS:
                (self.path / name).unlink(missing_ok=True)
            replace_text(self.path / "config.yaml", settings_text(config))
            self._writer = MetricsWriter(self.path)

    def add(self, row: Mapping[str, Any], timing: Mapping[str, Any]) -> None:
        """Writes a row. A figure that is not finite has no value there; the incident has it."""
        assert self._writer is not None
        with self._saving():
            self._writer.write(_finite(row), _finite(timing))

    def add_incident(self, incident: Mapping[str, Any]) -> None:
        with self._saving():
            incidents.append(self.path, incident)

    def close(self) -> None:
        """Releases the folder."""
        self._lock.release()

    @contextlib.contextmanager
    def _saving(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            remedy = NO_ROOM.get(error.errno or 0)
            what = f"{self.path} could not be written: {error.strerror or error}; {remedy or 'fix that'}"
            raise (SaveError if remedy is None else NoRoomError)(what) from error


def _is_watched(folder: Path) -> bool:
    try:
        return isinstance(read_settings(folder / "config.yaml").get("watched"), Mapping)
    except ConfigError:
        return False


def _finite(row: Mapping[str, Any]) -> dict[str, Any]:
    return {
        name: None if isinstance(value, float) and not math.isfinite(value) else value for name, value in row.items()
    }
