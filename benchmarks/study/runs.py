"""The runs of the study as they are read, and the figures of one run that `stable-rlhf compare` does not have."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from stable_rlhf.evidence import find_outcomes
from stable_rlhf.evidence.measures import END, NEAR
from stable_rlhf.evidence.outcome import Outcome, Status
from stable_rlhf.runs import sweeps
from study.arms import read_label

KL = ("objective/kl_exact", "objective/kl")
"""Metrics of the KL, the better first: k1 of one batch has 20 to 40 % of noise below .05 nats per token."""

ENDED = (Status.FINISHED, Status.GIVEN_UP, Status.CRASHED)

Rows = Sequence[Mapping[str, Any]]
Values = dict[tuple[str, int], float]
"""(stratum, seed) -> a figure of that run, as stable_rlhf.evidence.statistics takes them."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """A run of one bench. `figures` are those of compare (docs/compare.md) and those of `own_figures`."""

    bench: str
    part: str
    arm: str
    rate: float
    seed: int
    status: Status
    figures: Mapping[str, float]
    rows: Rows = ()
    evaluation: Mapping[str, Any] = field(default_factory=dict)
    why: str | None = None


def read_bench(bench: str, paths: Sequence[Path]) -> list[Run]:
    """The runs of sweeps and of other trainers' folders that have a label of arms.py as their name, and have ended: a
    run that the time stopped says nothing of its end."""
    places: dict[str, Path] = {}
    for path in paths:
        inside = sweeps.read_cells(path) if sweeps.is_sweep(path) else [path.name]
        places |= {name: (path / sweeps.CELLS / name if sweeps.is_sweep(path) else path) for name in inside}
    found = []
    for outcome in find_outcomes(list(paths)):
        label = read_label(outcome.name)
        if label and outcome.figures and outcome.status in ENDED:
            found.append(_run(bench, label, outcome, places[outcome.name.rpartition("/")[2]]))
    return found


def _run(bench: str, label: Mapping[str, str], outcome: Outcome, path: Path) -> Run:
    rows = _rows(path / "metrics.jsonl") or _of_curves(outcome)
    file = path / "evaluation.json"
    return Run(
        bench=bench,
        part=label["part"],
        arm=label["arm"],
        rate=float(label["rate"]),
        seed=int(label["seed"]),
        status=outcome.status,
        figures={**outcome.figures, **own_figures(rows)},
        rows=rows,
        evaluation=json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {},
        why=outcome.why,
    )


def _rows(file: Path) -> Rows:
    lines = file.read_text(encoding="utf-8").split("\n")[:-1] if file.is_file() else []
    return [json.loads(line) for line in lines if line]


def _of_curves(outcome: Outcome) -> Rows:
    """Rows of a log that is not ours, which compare has read."""
    rows: dict[int, dict[str, Any]] = {}
    for metric, (steps, values) in outcome.curves.items():
        for step, value in zip(steps.tolist(), values.tolist(), strict=True):
            rows.setdefault(step, {"step": step})[metric] = value
    return [rows[step] for step in sorted(rows)]


def own_figures(rows: Rows) -> dict[str, float]:
    """kl/held: share of the steps with a KL within NEAR of the threshold in force, after it is first so near.
    kl/first: the step of that. distinct_2/share: of the last END steps, of its mean in the first END. length/change:
    the same difference in tokens. kl/step_100: mean KL of END steps from step 100. Absent where a run lacks them."""
    found: dict[str, float | None] = {}
    near = [(row["step"], abs(kl / limit - 1)) for row in rows if (kl := kl_of(row)) is not None
            and (limit := row.get("safe/threshold"))]  # fmt: skip
    first = next((at for at, (_, off) in enumerate(near) if off <= NEAR), None)
    if first is not None:
        found["kl/first"] = float(near[first][0])
        after = [off <= NEAR for _, off in near[first:]]
        found["kl/held"] = sum(after) / len(after)
    ends = {name: _ends([row[name] for row in rows if row.get(name) is not None]) for name in (DISTINCT, LENGTH)}
    if (distinct := ends[DISTINCT]) is not None and distinct[0] > 0:
        found["distinct_2/share"] = distinct[1] / distinct[0]
    if (length := ends[LENGTH]) is not None:
        found["length/change"] = length[1] - length[0]
    late = [kl for row in rows if 100 <= row["step"] < 100 + END and (kl := kl_of(row)) is not None]
    found["kl/step_100"] = math.fsum(late) / len(late) if late else None
    return {name: value for name, value in found.items() if value is not None}


DISTINCT, LENGTH = "completions/distinct_2", "completions/mean_length"


def kl_of(row: Mapping[str, Any]) -> float | None:
    """The KL of a step, nats per token."""
    return next((row[name] for name in KL if row.get(name) is not None), None)


def _ends(values: Sequence[float]) -> tuple[float, float] | None:
    """Means of the first and of the last END values; None for fewer than twice as many."""
    if len(values) < 2 * END:
        return None
    return math.fsum(values[:END]) / END, math.fsum(values[-END:]) / END


def gold_falls(run: Run, gold: str, until: float = math.inf) -> bool | None:
    """Whether gold falls by more than two standard errors between two evaluations in which the reward rises by as
    much, in the first `until` steps. None for fewer than two evaluations."""
    points = [point for point in evaluations(run, gold) if point["step"] <= until]
    if len(points) < 2:
        return None
    pairs = [(early, late) for at, early in enumerate(points) for late in points[at + 1 :]]
    return any(_rises(early, late, "reward") and _rises(late, early, "gold") for early, late in pairs)


def evaluations(run: Run, gold: str) -> list[dict[str, float]]:
    """step, reward, reward_se, gold, gold_se and kl of every evaluation of a run, in order."""
    done = run.rows[-1]["step"] + 1 if run.rows else 0
    sides = [{"step": 0, **(run.evaluation.get("before") or {})}, *run.evaluation.get("during", [])]
    sides.append({"step": done, **(run.evaluation.get("after") or {})})
    names = {"step": "step", "reward": "reward", "reward_se": "reward_se", "kl": "kl",
             "gold": f"gold/{gold}/mean", "gold_se": f"gold/{gold}/se"}  # fmt: skip
    whole = [{name: side.get(key) for name, key in names.items()} for side in sides]
    return [{name: float(v) for name, v in each.items()} for each in whole if None not in each.values()]


def _rises(early: Mapping[str, float], late: Mapping[str, float], name: str) -> bool:
    return late[name] - early[name] > 2 * math.hypot(early[f"{name}_se"], late[f"{name}_se"])


def gold_of(runs: Sequence[Run]) -> str | None:
    """The name of the gold reward that the runs have."""
    names = (key for run in runs for key in (run.evaluation.get("after") or {}) if key.startswith("gold/"))
    return next((key.split("/")[1] for key in names if key.endswith("/mean")), None)


def values(runs: Sequence[Run], key: str) -> Values:
    """The figure of each run that has it; runs of several rates are strata."""
    return {(f"{run.rate:g}", run.seed): run.figures[key] for run in runs if key in run.figures}
