"""The frame of a page: one file that needs no network; all text of models, data and settings is escaped.

Its only script is our own (assets/report.js), named by its hash in the page's Content-Security-Policy, so that no other
script runs. The report of one run and the comparison of many are pages of this kind.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import reprlib
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from stable_rlhf.errors import SaveError
from stable_rlhf.files import ASSETS, NO_ROOM
from stable_rlhf.report.plots import figure
from stable_rlhf.text import excerpt

TEXT_LIMIT = 1500
"""Characters of each text that is shown: the file stays small."""

STYLE = Markup((ASSETS / "report.css").read_text(encoding="utf-8"))
SCRIPT = Markup((ASSETS / "report.js").read_text(encoding="utf-8"))
SCRIPT_HASH = base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()


def page_of(template: str, **values: Any) -> str:
    """A page from a template of assets/, which extends `report_page.html.j2`."""
    return _environment().get_template(template).render(**values)


def write_page(path: Path, text: str) -> Path:
    """Writes a page whole or not at all, and returns its path. Raises SaveError where it cannot be written."""
    aside = path.with_name(path.name + ".tmp")
    try:
        aside.write_text(text, encoding="utf-8")
        return aside.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):  # the disk that refused the page may refuse this too
            aside.unlink(missing_ok=True)
        if isinstance(error, FileNotFoundError) and not path.parent.is_dir():
            raise SaveError(f"{path} could not be written: the folder {path.parent} does not exist; make it") from error
        remedy = NO_ROOM.get(error.errno or 0, "fix that")
        raise SaveError(f"{path} could not be written: {error.strerror or error}; {remedy}") from error


def shown(value: Any, limit: int = TEXT_LIMIT) -> str:
    """Any value as harmless text: control characters escaped, long texts cut. Jinja escapes the HTML in it."""
    return excerpt(value if isinstance(value, str) else reprlib.repr(value), limit)  # a list in YAML can be 10^9 items


def _environment() -> jinja2.Environment:
    made = jinja2.Environment(
        loader=jinja2.FileSystemLoader(ASSETS),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.filters["shown"] = shown
    made.filters["number"] = lambda value, form=".3f": "-" if value is None else format(float(value), form)
    made.filters["figure"] = figure
    made.globals |= {"style": STYLE, "script": SCRIPT, "script_hash": SCRIPT_HASH}
    return made
