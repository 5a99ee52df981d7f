"""A table for each aim of the study: runs in, Markdown out."""

from __future__ import annotations

import math
from collections.abc import Sequence

from stable_rlhf.evidence.measures import REACH
from stable_rlhf.evidence.statistics import Difference, difference
from study.frontier import above_frontier, best_ppo, best_setting, is_tuned_ppo, method
from study.runs import Run, Values, gold_falls, gold_of, values
from study.tables import Table, arms_in, counted, interval, mean, number, said, select

CUSTOMARY = "ppo 0.05"


def arms_table(bench: str, runs: Sequence[Run]) -> Table:
    """Every arm of the main part at every rate."""
    rows = []
    for arm in arms_in(select(runs, "main")):
        for rate in sorted({run.rate for run in select(runs, "main", arm)}):
            cell = select(runs, "main", arm, rate)
            figures = [interval(mean(values(cell, key))) for key in ("reward/average", "reward/final", "kl/final")]
            healthy = values(cell, "healthy")
            rows.append(
                [arm, f"{rate:g}", *figures, interval(mean(values(cell, "distinct_2/share"))), counted(healthy)]
            )
    columns = ["arm", "rate", "training average", "final reward", "final KL", "distinct-2, share of start", "healthy"]
    return Table(
        title=f"Bench {bench}: all arms", aim="Means with 95 % intervals over seeds.", columns=columns, rows=rows
    )


def frontier_table(bench: str, runs: Sequence[Run]) -> Table:
    """Aim 1."""
    rows: list[list[str]] = []
    if (best := best_ppo(runs)) is not None:
        rate = best[1]
        safe = select(runs, "main", "safe", rate)
        ppo = [run for run in select(runs, "main", rate=rate) if is_tuned_ppo(run.arm)]
        gap = mean(above_frontier(safe, ppo))
        rows.append(["final reward above PPO's frontier at the same KL", interval(gap), said(gap)])
        for name, arm in (("the customary coefficient", CUSTOMARY), ("the best PPO", best[0])):
            other = select(runs, "main", arm, rate)
            for figure, title in (("reward/average", "training average"), ("reward/final", "final reward")):
                rows.append(_against(f"{title} less that of {name} ({arm})", safe, other, figure))
    return Table(
        title=f"Aim 1, bench {bench}: `safe` at its defaults and hand-tuned PPO",
        aim="On or above the frontier of the best hand-tuned PPO; training average at least 5 % above the coefficient "
        f"0.05. At PPO's best rate{'' if best is None else f', {best[1]:g}'}.",
        columns=["figure", "value [95 %]", "in words"],
        rows=rows,
    )


def baselines_table(bench: str, runs: Sequence[Run]) -> Table:
    """`safe` at its defaults against each baseline at its best setting."""
    rows = []
    main, ppo = select(runs, "main"), best_ppo(runs)
    safe = [] if ppo is None else select(main, arm="safe", rate=ppo[1])
    for name in dict.fromkeys(method(run.arm) for run in main):
        mine = [run for run in main if method(run.arm) == name]
        settings = len({(run.arm, run.rate) for run in mine})
        best = best_setting(mine)
        known = [run.figures["healthy"] for run in mine if "healthy" in run.figures]
        row = [name, str(settings), f"{math.fsum(known):g} of {len(known)}"]
        if best is None:
            rows.append([*row, "none mostly healthy", "-", "-", "-"])
            continue
        cell = select(mine, arm=best[0], rate=best[1])
        gaps = [_paired(values(safe, key), values(cell, key)) for key in ("reward/average", "reward/final")]
        rows.append([*row, f"{best[0]}, {best[1]:g}", interval(mean(values(cell, "kl/final"))), *map(interval, gaps)])
    return Table(
        title=f"Bench {bench}: `safe` and each baseline at its best setting",
        aim="The best setting (coefficient and learning rate) has the highest final reward of those whose runs "
        "mostly end healthy; `safe` is untuned, at PPO's best rate. Healthy runs are counted over all settings.",
        columns=[
            *("method", "settings tried", "healthy runs", "best setting", "its final KL"),
            *("training average, `safe` less it", "final reward, `safe` less it"),
        ],
        rows=rows,
    )


def _paired(ours: Values, others: Values) -> Difference | None:
    """By seed, whatever the rates of the two are."""
    one, other = ({("", seed): value for (_, seed), value in found.items()} for found in (ours, others))
    return difference(one, other) if one and other else None


def _against(title: str, ours: Sequence[Run], others: Sequence[Run], key: str) -> list[str]:
    one, other = values(ours, key), values(others, key)
    if not one or not other:
        return [title, "-", "no run"]
    gap = difference(one, other)
    base = abs(math.fsum(other.values()) / len(other))
    return [title, interval(gap), f"{said(gap)}, {100 * gap.value / base:+.1f} %" if base else said(gap)]


def budget_table(bench: str, runs: Sequence[Run]) -> Table:
    """Aim 2."""
    found = {_budget(arm): arm for arm in arms_in(select(runs, "budget"))}
    rate = min({run.rate for run in select(runs, "budget")}, default=None)
    cells = {budget: select(runs, "budget", arm) for budget, arm in found.items()}
    if rate is not None and (default := select(runs, "main", "safe", rate)):
        cells[math.nan] = default
    rows = []
    for budget, cell in sorted(cells.items(), key=lambda item: (item[0] != item[0], item[0])):
        incidents = values(cell, "incidents")
        rows.append(
            [
                "default" if math.isnan(budget) else f"{budget:g}",
                str(len(cell)),
                interval(mean(values(cell, "kl/held"))),
                interval(mean(values(cell, "kl/final"))),
                interval(mean(values(cell, "reward/final"))),
                f"{math.fsum(incidents.values()):g} in {len(incidents)} runs",
            ]
        )
    return Table(
        title=f"Aim 2, bench {bench}: any budget",
        aim="KL within 15 % of the threshold in force in 95 % of the steps after it is first reached; the final reward "
        "rises with the budget; no incident.",
        columns=["budget", "n", "share of steps within 15 %", "final KL", "final reward", "incidents"],
        rows=rows,
    )


def _budget(arm: str) -> float:
    return float(arm.split()[-1])


def rate_table(bench: str, runs: Sequence[Run]) -> Table:
    """Aim 3: every arm of the main part at PPO's best rate and above, against itself at that rate."""
    best = best_ppo(runs)
    rows = []
    for arm in arms_in(select(runs, "main")) if best is not None else []:
        base = select(runs, "main", arm, best[1]) if best is not None else []
        ends = values(base, "reward/final")
        if not ends:
            continue
        start = start_of(base)
        middle = math.fsum(ends.values()) / len(ends)
        target = start + REACH * (middle - start)
        slow = _steps_to(base, target)
        for rate in sorted({run.rate for run in select(runs, "main", arm) if best is not None and run.rate >= best[1]}):
            cell = select(runs, "main", arm, rate)
            end, steps = mean(values(cell, "reward/final")), _steps_to(cell, target)
            ratio = f"{steps / slow:.2f}" if steps and slow else "never" if not steps else "-"
            rows.append(
                [arm, f"{rate:g}", interval(end), f"{100 * (end.value / middle - 1):+.1f} %" if end else "-", ratio,
                 counted(values(cell, "healthy"))]
            )  # fmt: skip
    return Table(
        title=f"Aim 3, bench {bench}: 1 to 30 times PPO's best rate",
        aim="Final reward within 3 % of the arm's own at PPO's best rate, 90 % of it reached within 1.5 times the "
        "steps, every run healthy.",
        columns=["arm", "rate", "final reward", "against itself", "steps to 90 %, ratio", "healthy"],
        rows=rows,
    )


WINDOW = 20
"""Steps of which a mean counts as reaching a reward, as in compare."""


def _scores(run: Run) -> list[float]:
    return [row["objective/scores"] for row in run.rows if row.get("objective/scores") is not None]


def start_of(runs: Sequence[Run]) -> float:
    first = [score for run in runs for score in _scores(run)[:5]]
    return math.fsum(first) / len(first) if first else 0.0


def _steps_to(runs: Sequence[Run], target: float) -> float | None:
    """Mean steps until a mean of WINDOW steps is at the target; None where a run never gets there."""
    found = []
    for run in runs:
        scores = _scores(run)
        windows = (
            at for at in range(WINDOW, len(scores) + 1) if math.fsum(scores[at - WINDOW : at]) / WINDOW >= target
        )
        if (first := next(windows, None)) is None:
            return None
        found.append(first)
    return math.fsum(found) / len(found) if found else None


def adversarial_table(bench: str, runs: Sequence[Run]) -> Table:
    """Aim 4."""
    rows = []
    plain = {run.seed: run for run in select(runs, "main", "safe")}
    for arm in arms_in(select(runs, "adversarial")):
        cell = select(runs, "adversarial", arm)
        rate = cell[0].rate
        same = {run.seed: run for run in select(runs, "main", "safe", rate)} or plain
        apart = [_decisions_apart(run, same[run.seed]) for run in cell if run.seed in same]
        scaled = arm in ("tiny", "huge")
        rows.append(
            [
                arm,
                str(len(cell)),
                interval(mean(values(cell, "kl/step_100"))),
                interval(mean(values(cell, "kl/final"))),
                interval(mean(values(cell, "length/change"))),
                number(max(apart)) if scaled and apart else "-",
            ]
        )
    return Table(
        title=f"Aim 4, bench {bench}: rewards that must not matter",
        aim="Times 1e-6 (tiny) and 1e6 (huge) with an offset: the decisions of the plain reward. Independent of the "
        "text (noise): no effect on length and KL. Constant: KL below .005 after 100 steps.",
        columns=[
            "reward",
            "n",
            "KL at step 100",
            "final KL",
            "change of length, tokens",
            "coefficients apart, at most",
        ],
        rows=rows,
    )


def _decisions_apart(run: Run, other: Run) -> float:
    """The largest relative difference between the coefficients of two runs at a step."""
    pairs = [
        (a["safe/kl_coef"], b["safe/kl_coef"])
        for a, b in zip(run.rows, other.rows, strict=False)
        if a.get("safe/kl_coef") is not None and b.get("safe/kl_coef") is not None
    ]
    return max((abs(a - b) / max(abs(a), abs(b)) for a, b in pairs if a != b), default=0.0)


def gold_table(bench: str, runs: Sequence[Run]) -> Table:
    """Aim 5."""
    gold = gold_of(runs)
    rows = []
    for arm in arms_in(select(runs, "main")) if gold is not None else []:
        for rate in sorted({run.rate for run in select(runs, "main", arm)}):
            cell = select(runs, "main", arm, rate)
            falls = _falls(cell, str(gold))
            change = {key: _change(cell, key) for key in ("reward", f"gold/{gold}/mean")}
            if not any(change.values()):
                continue
            rises = [interval(mean(found)) for found in change.values()]
            rows.append([arm, f"{rate:g}", *rises, interval(mean(values(cell, "kl/final"))), *falls])
    return Table(
        title=f"Aim 5, bench {bench}: the gold reward",
        aim="Gold never falls by more than two standard errors while the reward rises by as much, before the KL first "
        "reaches its threshold. An arm without a threshold has no such step; the last column is of the whole run.",
        columns=[
            *("arm", "rate", "reward, after less before", "gold, after less before", "final KL"),
            *("gold fell before", "gold fell"),
        ],
        rows=rows,
    )


def _falls(runs: Sequence[Run], gold: str) -> list[str]:
    """Runs in which gold fell: before the threshold closes, and in the whole run."""
    closing = [gold_falls(run, gold, run.figures["kl/first"]) for run in runs if "kl/first" in run.figures]
    whole = [gold_falls(run, gold) for run in runs]
    return [f"{sum(known)} of {len(known)}" if (known := [fell for fell in side if fell is not None]) else "-"
            for side in (closing, whole)]  # fmt: skip


def _change(runs: Sequence[Run], key: str) -> Values:
    found: Values = {}
    for run in runs:
        before, after = run.evaluation.get("before") or {}, run.evaluation.get("after") or {}
        if before.get(key) is not None and after.get(key) is not None:
            found[f"{run.rate:g}", run.seed] = after[key] - before[key]
    return found


def variety_table(bench: str, runs: Sequence[Run]) -> Table:
    """Aim 7, on the bench's own runs; `make quickstart` is the built-in pair at the defaults."""
    rows = []
    for rate in sorted({run.rate for run in select(runs, "main", "safe")}):
        cell = select(runs, "main", "safe", rate)
        figures = [interval(mean(values(cell, key))) for key in ("distinct_2/share", "entropy/final", "reward/final")]
        rows.append([f"{rate:g}", str(len(cell)), *figures])
    return Table(
        title=f"Aim 7, bench {bench}: variety of `safe`",
        aim="Distinct-2 at least 75 % of its start.",
        columns=["rate", "n", "distinct-2, share of start", "entropy", "final reward"],
        rows=rows,
    )
