"""What became of one run: its status, settings, figures and curves, small enough to hold hundreds of them."""

from __future__ import annotations

import enum
import itertools
import json
import math
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from stable_rlhf.config import flat_settings
from stable_rlhf.control import WINDOW, observed_kl
from stable_rlhf.errors import RunError
from stable_rlhf.evidence.measures import END, NEAR
from stable_rlhf.report import Facts, Headline, Run, facts_of, headline, moving_average, read_run, series
from stable_rlhf.report.verdict import ENTROPY_GONE, VARIETY_GONE
from stable_rlhf.runs.evaluation import gold_names
from stable_rlhf.runs.incidents import UNDOES

CURVES = (
    "objective/scores",
    "objective/kl",
    "objective/entropy",
    "completions/distinct_2",
    "objective/ref_nll",
    "completions/mean_length",
    "val/explained_variance",
    "safe/threshold",
    "safe/gate",
    "safe/kl_coef",
)
"""Metrics whose course is kept."""


LARGEST = float(np.finfo(np.float32).max)
"""Values of curves beyond it are drawn on the edge."""


class Status(enum.Enum):
    """How a run ended."""

    FINISHED = "finished"
    RUNNING = "running"
    UNFINISHED = "unfinished"
    GIVEN_UP = "given up"
    """By the guard."""
    CRASHED = "crashed"
    """It ended with an error."""
    BROKEN = "broken"
    """Its files cannot be read."""
    MISSING = "missing"
    """It has no files."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """One run. Texts are unchanged (hostile). Figures and curves that a run lacks are absent."""

    name: str
    status: Status
    why: str | None = None
    """What is the matter with a run that is not finished, in a sentence."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Flat: `optim.learning_rate` -> 1e-4."""
    inputs: Mapping[str, str] = field(default_factory=dict)
    """What arms must share to be comparable -> its name or digest."""
    steps: int = 0
    figures: Mapping[str, float] = field(default_factory=dict)
    """Key of a measure -> value."""
    curves: Mapping[str, tuple[np.ndarray, np.ndarray]] = field(default_factory=dict)
    """Metric -> (steps, values), float32: half the memory, and finer than a page shows."""
    seconds: tuple[np.ndarray, np.ndarray] | None = None
    """(steps, seconds since the first step began)."""
    gold: Mapping[str, tuple[np.ndarray, np.ndarray]] = field(default_factory=dict)
    """Gold reward -> (steps done, mean over the held-out prompts)."""
    notes: tuple[str, ...] = ()

    @property
    def seed(self) -> int | None:
        """The seed, where it is recorded."""
        seed = self.settings.get("seed")
        return seed if isinstance(seed, int) and not isinstance(seed, bool) else None


def read_outcome(folder: Path, name: str) -> Outcome:
    """What became of the run in a folder. A missing or broken one is an outcome that says so, never an error."""
    try:
        run = read_run(folder, completions=False)
    except RunError as error:
        status = Status.BROKEN if (folder / "metrics.jsonl").exists() else Status.MISSING
        return Outcome(name=name, status=status, why=str(error))
    return outcome(run, name)


def outcome(run: Run, name: str) -> Outcome:
    """The outcome of a run that was read."""
    facts = facts_of(run, head := headline(run))
    status, why = _status(run, facts)
    settings = flat(run.config)
    return Outcome(
        name=name,
        status=status,
        why=why,
        settings=settings,
        inputs=_inputs(run, settings),
        steps=run.rows[-1]["step"] + 1,
        figures=_figures(run, settings, status, head, facts),
        curves={metric: _array(pairs) for metric in CURVES if (pairs := series(run.rows, metric))[0]},
        seconds=_seconds(run),
        gold=_gold(run),
        notes=run.notes,
    )


def _figures(run: Run, settings: Mapping[str, Any], status: Status, head: Headline, facts: Facts) -> dict[str, float]:
    """Key of a measure -> value. Steps that the guard undid are left out of means at the end and over the run."""
    undone = {incident["step"] for incident in run.incidents if incident["action"] in UNDOES}
    rows = [row for row in run.rows if row["step"] not in undone] or list(run.rows)
    after = (run.evaluation or {}).get("after") or {}
    acted = Counter(incident["action"] for incident in run.incidents)
    scores = series(rows, "objective/scores")[1]
    kl = series(rows, "objective/kl")[1]
    found: dict[str, float | None] = {
        "reward/average": _mean(scores),
        "reward/final": _mean(scores[-WINDOW:]),
        "reward/held_out": after.get("reward"),
        "kl/final": _mean(kl[-END:]),
        "kl/max": max(kl, default=None),
        "kl/near": _near(rows),
        "explained_variance": _mean(series(rows, "val/explained_variance")[1]),
        "crashes": float(len(head.crashes)) if scores else None,
        "drawdown": head.largest_fall,
        "seconds": _middle(series(run.timings, "total_s")[1]),
        "tokens_per_s": _middle(series(run.timings, "tokens_per_s")[1]),
        "memory": max(series(run.timings, "memory_gb")[1], default=None),
    }
    for key, metric in {
        "entropy/final": "objective/entropy",
        "distinct_2/final": "completions/distinct_2",
        "ref_nll/final": "objective/ref_nll",
        "length/final": "completions/mean_length",
    }.items():
        found[key] = _mean(series(rows, metric)[1][-END:])
    if run.incidents or settings.get("guard.enabled"):  # elsewhere nobody counts
        found |= {"incidents": float(acted.total()), "rollbacks": float(acted["roll back"] + acted["stop"])}
        found["skipped"] = acted["skip"] + math.fsum(series(run.rows, "policy/skipped_steps")[1])
    if shares := series(run.rows, "safe/step_scale")[1]:
        found["step_scale"] = math.fsum(shares) / len(shares)
    if status in (Status.FINISHED, Status.GIVEN_UP, Status.CRASHED):
        # By the steps and not by held-out prompts, of which other trainers record no variety.
        kept = not (
            _lost(rows, "completions/distinct_2", VARIETY_GONE) or _lost(rows, "objective/entropy", ENTROPY_GONE)
        )
        calm = not head.crashes and not facts.rollbacks
        found["healthy"] = float(status is Status.FINISHED and kept and calm)
    found |= {f"gold/{name}": after.get(f"gold/{name}/mean") for name in gold_names(run.evaluation or {})}
    return {key: float(value) for key, value in found.items() if value is not None}


def reached(found: Outcome, reward: float) -> tuple[int, float | None] | None:
    """(steps, seconds) until the WINDOW-step mean of the reward is at least `reward`; None where it never is."""
    if "objective/scores" not in found.curves:
        return None
    steps, values = found.curves["objective/scores"]
    for step, average in zip(steps[WINDOW - 1 :], moving_average(values.tolist()), strict=False):
        if average >= reward:
            return int(step) + 1, _seconds_at(found, int(step))
    return None


def with_figures(found: Outcome, more: Mapping[str, float]) -> Outcome:
    """The outcome with figures that depend on the other runs."""
    return replace(found, figures={**found.figures, **more})


def flat(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Nested settings by their names on the command line, without the secrets of URLs: a page is shown to others."""
    return {str(name): value for name, value in flat_settings(settings).items()}


def _status(run: Run, facts: Facts) -> tuple[Status, str | None]:
    if run.running:
        return Status.RUNNING, f"it is still running: {facts.steps} steps of {facts.planned} are done"
    if facts.gave_up_at is not None:
        return Status.GIVEN_UP, f"the guard gave it up at step {facts.gave_up_at}: {run.incidents[-1]['seen']}"
    if facts.planned is not None and facts.steps < facts.planned:
        return Status.UNFINISHED, f"it did {facts.steps} of {facts.planned} steps"
    return Status.FINISHED, None


def _inputs(run: Run, settings: Mapping[str, Any]) -> dict[str, str]:
    """By content where the run recorded digests, otherwise by name."""
    given: dict[str, Any] = {
        "data": settings.get("data.train"),
        "reward": settings.get("reward.functions"),
        "model": settings.get("model.name"),
    }
    if run.starts:
        start = run.starts[-1]
        given["device"] = start["device"].rpartition(", ")[2]  # not the number of one of several alike
        given |= {name: value for name, value in (start.get("inputs") or {}).items() if value is not None}
        versions = start.get("versions")
        if isinstance(versions, Mapping):
            given |= versions
        given |= {"code": start["code"]} if "code" in start else {}
    return {
        name: value if isinstance(value, str) else json.dumps(value, default=str)
        for name, value in given.items()
        if value is not None
    }


def _near(rows: Sequence[Mapping[str, Any]]) -> float | None:
    pairs = [(observed_kl(row), row.get("safe/threshold")) for row in rows]
    known = [abs(kl / limit - 1) <= NEAR for kl, limit in pairs if kl is not None and limit]
    return sum(known) / len(known) if known else None


def _gold(run: Run) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    names = gold_names(run.evaluation or {})
    return {name: _array(series(run.measured, f"gold/{name}/mean")) for name in names}


def _seconds(run: Run) -> tuple[np.ndarray, np.ndarray] | None:
    steps, each = series(run.timings, "total_s")
    return _array((steps, list(itertools.accumulate(each)))) if steps else None


def _seconds_at(found: Outcome, step: int) -> float | None:
    if found.seconds is None:
        return None
    steps, seconds = found.seconds
    place = int(np.searchsorted(steps, step))
    return float(seconds[place]) if place < len(steps) and steps[place] == step else None


def _array(pairs: tuple[Sequence[int], Sequence[float]]) -> tuple[np.ndarray, np.ndarray]:
    return np.asarray(pairs[0], np.int64), np.clip(pairs[1], -LARGEST, LARGEST).astype(np.float32)


def _lost(rows: Sequence[dict[str, Any]], metric: str, limit: float) -> bool:
    """Whether the mean of the last END steps is lower than that of the first by this share or more."""
    values = series(rows, metric)[1]
    start, end = _mean(values[:END]), _mean(values[-END:])
    return len(values) >= 2 * END and bool(start and start > 0 and end is not None and 1 - end / start >= limit)


def _mean(values: Sequence[float]) -> float | None:
    return math.fsum(values) / len(values) if values else None


def _middle(values: Sequence[float]) -> float | None:
    return statistics.median(values) if values else None
