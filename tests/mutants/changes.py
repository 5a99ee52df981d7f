"""The list of changed source lines, and how one is made."""

from __future__ import annotations

import re
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import yaml

LISTS = Path(__file__).parent
ROOT = LISTS.parents[1]


@dataclass(frozen=True, kw_only=True)
class Change:
    """A mistake that an engineer might make in one place, and the tests that notice it."""

    file: str
    """The changed file, from the root of the repository."""
    was: str
    """The text as it is; it occurs once in the file."""
    becomes: str
    """The text that takes its place."""
    tests: tuple[str, ...] = ()
    """What pytest is given: files, or ``file::test``. Empty only where ``equivalent`` says why."""
    equivalent: str = ""
    """Why no test can notice the change. Such a change is counted and not tried."""

    @property
    def area(self) -> str:
        """The folder of the package, or the file's own name where it is in none: ``control``, ``files``."""
        return Path(self.file).relative_to("src/stable_rlhf").parts[0].removesuffix(".py")

    def apply(self, source: str) -> str:
        """The changed source. Raises ValueError where ``was`` does not occur exactly once."""
        if (count := source.count(self.was)) != 1:
            raise ValueError(f"{self.file}: {self.was!r} occurs {count} times; make it occur once")
        return source.replace(self.was, self.becomes)

    def __str__(self) -> str:
        was, becomes = (re.sub(r"\s+", " ", text).strip() for text in (self.was, self.becomes))
        return f"{self.file}: {was}  ->  {becomes or '(removed)'}  [{' '.join(self.tests)}]"


def load() -> list[Change]:
    """All changes of all lists. Raises ValueError for an entry with a key missing, unknown or of another type."""
    return [change(entry, path.name) for path in sorted(LISTS.glob("*.yaml")) for entry in entries(path)]


def entries(path: Path) -> list[Any]:
    return yaml.load(path.read_text(), Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))  # noqa: S506 - both safe


def change(entry: Any, where: str) -> Change:
    """An entry as a record. ``where``: the list's name, for errors."""
    if not isinstance(entry, dict):
        raise ValueError(f"{where}: {entry!r} is not a mapping")
    if unknown := entry.keys() - {field.name for field in fields(Change)}:
        raise ValueError(f"{where}: unknown {sorted(unknown)} in {entry!r}")
    if missing := {"file", "was", "becomes"} - entry.keys():
        raise ValueError(f"{where}: {sorted(missing)} missing in {entry!r}")
    tests = entry.get("tests", [])
    texts = [value for name, value in entry.items() if name != "tests"]
    if not isinstance(tests, list) or not all(isinstance(text, str) for text in [*texts, *tests]):
        raise ValueError(f"{where}: a text is not a text, or tests is not a list of texts, in {entry!r}")
    return Change(**{**entry, "tests": tuple(tests)})
