"""evaluation.json: figures and samples on the held-out prompts, before and after training."""

from __future__ import annotations

import itertools
import json
import math
import re
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from stable_rlhf.errors import RunError
from stable_rlhf.files import replace_text
from stable_rlhf.runs.metrics import STEP_LIMIT, check_size, check_value
from stable_rlhf.text import clipped, formatted, printable, quoted

TEXT_LIMIT = 20_000
"""Characters kept of a sample's prompt and completion. They are for reading: 16 prompts of 10 MB would be 160 MB."""


def record(run_dir: Path, side: str, figures: dict[str, float | None], samples: list[dict[str, Any]]) -> dict[str, Any]:
    """Writes one side (``before`` or ``after``) into run_dir/evaluation.json and returns the whole content.

    ``before`` starts a new file: a run that stopped before its first step may have left one in the folder.
    """
    known = {} if side == "before" else read(run_dir)
    known[side] = figures
    kept = known.get("samples") or [{"prompt": clipped(sample["prompt"], TEXT_LIMIT)} for sample in samples]
    for sample, new in zip(kept, samples, strict=True):
        sample |= {side: clipped(new["completion"], TEXT_LIMIT), f"reward_{side}": new["reward"]}
    known["samples"] = kept
    replace_text(run_dir / "evaluation.json", json.dumps(known, indent=1))
    return known


def record_during(run_dir: Path, step: int, figures: dict[str, float | None]) -> None:
    """Adds an evaluation in training to ``during`` of run_dir/evaluation.json, in place of one after as many steps.

    ``step``: steps done.
    """
    known = read(run_dir)
    others = [each for each in known.get("during", []) if each["step"] != step]
    known["during"] = [*others, {"step": step, **figures}]
    replace_text(run_dir / "evaluation.json", json.dumps(known, indent=1))


def forget_after(run_dir: Path, step: int) -> None:
    """Removes from run_dir/evaluation.json what a run that resumes after ``step`` steps will measure again: ``after``,
    and ``during`` of later steps."""
    known = read(run_dir)
    before = json.dumps(known)
    if known.pop("after", None) is not None:
        for sample in known["samples"]:
            del sample["after"], sample["reward_after"]
    if "during" in known:
        known["during"] = [figures for figures in known["during"] if figures["step"] <= step]
    if json.dumps(known) != before:
        replace_text(run_dir / "evaluation.json", json.dumps(known, indent=1))


def read(run_dir: Path) -> dict[str, Any]:
    """The content of run_dir/evaluation.json; empty if the run has no held-out prompts.

    Raises RunError where it is not JSON.
    """
    path = run_dir / "evaluation.json"
    try:
        return json.loads(path.read_text()) if path.exists() else {}
    except ValueError as error:
        raise RunError(f"{path}: not JSON ({error}); repair or remove it") from error


GOLD = re.compile(r"gold/(.+)/mean", re.DOTALL)
"""The name of a figure of evaluation.json that is the mean of a gold reward."""

GOLD_NAME = 80
"""Characters shown of a gold reward's name: the label of a row."""


def gold_figures(name: str, scores: Sequence[float]) -> dict[str, float | None]:
    """The figures of a gold reward, from the scores of the completions that it judged.

    The mean, None without a score, and its standard error (denominator n - 1), None with fewer than two.
    """
    count = len(scores)
    return {
        f"gold/{name}/mean": math.fsum(scores) / count if count else None,
        f"gold/{name}/se": statistics.stdev(scores) / math.sqrt(count) if count > 1 else None,
        f"gold/{name}/judged": count,
    }


def gold_names(evaluation: Mapping[str, Any]) -> list[str]:
    """The names of the gold rewards of an evaluation.json, in the order of their settings."""
    sides = [evaluation.get(side) for side in ("before", "after")]
    figures = [name for side in sides if isinstance(side, Mapping) for name in side]
    return list(dict.fromkeys(found[1] for name in figures if (found := GOLD.fullmatch(name))))


def measured_rows(evaluation: Mapping[str, Any], steps: int) -> list[dict[str, Any]]:
    """The figures of every evaluation of a run of ``steps`` steps, each with its ``step``, the steps done before it.

    ``after`` is the one at the last step, unless the training ended with an evaluation: with load_best_model_at_end
    ``after`` may be of an earlier policy. Raises ValueError where a figure is not a number.
    """
    during = evaluation.get("during", [])
    if not isinstance(during, list) or not all(isinstance(figures, Mapping) for figures in during):
        raise ValueError("evaluation.json: `during` is not a list of objects; remove the file")
    rows = [{**(evaluation.get("before") or {}), "step": 0}, *during]
    if during and not all(isinstance(row.get("step"), int) for row in during):
        raise ValueError("evaluation.json: an entry of `during` has no whole number `step`; remove the file")
    if evaluation.get("after") and rows[-1]["step"] < steps:
        rows.append({**evaluation["after"], "step": steps})
    for row in rows:
        for name, value in row.items():
            where = f"{name} of step {quoted(row['step'])} in evaluation.json"
            check_value(where, value)
            check_size(where, value)
    if any(one["step"] >= other["step"] for one, other in itertools.pairwise(rows)) or rows[-1]["step"] >= STEP_LIMIT:
        raise ValueError("evaluation.json: the steps of `during` must be above 0 and increase; remove the file")
    return rows


# Figures of evaluation.json that get a row of their own: label, and the format in which people read it.
EVALUATION: dict[str, tuple[str, str]] = {
    "reward": ("reward", ".4f"),
    "kl": ("KL, nats per token", ".4f"),
    "entropy": ("entropy, nats per token", ".3f"),
    "distinct_2": ("distinct-2", ".3f"),
    "length": ("length, tokens", ".1f"),
}


def evaluation_rows(evaluation: Mapping[str, Any]) -> list[tuple[str, str, str, str]]:
    """(label, before, after, change) of each figure of evaluation.json. A missing figure is a dash.

    Gold rewards follow, each with the number of completions that it judged where that is not all. Raises ValueError
    when `before` is missing or a figure is not a number. The standard error stands behind its reward and the number of
    prompts in a heading, so these have no row.
    """
    if not isinstance(evaluation.get("before"), Mapping):
        raise ValueError("evaluation.json has no `before`: evaluate the policy before training, or remove the file")
    before, after = evaluation["before"], evaluation.get("after") or {}
    if not isinstance(after, Mapping):
        raise ValueError("evaluation.json: `after` is not an object of figures; remove the file")
    rows = []
    gold = {f"gold/{name}/mean": (f"gold: {printable(name, GOLD_NAME)}", ".4f") for name in gold_names(evaluation)}
    for name, (label, form) in (EVALUATION | gold).items():
        shown, values = [], []
        for side, figures in (("before", before), ("after", after)):
            value = figures.get(name)
            check_value(f"{name} of `{side}` in evaluation.json", value)
            error = figures.get("reward_se" if name == "reward" else f"{name.removesuffix('/mean')}/se")
            check_value(f"the standard error of {name} of `{side}` in evaluation.json", error)
            shown.append(formatted(value, form) + ("" if error is None else f" ± {error:{form}}"))
            judged = figures.get(f"{name.removesuffix('/mean')}/judged", figures.get("prompts"))
            if value is not None and judged != figures.get("prompts"):
                check_value(f"the number judged by {name} of `{side}` in evaluation.json", judged)
                shown[-1] += f" (of {formatted(judged, '.0f')})"
            values.append(value)
        change = formatted(None if None in values else values[1] - values[0], "+" + form)
        rows.append((label, shown[0], shown[1], change))
    return rows
