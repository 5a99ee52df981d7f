"""How near the KL is held to its budget, on the simulated policies of tests/control/plants.py.

    PYTHONPATH=. python benchmarks/control/loop.py [--picture FILE.png]

Four tables. The first compares the regulating controllers on 25 `Plant`s (learning rates over a factor of 200, delay,
momentum, 5 % noise), 600 steps each: over the last 200, KL divided by the threshold in force, its mean, its deviation,
and its 10-step mean that is furthest from 1. Rewards play no part in `safe` and `adaptive` there; `paper` moves its
threshold with them.

The others compare `safe` with its law at commit f169609 (before.py, with the bound of 0.005 nats an update that its
preview then had) on `Policy`, whose figures are those of recorded runs (fit.py): 18 policies, pulls over a factor of
13, steps over a factor of 100, with and without a rollout of delay and a momentum of 0.5. One row a budget; then what
happens where a pull comes late, where the coefficient has no effect for a while, and where one rollout is far off.

The last holds `safe` with its moving threshold on two policies that were fitted to recorded runs.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import statistics
from collections.abc import Callable
from pathlib import Path

from benchmarks.control.before import Before
from stable_rlhf.control import Observation, make_controller
from tests.control.plants import BUILT_IN, SMOLLM2, Law, Plant, Policy, Saturating, Seen, follow, hold, run
from tests.control.test_safe import SPEEDS

CONTROLLERS = {"safe": {"threshold_on": False}, "adaptive": {}, "paper": {}}
STEPS, TAIL, WINDOW = 600, 200, 10
BUDGETS = (0.01, 0.02, 0.05, 0.1, 0.3, 1.0, 2.0)
POLICIES = [
    Policy(pull=pull, size=size, delay=delay, momentum=delay / 2)
    for pull in (0.015, 0.05, 0.2)
    for size in (0.01, 0.1, 1.0)
    for delay in (0, 1)
]
ALLOWED = 0.15  # of the budget


def shares(plant: Plant, name: str) -> list[float]:
    """KL / threshold of the last TAIL steps."""
    kls, decisions = run(plant, make_controller(name, **CONTROLLERS[name]), STEPS)
    pairs = zip(kls, (decision.threshold for decision in decisions), strict=True)
    return [kl / threshold for kl, threshold in pairs if threshold is not None][-TAIL:]


def row(name: str) -> str:
    """The controller's row of the first table."""
    tails = [shares(plant, name) for plant in SPEEDS]
    means = [statistics.fmean(tail) for tail in tails]
    averages = [statistics.fmean(tail[i : i + WINDOW]) for tail in tails for i in range(TAIL - WINDOW + 1)]
    return (
        f"| `{name}` | {min(means):.3f} to {max(means):.3f} | {max(map(statistics.pstdev, tails)):.3f} "
        f"| {max(abs(average - 1) for average in averages):.1%} |"
    )


def before(budget: float, initial_coef: float = 0.05) -> Law:
    """The law at f169609, with the bound of the preview."""
    law = Before(budget, initial_coef)
    return lambda seen: (law.coefficient(seen), 0.005)


def after(budget: float, initial_coef: float = 0.05) -> Law:
    """The law of `safe` as it is."""
    controller = make_controller("safe", budget=budget, initial_coef=initial_coef, threshold_on=False)

    def law(seen: Observation) -> tuple[float, float | None]:
        decision = controller.observe(seen)
        return decision.kl_coef, decision.update_kl

    return law


LAWS: dict[str, Callable[..., Law]] = {"before": before, "after": after}


@dataclasses.dataclass(frozen=True)
class Held:
    """How well one run was held, in budgets and steps."""

    reached: bool
    """Whether the KL came to 95 % of the budget."""
    within: float
    """Share of the steps since then within 15 % of the budget; 0 where it did not come."""
    peak: float
    """Largest KL / budget."""
    settling: int
    """Steps from there until the 10-step mean stays within 15 %."""
    error: float
    """Mean of KL / budget over the last 100 steps, less 1."""


def held(seen: list[Seen], budget: float) -> Held:
    """The figures of a run."""
    kls = [each.kl / budget for each in seen]
    begin = next((step for step, kl in enumerate(kls) if kl >= 0.95), None)
    error = statistics.fmean(kls[-100:]) - 1
    if begin is None:
        return Held(False, 0.0, max(kls), len(kls), error)
    rest = kls[begin:]
    means = [statistics.fmean(rest[i : i + WINDOW]) for i in range(len(rest) - WINDOW + 1)]
    settling = max((i + 1 for i, mean in enumerate(means) if abs(mean - 1) > ALLOWED), default=0)
    return Held(True, statistics.fmean(abs(kl - 1) <= ALLOWED for kl in rest), max(kls), settling, error)


def budget_row(name: str, budget: float) -> str:
    """Over the 18 policies; a run lasts 400 steps more than four times the quickest rise."""
    found = []
    for policy in POLICIES:
        steps = 400 + math.ceil(4 * math.sqrt(2 * budget) / policy.size)
        found.append(held(hold(policy, LAWS[name](budget), steps), budget))
    good = sum(each.within >= 0.95 for each in found)
    return (
        f"| {budget:g} | {name} | {sum(each.reached for each in found)} | {good} "
        f"| {statistics.fmean(each.within for each in found):.1%} | {min(each.within for each in found):.1%} "
        f"| {statistics.fmean(each.peak for each in found):.2f} | {max(each.peak for each in found):.2f} "
        f"| {statistics.median(each.settling for each in found):.0f} "
        f"| {statistics.fmean(abs(each.error) for each in found):.1%} |"
    )


def late(name: str) -> list[Seen]:
    """A fiftieth of the pull for 300 rollouts, then all of it."""
    policy = Policy(pull=0.2, schedule=lambda step: 0.02 if step < 300 else 1.0)
    return hold(policy, LAWS[name](0.3, 0.3), 600)


def without_effect(name: str) -> list[Seen]:
    """A coefficient that has no effect in rollouts 100 to 300."""
    return hold(Policy(effect=lambda step: 0.0 if 100 <= step < 300 else 1.0), LAWS[name](0.3), 700)


def outlier(name: str) -> list[Seen]:
    """The KL of rollout 200 is read ten times too high."""
    law = LAWS[name](0.3)

    def misread(seen: Observation) -> tuple[float, float | None]:
        return law(dataclasses.replace(seen, kl=10 * seen.kl) if seen.step == 200 else seen)

    return hold(Policy(), misread, 400)


def event_rows(name: str) -> list[str]:
    """Rows of the third table."""
    kl = {case.__name__: [each.kl / 0.3 for each in case(name)] for case in (late, without_effect)}
    coefficient = [each.coefficient for each in without_effect(name)]
    plain = [each.coefficient for each in hold(Policy(), LAWS[name](0.3), 400)]
    shaken = [each.coefficient for each in outlier(name)]
    worst = max((abs(math.log(b / a)) for a, b in zip(plain[205:230], shaken[205:230], strict=True)), default=0.0)
    late_part = kl["without_effect"][300:]  # back is where the KL has come to stay, as the mean of a window of ten
    windows = [statistics.fmean(late_part[i : i + 10]) for i in range(len(late_part) - 9)]
    back = max((i + 1 for i, each in enumerate(windows) if abs(each - 1) > ALLOWED), default=0)
    return [
        f"| a pull that comes late: largest KL / budget | {name} | {max(kl['late']):.2f} |",
        f"| no effect for 200 rollouts: largest coefficient, divided by the one before | {name} "
        f"| {max(coefficient[100:310]) / coefficient[99]:.0f} |",
        f"| the same: largest KL / budget | {name} | {max(kl['without_effect']):.2f} |",
        f"| the same: rollouts until the KL is back within 15 % | {name} | {back} |",
        f"| one KL read tenfold: largest change of the coefficient 5 to 30 later | {name} | {math.expm1(worst):.0%} |",
    ]


SWINGING = {
    "built-in pair": (BUILT_IN, (0.02, 0.05, 0.1, 0.3)),
    "SmolLM2": (SMOLLM2, (0.02, 0.05, 0.1, 0.3)),
}
"""Policies that were fitted to recorded runs, and budgets of those runs at which they agree with them."""


def swinging_row(name: str, policy: Saturating, budget: float) -> str:
    """Five seeds of 120 rollouts, from the first within 15 % of the threshold in force."""
    within, peaks = [], []
    for seed in range(5):
        seen = follow(policy, make_controller("safe", budget=budget), 120, seed)
        shares = [each.kl / (each.threshold or math.nan) for each in seen]
        begin = next((step for step, share in enumerate(shares) if share >= 1 - ALLOWED), len(shares))
        within.append(
            statistics.fmean(abs(share - 1) <= ALLOWED for share in shares[begin:]) if shares[begin:] else 0.0
        )
        peaks.append(max(shares))
    return f"| {name} | {budget:g} | {statistics.fmean(within):.1%} | {min(within):.1%} | {max(peaks):.2f} |"


def draw(file: Path) -> None:
    """The picture in docs/algorithm.md: KL by budget before and after, in six cases."""
    import matplotlib.pyplot as plt

    steps = 300
    cases: dict[str, Callable[[str], list[float]]] = {
        f"budget {budget:g}": lambda name, budget=budget: [
            each.kl / budget for each in hold(Policy(), LAWS[name](budget), steps)
        ]
        for budget in (0.02, 0.3, 2.0)
    }
    cases["steps ten times as long, budget 0.1"] = lambda name: [
        each.kl / 0.1 for each in hold(Policy(size=1.0, delay=1, momentum=0.5, pull=0.2), LAWS[name](0.1), steps)
    ]
    cases["the pull comes at 300"] = lambda name: [each.kl / 0.3 for each in late(name)]
    cases["no effect from 100 to 300"] = lambda name: [each.kl / 0.3 for each in without_effect(name)]
    figure, axes = plt.subplots(2, 3, figsize=(11, 5.5), sharey=True)
    for axis, (title, case) in zip(axes.flat, cases.items(), strict=True):
        axis.axhspan(1 - ALLOWED, 1 + ALLOWED, color="0.92")
        for name, colour in (("before", "tab:orange"), ("after", "tab:blue")):
            axis.plot(case(name), color=colour, linewidth=1.2, label=name)
        axis.set(title=title, ylim=(0, 3), xlabel="rollout")
    for axis in axes[:, 0]:
        axis.set_ylabel("KL / budget")
    axes[0, 0].legend(frameon=False)
    figure.tight_layout()
    figure.savefig(file, dpi=110, metadata={"Software": None})


def main() -> None:
    parser = argparse.ArgumentParser(description="How near the KL is held to its budget on simulated policies.")
    parser.add_argument("--picture", type=Path, help="draw the comparison to this file")
    given = parser.parse_args()
    print(
        "| controller | mean KL / threshold | largest deviation | furthest 10-step mean |",
        "|---|---|---|---|",
        *map(row, CONTROLLERS),
        "",
        "| budget | law | reached, of 18 | held in 95 % of steps | within 15 %, mean | worst | peak, mean | worst "
        "| settling, median | steady error |",
        "|---|---|---|---|---|---|---|---|---|---|",
        *(budget_row(name, budget) for budget in BUDGETS for name in LAWS),
        "",
        "| event | law | |",
        "|---|---|---|",
        *(line for lines in zip(*map(event_rows, LAWS), strict=True) for line in lines),
        "",
        "| policy | budget | within 15 %, mean | worst | peak, worst |",
        "|---|---|---|---|---|",
        *(swinging_row(name, policy, budget) for name, (policy, budgets) in SWINGING.items() for budget in budgets),
        sep="\n",
    )
    if given.picture is not None:
        draw(given.picture)


if __name__ == "__main__":
    main()
