"""What each mechanism of `safe` does, in a line with its interval, and the table of bench L."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from stable_rlhf.evidence.statistics import Difference, difference, difference_of_shares
from study.aims import start_of
from study.runs import Run, Values, values
from study.tables import Table, arms_in, counted, interval, mean, select

JUDGED = {
    "reward/final": "final reward",
    "reward/average": "training average",
    "kl/held": "steps within 15 %",
    "healthy": "healthy",
}
"""Figures of which more is better -> title. A mechanism is judged by the final reward and by `healthy`."""
DECIDES = ("reward/final", "healthy")


def mechanism_table(bench: str, runs: Sequence[Run]) -> Table:
    """`safe` with each mechanism less `safe` without it, pairs of seed and rate."""
    rows = []
    for arm in arms_in(select(runs, "ablation")):
        without = select(runs, "ablation", arm)
        rates = {run.rate for run in without}
        whole = [run for run in select(runs, "main", "safe") if run.rate in rates]
        pair = (whole, without) if arm.startswith("safe-no-") else (without, whole)  # others put a layer in
        gaps = {key: _gap(values(pair[0], key), values(pair[1], key), key) for key in JUDGED}
        word = verdict([gap for key in DECIDES if (gap := gaps[key]) is not None])
        seeds = f"{len(whole)} and {len(without)}"
        rows.append([arm.removeprefix("safe-no-").removeprefix("safe-"), seeds, *map(interval, gaps.values()), word])
    return Table(
        title=f"Mechanisms, bench {bench}: `safe` with each, less `safe` without it",
        aim="A mechanism helps where `safe` with it has the higher final reward or more healthy runs (interval above "
        "0) and neither lower; it hurts in the reverse case. Several rates are pooled, each a stratum.",
        columns=["mechanism", "n", *JUDGED.values(), "verdict"],
        rows=rows,
    )


def _gap(ours: Values, others: Values, key: str) -> Difference | None:
    if not ours or not others:
        return None
    compute: Callable[[Values, Values], Difference] = difference_of_shares if key == "healthy" else difference
    return compute(ours, others)


def verdict(gaps: Sequence[Difference]) -> str:
    """helps, hurts, does nothing, or mixed, by the intervals of differences of which more is better."""
    known = [gap for gap in gaps if gap.low is not None and gap.high is not None]
    if not known:
        return "not known"
    helps = any(gap.low is not None and gap.low > 0 for gap in known)
    hurts = any(gap.high is not None and gap.high < 0 for gap in known)
    return {(True, True): "mixed", (True, False): "helps", (False, True): "hurts"}.get((helps, hurts), "does nothing")


def length_table(bench: str, runs: Sequence[Run]) -> Table:
    """Bench L: each verifiable reward at each length."""
    rows = []
    for part in dict.fromkeys(run.part for run in runs):
        for arm in arms_in(select(runs, part)):
            cell = select(runs, part, arm)
            first = {(f"{run.rate:g}", run.seed): start_of([run]) for run in cell}
            figures = [interval(mean(values(cell, key))) for key in ("reward/final", "kl/final", "kl/held")]
            rows.append([part, arm, str(len(cell)), interval(mean(first)), *figures,
                         interval(mean(values(cell, "length/change"))), counted(values(cell, "healthy"))])  # fmt: skip
    return Table(
        title=f"Bench {bench}: verifiable rewards by length",
        aim="`exact`: a number of commas, right or wrong; `listed`: different words of a list. The number is the most "
        "tokens of a completion.",
        columns=[
            *("reward", "arm", "n", "at the start", "final reward", "final KL", "steps within 15 %"),
            *("change of length", "healthy"),
        ],
        rows=rows,
    )
