"""How near each regulating controller holds the KL to its budget, on the simulated policies of tests/control.

    PYTHONPATH=. python benchmarks/regulation.py

25 plants (tests/control/plants.py: three kinds, learning rates over a factor of 200, delay, momentum, 5 % noise), 600
steps each. Over the last 200 steps, KL divided by the threshold in force: its mean, its deviation, and its 10-step mean
that is furthest from 1; each row gives the range or the worst over the plants. Rewards play no part in `safe` and
`adaptive` here; `paper` moves its threshold with them, and divides by the threshold that it moved to.
"""

from __future__ import annotations

import statistics

from stable_rlhf.control import make_controller
from tests.control.plants import Plant, run
from tests.control.test_safe import SPEEDS

CONTROLLERS = {"safe": {"threshold_on": False}, "adaptive": {}, "paper": {}}
STEPS, TAIL, WINDOW = 600, 200, 10


def shares(plant: Plant, name: str) -> list[float]:
    """KL / threshold of the last TAIL steps."""
    kls, decisions = run(plant, make_controller(name, **CONTROLLERS[name]), STEPS)
    pairs = zip(kls, (decision.threshold for decision in decisions), strict=True)
    return [kl / threshold for kl, threshold in pairs if threshold is not None][-TAIL:]


def row(name: str) -> str:
    """The controller's row of the table."""
    tails = [shares(plant, name) for plant in SPEEDS]
    means = [statistics.fmean(tail) for tail in tails]
    averages = [statistics.fmean(tail[i : i + WINDOW]) for tail in tails for i in range(TAIL - WINDOW + 1)]
    return (
        f"| `{name}` | {min(means):.3f} to {max(means):.3f} | {max(map(statistics.pstdev, tails)):.3f} "
        f"| {max(abs(average - 1) for average in averages):.1%} |"
    )


def main() -> None:
    print(
        "| controller | mean KL / threshold | largest deviation | furthest 10-step mean |",
        "|---|---|---|---|",
        sep="\n",
    )
    for name in CONTROLLERS:
        print(row(name))


if __name__ == "__main__":
    main()
