"""The page of a report.

Its frame (report/page.py), the reading of a run (report/run.py) and the figures (report/crashes.py) are separate, so
that a comparison of runs uses the same.
"""

from __future__ import annotations

import datetime
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from stable_rlhf.config import is_url, url_without_secrets
from stable_rlhf.control import WINDOW
from stable_rlhf.report.facts import facts_of
from stable_rlhf.report.page import page_of, shown, write_page
from stable_rlhf.report.plots import draw_plots
from stable_rlhf.report.run import Run, headline, read_run
from stable_rlhf.report.verdict import verdict
from stable_rlhf.runs import METRICS, evaluation

SAMPLES, COMPLETIONS = 12, 8  # rows shown: the file stays small
INCIDENTS = 200  # the newest that are shown; a run that skips at every step has one for each
NAME_LIMIT = 200  # characters of a name at the top: a path or a hub name fits

_QUERY = re.compile(r"(https?://[^\s?]+)\?\S+", re.IGNORECASE)
"""A URL with a query, which may hold a secret of a reward server; a report is sent to others."""


def write_report(run_dir: str | Path) -> Path:
    """Writes `report.html` into the run folder, whole or not at all, and returns its path.

    Raises as `read_run` does, and SaveError where the file cannot be written.
    """
    run = read_run(run_dir)
    return write_page(run.path / "report.html", rendered(run))


def rendered(run: Run, live: str | None = None) -> str:
    """The page. A live one has the version of its figures, and asks its server for newer ones (report/watch.py)."""
    head = headline(run)
    return page_of(
        "report.html.j2",
        run=run,
        config_text=None if run.config_text is None else _QUERY.sub(r"\1?...", run.config_text),
        name=run.path.resolve().name,
        live=live,
        head=head,
        verdict=verdict(facts_of(run, head)),
        about=about(run),
        window=WINDOW,
        evaluation=evaluation.evaluation_rows(run.evaluation) if run.evaluation else [],
        samples=(run.evaluation or {}).get("samples", [])[:SAMPLES],
        completions=run.completions[:COMPLETIONS],
        incidents=run.incidents[-INCIDENTS:],
        sections=draw_plots(run.rows, run.timings, head.crashes, run.incidents, run.measured),
        metrics=METRICS,
    )


def waiting(name: str, sentence: str, live: str) -> str:
    """The live page of a run that cannot be shown yet, with the sentence that says why."""
    return page_of("report_waiting.html.j2", name=name, sentence=sentence, live=live)


def about(run: Run) -> list[tuple[str, str]]:
    """(name, value) of what a reader asks first: model, data, reward, preset, when, how long, on what."""
    model = _setting(run.config, "model", "name")
    if (rank := _setting(run.config, "model", "lora_r")) and model is not None:
        model = f"{_text(model)} (LoRA, rank {_text(rank)})"
    data = _setting(run.config, "data", "train")
    start = run.starts[0] if run.starts else None
    began = None if start is None else datetime.datetime.fromisoformat(start["time"]).strftime("%Y-%m-%d %H:%M %Z")
    seconds = sum(row.get("total_s") or 0 for row in run.timings)
    devices = list(dict.fromkeys(each["device"] for each in run.starts))
    given = {
        "model": model,
        "data": data,
        "reward": _rewards(_setting(run.config, "reward", "functions")),
        **({"gold reward": _rewards(gold)} if (gold := _setting(run.config, "reward", "gold")) else {}),
        "preset": run.config.get("preset"),
        "begun": began,
        "time in steps": duration(seconds) if seconds else None,
        "device": ", then ".join(map(_text, devices[:4])) or _setting(run.config, "model", "device"),
    }
    return [(name, "not recorded" if value is None else _text(value)) for name, value in given.items()]


def _rewards(names: Any) -> Any:
    """The rewards of a setting, the queries of URLs left out."""
    if not isinstance(names, list):
        return names
    names = [url_without_secrets(name) if is_url(name) else name for name in names]
    return ", ".join(map(_text, names[:4])) if len(names) < 5 else names


def duration(seconds: float) -> str:
    """Seconds as people say them, in two units at most."""
    if seconds < 60:
        return f"{seconds:.3g} s"
    minutes, hours = divmod(round(seconds), 60), divmod(round(seconds / 60), 60)
    return f"{minutes[0]} min {minutes[1]} s" if minutes[0] < 60 else f"{hours[0]} h {hours[1]} min"


def _setting(config: Mapping[str, Any], section: str, name: str) -> Any:
    found = config.get(section)
    return found.get(name) if isinstance(found, Mapping) else None


def _text(value: Any) -> str:
    return shown(value, NAME_LIMIT)
