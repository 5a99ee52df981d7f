"""benchmarks/guard: what is simulated is what its names say, and alarms are counted where the guard has them."""

from __future__ import annotations

import math
import statistics
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks" / "guard"))

import false_alarms
import simulated

from stable_rlhf.control import Guard, GuardConfig


@pytest.mark.parametrize("name", [name for name in simulated.FAILING if "noisy" not in name])
def test_a_failing_run_is_the_climbing_one_until_it_fails(name: str) -> None:
    law = simulated.FAILING[name]
    before = range(simulated.BEGINS)
    assert [law(step) for step in before] == [simulated.climbing(step) for step in before]
    later = simulated.BEGINS + 60
    assert law(later) != simulated.climbing(later)


@pytest.mark.parametrize(("batch", "budget"), [(4, 0.02), (256, 2.0)])
def test_figures_sway_around_the_levels_and_k1_is_noisier_than_the_exact_kl(batch: int, budget: float) -> None:
    seen = [row for row, _ in simulated.rows(simulated.climbing, 2000, batch, budget, seed=0)][500:]
    exact = [row["objective/kl_exact"] for row in seen]
    k1 = [row["objective/kl"] for row in seen]
    assert statistics.fmean(exact) == pytest.approx(budget, rel=0.03)
    assert statistics.fmean(k1) == pytest.approx(budget, rel=0.03)
    assert statistics.pstdev(k1) > statistics.pstdev(exact)
    entropy = [row["objective/entropy"] for row in seen]
    assert statistics.fmean(entropy) == pytest.approx(0.75 * simulated.ENTROPY, rel=0.02)


def test_an_alarm_is_the_guards_first_and_before_is_a_ceiling_in_nats() -> None:
    law = simulated.FAILING["KL diverges: doubles in 10 steps"]
    guard, steps = Guard(GuardConfig()), simulated.rows(law, 400, 64, 0.3, seed=1)
    first = next(step for step, (row, _) in enumerate(steps) if guard.judge(row).rule == "max_kl")
    assert false_alarms.alarm(law, 64, 0.3, seed=1, after=True) == (first, "max_kl")
    kls = [row["objective/kl"] or 0.0 for row, _ in simulated.rows(law, 400, 64, 0.3, seed=1)]
    above = next(step for step, kl in enumerate(kls) if kl > 2.0)
    assert false_alarms.alarm(law, 64, 0.3, seed=1, after=False) == (above, "max_kl")


@pytest.mark.parametrize(("after", "alarms"), [(False, True), (True, False)])
def test_a_reward_that_moves_is_an_alarm_only_where_nobody_asks_it_again(after: bool, alarms: bool) -> None:
    law = simulated.HEALTHY["the reward moves: 1 lower from step 150"]
    assert (false_alarms.alarm(law, 64, 0.3, seed=0, after=after) is not None) is alarms


def test_intervals_are_exact() -> None:
    """No alarm in 1,000 steps: up to 3.69, as e^-3.69 is 0.025. No run of 10: up to 31 %, as 0.69^10 is 0.025."""
    assert false_alarms.rate(0, 1000) == f"0.00 (0.00 to {-math.log(0.025):.2f})"
    assert false_alarms.share(0, 10) == f"0% (0% to {1 - 0.025**0.1:.0%})"
