"""starts.jsonl: when and on which machine a run was started or resumed, one JSON object a line."""

from __future__ import annotations

import datetime
import functools
import hashlib
import json
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from stable_rlhf.errors import RunError
from stable_rlhf.files import parsed, replace_text
from stable_rlhf.text import valid_unicode

FILE = "starts.jsonl"

FIELDS = ("step", "time", "device", "versions", "code", "inputs")
"""Steps done before this start; UTC, ISO 8601; the device in words; versions of PACKAGES; a digest of this package's
source, which changes with an edit where the version does not; digests of data, reward and model, None where unknown."""

PACKAGES = ("stable-rlhf", "torch", "transformers")
"""What figures may depend on."""


def record(run_dir: Path, step: int, device: str, inputs: Mapping[str, str | None]) -> None:
    """Appends a start. One at step 0 begins the file anew: what an earlier try left in the folder was not this run."""
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    start = {
        "step": step,
        "time": now,
        "device": valid_unicode(device),
        "versions": {name: version(name) for name in PACKAGES},
        "code": source_digest(),
        "inputs": dict(inputs),
    }
    path = run_dir / FILE
    before = path.read_text(encoding="ascii") if step and path.exists() else ""
    if before and not before.endswith("\n"):  # a kill tore the last line
        before = before[: before.rfind("\n") + 1]
    replace_text(path, before + json.dumps(start) + "\n")


@functools.cache
def source_digest() -> str:
    """SHA-256 of this package's Python files, by their names."""
    package = Path(__file__).parents[1]
    digest = hashlib.sha256()
    for file in sorted(package.rglob("*.py"), key=lambda file: file.relative_to(package).as_posix()):
        content = file.read_bytes().replace(b"\r\n", b"\n")
        digest.update(f"{file.relative_to(package).as_posix()} {len(content)}\n".encode() + content)
    return digest.hexdigest()


def read(run_dir: Path) -> list[dict[str, Any]]:
    """The starts of a run, oldest first; none for a run of a version that did not record them.

    Raises RunError with file and line for a line that is not a start.
    """
    path = run_dir / FILE
    found = []
    for number, line in enumerate(path.read_bytes().splitlines() if path.exists() else [], start=1):
        try:
            start = parsed(line)
            if not isinstance(start, dict) or not all(isinstance(start.get(name), str) for name in ("time", "device")):
                raise ValueError(f"expected an object with {', '.join(FIELDS)}")
            if not isinstance(start.get("inputs") or {}, dict):
                raise ValueError("`inputs` must be an object")
            datetime.datetime.fromisoformat(start["time"])
        except ValueError as error:
            raise RunError(f"{path}:{number}: not a start ({error}); repair or remove this line") from error
        found.append(start)
    return found
