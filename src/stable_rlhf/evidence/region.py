"""The stable region: for each pair of settings, the share of runs that end healthy and near the best reward."""

from __future__ import annotations

from dataclasses import dataclass

from stable_rlhf.evidence.arms import ABSENT, number_in
from stable_rlhf.evidence.compare import Comparison

STEPS = 5
"""Shades of a cell: as many as stay apart on a grey print."""


@dataclass(frozen=True, kw_only=True)
class Share:
    """`stable` of `runs`; `shade` is 0 (none) to STEPS - 1 (all)."""

    stable: int
    runs: int
    shade: int


@dataclass(frozen=True, kw_only=True)
class Region:
    """A grid of two settings: `rows` by the values of `up`, columns by those of `across`. `given`: the other
    settings and their values."""

    given: dict[str, str]
    across: str
    up: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, tuple[Share | None, ...]], ...]


def regions(made: Comparison) -> list[Region]:
    """A grid for each combination of the other settings. Empty where no setting of two or more has numbers as values,
    and where no reward rises."""
    if made.target is None or not (axes := _axes(made)):
        return []
    across, up = axes
    others = [name for name in made.by if name not in axes]
    combinations = dict.fromkeys(tuple(arm.by[name] for name in others) for arm in made.arms)
    columns, ups = (_ordered({arm.by[name] for arm in made.arms}) for name in axes)
    return [
        Region(
            given=dict(zip(others, given, strict=True)),
            across=across,
            up=up,
            columns=columns,
            rows=tuple(
                (row, tuple(_share(made, {across: column, up: row, **dict(zip(others, given, strict=True))})
                            for column in columns))
                for row in ups
            ),
        )
        for given in combinations
    ]  # fmt: skip


def _axes(made: Comparison) -> tuple[str, str] | None:
    """The first setting whose values are numbers, and another: one with numbers if there is one."""
    values = {name: {arm.by[name] for arm in made.arms} for name in made.by}
    varied = [name for name in made.by if len(values[name]) > 1]
    numeric = [name for name in varied if _numbers(values[name])]
    if not numeric or len(varied) < 2:
        return None
    rest = [name for name in varied if name != numeric[0]]
    return numeric[0], next((name for name in rest if name in numeric), rest[0])


def _share(made: Comparison, at: dict[str, str]) -> Share | None:
    runs = [run for arm in made.arms if dict(arm.by) == at for run in arm.runs.values()]
    ended = [run.figures for run in runs if "healthy" in run.figures]
    if not ended or made.target is None:
        return None
    stable = sum(
        each["healthy"] == 1 and each.get("reward/final", float("-inf")) >= made.target for each in ended
    )  # fmt: skip
    inner = 1 + (STEPS - 2) * stable // len(ended)  # none and all have a shade of their own
    shade = 0 if stable == 0 else STEPS - 1 if stable == len(ended) else min(inner, STEPS - 2)
    return Share(stable=stable, runs=len(ended), shade=shade)


def _numbers(values: set[str]) -> bool:
    known = values - {ABSENT}
    return len(known) > 1 and all(number_in(value) is not None for value in known)


def _ordered(values: set[str]) -> tuple[str, ...]:
    """Numbers by size, then texts."""
    return tuple(sorted(values, key=lambda value: (number_in(value) is None, number_in(value) or 0.0, value)))
