"""Hook of mkdocs.yml: links from a page of docs/ to another file of the repository lead to the repository's page.

On the repository's own pages `../src/x.py` is right; the site has only docs/, so there it becomes an absolute link.
A link to a file that is not there ends the build.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
BRANCH = "main"


def on_page_markdown(markdown: str, *, page: Any, config: Any, **_: Any) -> str:
    """Called by MkDocs with each page's text."""
    return absolute(markdown, (ROOT / "docs" / page.file.src_uri).parent, config.repo_url)


def absolute(markdown: str, folder: Path, repository: str) -> str:
    """The text with its relative links that lead out of docs/, or to a page that the site leaves out, made absolute."""

    def link(found: re.Match[str]) -> str:
        target, anchor = found[1], found[2] or ""
        path = (folder / target).resolve()
        if path.is_relative_to(ROOT / "docs") and path.name != "LOG.md":
            return found[0]
        if not path.exists():
            raise FileNotFoundError(f"{folder}: the link {target} leads nowhere")
        kind = "tree" if path.is_dir() else "blob"
        return f"]({repository}/{kind}/{BRANCH}/{path.relative_to(ROOT)}{anchor})"

    return re.sub(r"\]\((?!\w+:|#)([^)\s#]+)(#[^)\s]*)?\)", link, markdown)
