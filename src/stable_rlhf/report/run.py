"""Reads and checks a run folder, and computes the report's headline figures."""

from __future__ import annotations

import itertools
import json
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import yaml

from stable_rlhf.control import WINDOW
from stable_rlhf.errors import NoRunError, RunError
from stable_rlhf.files import finite
from stable_rlhf.report.crashes import RewardCrash, moving_average, reward_crashes, step_errors
from stable_rlhf.report.plots import series
from stable_rlhf.runs import RunLock, incidents, read_rows, starts
from stable_rlhf.runs import evaluation as runs_evaluation


@dataclass(frozen=True, kw_only=True)
class Run:
    """A run folder as it was read. Texts are unchanged (hostile); `notes` names missing and incomplete files."""

    path: Path
    rows: tuple[dict[str, Any], ...]
    timings: tuple[dict[str, Any], ...]
    starts: tuple[dict[str, Any], ...]
    running: bool
    """Whether a process is training in the folder."""
    config_text: str | None
    config: dict[str, Any]
    evaluation: dict[str, Any] | None
    completions: tuple[dict[str, Any], ...]
    completions_step: int | None
    incidents: tuple[dict[str, Any], ...]
    notes: tuple[str, ...]

    @property
    def measured(self) -> list[dict[str, Any]]:
        """The figures of every evaluation, each with its `step`: the steps done before it."""
        return [] if self.evaluation is None else runs_evaluation.measured_rows(self.evaluation, self.steps)

    @property
    def steps(self) -> int:
        """Steps done, those that were rolled back included."""
        return self.rows[-1]["step"] + 1


@dataclass(frozen=True, kw_only=True)
class Headline:
    """The figures at the top of a report; None where the run lacks what they need. Rewards in the scorer's units."""

    steps: int
    reward: float | None  # R at the last step; over fewer steps in a run shorter than WINDOW
    kl_end: float | None  # nats per token
    kl_max: float | None
    entropy: float | None
    crashes: tuple[RewardCrash, ...]
    errors_known: bool  # False: no standard errors, so that only the first condition for a crash was applied
    largest_fall: float | None  # max_t D_t, crash or not


def read_run(run_dir: str | Path, *, completions: bool = True) -> Run:
    """Reads a run folder. metrics.jsonl is required and must have a row; other missing files are noted.

    ``completions``: whether the last file of completions is read. Raises NoRunError without metrics.jsonl, RunError
    naming file and line for what cannot be read.
    """
    path = Path(run_dir)
    if not os.path.isfile(path / "metrics.jsonl"):  # False, where Path.is_file raises, for a name too long to be one
        begun = os.path.isfile(path / "config.yaml")
        remedy = "the run has not done a step yet" if begun else "give the folder of a run"
        raise NoRunError(f"{path / 'metrics.jsonl'} does not exist: {remedy}")
    try:
        return _read(Path(run_dir), completions)
    except RunError:
        raise
    except (OSError, ValueError) as error:
        raise RunError(str(error)) from error


def _read(path: Path, with_completions: bool) -> Run:
    notes: list[str] = []
    rows, torn = read_rows(path / "metrics.jsonl")
    if not rows:
        raise NoRunError(f"{path / 'metrics.jsonl'}:1: no complete row yet: nothing to report before the first step")
    if torn:
        notes.append("metrics.jsonl ends in an incomplete line: the run was stopped while writing it.")
    config_text, config = _read_config(path / "config.yaml", notes)
    evaluation = _read_evaluation(path / "evaluation.json", rows[-1]["step"] + 1, notes)
    step, completions = _read_completions(path / "completions", notes) if with_completions else (None, ())
    timings = read_rows(path / "timings.jsonl")[0] if (path / "timings.jsonl").is_file() else []
    return Run(
        path=path,
        rows=tuple(rows),
        timings=tuple(timings),
        starts=tuple(starts.read(path)),
        running=RunLock(path).held_elsewhere(),
        config_text=config_text,
        config=config,
        evaluation=evaluation,
        completions=completions,
        completions_step=step,
        incidents=tuple(incidents.read(path)),
        notes=tuple(notes),
    )


def headline(run: Run) -> Headline:
    """The headline figures of a run, as docs/metrics.md defines them."""
    errors = step_errors([row for row in run.rows if row.get("objective/scores") is not None])
    rewards, kl, entropy = (series(run.rows, f"objective/{name}")[1] for name in ("scores", "kl", "entropy"))
    averages = moving_average(rewards)
    falls = [peak - now for peak, now in zip(itertools.accumulate(averages, max), averages, strict=True)]
    return Headline(
        steps=run.steps,
        reward=math.fsum(rewards[-WINDOW:]) / min(WINDOW, len(rewards)) if rewards else None,
        kl_end=kl[-1] if kl else None,
        kl_max=max(kl, default=None),
        entropy=entropy[-1] if entropy else None,
        crashes=tuple(reward_crashes(rewards, errors)),
        errors_known=errors is not None,
        largest_fall=max(falls, default=None),
    )


def _read_config(path: Path, notes: list[str]) -> tuple[str | None, dict[str, Any]]:
    if not path.is_file():
        notes.append("config.yaml is missing: the preset and the number of steps are unknown.")
        return None, {}
    try:
        text = path.read_text(encoding="utf-8")
        config = yaml.safe_load(text)
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        raise ValueError(f"{path}:{mark.line + 1 if mark else 1}: not YAML ({error})") from error
    if not isinstance(config, dict):
        raise ValueError(f"{path}:1: a configuration is a mapping of settings, found {type(config).__name__}")
    return text, config


def _read_evaluation(path: Path, steps: int, notes: list[str]) -> dict[str, Any] | None:
    if not path.is_file():
        notes.append("evaluation.json is missing: no comparison of before and after, and no samples.")
        return None
    try:
        evaluation = json.loads(path.read_bytes(), parse_float=finite, parse_constant=finite)
        if not isinstance(evaluation, dict):
            raise TypeError(f"expected an object, found {type(evaluation).__name__}")
        runs_evaluation.evaluation_rows(evaluation)
        runs_evaluation.measured_rows(evaluation, steps)
        if not all(isinstance(sample, dict) for sample in evaluation.get("samples", [])):
            raise TypeError("`samples` must be a list of objects")
    except (ValueError, TypeError, RecursionError) as error:
        raise ValueError(f"{path}:{getattr(error, 'lineno', 1)}: {error}") from error
    if not evaluation.get("after"):
        notes.append("evaluation.json has no `after`: the last evaluation was not made, or not yet.")
    return evaluation


def _read_completions(folder: Path, notes: list[str]) -> tuple[int | None, tuple[dict[str, Any], ...]]:
    files = sorted(folder.glob("step-[0-9]*.parquet"), key=lambda file: int(file.stem.removeprefix("step-")))
    if not files:
        notes.append("completions/ is empty: there are no completions to show.")
        return None, ()
    try:
        rows = pq.read_table(files[-1], columns=["prompt", "completion", "score", "length", "kl"]).to_pylist()
    except (OSError, ValueError) as error:  # pyarrow's own errors are ValueErrors
        raise ValueError(f"{files[-1]}: not a file of completions ({error}); remove it") from error
    return int(files[-1].stem.removeprefix("step-")), tuple(rows)
