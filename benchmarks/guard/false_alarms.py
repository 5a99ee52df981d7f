"""False alarms and misses of the guard, before and after its rules followed the KL budget and asked the reward again.

    python benchmarks/guard/false_alarms.py [--recorded FOLDER ...]

Simulated runs (simulated.py) for batches of 4 to 256 and budgets of 0.02 to 2, judged by `Guard` at its defaults.
*Before*: the same rows without the threshold in force and the exact KL, which is how the rules were (a ceiling of 2
nats, one sign for every collapse), and without scoring texts again. A run ends at its first alarm. ``--recorded``:
folders with runs (metrics.jsonl), judged as well. ``--choices``: instead, the thresholds next to others.

Intervals are exact at 95 %: Poisson for alarms per 1,000 steps, Clopper and Pearson for shares of runs.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from scipy.special import betaincinv, gammaincinv
from simulated import BEGINS, FAILING, HEALTHY, Law, Levels, rows

from stable_rlhf.control import Action, Guard, GuardConfig, Rescored, guard_rules

BATCHES = (4, 16, 64, 256)
BUDGETS = (0.02, 0.1, 0.3, 1.0, 2.0)
STEPS = 400
NOTICED = 200
"""Steps within which a failure must be noticed."""
ALARMS = (Action.ROLL_BACK, Action.STOP)
TEXTS = 32
UNSEEN = {"safe/threshold": None, "objective/kl_exact": None}
"""What the rules did not look at before."""


@dataclass
class Tally:
    """What became of the runs of a kind."""

    runs: int = 0
    steps: int = 0
    alarms: int = 0
    early: int = 0
    """Alarms before the failure had begun."""
    late: list[int] = field(default_factory=list)
    """Steps until a failure was noticed."""
    rules: dict[str, int] = field(default_factory=dict)


def alarm(
    law: Law, batch: int, budget: float, seed: int, after: bool, settings: GuardConfig | None = None
) -> tuple[int, str] | None:
    """(step, rule) of the run's first alarm."""
    guard, best, now = Guard(settings or GuardConfig()), Levels(kl=0.0), Levels(kl=0.0)

    def again() -> Rescored:
        spread = [(index / (TEXTS - 1) - 0.5) * best.spread for index in range(TEXTS)]
        moved = now.moved - best.moved
        before = tuple(best.reward + each for each in spread)
        return Rescored(step=0, before=before, now=tuple(score - moved for score in before))

    for step, (figures, now) in enumerate(rows(law, STEPS, batch, budget, seed)):
        seen = figures if after else {**figures, **UNSEEN}
        verdict = guard.judge(seen, again if after else None)
        if guard.state.rewards.since == 0:
            best = now
        if verdict.action in ALARMS:
            return step, verdict.rule
    return None


def tally(
    law: Law,
    seeds: int,
    after: bool,
    failing: bool,
    settings: GuardConfig | None = None,
    batches: Sequence[int] = BATCHES,
    budgets: Sequence[float] = BUDGETS,
) -> Tally:
    found = Tally()
    for batch in batches:
        for budget in budgets:
            for seed in range(seeds):
                at = alarm(law, batch, budget, seed, after, settings)
                found.runs += 1
                found.steps += STEPS if at is None else at[0] + 1
                if at is None:
                    continue
                if failing and at[0] < BEGINS:
                    found.early += 1
                    continue
                found.alarms += 1
                found.rules[at[1]] = found.rules.get(at[1], 0) + 1
                if failing and at[0] - BEGINS < NOTICED:
                    found.late.append(at[0] - BEGINS)
    return found


def rate(alarms: int, steps: int) -> str:
    """Alarms per 1,000 steps with the exact interval."""
    low = float(gammaincinv(alarms, 0.025)) if alarms else 0.0
    high = float(gammaincinv(alarms + 1, 0.975))
    return f"{1000 * alarms / steps:.2f} ({1000 * low / steps:.2f} to {1000 * high / steps:.2f})"


def share(ones: int, runs: int) -> str:
    low = float(betaincinv(ones, runs - ones + 1, 0.025)) if ones else 0.0
    high = float(betaincinv(ones + 1, runs - ones, 0.975)) if ones < runs else 1.0
    return f"{ones / runs:.0%} ({low:.0%} to {high:.0%})"


def rules(found: Tally) -> str:
    return ", ".join(f"`{name}`" for name in sorted(found.rules, key=lambda name: -found.rules[name])[:3]) or "-"


def healthy(seeds: int) -> Iterable[str]:
    yield "| healthy run | false alarms per 1,000 steps, before | after | rules before | rules after |"
    yield "|---|---|---|---|---|"
    sums = {False: Tally(), True: Tally()}
    for name, law in HEALTHY.items():
        both = {after: tally(law, seeds, after, failing=False) for after in (False, True)}
        for after, found in both.items():
            sums[after].alarms += found.alarms
            sums[after].steps += found.steps
        rates = [rate(found.alarms, found.steps) for found in both.values()]
        yield f"| {name} | {rates[0]} | {rates[1]} | {rules(both[False])} | {rules(both[True])} |"
    rates = [rate(found.alarms, found.steps) for found in sums.values()]
    yield f"| all | {rates[0]} | {rates[1]} | | |"


def failing(seeds: int) -> Iterable[str]:
    delay = "steps until noticed, before: median, 95th of 100"
    yield f"| failing run | missed, before | after | {delay} | after | rules before | rules after |"
    yield "|---|---|---|---|---|---|---|"
    for name, law in FAILING.items():
        both = {after: tally(law, seeds, after, failing=True) for after in (False, True)}
        cells = [share(found.runs - found.early - len(found.late), found.runs - found.early) for found in both.values()]
        delays = [_delay(found.late) for found in both.values()]
        yield f"| {name} | {' | '.join([*cells, *delays, *map(rules, both.values())])} |"


def choices(seeds: int) -> Iterable[str]:
    """The thresholds next to others: false alarms of all healthy runs, misses and delays of all failing ones."""
    yield "| threshold | false alarms per 1,000 steps | missed | steps until noticed: median, 95th of 100 |"
    yield "|---|---|---|---|"
    for name, value, settings, constants in CHOICES:
        with changed(constants):
            well = [tally(law, seeds, True, False, settings, *CORNERS) for law in HEALTHY.values()]
            ill = [tally(law, seeds, True, True, settings, *CORNERS) for law in FAILING.values()]
        runs, late = sum(each.runs - each.early for each in ill), [step for each in ill for step in each.late]
        alarms = rate(sum(each.alarms for each in well), sum(each.steps for each in well))
        yield f"| {name} {value:g} | {alarms} | {share(runs - len(late), runs)} | {_delay(late)} |"


CORNERS = (4, 64), (0.02, 0.3, 2.0)
"""Batches and budgets of the runs that the thresholds are compared on."""
CHOICES: list[tuple[str, float, GuardConfig, dict[str, float]]] = [
    *(("`max_kl_ratio`", value, GuardConfig(max_kl_ratio=value), {}) for value in (2.0, 3.0, 4.0, 5.0, 8.0)),
    *(("KL beyond the threshold by", value, GuardConfig(), {"BEYOND": value}) for value in (1.1, 1.5, 2.0, 3.0)),
    *(("repetitive below", value, GuardConfig(), {"REPETITIVE": value}) for value in (0.3, 0.5, 0.7)),
    *(("`min_distinct`", value, GuardConfig(min_distinct=value), {}) for value in (0.1, 0.25, 0.5)),
    *(("`min_entropy`", value, GuardConfig(min_entropy=value), {}) for value in (0.1, 0.2, 0.4)),
    *(("`max_drawdown`", value, GuardConfig(max_drawdown=value), {}) for value in (0.25, 0.5, 0.75)),
    *(("`patience`", value, GuardConfig(patience=value), {}) for value in (1, 3, 5, 10)),
]


@contextlib.contextmanager
def changed(constants: dict[str, float]) -> Iterator[None]:
    """Other constants of the rules, inside."""
    own = {name: getattr(guard_rules, name) for name in constants}
    for name, value in constants.items():
        setattr(guard_rules, name, value)
    try:
        yield
    finally:
        for name, value in own.items():
            setattr(guard_rules, name, value)


def _delay(late: list[int]) -> str:
    if not late:
        return "-"
    ranked = sorted(late)
    return f"{statistics.median(ranked):.0f}, {ranked[int(0.95 * (len(ranked) - 1))]}"


def recorded(folders: list[Path]) -> Iterable[str]:
    """Recorded runs by preset and rate: how many have an alarm, and where."""
    groups: dict[str, list[tuple[int, dict[bool, tuple[int, str] | None]]]] = {}
    for path in sorted(path for folder in folders for path in folder.rglob("metrics.jsonl")):
        lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        name = path.parent.name.rpartition(",seed=")[0] or path.parent.name.rpartition("-")[0]
        groups.setdefault(name, []).append((len(lines), {after: _judged(lines, after) for after in (False, True)}))
    yield "| recorded runs | runs, steps | with an alarm, before | after | first alarms after: step, rule |"
    yield "|---|---|---|---|---|"
    for name, runs in groups.items():
        counts = [sum(found[after] is not None for _, found in runs) for after in (False, True)]
        first = ", ".join(f"{at[0]} `{at[1]}`" for _, found in runs if (at := found[True]) is not None)
        steps = sum(count for count, _ in runs)
        yield f"| {name} | {len(runs)}, {steps:,} | {counts[0]} | {counts[1]} | {first or '-'} |"


def _judged(lines: list[dict[str, float | None]], after: bool) -> tuple[int, str] | None:
    guard = Guard(GuardConfig())
    for step, line in enumerate(lines):
        figures = {name: value for name, value in line.items() if not isinstance(value, str)}
        figures["rows"] = (line["episode"] or 0) / (step + 1) - (line["completions/skipped"] or 0)
        if not after:
            figures |= UNSEEN
        verdict = guard.judge(figures)
        if verdict.action in ALARMS:
            return step, verdict.rule
    return None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3, help="runs of each kind, batch and budget")
    parser.add_argument("--recorded", type=Path, nargs="*", default=[], help="folders with runs")
    parser.add_argument("--choices", action="store_true", help="instead, the thresholds next to others")
    options = parser.parse_args()
    if options.choices:
        tables = [choices(options.seeds)]
    else:
        tables = [healthy(options.seeds), failing(options.seeds)]
        tables += [recorded(options.recorded)] if options.recorded else []
    for table in tables:
        for line in table:
            print(line, flush=True)
        print()


if __name__ == "__main__":
    main()
