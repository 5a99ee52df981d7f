"""What the study's tables share: how figures are written, and which runs a row is of."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from stable_rlhf.evidence.statistics import Difference, Estimate, estimate
from study.runs import Run, Values


@dataclass(frozen=True, kw_only=True)
class Table:
    """A title, a sentence on what is aimed at, columns and rows of texts."""

    title: str
    aim: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]

    def markdown(self) -> str:
        lines = [f"### {self.title}", "", self.aim, ""]
        if not self.rows:
            return "\n".join([*lines, "No run was made for this.", ""])
        lines += [f"| {' | '.join(cells)} |" for cells in (self.columns, ["---"] * len(self.columns), *self.rows)]
        return "\n".join([*lines, ""])


def number(value: float) -> str:
    """Three significant digits, without exponents where a person would write none."""
    return f"{value:.3g}" if value == 0 or 1e-3 <= abs(value) < 1e4 else f"{value:.2e}"


def interval(found: Estimate | Difference | None) -> str:
    """value [low, high]."""
    if found is None:
        return "-"
    if found.low is None or found.high is None:
        return number(found.value)
    return f"{number(found.value)} [{number(found.low)}, {number(found.high)}]"


def mean(found: Values) -> Estimate | None:
    return estimate(found) if found else None


def counted(found: Values) -> str:
    """3 of 5."""
    return f"{round(math.fsum(found.values()))} of {len(found)}" if found else "-"


def said(gap: Estimate | Difference | None) -> str:
    if gap is None or gap.low is None or gap.high is None:
        return "not known"
    return "above" if gap.low > 0 else "below" if gap.high < 0 else "level"


def select(
    runs: Iterable[Run], part: str | None = None, arm: str | None = None, rate: float | None = None
) -> list[Run]:
    return [
        run
        for run in runs
        if (part is None or run.part == part) and (arm is None or run.arm == arm) and (rate is None or run.rate == rate)
    ]


def arms_in(runs: Iterable[Run]) -> list[str]:
    return list(dict.fromkeys(run.arm for run in runs))
