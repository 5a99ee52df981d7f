"""The page of a comparison: one file that needs no network. All texts of runs and settings are shown escaped."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from markupsafe import Markup

from stable_rlhf.evidence.arms import ABSENT, OWN, value_text
from stable_rlhf.evidence.compare import ALPHA, Comparison
from stable_rlhf.evidence.frontier import frontier
from stable_rlhf.evidence.measures import Measure, measure
from stable_rlhf.evidence.outcome import Outcome, Status
from stable_rlhf.evidence.plots import arm_styles, best_arms, draw_plots
from stable_rlhf.evidence.region import regions
from stable_rlhf.evidence.table import gaps, groups, method, numbered
from stable_rlhf.files import ASSETS
from stable_rlhf.report import figure, page_of
from stable_rlhf.report import write_page as write_whole

OPEN_ROWS = 24
"""Rows up to which a table is open from the start: about a screen."""

IN_RUNS = ("reward/average", "reward/final", "reward/held_out", "kl/final", "distinct_2/final", "crashes", "seconds")
"""Figures of each run; the JSON has all."""

MOST_SETTINGS = 200
"""Settings in which arms differ that are shown."""

STYLE = Markup((ASSETS / "compare.css").read_text(encoding="utf-8"))


@dataclass(frozen=True, kw_only=True)
class RunRow:
    """A run in the list of runs."""

    name: str
    arm: str
    seed: str
    status: str
    odd: bool
    """Whether it is not finished."""
    why: str
    steps: int
    figures: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class SettingRow:
    """A setting in which arms differ: (value, numbers of the arms that have it)."""

    name: str
    values: tuple[tuple[str, str], ...]


def write_page(made: Comparison, path: Path) -> Path:
    """Writes the page whole or not at all, and returns its path. Raises SaveError where it cannot be written."""
    return write_whole(path, rendered(made))


def rendered(made: Comparison) -> str:
    """The page."""
    chosen = best_arms(made)
    listed = _in_runs(made)
    return page_of(
        "compare.html.j2",
        compare_style=STYLE,
        live=None,
        name="Comparison",
        made=made,
        method=method(made),
        alpha=ALPHA,
        groups=groups(made),
        gaps=gaps(made),
        styles=arm_styles(made),
        drawn=len(chosen),
        left_out=numbered([index + 1 for index in range(len(made.arms)) if index not in chosen]),
        plots=draw_plots(made),
        frontier=frontier(made),
        regions=regions(made),
        listed=listed,
        runs=_runs(made, listed),
        statuses=Counter(run.status.value for run in made.runs),
        settings=_settings(made)[:MOST_SETTINGS],
        measures=[measure(key) for key in made.keys],
        open_rows=OPEN_ROWS,
    )


def _in_runs(made: Comparison) -> list[Measure]:
    return [measure(key) for key in made.keys if key in IN_RUNS or key.startswith("gold/")]


def _runs(made: Comparison, listed: list[Measure]) -> list[RunRow]:
    """The runs in the order of the arms, then those that have no figures."""
    places = {id(run): index for index, arm in enumerate(made.arms) for run in arm.runs.values()}

    def row(run: Outcome) -> RunRow:
        arm = f"{places[id(run)] + 1}: {made.arms[places[id(run)]].name}" if id(run) in places else _by(made, run)
        return RunRow(
            name=run.name,
            arm=arm,
            seed="-" if run.seed is None else str(run.seed),
            status=run.status.value,
            odd=run.status is not Status.FINISHED,
            why=" ".join(filter(None, [run.why, *run.notes])),
            steps=run.steps,
            figures=tuple(figure(run.figures[each.key]) if each.key in run.figures else "-" for each in listed),
        )

    return [row(run) for run in sorted(made.runs, key=lambda run: places.get(id(run), len(places)))]


def _by(made: Comparison, run: Outcome) -> str:
    """What is known of the arm of a run without figures."""
    return ", ".join(value_text(run.settings, name) for name in made.by) if run.settings else "-"


def _settings(made: Comparison) -> list[SettingRow]:
    """The settings that make the arms, then those in which two arms that have them differ: an arm that lacks a setting,
    such as another trainer's, does not differ in it."""
    of_arms = [list(arm.runs.values()) for arm in made.arms]
    names = dict.fromkeys([*made.by, *(name for runs in of_arms for run in runs for name in run.settings)])
    rows = []
    for name in names:
        if name not in made.by and (name in OWN or name.startswith("log.")):
            continue
        values = [_values(runs, name) for runs in of_arms]
        apart = {value for value in values if value != ABSENT or name in made.by}
        if len(apart) > 1:
            with_value: dict[str, list[int]] = {}
            for number, value in enumerate(values, 1):
                with_value.setdefault(value, []).append(number)
            rows.append(SettingRow(name=name, values=tuple((v, numbered(arms)) for v, arms in with_value.items())))
    return rows


def _values(runs: list[Outcome], name: str) -> str:
    """The values of the runs that have the setting; ABSENT where none has."""
    return " or ".join(dict.fromkeys(value_text(run.settings, name) for run in runs if name in run.settings)) or ABSENT
