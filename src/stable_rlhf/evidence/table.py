"""The rows of a comparison in words, which console and page share; and the tables of the console."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from rich.table import Table
from rich.text import Text

from stable_rlhf.evidence.arms import odd_runs
from stable_rlhf.evidence.compare import Cell, Comparison
from stable_rlhf.evidence.measures import Better, Measure, measure
from stable_rlhf.evidence.outcome import Outcome
from stable_rlhf.evidence.statistics import SPREAD, Estimate
from stable_rlhf.report import figure
from stable_rlhf.text import counted, printable

NAME_LIMIT = 60
"""Characters of the name of an arm or a figure on the console."""

SENTENCE_LIMIT = 1000
"""Characters of a sentence on the console."""

BASELINE = "baseline"


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A figure of an arm as texts. An interval is `[low, high]`, or empty where one run cannot give any."""

    mean: str
    interval: str
    runs: str
    """n=5, or n=2 of 5 where only some of the arm's runs have the figure."""
    iqm: str
    """With its interval; empty for a share, which has none."""
    percentiles: str
    mark: str
    """`better`, `worse`, `higher` or `lower` where it differs from the baseline; otherwise empty."""
    p: str
    """Of no difference from the baseline, empty where that was not tested."""


@dataclass(frozen=True, kw_only=True)
class Group:
    """A table: the figures of one group (columns) of every arm (rows, in the order of the arms)."""

    title: str
    measures: tuple[Measure, ...]
    rows: tuple[tuple[Entry | None, ...], ...]
    """None where no run of the arm has the figure."""


@dataclass(frozen=True, kw_only=True)
class Gap:
    """A difference from the baseline as texts."""

    arm: int
    """Index of the arm."""
    measure: Measure
    difference: str
    interval: str
    paired: bool
    runs: tuple[int, int]
    p: str
    holm: str
    improvement: str
    mark: str


def groups(made: Comparison) -> list[Group]:
    """The tables by group of figures."""
    found: dict[str, list[Measure]] = {}
    for key in made.keys:
        known = measure(key)
        found.setdefault(known.group, []).append(known)

    def entry(index: int, known: Measure) -> Entry | None:
        cell = made.cells.get((index, known.key))
        return None if cell is None else _entry(cell, known, len(made.arms[index].runs))

    return [
        Group(
            title=title,
            measures=tuple(measures),
            rows=tuple(tuple(entry(index, each) for each in measures) for index in range(len(made.arms))),
        )
        for title, measures in found.items()
    ]


def gaps(made: Comparison) -> list[Gap]:
    """The differences from the baseline, by figure."""
    found = []
    for key in made.keys:
        known = measure(key)
        for index in range(len(made.arms)):
            cell = made.cells.get((index, key))
            if cell is None or (gap := cell.difference) is None:
                continue
            value, interval = in_words(gap.value, gap.low, gap.high)
            chance = cell.improvement
            found.append(
                Gap(
                    arm=index,
                    measure=known,
                    difference=value if value.startswith("-") or not gap.value else f"+{value}",
                    interval=interval,
                    paired=gap.paired,
                    runs=gap.runs,
                    p=p_in_words(gap.p),
                    holm=p_in_words(cell.adjusted_p),
                    improvement="-" if chance is None else _share(chance),
                    mark=_mark(cell, known),
                )
            )
    return found


def tested_figures(made: Comparison) -> int:
    """How many figures were compared with the baseline: each is a family of comparisons of its own."""
    return len({key for (_, key), cell in made.cells.items() if cell.adjusted_p is not None})


def method(made: Comparison) -> str:
    """What is compared, and how often chance is expected to look like a difference, in plain words."""
    names = [printable(name, NAME_LIMIT) for name in made.by]
    by = " and ".join(filter(None, [", ".join(names[:-1]), *names[-1:]]))
    arms = f"{counted(len(made.arms), 'arm')} of {counted(sum(len(arm.runs) for arm in made.arms), 'run')}"
    parts = [f"Runs by {by}: {arms}." if by else f"All runs are one arm: {counted(len(made.arms[0].runs), 'run')}."]
    if made.comparisons:
        figures = tested_figures(made)
        base = printable(made.arms[made.baseline].name, NAME_LIMIT)
        parts.append(
            f"Every arm is compared with {base}: {counted(made.comparisons, 'difference')} "
            f"of {counted(figures, 'figure')} tested, with Holm's correction over the arms of each figure. "
            "The correction does not go over the figures: "
            f"{counted(figures, 'figure')} tested means that about one in twenty figures without any difference is "
            "still marked by chance."
        )
    if made.target is not None and "reward/reached" in made.keys:
        parts.append(f"The reward to reach is {figure(made.target)}, as a mean of 20 steps.")
    if any(cell.mean.runs < len(made.arms[index].runs) for (index, _), cell in made.cells.items()):
        parts.append(
            "Where only some of an arm's runs have a figure, its n says so (n=2 of 5): the mean leaves out the others, "
            "and it is not tested against the baseline."
        )
    return " ".join(parts)


def console_tables(made: Comparison) -> list[Table]:
    """A table for each group of figures, and one of the runs that are not finished. All texts are shown as text, never
    as markup."""
    odd = odd_runs(made.runs)
    return [*(_console_table(made, group) for group in groups(made)), *([_odd_table(odd)] if odd else [])]


def notes(made: Comparison) -> list[str]:
    """The sentences around the tables: first what makes arms not comparable, then what the figures do not show."""
    bad = [f"NOT COMPARABLE: {sentence}." for sentence in made.not_comparable]
    return [
        printable(text, SENTENCE_LIMIT) for text in (*bad, *(f"Note: {text}." for text in made.warnings), method(made))
    ]


def in_words(value: float, low: float | None, high: float | None) -> tuple[str, str]:
    """(value, `[low, high]`) with the digits that the interval allows (`decimals`), the same for all three. A value
    without an interval has four digits."""
    if low is None or high is None:
        return figure(value), ""
    digits = decimals(low, high)
    if digits is None or max(map(abs, (value, low, high))) >= 1e6:
        return figure(value), f"[{figure(low)}, {figure(high)}]"
    # + 0.0: no minus before a zero
    texts = [format(round(each, digits) + 0.0, f".{digits}f") for each in (value, low, high)]
    return texts[0], f"[{texts[1]}, {texts[2]}]"


def decimals(low: float, high: float) -> int | None:
    """Decimals that show two digits of an interval's half width, and two of its middle where two decimals do; None for
    intervals that are too narrow or too wide for decimals."""
    half, middle = high / 2 - low / 2, abs(low / 2 + high / 2)
    if not 1e-5 <= half < 1e6:
        return None
    of_middle = min(2, 1 - math.floor(math.log10(middle))) if middle > 0 else 0
    return max(0, of_middle, 1 - math.floor(math.log10(half)))


def p_in_words(p: float | None) -> str:
    """A probability with two digits; very small ones are below a bound."""
    if p is None:
        return "-"
    return "< 0.0001" if p < 0.0001 else f"{p:.2g}"


def _entry(cell: Cell, known: Measure, members: int) -> Entry:
    mean, interval = in_words(cell.mean.value, cell.mean.low, cell.mean.high)
    tested = cell.difference is not None and cell.difference.p is not None
    return Entry(
        mean=mean,
        interval=interval,
        runs=f"n={cell.mean.runs}" + (f" of {members}" if cell.mean.runs < members else ""),
        iqm="" if cell.iqm is None else _joined(*in_words(cell.iqm.value, cell.iqm.low, cell.iqm.high)),
        percentiles=", ".join(f"{p} %: {figure(v)}" for p, v in zip(SPREAD, cell.percentiles, strict=True)),
        mark=_mark(cell, known),
        p=f"p {p_in_words(cell.difference.p)}, Holm {p_in_words(cell.adjusted_p)}"
        if tested and cell.difference
        else "",
    )


def _mark(cell: Cell, known: Measure) -> str:
    if not cell.differs or cell.difference is None:
        return ""
    more = cell.difference.value > 0
    if known.better is Better.NEITHER:
        return "higher" if more else "lower"
    return "better" if more == (known.better is Better.MORE) else "worse"


def _share(chance: Estimate) -> str:
    if chance.low is None or chance.high is None:
        return f"{chance.value:.2f}"
    return f"{chance.value:.2f} [{chance.low:.2f}, {chance.high:.2f}]"


def _joined(value: str, interval: str) -> str:
    return f"{value} {interval}" if interval else value


def _console_table(made: Comparison, group: Group) -> Table:
    """Arms below each other for each figure: so a table fits a terminal, however many figures the group has."""
    table = Table(title=Text(group.title), title_justify="left")
    table.add_column("arm", overflow="fold")
    table.add_column(Text("mean [95 % interval], IQM"), no_wrap=True)
    table.add_column(Text(f"against {printable(made.arms[made.baseline].name, NAME_LIMIT)}"), overflow="fold")
    names = [printable(arm.name, NAME_LIMIT) for arm in made.arms]
    for column, known in enumerate(group.measures):
        heading = f"{printable(known.title, NAME_LIMIT)} ({known.unit})"
        table.add_row(Text(heading, style="bold"), "", "", end_section=False)
        for index, name in enumerate(names):
            entry = group.rows[index][column]
            table.add_row(
                Text(f"  {name}"),
                Text("-" if entry is None else _lines(entry)),
                Text(_against(entry, baseline=index == made.baseline)),
                end_section=index + 1 == len(names),
            )
    return table


def _odd_table(runs: Sequence[Outcome]) -> Table:
    table = Table(title=Text("Runs that are not finished"), title_justify="left")
    for heading in ("run", "status", "why"):
        table.add_column(heading, overflow="fold")
    for run in runs:
        texts = (printable(run.name, NAME_LIMIT), run.status.value, printable(run.why or "", SENTENCE_LIMIT))
        table.add_row(*map(Text, texts))
    return table


def _lines(entry: Entry) -> str:
    return f"{_joined(entry.mean, entry.interval)} {entry.runs}" + (f"\nIQM {entry.iqm}" if entry.iqm else "")


def _against(entry: Entry | None, *, baseline: bool) -> str:
    if entry is None or (not baseline and not entry.p):
        return ""
    if baseline:
        return BASELINE
    return f"* {entry.mark}\n{entry.p}" if entry.mark else f"\n{entry.p}"


def numbered(items: Sequence[int]) -> str:
    """Numbers in order, with spans for neighbours: 1-3, 5."""
    spans: list[list[int]] = []
    for item in sorted(items):
        if spans and item == spans[-1][-1] + 1:
            spans[-1][1:] = [item]
        else:
            spans.append([item])
    return ", ".join("-".join(map(str, span)) for span in spans)
