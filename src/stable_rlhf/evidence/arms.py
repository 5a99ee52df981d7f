"""Runs by arm: which settings tell the arms apart, which only vary within one, and what makes arms not comparable."""

from __future__ import annotations

import difflib
import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from stable_rlhf.errors import ConfigError
from stable_rlhf.evidence.outcome import Outcome, Status

OWN = ("seed", "output_dir", "overwrite_output_dir", "save_steps", "save_total_limit", "push_to_hub", "hub_model_id")
"""Settings that differ from run to run and tell no arms apart; those of `log.` too."""

INPUTS = {
    "data": "the data",
    "reward": "the reward",
    "model": "the model",
    "code": "the code of this package",
    "stable-rlhf": "the version of this package",
    "torch": "the version of torch",
    "transformers": "the version of transformers",
    "device": "the device, on which seconds and memory depend,",
}
"""Input that arms must share -> what a sentence calls it."""

ABSENT = "-"
"""The value of a setting that a run does not have."""


@dataclass(frozen=True)
class Arm:
    """Runs that differ by their seed, and by settings that `by` leaves out: each combination of those is a stratum."""

    by: Mapping[str, str]
    """Setting -> value, as texts."""
    runs: Mapping[tuple[str, int], Outcome]
    """(stratum, seed) -> run. A run whose seed is not known, or there already, has a negative number of its own."""

    @property
    def name(self) -> str:
        """The values, or `all runs`."""
        return ", ".join(self.by.values()) or "all runs"

    def values(self, key: str) -> dict[tuple[str, int], float]:
        """The figures of the runs that have this one."""
        return {at: run.figures[key] for at, run in self.runs.items() if key in run.figures}


def differing(runs: Sequence[Outcome]) -> list[str]:
    """The settings that tell the runs apart. What a preset implies is not named beside it."""
    known = [run for run in runs if run.settings]
    names = list(dict.fromkeys(name for run in known for name in run.settings))
    found = [
        name
        for name in names
        if name not in OWN
        and not name.startswith("log.")
        and len({value_text(run.settings, name) for run in known}) > 1
    ]
    for leader in ("preset", "framework"):
        if leader in found:
            implied = {name for name in found if name != leader and _implied(known, leader, name)}
            found = [leader, *(name for name in found if name != leader and name not in implied)]
    return found


def arms_of(runs: Sequence[Outcome], by: Sequence[str]) -> list[Arm]:
    """The arms in the order of their first run.

    Raises ConfigError for a setting that no run has.
    """
    known = list(dict.fromkeys(name for run in runs for name in run.settings))
    for name in by:
        if known and name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            meant = (
                f"did you mean {close[0]}?" if close else f"the runs differ in {', '.join(differing(runs)) or 'none'}"
            )
            raise ConfigError(f"--by {name}: no run has this setting: {meant}")
    within = [name for name in differing(runs) if name not in by]
    found: dict[tuple[str, ...], dict[tuple[str, int], Outcome]] = {}
    without_pair = itertools.count(-1, -1)  # the same number in two arms would make a pair of them
    for run in runs:
        members = found.setdefault(tuple(value_text(run.settings, name) for name in by), {})
        stratum = ", ".join(f"{name}={value_text(run.settings, name)}" for name in within)
        seed = run.seed
        if seed is None or seed < 0 or (stratum, seed) in members:
            seed = next(without_pair)
        members[stratum, seed] = run
    return [Arm(dict(zip(by, values, strict=True)), members) for values, members in found.items()]


def in_order_of_values(arms: Sequence[Arm]) -> list[Arm]:
    """Setting by setting: numbers in their order, other values in the order in which they come first."""
    order: dict[str, dict[str, float]] = {}
    for name in arms[0].by if arms else ():
        values = list(dict.fromkeys(arm.by[name] for arm in arms))
        numbers = [number_in(value) for value in values]
        known = [number for number in numbers if number is not None]
        ranks = known if len(known) == len(values) else range(len(values))
        order[name] = dict(zip(values, ranks, strict=True))
    return sorted(arms, key=lambda arm: [order[name][value] for name, value in arm.by.items()])


def not_comparable(arms: Sequence[Arm]) -> list[str]:
    """A sentence for each input in which arms differ, naming arms and values."""
    sentences = []
    for name, words in INPUTS.items():
        of_arms = {
            arm.name: sorted({run.inputs[name] for run in arm.runs.values() if name in run.inputs}) for arm in arms
        }
        known = {value for values in of_arms.values() for value in values}
        if len(known) < 2:
            continue
        if len({tuple(values) for values in of_arms.values() if values}) > 1:
            shown = "; ".join(f"{arm}: {_short(values)}" for arm, values in list(of_arms.items())[:4] if values)
            more = f"; and {len(of_arms) - 4} more" if len(of_arms) > 4 else ""
            sentences.append(f"{words} differs between the arms ({shown}{more}): they are not comparable in this")
        else:
            sentences.append(f"{words} differs between the runs of each arm ({_short(sorted(known))})")
    return sentences


def odd_runs(runs: Sequence[Outcome]) -> list[Outcome]:
    """The runs that are not finished."""
    return [run for run in runs if run.status is not Status.FINISHED]


def _implied(runs: Sequence[Outcome], leader: str, name: str) -> bool:
    """Whether every value of `leader` has one value of `name`."""
    of_leader: dict[str, set[str]] = {}
    for run in runs:
        of_leader.setdefault(value_text(run.settings, leader), set()).add(value_text(run.settings, name))
    return all(len(values) == 1 for values in of_leader.values())


def value_text(settings: Mapping[str, Any], name: str) -> str:
    """The value of a setting as it tells arms apart."""
    value = settings.get(name, ABSENT)
    if isinstance(value, str):
        return value
    return format(value, ".12g") if isinstance(value, float) else json.dumps(value, default=str)


def number_in(text: str) -> float | None:
    """The number that a value is; None for another text."""
    try:
        return float(text)
    except ValueError:
        return None


def _short(values: Sequence[str]) -> str:
    cut = [value if len(value) <= 24 else f"{value[:12]}..." for value in values[:3]]
    return ", ".join(cut) + (f" and {len(values) - 3} more" if len(values) > 3 else "")
