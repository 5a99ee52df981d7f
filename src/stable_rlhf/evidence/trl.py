"""TRL's logs: `trainer_state.json` of its GRPO, RLOO and PPO, and what its names mean in ours.

Names and units are those of TRL 1.12 (trl/trainer/grpo_trainer.py, rloo_trainer.py, experimental/ppo/ppo_trainer.py);
those of older versions stand after them.

| theirs | what it is | ours |
|---|---|---|
| GRPO, RLOO `reward` | mean of the weighted rewards of a rollout, before any KL | objective/scores |
| GRPO `kl` | k3, mean over tokens, of the policy before an optimiser step; none without a beta | objective/kl |
| RLOO `kl` | k1, mean over the rollout's tokens, of the policy that sampled | objective/kl |
| GRPO, RLOO `entropy` | exact, mean over tokens, of the policy before an optimiser step | objective/entropy |
| PPO `objective/kl` | k1 or k3, summed over each answer | / mean length: objective/kl |
| PPO `objective/entropy` | -log p of the sampled tokens, summed over each answer | / mean length: objective/entropy |
| GRPO, RLOO `step_time` | seconds of an optimiser step, the sampling before it included | total_s |

`num_tokens` counts prompts too, PPO's `eps` is a whole number of all the time so far, and `frac_reward_zero_std` is of
groups: none of them has a counterpart.
"""

from __future__ import annotations

import itertools
import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stable_rlhf.errors import RunError
from stable_rlhf.evidence.foreign_rows import Table, number
from stable_rlhf.evidence.mapping import Column, understood
from stable_rlhf.runs import STEP_LIMIT
from stable_rlhf.text import quoted

STATE = "trainer_state.json"
SETTINGS = "settings.json"
"""Settings that the state does not hold, written by whoever ran it: flat or nested, with `seed`, `framework`,
`rollout.batch_size` (completions of a rollout), STEPS_PER_ROLLOUT, and `inputs`."""

STEPS_PER_ROLLOUT = "optimizer_steps_per_rollout"

_COMMON: dict[str, tuple[str, ...]] = {
    "step": ("step", "global_step"),
    "completions/distinct_2": ("completions/distinct_2",),  # of a reward function's log_metric
    "total_s": ("step_time",),
}

_GROUPS: dict[str, tuple[str, ...]] = {
    **_COMMON,
    "objective/scores": ("reward",),
    "objective/scores_std": ("reward_std",),
    "objective/kl": ("kl",),
    "objective/entropy": ("entropy",),
    "completions/mean_length": ("completions/mean_length", "completion_length"),
}
"""Of GRPO and RLOO."""

_PPO: dict[str, tuple[str, ...]] = {
    **_COMMON,
    "objective/scores": ("objective/scores", "ppo/mean_scores", "env/reward_mean"),
    "completions/mean_length": ("completions/mean_length", "tokens/responses_len_mean"),
    "episode": ("episode",),
}
_PPO_SUMS = ("objective/kl", "objective/entropy")
"""Sums over each answer, which the mean length makes means over tokens: the ratio of both means is exactly that."""

_OF_PPO = ("eps", "val/num_eos_tokens", "ppo/mean_scores")
"""Columns that a log of ours never has: `objective/kl` alone may be either's, in another unit."""
_OF_GRPO = ("policy_loss", "entropy_coef", "cispo_clip_ratio", "clip_ratio")
"""Columns of GRPO that RLOO does not have."""


@dataclass(frozen=True, kw_only=True)
class State:
    """A trainer_state.json: the rows of its log, and how far it got."""

    table: Table
    done: int
    """Optimiser steps; of PPO, rollouts."""
    planned: int | None
    held_out: float | None
    """Mean reward of the evaluation after the last step."""


def state_file(path: Path) -> Path | None:
    """The state of a run: the file itself, that of a folder, or of its newest checkpoint-N, whichever got furthest."""
    if path.name == STATE:
        return path if os.path.isfile(path) else None
    if not os.path.isdir(path):
        return None
    states = [file for file in path.glob(f"checkpoint-*/{STATE}") if _number(file.parent) is not None]
    newest = max(states, key=lambda file: _number(file.parent) or 0, default=None)
    own = path / STATE
    if not own.is_file():
        return newest
    return own if newest is None or _steps(own) >= (_number(newest.parent) or 0) else newest


def read_state(path: Path, *, finite: bool = True) -> State:
    """The state in a file. Raises RunError with the file, and the line where it is known.

    finite: whether the reward of the last evaluation must be a finite number.
    """
    try:
        text = path.read_bytes().decode("utf-8-sig")
        state = json.loads(text)  # NaN, which Transformers writes, is refused where the value is used
    except OSError as error:
        raise RunError(f"{path}: {error.strerror}; check the path") from error
    except (ValueError, RecursionError) as error:
        line = getattr(error, "lineno", 1)
        raise RunError(f"{path}:{line}: not JSON ({error}); give an earlier checkpoint of the run") from error
    history = state.get("log_history") if isinstance(state, dict) else None
    if not isinstance(history, list) or not all(isinstance(row, dict) for row in history):
        raise RunError(f"{path}:1: has no list `log_history`, so it is not a state of Transformers' Trainer")
    columns = dict.fromkeys(name for row in history for name in row)
    done, planned = (_count(path, state, name) for name in ("global_step", "max_steps"))
    if done is None:
        raise RunError(f"{path}:1: has no `global_step`, so it is not a state of Transformers' Trainer")
    ends = [row["eval_reward"] for row in history if "eval_reward" in row and row.get("step") == done]
    return State(
        table=Table(
            path=path,
            columns=list(columns),
            rows=history,  # of evaluations and of the end too: these have none of the columns that are read
            where=lambda row, column: f"{path}:{_line(text, row, column)}",
        ),
        done=done,
        planned=planned or None,
        held_out=_held_out(path, ends[-1], finite) if ends else None,
    )


def read_beside(state: Path) -> dict[str, Any]:
    """Settings beside a state or its checkpoint's folder: settings.json, and the model's name in its own JSON files.

    Raises RunError for a file that is not a JSON object.
    """
    found: dict[str, Any] = {}
    for folder in (state.parent.parent, state.parent) if _number(state.parent) is not None else (state.parent,):
        for name, key in (("config.json", "_name_or_path"), ("adapter_config.json", "base_model_name_or_path")):
            model = _object(folder / name).get(key)
            if isinstance(model, str) and model:
                found["model.name"] = model
        found |= _object(folder / SETTINGS)
    return found


def columns_of(columns: Iterable[str], *, certain: bool = False) -> tuple[str, dict[str, Column], list[str]] | None:
    """(trainer, metric -> column, notes on units) where the columns are TRL's, otherwise None.

    certain: whether they cannot be ours, since they come from a trainer_state.json. In a table, `reward` is TRL's name
    unless the table has ours, `objective/scores`.
    """
    names = {name.removeprefix("train/"): name for name in columns}
    if any(name in names for name in _OF_PPO) or (certain and any(name.startswith("objective/") for name in names)):
        return "TRL PPO", *_ppo(names)
    if "reward" in names and (certain or "objective/scores" not in names):
        grpo = any(name in names for name in _OF_GRPO) or any(name.startswith("sampling/") for name in names)
        return "TRL GRPO" if grpo else "TRL GRPO or RLOO", understood(names.values(), _GROUPS), []
    return None


def notes_on(framework: str, columns: Mapping[str, Column]) -> list[str]:
    """What differs from our figures of the same name. `framework`: of `columns_of`, or as the user has it."""
    if "PPO" in framework:
        return []
    if "objective/kl" not in columns:
        return ["TRL logs no KL without a beta: the KL is not known."]
    if "GRPO" in framework:
        return ["GRPO's KL is the estimate k3, RLOO's and ours k1: of the same KL, in nats per token."]
    return []


def rollout_steps(rows: Sequence[Mapping[str, Any]]) -> int:
    """Optimiser steps of a rollout, as a log shows them that has a row for each: only the first has the reward."""
    steps = [row["step"] for row in rows]
    rewarded = [row["step"] for row in rows if "objective/scores" in row]
    if len(rewarded) < 2 or steps != list(range(steps[0], steps[-1] + 1)) or rewarded[0] != 0:
        return 1
    gaps = {later - earlier for earlier, later in itertools.pairwise(rewarded)}
    return gaps.pop() if len(gaps) == 1 else 1


def shows_rollouts(rows: Sequence[Mapping[str, Any]]) -> bool:
    """Whether the rows are enough for `rollout_steps`: a later row does not change it, unless a reward is missing."""
    rewarded = sum("objective/scores" in row for row in rows)
    return rewarded > 1 or [row["step"] for row in rows] != list(range(len(rows)))


def by_rollout(rows: Sequence[Mapping[str, Any]], each: int) -> list[dict[str, Any]]:
    """Rows of optimiser steps made rows of rollouts: every figure is that of the first row that has it. KL and entropy
    are then those of the policy that sampled, as ours are: the first optimiser step has not moved it yet."""
    made: dict[int, dict[str, Any]] = {}
    for row in rows:
        step = row["step"] // each
        made[step] = {**row, **made.get(step, {}), "step": step}
    return list(made.values())


def seconds_by_rollout(timings: Sequence[Mapping[str, Any]], each: int) -> list[dict[str, Any]]:
    """Seconds of optimiser steps made seconds of rollouts: `each` times the mean of the rows."""
    seconds: dict[int, list[float]] = {}
    for row in timings:
        seconds.setdefault(row["step"] // each, []).append(row["total_s"])
    return [{"step": step, "total_s": each * sum(found) / len(found)} for step, found in seconds.items()]


def _ppo(names: Mapping[str, str]) -> tuple[dict[str, Column], list[str]]:
    columns, notes = understood(names.values(), _PPO), []
    sums = [name for name in _PPO_SUMS if name in names]
    if length := columns.get("completions/mean_length"):
        columns |= {name: Column(names[name], per=length.name) for name in sums}
        if "objective/entropy" in sums:
            notes.append("The entropy is TRL's estimate from the sampled tokens; ours is exact.")
    elif sums:
        notes.append(
            f"{' and '.join(sums)} of TRL's PPO are sums over an answer, whose length it does not log: left out. A CSV "
            "of the log with the length, and a mapping with `per`, has them in nats per token."
        )
    if "objective/scores" not in columns and "objective/rlhf_reward" in names:
        notes.append("objective/rlhf_reward has the KL penalty in it, so it is not the reward: left out.")
    return columns, notes


def _number(folder: Path) -> int | None:
    found = re.fullmatch(r"checkpoint-(\d{1,15})", folder.name)
    return int(found[1]) if found else None


def _steps(path: Path) -> int:
    """How far a state got. One that cannot be read got furthest: its error is then the user's to see."""
    try:
        return read_state(path, finite=False).done
    except RunError:
        return STEP_LIMIT


def _count(path: Path, state: Mapping[str, Any], name: str) -> int | None:
    value = state.get(name)
    if value is None or (name == "max_steps" and value == -1):
        return None
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < STEP_LIMIT:
        raise RunError(f"{path}:1: {name} is {quoted(value)}, which is not a number of steps; correct it")
    return value


def _held_out(path: Path, value: Any, finite: bool) -> float | None:
    try:
        return number(value, finite=finite)
    except ValueError as error:
        raise RunError(f"{path}: eval_reward is {error}") from None


def _object(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise RunError(f"{path}: not JSON ({error}); repair or remove it") from error
    if not isinstance(found, dict):
        raise RunError(f"{path}: is not a JSON object but {quoted(found)}; repair or remove it")
    return found


def _line(text: str, place: int, column: str) -> int:
    """The line of a value in the `place`-th row of log_history; 1 where another key looks like it."""
    try:
        at = end = text.index("[", text.index('"log_history"')) + 1
        for _ in range(place + 1):
            at = text.index("{", end)
            end = json.JSONDecoder().raw_decode(text, at)[1]
        return text.count("\n", 0, max(at, text.find(json.dumps(column), at, end))) + 1
    except ValueError:
        return 1
