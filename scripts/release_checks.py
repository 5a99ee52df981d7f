"""Checks of a release: the version that is tagged is that of pyproject.toml, CITATION.cff and the changelog.

    python scripts/release_checks.py 0.1.0

Exits with 1 and a line for each file that says something else. Standard library only: it runs before anything is
installed.
"""

from __future__ import annotations

import re
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def faults(version: str, root: Path = ROOT) -> list[str]:
    """A sentence for each file that does not have this version."""
    project = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"]
    cited = re.search(r"^version: (\S+)$", (root / "CITATION.cff").read_text(encoding="utf-8"), re.MULTILINE)
    listed = re.findall(r"^## \[([^\]]+)\]", (root / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
    found = [
        ("pyproject.toml", project == version, f"its version is {project}"),
        ("CITATION.cff", cited is not None and cited[1] == version, f"its version is {cited and cited[1]}"),
        ("CHANGELOG.md", version in listed, f"it has {', '.join(listed)}"),
    ]
    return [f"{name}: {said}, not {version}" for name, fits, said in found if not fits]


def main() -> int:
    wrong = faults(sys.argv[1])
    print("\n".join(wrong) or f"{sys.argv[1]}: every file says so")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
