"""A comparison of arms: for every figure an estimate with its interval, and its difference from the baseline arm."""

from __future__ import annotations

import difflib
import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from stable_rlhf.errors import ConfigError
from stable_rlhf.evidence.arms import Arm, arms_of, differing, in_order_of_values, not_comparable
from stable_rlhf.evidence.measures import REACH, Better, in_order, measure
from stable_rlhf.evidence.outcome import Outcome, Status, reached, with_figures
from stable_rlhf.evidence.statistics import (
    FEW,
    SPREAD,
    Difference,
    Estimate,
    Values,
    difference,
    difference_of_shares,
    estimate,
    holm,
    probability_of_improvement,
    share,
    spread,
)
from stable_rlhf.text import counted

ALPHA = 0.05
"""Share of families of comparisons without any difference in which one is called a difference."""

START = 5
"""Steps of which a run's starting reward is the mean."""


@dataclass(frozen=True, kw_only=True)
class Cell:
    """A figure of an arm, and its difference from the baseline (None for the baseline itself)."""

    mean: Estimate
    iqm: Estimate | None
    """None for a share: without its outer runs it is another one."""
    percentiles: tuple[float, ...]
    """SPREAD of the runs."""
    difference: Difference | None = None
    adjusted_p: float | None = None
    """Holm's, over the arms that this figure compares with the baseline."""
    improvement: Estimate | None = None
    """The probability that a run of this arm is better than one of the baseline."""

    @property
    def differs(self) -> bool:
        """Whether the difference from the baseline is more than chance explains."""
        return self.adjusted_p is not None and self.adjusted_p < ALPHA


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """What `compare` shows: on the console, as JSON and as a page."""

    runs: tuple[Outcome, ...]
    by: tuple[str, ...]
    arms: tuple[Arm, ...]
    baseline: int
    """Index of the arm that the others are compared with."""
    keys: tuple[str, ...]
    """Measures that at least one run has, in order."""
    cells: Mapping[tuple[int, str], Cell]
    """(index of the arm, key of the measure) -> cell; absent where no run of the arm has the figure."""
    target: float | None
    """The reward whose time is measured."""
    not_comparable: tuple[str, ...]
    """Sentences on inputs that differ between arms."""
    warnings: tuple[str, ...]
    """Sentences on what the figures do not show: few seeds, unequal ones, runs that are missing."""

    @property
    def comparisons(self) -> int:
        """How many differences were tested."""
        return sum(cell.adjusted_p is not None for cell in self.cells.values())


def compare(runs: Sequence[Outcome], by: Sequence[str] | None = None, baseline: str | None = None) -> Comparison:
    """Compares the arms. ``by``: the settings that make an arm; by default all in which the runs differ.
    ``baseline``: the name of an arm; by default that of the first run.

    Raises ConfigError for a setting or an arm that does not exist, and where no run can be read.
    """
    readable = [run for run in runs if run.figures]
    if not readable:
        first = next((run.why for run in runs if run.why), "no run was given")
        raise ConfigError(f"there is nothing to compare: {first}")
    chosen = tuple(differing(readable) if by is None else by)
    target = _target(arms_of(readable, chosen))
    timed = [_timed(run, target) for run in readable]
    arms = tuple(in_order_of_values(arms_of(timed, chosen)))
    base = _baseline(arms, baseline, timed[0])
    keys = tuple(in_order({key for run in timed for key in run.figures}))
    by_name = {run.name: run for run in timed}
    return Comparison(
        runs=tuple(by_name.get(run.name, run) for run in runs),
        by=chosen,
        arms=arms,
        baseline=base,
        keys=keys,
        cells={at: cell for key in keys for at, cell in _cells(arms, base, key).items()},
        target=target,
        not_comparable=tuple(not_comparable(arms)),
        warnings=tuple(_warnings(runs, arms)),
    )


def as_json(made: Comparison) -> dict[str, Any]:
    """The comparison as plain values; every estimate has its interval (null where unknown) and its number of runs."""

    def plain(found: Estimate) -> dict[str, Any]:
        return {"value": found.value, "low": found.low, "high": found.high, "runs": found.runs}

    def cell(found: Cell) -> dict[str, Any]:
        row: dict[str, Any] = {
            "mean": plain(found.mean),
            **({} if found.iqm is None else {"iqm": plain(found.iqm)}),
            "percentiles": dict(zip(map(str, SPREAD), found.percentiles, strict=True)),
        }
        if (gap := found.difference) is not None:
            row["difference"] = {
                "value": gap.value, "low": gap.low, "high": gap.high, "p": gap.p, "p_holm": found.adjusted_p,
                "runs": list(gap.runs), "paired_by_seed": gap.paired, "differs": found.differs,
            }  # fmt: skip
        if found.improvement is not None:
            row["probability_of_improvement"] = plain(found.improvement)
        return row

    places = {id(run): (arm.name, at) for arm in made.arms for at, run in arm.runs.items()}
    return {
        "by": list(made.by),
        "baseline": made.arms[made.baseline].name,
        "not_comparable": list(made.not_comparable),
        "warnings": list(made.warnings),
        "comparisons": made.comparisons,
        "alpha": ALPHA,
        "target_reward": made.target,
        "measures": {
            key: {"title": known.title, "unit": known.unit, "text": known.text, "better": known.better.value}
            for key in made.keys
            for known in [measure(key)]
        },
        "arms": [
            {
                "name": arm.name,
                "settings": dict(arm.by),
                "runs": len(arm.runs),
                "figures": {key: cell(made.cells[index, key]) for key in made.keys if (index, key) in made.cells},
            }
            for index, arm in enumerate(made.arms)
        ],
        "runs": [
            {
                "name": run.name,
                "arm": places[id(run)][0] if id(run) in places else None,
                "seed": run.seed,
                "status": run.status.value,
                "why": run.why,
                "steps": run.steps,
                "figures": dict(run.figures),
            }
            for run in made.runs
        ],
    }


def to_json(made: Comparison) -> str:
    """Strict JSON, for `--json`."""
    return json.dumps(as_json(made), indent=1, allow_nan=False)


def _cells(arms: Sequence[Arm], baseline: int, key: str) -> dict[tuple[int, str], Cell]:
    values = {index: found for index, arm in enumerate(arms) if (found := arm.values(key))}
    cells = {
        index: Cell(
            mean=share(found) if measure(key).is_binary else _cut(estimate(found), key),
            iqm=None if measure(key).is_binary else _cut(estimate(found, "IQM"), key),
            percentiles=spread(list(found.values())),
        )
        for index, found in values.items()
    }
    if baseline in values:
        base = values[baseline]
        gaps = {index: _gap(arms[index], arms[baseline], key) for index in values if index != baseline}
        tested = [index for index, gap in gaps.items() if gap.p is not None]
        adjusted = dict(zip(tested, holm([gaps[index].p or 0.0 for index in tested]), strict=True))
        for index, gap in gaps.items():
            cells[index] = replace(
                cells[index],
                difference=gap,
                adjusted_p=adjusted.get(index),
                improvement=None if gap.p is None else _improvement(values[index], base, measure(key).better),
            )
    return {(index, key): cell for index, cell in cells.items()}


def _gap(ours: Arm, base: Arm, key: str) -> Difference:
    """The difference from the baseline. Where only some runs of an arm have the figure (those that reached the reward,
    or that lived until the end), they are a choice that the figure itself may have made: it is not tested."""
    values, others = ours.values(key), base.values(key)
    found = difference_of_shares(values, others) if measure(key).is_binary else difference(values, others)
    strata = {stratum for stratum, _ in (*values, *others)}  # a stratum without it, such as a preset, has no such thing
    whole = all(at in side for arm, side in ((ours, values), (base, others)) for at in arm.runs if at[0] in strata)
    return found if whole else replace(found, low=None, high=None, p=None)


def _cut(found: Estimate, key: str) -> Estimate:
    """The interval within what the figure can be: a share is at most 1."""
    if found.low is None or found.high is None:
        return found
    least, most = measure(key).bounds
    return replace(found, low=max(found.low, least), high=min(found.high, most))


def _improvement(ours: Values, base: Values, better: Better) -> Estimate | None:
    if better is Better.NEITHER:
        return None
    if not {stratum for stratum, _ in ours} & {stratum for stratum, _ in base}:
        ours, base = ({("", n): v for n, v in enumerate(side.values())} for side in (ours, base))
    return probability_of_improvement(*((ours, base) if better is Better.MORE else (base, ours)))


def _target(arms: Sequence[Arm]) -> float | None:
    """REACH of the way from the mean start of all runs to the final reward of the best arm; None where none rises.

    Where there is an arm of which at least half of the runs are healthy, it is the best of those: a reward that only a
    collapsed policy gets is not one to aim for.
    """
    starts = [
        float(run.curves["objective/scores"][1][:START].mean(dtype=float))
        for arm in arms
        for run in arm.runs.values()
        if "objective/scores" in run.curves
    ]
    ended = [(arm, found) for arm in arms if (found := arm.values("reward/final"))]
    healthy = [each for each in ended if (known := each[0].values("healthy")) and 2 * sum(known.values()) >= len(known)]
    ends = [math.fsum(found.values()) / len(found) for _, found in healthy or ended]
    if not starts or not ends:
        return None
    start = math.fsum(starts) / len(starts)
    return start + REACH * (max(ends) - start) if max(ends) > start else None


def _timed(run: Outcome, target: float | None) -> Outcome:
    """The run with `reward/reached`, and with the time of one that reached it."""
    if target is None:
        return run
    if (found := reached(run, target)) is None:
        is_known = run.status is Status.CRASHED or ("healthy" in run.figures and "objective/scores" in run.curves)
        return with_figures(run, {"reward/reached": 0.0}) if is_known else run
    figures = {"reward/reached": 1.0, "reward/steps_to": float(found[0])}
    return with_figures(run, figures if found[1] is None else {**figures, "reward/seconds_to": found[1]})


def _baseline(arms: Sequence[Arm], name: str | None, first: Outcome) -> int:
    if name is None:
        return next(index for index, arm in enumerate(arms) if any(run is first for run in arm.runs.values()))
    names = [arm.name for arm in arms]
    if name not in names:
        close = difflib.get_close_matches(name, names, n=1)
        meant = f"did you mean {close[0]!r}?" if close else f"the arms are {'; '.join(names[:12])}"
        raise ConfigError(f"--baseline {name!r}: no arm has this name: {meant}")
    return names.index(name)


def _warnings(runs: Sequence[Outcome], arms: Sequence[Arm]) -> list[str]:
    sentences = []
    fewest = min(len(arm.runs) for arm in arms)
    if fewest == 1:
        sentences.append(
            "an arm has a single run: it has no interval, and says nothing about what another seed would give"
        )
    elif fewest < FEW:
        sentences.append(
            f"an arm has {fewest} runs: with fewer than {FEW}, an interval rests on how the runs are distributed as "
            "much as on the runs, and only large differences show"
        )
    strata = [{stratum for stratum, _ in arm.runs} for arm in arms]
    if max(map(len, strata)) > 1 and (other := next((n for n, each in enumerate(strata) if each != strata[0]), 0)):
        stratum = min(strata[0] ^ strata[other])
        has, lacks = (arms[0], arms[other]) if stratum in strata[0] else (arms[other], arms[0])
        sentences.append(
            f"arms hold runs of different settings ({has.name} has {stratum}, {lacks.name} does not): a difference "
            "between them may be that of these settings"
        )
    for arm in arms:
        seeds = Counter((at[0], run.seed) for at, run in arm.runs.items() if run.seed is not None)
        if repeated := [seed for (_, seed), count in seeds.items() if count > 1]:
            sentences.append(
                f"{arm.name} has several runs of seed {repeated[0]} with the same settings: they count as runs of "
                "their own, and where one is a copy of another, intervals are too narrow"
            )
    unread = [run for run in runs if not run.figures]
    if unread:
        sentences.append(f"{_some(unread, runs, 'have')} no figures: {unread[0].name}: {unread[0].why}")
    ended = [run for run in runs if run.figures and run.status in (Status.RUNNING, Status.UNFINISHED)]
    if ended:
        sentences.append(f"{_some(ended, runs, 'are')} not finished: the figures are of the steps done so far")
    bad = [run for run in runs if run.status in (Status.CRASHED, Status.GIVEN_UP)]
    if bad:
        sentences.append(
            f"{_some(bad, runs, 'ended')} early, by an error or by the guard: the figures are of the steps done, and "
            "`healthy` is 0"
        )
    return sentences


def _some(part: Sequence[Outcome], runs: Sequence[Outcome], verb: str) -> str:
    """1 of 1 run is, 2 of 3 runs are."""
    of_one = {"have": "has", "are": "is"}.get(verb, verb)
    return f"{len(part)} of {counted(len(runs), 'run')} {of_one if len(part) == 1 else verb}"
