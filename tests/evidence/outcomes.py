"""Outcomes and run folders with literal figures."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from stable_rlhf.evidence.outcome import Outcome, Status

SCORES = "objective/scores"


def outcome(
    name: str, figures: Mapping[str, float] | None = None, *, status: Status = Status.FINISHED, **settings: Any
) -> Outcome:
    """Settings by their names with `__` for a dot: optim__learning_rate."""
    return Outcome(
        name=name,
        status=status,
        settings={name.replace("__", "."): value for name, value in settings.items()},
        figures={"reward/final": 1.0} if figures is None else figures,
    )


def write_run(
    folder: Path,
    rows: Sequence[Mapping[str, Any]],
    *,
    config: Mapping[str, Any] | None = None,
    timings: Sequence[Mapping[str, Any]] = (),
    evaluation: Mapping[str, Any] | None = None,
    incidents: Sequence[Mapping[str, Any]] = (),
    starts: Sequence[Mapping[str, Any]] = (),
) -> Path:
    """A run folder. Steps are numbered where a row has none."""
    folder.mkdir(parents=True, exist_ok=True)
    files = {"metrics.jsonl": rows, "timings.jsonl": timings, "incidents.jsonl": incidents, "starts.jsonl": starts}
    for name, lines in files.items():
        if lines:
            numbered = [{"step": number, **line} for number, line in enumerate(lines)]
            (folder / name).write_text("".join(json.dumps(line) + "\n" for line in numbered))
    settings = {"preset": "safe", "seed": 0, "max_steps": len(rows), **(config or {})}
    (folder / "config.yaml").write_text(yaml.safe_dump(settings))
    if evaluation is not None:
        (folder / "evaluation.json").write_text(json.dumps(evaluation))
    return folder


def incident(step: int, action: str) -> dict[str, Any]:
    texts = {name: name for name in ("rule", "seen", "done", "advice")}
    return {"step": step, "action": action, **texts, "figures": {}}
