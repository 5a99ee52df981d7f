"""Writes report.html: no scripts, no network, no torch; all text of models and data is escaped.

Reading (report/run.py) and figures (report/crashes.py) are separate, so that a comparison of runs uses the same
figures. Metrics that a run did not record are named in the report, not drawn as an empty plot.
"""

from __future__ import annotations

import contextlib
import reprlib
from pathlib import Path
from typing import Any

import jinja2

from stable_rlhf.control import WINDOW
from stable_rlhf.errors import SaveError
from stable_rlhf.files import ASSETS, NO_ROOM
from stable_rlhf.report.plots import draw_plots
from stable_rlhf.report.run import headline, read_run
from stable_rlhf.runs import METRICS, evaluation
from stable_rlhf.text import excerpt

SAMPLES, COMPLETIONS, TEXT_LIMIT = 12, 8, 1500  # rows shown, and characters of each text: the file stays small


def write_report(run_dir: str | Path) -> Path:
    """Writes `report.html` into the run folder, whole or not at all, and returns its path.

    Raises as `read_run` does, and SaveError where the file cannot be written.
    """
    run = read_run(run_dir)
    head = headline(run)
    folder = jinja2.FileSystemLoader(ASSETS)
    environment = jinja2.Environment(loader=folder, autoescape=True, undefined=jinja2.StrictUndefined)
    environment.filters["shown"] = _shown
    environment.filters["number"] = lambda value, form=".3f": "-" if value is None else format(float(value), form)
    page = environment.get_template("report.html.j2").render(
        run=run,
        head=head,
        window=WINDOW,
        evaluation=evaluation.evaluation_rows(run.evaluation) if run.evaluation else [],
        samples=(run.evaluation or {}).get("samples", [])[:SAMPLES],
        completions=run.completions[:COMPLETIONS],
        plots=draw_plots(run.rows, head.crashes, run.incidents),
        metrics=METRICS,
    )
    aside, path = run.path / "report.html.tmp", run.path / "report.html"
    try:
        aside.write_text(page, encoding="utf-8")
        return aside.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):  # the disk that refused the page may refuse this too
            aside.unlink(missing_ok=True)
        remedy = NO_ROOM.get(error.errno or 0, "fix that")
        raise SaveError(f"{path} could not be written: {error.strerror or error}; {remedy}") from error


def _shown(value: Any, limit: int = TEXT_LIMIT) -> str:
    """Any value as harmless text: control characters escaped, long texts cut. Jinja escapes the HTML in it."""
    return excerpt(value if isinstance(value, str) else reprlib.repr(value), limit)  # a list in YAML can be 10^9 items
