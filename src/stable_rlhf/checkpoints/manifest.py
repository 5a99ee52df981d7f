"""The manifest of a checkpoint: every file's name, length and SHA-256, so that damage is noticed.

``manifest.json`` lists every other file and ends with a digest of itself. It has exactly one spelling, byte for byte,
so that any change to it is noticed. The digests find damage; they are not a signature.
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path

from stable_rlhf.files import parsed

VERSION = 6
"""Version of the format of checkpoints; older ones are refused. 1 had no digest of the manifest and no lengths; 2, of
release 0.1.0, did not keep the state in named parts; 3 did not know the prompts, the tokenizer and the rewards by their
content, nor the best evaluation, nor the rewards' own random numbers; 4 did not say that an evaluation had failed,
nor know gold rewards; 5 had another state of the preview, the controllers and the guard."""

NAME = "manifest.json"

LONGEST = 1 << 20
"""Most bytes of a manifest. Ours have about a thousand; it is read before anything is known about it, so its length is
bounded."""


@dataclass(frozen=True)
class Manifest:
    """The files of a checkpoint, and the steps done when it was written."""

    step: int
    """Steps done when the folder was written."""
    files: dict[str, tuple[int, str]]
    """Length in bytes and SHA-256 of every other file, by name."""

    @classmethod
    def of(cls, folder: Path, step: int) -> Manifest:
        """The manifest of a folder's files as they are."""
        return cls(step, {file.name: (file.stat().st_size, sha256(file)) for file in sorted(folder.iterdir())})

    def encoded(self) -> bytes:
        """The content of manifest.json."""
        files = {name: {"bytes": length, "sha256": digest} for name, (length, digest) in sorted(self.files.items())}
        content = {"version": VERSION, "step": self.step, "files": files}
        digest = hashlib.sha256(json.dumps(content).encode()).hexdigest()
        return json.dumps({**content, "sha256": digest}, indent=1).encode()

    @property
    def length(self) -> int:
        """Bytes of all files that it lists."""
        return sum(length for length, _ in self.files.values())


def check(folder: Path, hashed: bool = True) -> Manifest:
    """Checks that a folder is as it was saved, and returns its manifest.

    Without ``hashed`` only the files' names and lengths are compared, and the manifest with its own digest. Raises
    ValueError for a file that has changed, OSError for one that cannot be read.
    """
    with os.scandir(folder) as entries:
        there = {entry.name: entry for entry in entries}
    for name, entry in there.items():
        if not entry.is_file(follow_symlinks=False):
            raise ValueError(f"{name!r} is not a plain file")
    if NAME not in there:
        raise ValueError(f"{NAME} is missing")
    manifest = _read(folder / NAME)
    if missing := sorted(manifest.files.keys() - there.keys()):
        raise ValueError(f"{missing[0]} is missing")
    if added := sorted(there.keys() - manifest.files.keys() - {NAME}):
        raise ValueError(f"{added[0]!r} was not saved with it; move it out of the folder")
    for name, (length, _) in manifest.files.items():
        if (found := there[name].stat(follow_symlinks=False).st_size) != length:
            raise ValueError(f"{name} has {found:,} bytes, but {length:,} were saved")
    for name, (_, digest) in manifest.files.items() if hashed else ():
        if sha256(folder / name) != digest:
            raise ValueError(f"{name} has changed since it was saved")
    return manifest


def sha256(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def _read(file: Path) -> Manifest:
    changed = f"{NAME} has changed since it was saved"
    with file.open("rb") as opened:
        content = opened.read(LONGEST + 1)
    if len(content) > LONGEST:
        raise ValueError(f"{NAME} is longer than {LONGEST:,} bytes")
    try:
        given = parsed(content)
    except ValueError as error:
        raise ValueError(f"{changed}: {error}") from error
    if not isinstance(given, dict):
        raise ValueError(changed)
    version = given.get("version", 1 if all(isinstance(value, str) for value in given.values()) else None)
    if isinstance(version, int) and version != VERSION:
        raise ValueError(f"it has format {version}, but this release reads format {VERSION}")
    try:
        files = {name: (entry["bytes"], entry["sha256"]) for name, entry in given["files"].items()}
        manifest = Manifest(given["step"], files)
        whole = manifest.encoded() == content
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(changed) from error
    types = {type(manifest.step), *(type(length) for length, _ in files.values())}
    if not whole or types != {int} or "state.json" not in files:
        raise ValueError(changed)
    return manifest
