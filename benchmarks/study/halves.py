"""Two halves of a file of preference pairs, so that two reward models know nothing of each other's."""

from __future__ import annotations

import gzip
import hashlib
import json
from pathlib import Path


def halves(data: Path, folder: Path, limit: int | None = None) -> dict[str, Path]:
    """Writes ``pairs-proxy.jsonl`` and ``pairs-gold.jsonl``, at most `limit` pairs each; returns them by name.

    All pairs that begin with the same question are on one side: HH has a dialogue in several lengths.
    """
    content = gzip.decompress(data.read_bytes()) if data.suffix == ".gz" else data.read_bytes()
    sides: dict[str, list[str]] = {"proxy": [], "gold": []}
    for line in content.decode().split("\n"):
        if line.strip():
            sides[side(json.loads(line)["chosen"])].append(line.strip())
    folder.mkdir(parents=True, exist_ok=True)
    files = {name: folder / f"pairs-{name}.jsonl" for name in sides}
    for name, file in files.items():
        file.write_text("".join(line + "\n" for line in sides[name][:limit]), encoding="utf-8")
    return files


def side(dialogue: str) -> str:
    """By the digest of the first question, which is a coin that always falls the same way."""
    first = dialogue.split("\n\nAssistant:")[0]
    return ("proxy", "gold")[hashlib.sha256(first.encode()).digest()[0] % 2]
