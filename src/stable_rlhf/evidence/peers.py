"""Logs of other trainers beside our runs: TRL's `trainer_state.json`, and any CSV or JSON-lines file.

Their figures are computed by the code that computes ours: the log is made a `Run` with our names and units, and
`outcome` reads it. A figure whose unit cannot be converted is left out, and a note says so.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from stable_rlhf.errors import NoRunError, RunError
from stable_rlhf.evidence import trl
from stable_rlhf.evidence.foreign_rows import CSV, JSON_LINES, read_table
from stable_rlhf.evidence.mapping import MetricMapping, apply, not_understood, own_columns, read_mapping
from stable_rlhf.evidence.outcome import Outcome, Status, flat, outcome
from stable_rlhf.report import Run
from stable_rlhf.text import quoted

_SEED = re.compile(r"(?:^|[^a-z])seed[=_-]?(\d{1,9})(?!\d)", re.IGNORECASE)
_SHORT_SEED = re.compile(r"[-_.]s(\d{1,9})$", re.IGNORECASE)
"""Seeds in names: `seed=3`, `run-seed3`, `ppo-s3`."""


@dataclass(kw_only=True)
class Log:
    """A log in our names and units."""

    rows: list[dict[str, Any]]
    timings: list[dict[str, Any]]
    settings: dict[str, Any]
    planned: int | None
    done: int
    settled: int
    """Rows, from the first on, that what is still to be written cannot change."""
    held_out: float | None = None
    inputs: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    """What differs from figures of ours with the same name."""
    caveats: list[str] = field(default_factory=list)
    """What a comparison does without, or assumes, because the log does not say it."""


def is_table(path: Path) -> bool:
    """Whether its name is that of a CSV or JSON-lines file."""
    return path.suffix.lower() in (*CSV, *JSON_LINES)


def is_foreign(path: Path) -> bool:
    """Whether it is another trainer's log: a CSV or JSON-lines file, a trainer_state.json, or a folder that holds one,
    itself or in checkpoint-N. A run folder of ours is not."""
    if os.path.isdir(path):
        return not os.path.lexists(path / "metrics.jsonl") and trl.state_file(path) is not None
    return (path.name == trl.STATE or is_table(path)) and os.path.isfile(path)


def read_foreign(path: Path, mapping: Path | None = None) -> Outcome:
    """The outcome of another trainer's log. One that cannot be read is an outcome that says so.

    mapping: a file that says which column of a CSV or JSON-lines file is which metric; a trainer_state.json needs none.
    Raises ConfigError for a mapping file that cannot be used.
    """
    given = read_mapping(mapping) if mapping is not None else None
    name = str(path)
    try:
        log = read_log(path, given)
    except RunError as error:
        return Outcome(name=name, status=Status.BROKEN, why=str(error))
    return _outcome(path, name, log)


def read_log(path: Path, mapping: MetricMapping | None = None, *, finite: bool = True, growing: bool = False) -> Log:
    """Another trainer's log in our names and units. A trainer_state.json does not use the mapping.

    finite: whether a figure that is not finite is an error; if not, it stays in its row.
    growing: whether somebody is writing it: the last line of a table is then taken with its newline only.
    Raises RunError with file and line for a log that cannot be read, NoRunError for one without a row.
    """
    state = trl.state_file(path)
    log = _read_table(path, mapping, finite, growing) if state is None else _read_trl(state, finite)
    if log.settings.get("seed") is None and (seed := seed_in(path)) is not None:
        log.settings["seed"] = seed
    return log


def seed_in(path: Path) -> int | None:
    """The seed that the name of a file, or of a folder around it, says."""
    parts = Path(os.path.abspath(path)).parts[-3:]
    for part in reversed(parts):
        text = Path(part).stem if part.lower().endswith((*CSV, *JSON_LINES)) else part
        if found := _SEED.search(text) or _SHORT_SEED.search(text):
            return int(found[1])
    return None


def _outcome(path: Path, name: str, log: Log) -> Outcome:
    last = log.rows[-1]["step"] + 1
    finished = log.planned is None or log.done >= log.planned
    notes = [*log.notes, *log.caveats]
    if len(log.rows) > 1 and (gap := log.rows[1]["step"] - log.rows[0]["step"]) > 1:
        notes.append(
            f"There is a row every {gap} steps: a mean over the last 5 or 20 rows spans {gap} times as many steps."
        )
    run = Run(
        path=path,
        rows=tuple(log.rows),
        timings=tuple(log.timings),
        starts=(),
        running=False,
        config_text=None,
        config={**log.settings, "max_steps": last if finished else max(log.planned or 0, last + 1)},
        evaluation=None if log.held_out is None else {"after": {"reward": log.held_out}},
        completions=(),
        completions_step=None,
        incidents=(),
        notes=tuple(notes),
    )
    found = outcome(run, name)
    planned = {} if log.planned is None else {"max_steps": log.planned}
    # In a table by preset, which our runs have, a peer stands under its trainer's name.
    named = {"preset": log.settings["framework"]} if "framework" in log.settings else {}
    return replace(
        found,
        why=None if finished else f"it did {log.done} of {log.planned} steps",
        settings={**named, **log.settings, **planned},
        inputs=log.inputs,  # ours are digests, which a name among the settings would only seem to differ from
        steps=log.done,
    )


def _read_trl(path: Path, finite: bool) -> Log:
    state = trl.read_state(path, finite=finite)
    if not state.table.rows:
        raise NoRunError(f"{path}:1: log_history has no row of training yet; give a later checkpoint")
    known = trl.columns_of(state.table.columns, certain=True)
    if known is None:
        raise RunError(
            f"{path}: log_history has no `reward` and no `objective/...`: it is no log of TRL's GRPO, RLOO or PPO"
        )
    beside = trl.read_beside(path)
    framework, columns, notes = known
    inputs = _inputs(path, beside.pop("inputs", {}))
    settings = {"framework": framework, **flat(beside)}
    seed = settings.get("seed")
    if seed is not None and (isinstance(seed, bool) or not isinstance(seed, int)):
        raise RunError(f"{path.parent / trl.SETTINGS}: seed is {quoted(seed)}; give an integer")
    rows, timings = apply(columns, state.table, finite=finite)
    if framework != "TRL PPO":
        notes += trl.notes_on(str(settings["framework"]), columns)
    told = _positive(path, settings, trl.STEPS_PER_ROLLOUT)
    each = told or trl.rollout_steps(rows)
    each = 1 if framework == "TRL PPO" else each  # its steps are rollouts
    sure = told is not None or framework == "TRL PPO" or trl.shows_rollouts(rows)
    whole = (rows[-1]["step"] + 1) // each * each if sure else 0  # optimiser steps of the rollouts that are complete
    completions = _positive(path, settings, "rollout.batch_size")
    spread = len(rows) > 1 and rows[1]["step"] - rows[0]["step"] > 1
    if each > 1:
        settings[trl.STEPS_PER_ROLLOUT] = each
        notes.append(f"A step is one rollout of {each} optimiser steps; its seconds are their sum.")
    if spread and framework != "TRL PPO":
        notes.append(
            "A row is a mean over several optimiser steps: where a rollout serves more than one, KL and entropy are of "
            "the policy while it moved, ours of the policy that sampled."
        )
    rows, timings = trl.by_rollout(rows, each), trl.seconds_by_rollout(timings, each)
    caveats = _count_completions(rows, timings, completions)
    return Log(
        rows=rows,
        timings=timings,
        settings=settings,
        planned=None if state.planned is None else -(-state.planned // each),
        done=-(-state.done // each),
        settled=sum(row["step"] < whole // each for row in rows),
        held_out=state.held_out,
        inputs={**inputs, "framework": str(settings["framework"])},
        notes=notes,
        caveats=caveats,
    )


def _count_completions(rows: list[dict[str, Any]], timings: list[dict[str, Any]], completions: int | None) -> list[str]:
    """Adds what needs the number of completions of a step, `episode` (for the error of the mean reward) and tokens a
    second; where it is not known, a caveat."""
    if completions is None:
        if all("episode" in row for row in rows):
            return []
        return [
            "The number of completions of a step is not known (settings.json may give it as rollout.batch_size): "
            "no tokens a second, and a reward crash is judged without the error of the mean reward."
        ]
    lengths = {row["step"]: row["completions/mean_length"] for row in rows if "completions/mean_length" in row}
    for row in rows:
        row["episode"] = completions * (row["step"] + 1)
    for time in timings:
        if time["step"] in lengths and time["total_s"] > 1e-6:  # a microsecond is no step
            time["tokens_per_s"] = completions * lengths[time["step"]] / time["total_s"]
    return []


def _read_table(path: Path, given: MetricMapping | None, finite: bool, growing: bool) -> Log:
    table = read_table(path, growing=growing)
    settings: dict[str, Any] = {}
    notes = list(table.notes)
    if given is not None:
        columns = given.columns
        settings = {**given.settings, **({} if given.seed is None else {"seed": given.seed})}
    elif known := trl.columns_of(table.columns):
        framework, columns, units = known
        settings["framework"] = framework
        notes += ["Its columns have TRL's names, so they are read in TRL's units.", *units]
        notes += trl.notes_on(framework, columns)
    else:
        columns = own_columns(table.columns)
        notes.append("Its columns have our names, so they are read in our units (KL and entropy in nats per token).")
    if "step" not in columns or len(columns) < 2:
        raise not_understood(table)
    rows, timings = apply(columns, table, finite=finite)
    planned = given.max_steps if given else None
    unknown = "How many steps were planned is not known: it counts as finished."
    framework = {"framework": str(settings["framework"])} if "framework" in settings else {}
    return Log(
        rows=rows,
        timings=timings,
        settings=settings,
        planned=planned,
        done=rows[-1]["step"] + 1,
        settled=len(rows),
        inputs=framework,
        notes=notes,
        caveats=[unknown] if planned is None else [],
    )


def _positive(path: Path, settings: Mapping[str, Any], name: str) -> int | None:
    value = settings.get(name)
    if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
        raise RunError(f"{path.parent / trl.SETTINGS}: {name} is {quoted(value)}; give an integer from 1")
    return value


def _inputs(path: Path, given: Any) -> dict[str, str]:
    if not isinstance(given, Mapping):
        raise RunError(f"{path.parent / trl.SETTINGS}: inputs is {quoted(given)}; give an object of names")
    return {str(name): value if isinstance(value, str) else json.dumps(value) for name, value in given.items()}
