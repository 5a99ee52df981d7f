"""A comparison: literal figures, the baseline, Holm's correction over the arms, and what it warns of."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
from scipy import stats

from stable_rlhf.errors import ConfigError
from stable_rlhf.evidence.compare import Comparison, compare, to_json
from stable_rlhf.evidence.measures import measure
from stable_rlhf.evidence.outcome import Outcome, Status
from stable_rlhf.evidence.table import groups, method
from tests.evidence.outcomes import SCORES, outcome

SAFE, PPO, OTHER = [0.9, 0.92, 0.88, 0.91, 0.93], [0.5, 0.7, 0.4, 0.6, 0.45], [0.52, 0.71, 0.38, 0.63, 0.44]


def runs(**arms: Sequence[float]) -> list[Outcome]:
    return [
        outcome(f"{preset}{seed}", {"reward/final": value, "kl/final": value / 10}, preset=preset, seed=seed)
        for preset, values in arms.items()
        for seed, value in enumerate(values)
    ]


def test_an_arm_is_compared_with_the_first_by_pairs_of_seeds() -> None:
    made = compare(runs(ppo=PPO, safe=SAFE))
    assert [arm.name for arm in made.arms] == ["ppo", "safe"]
    cell = made.cells[1, "reward/final"]
    assert cell.mean.value == pytest.approx(0.908)
    assert cell.mean.runs == 5
    assert cell.percentiles == pytest.approx((0.884, 0.91, 0.928))
    assert cell.difference is not None
    assert cell.difference.paired
    assert cell.difference.value == pytest.approx(0.378)
    assert cell.differs
    assert cell.improvement is not None
    assert cell.improvement.value == 1.0
    assert made.cells[0, "reward/final"].difference is None
    assert made.cells[1, "kl/final"].improvement is None  # no direction is better


def test_the_baseline_is_chosen_by_name() -> None:
    assert compare(runs(ppo=PPO, safe=SAFE), baseline="safe").baseline == 1
    with pytest.raises(ConfigError, match="--baseline 'saef': no arm has this name: did you mean 'safe'"):
        compare(runs(ppo=PPO, safe=SAFE), baseline="saef")


def test_holms_correction_is_over_the_arms_of_a_figure() -> None:
    made = compare(runs(ppo=PPO, other=OTHER, safe=SAFE))
    raw = [stats.ttest_rel(values, PPO).pvalue for values in (OTHER, SAFE)]
    adjusted = [made.cells[index, "reward/final"].adjusted_p for index in (1, 2)]
    assert adjusted[1] == pytest.approx(2 * raw[1], rel=0.2)
    assert adjusted[0] == pytest.approx(raw[0], rel=0.2)
    assert made.comparisons == 4
    assert [made.cells[index, "reward/final"].differs for index in (1, 2)] == [False, True]


def test_less_is_better_where_the_measure_says_so() -> None:
    given = [
        outcome(f"{preset}{seed}", {"kl/max": value}, preset=preset, seed=seed)
        for preset, values in (("a", (3.0, 4.0)), ("b", (1.0, 2.0)))
        for seed, value in enumerate(values)
    ]
    found = compare(given).cells[1, "kl/max"].improvement
    assert found is not None
    assert found.value == 1.0


def test_an_interval_ends_where_the_figure_does() -> None:
    given = [
        outcome(str(seed), {"healthy": value, "crashes": 1 - value}, seed=seed)
        for seed, value in enumerate((1.0, 1.0, 0.0))
    ]
    cells = compare(given).cells
    assert (cells[0, "healthy"].mean.low, cells[0, "healthy"].mean.high) == pytest.approx((0.0943, 0.9916), abs=1e-4)
    assert cells[0, "crashes"].mean.low == 0.0
    assert (cells[0, "crashes"].mean.high or 0.0) > 1.0


def test_an_entropy_is_never_negative_and_a_kl_may_be() -> None:
    given = [outcome(str(seed), {"entropy/final": value, "kl/final": value}, seed=seed)
             for seed, value in enumerate((0.0, 1.0))]  # fmt: skip
    cells = compare(given).cells
    assert cells[0, "entropy/final"].mean.low == 0.0
    assert (cells[0, "kl/final"].mean.low or 0.0) < -1.0


def with_rewards(name: str, preset: str, rewards: Sequence[float]) -> Outcome:
    values = np.asarray(rewards, np.float32)
    made = outcome(name, {"reward/final": float(values[-20:].mean())}, preset=preset, seed=0)
    steps = np.arange(len(values))
    return replace(made, curves={SCORES: (steps, values)}, seconds=(steps, 2.0 * (steps + 1.0)))


def test_the_reward_to_reach_is_nine_tenths_of_the_best_arms_way() -> None:
    made = compare([with_rewards("a", "a", [0.0] * 10 + [1.0] * 90), with_rewards("b", "b", [0.0] * 100)])
    assert made.target == pytest.approx(0.9)
    figures = {run.name: run.figures for run in made.runs}
    assert figures["a"]["reward/steps_to"] == 28  # eighteen of the last twenty steps are 1
    assert figures["a"]["reward/seconds_to"] == pytest.approx(56.0)
    assert "reward/steps_to" not in figures["b"]


def test_a_figure_that_only_some_runs_have_is_not_tested() -> None:
    """Two runs of five got there, and sooner than all of the baseline: the others never did."""
    slow, fast, never = [0.0] * 60 + [1.0] * 40, [0.0] * 5 + [1.0] * 95, [0.0] * 100
    given = [
        replace(
            with_rewards(f"{preset}{seed}", preset, [*rewards, 0.001 * seed]), settings={"preset": preset, "seed": seed}
        )
        for preset, courses in (("a", [slow] * 5), ("b", [fast, fast, never, never, never]))
        for seed, rewards in enumerate(courses)
    ]
    given = [replace(run, figures={**run.figures, "healthy": 1.0}) for run in given]
    made = compare(given)
    cell = made.cells[1, "reward/steps_to"]
    assert cell.mean.runs == 2
    assert cell.difference is not None
    assert cell.difference.value < 0
    assert (cell.difference.low, cell.difference.p, cell.improvement) == (None, None, None)
    assert not cell.differs
    assert [made.cells[index, "reward/reached"].mean.value for index in (0, 1)] == [1.0, 0.4]
    entry = next(g.rows[1][g.measures.index(measure("reward/steps_to"))] for g in groups(made) if g.title == "Reward")
    assert entry is not None
    assert (entry.runs, entry.mark, entry.p) == ("n=2 of 5", "", "")
    assert "n=2 of 5" in method(made)
    assert "n=2 of 5" not in method(compare(runs(a=PPO, b=SAFE)))


def test_a_figure_that_a_stratum_does_not_have_is_tested_over_the_others() -> None:
    given = [
        outcome(
            f"{preset}{rate}{seed}",
            {"step_scale": seed + 10.0 * rate} if preset == "safe" else {"reward/final": 1.0},
            preset=preset,
            rate=rate,
            seed=seed,
        )
        for preset in ("ppo", "safe")
        for rate in (1, 2)
        for seed in range(5)
    ]
    gap = compare(given, ["rate"]).cells[1, "step_scale"].difference
    assert gap is not None
    assert gap.p is not None


def test_a_run_that_may_still_get_there_is_not_counted_as_one_that_does_not() -> None:
    reward, flat = [0.0] * 10 + [1.0] * 90, [0.0] * 100
    made = compare(
        [
            with_rewards("a", "a", reward),
            replace(with_rewards("b", "b", flat), status=Status.RUNNING),
            replace(outcome("c", {"healthy": 0.0}, preset="c", seed=0), status=Status.CRASHED),
        ]
    )
    figures = {run.name: run.figures for run in made.runs}
    assert figures["a"]["reward/reached"] == 1.0
    assert "reward/reached" not in figures["b"]
    assert figures["c"]["reward/reached"] == 0.0  # it crashed before its first step


def test_a_share_is_compared_by_fishers_exact_test_and_has_no_iqm() -> None:
    given = [
        outcome(f"{preset}{seed}", {"healthy": float(seed < ones)}, preset=preset, seed=seed)
        for preset, ones in (("a", 5), ("b", 1), ("c", 0))
        for seed in range(5)
    ]
    made = compare(given)
    ps = [gap.p for index in (1, 2) if (gap := made.cells[index, "healthy"].difference) is not None]
    assert ps == pytest.approx([0.047619, 0.0079365], rel=1e-4)  # the larger difference has the smaller p
    assert made.cells[1, "healthy"].iqm is None
    assert "iqm" not in json.loads(to_json(made))["arms"][1]["figures"]["healthy"]


def test_arms_that_pool_different_settings_are_said() -> None:
    given = [
        outcome(f"{preset}{rate}{seed}", preset=preset, rate=rate, seed=seed)
        for preset, rates in (("a", (1, 2)), ("b", (2,)))
        for rate in rates
        for seed in range(5)
    ]
    assert "different settings (a has rate=1, b does not)" in sentences(compare(given, ["preset"]))
    assert "different settings" not in sentences(compare(given[5:], ["preset"]))
    assert "different settings" not in sentences(compare(given))


def test_several_runs_of_one_seed_are_said() -> None:
    given = runs(a=PPO, b=SAFE)
    twice = compare([*given, replace(given[0], name="a copy")])
    assert "a has several runs of seed 0 with the same settings" in sentences(twice)


def test_values_up_to_the_largest_have_strict_json() -> None:
    made = compare(runs(a=[-1e100, 1e100, 1e99, 5e99, 0.0], b=[1e100, 0.0, 1e90, -1e100]))
    json.loads(to_json(made), parse_constant=pytest.fail)


def test_no_reward_is_to_be_reached_where_none_rises() -> None:
    assert compare([with_rewards("a", "a", [1.0] * 40)]).target is None


def sentences(made: Comparison) -> str:
    return "; ".join(made.warnings)


def test_few_seeds_and_runs_without_figures_are_said() -> None:
    assert "an arm has 2 runs: with fewer than 5" in sentences(compare(runs(a=PPO[:2], b=PPO)))
    assert "an arm has a single run" in sentences(compare(runs(a=PPO[:1], b=PPO)))
    assert sentences(compare(runs(a=PPO, b=SAFE))) == ""
    missing = outcome("gone", {}, status=Status.MISSING)
    made = compare([*runs(a=PPO, b=SAFE), replace(missing, why="it has not begun")])
    assert "1 of 11 runs has no figures: gone: it has not begun" in sentences(made)
    crashed = outcome("ill", status=Status.CRASHED, preset="a", seed=9)
    assert "1 of 11 runs ended early" in sentences(compare([*runs(a=PPO, b=SAFE), crashed]))


def test_one_run_of_one_that_is_not_finished_is_said_in_the_singular() -> None:
    made = compare([outcome("a", seed=0, status=Status.UNFINISHED)])
    assert "1 of 1 run is not finished" in sentences(made)


def test_nothing_to_compare_is_refused_with_the_first_reason() -> None:
    broken = replace(outcome("x", {}, status=Status.BROKEN), why="metrics.jsonl:1: not JSON")
    with pytest.raises(ConfigError, match=r"there is nothing to compare: metrics\.jsonl:1: not JSON"):
        compare([broken])


def test_the_json_is_strict_and_has_every_figure() -> None:
    made = json.loads(to_json(compare(runs(ppo=PPO, safe=SAFE))), parse_constant=pytest.fail)
    cell = made["arms"][1]["figures"]["reward/final"]
    assert cell["mean"]["value"] == pytest.approx(0.908)
    assert cell["mean"]["runs"] == 5
    assert cell["difference"]["value"] == pytest.approx(0.378)
    assert cell["difference"]["differs"] is True
    assert made["runs"][0] == {
        "name": "ppo0",
        "arm": "ppo",
        "seed": 0,
        "status": "finished",
        "why": None,
        "steps": 0,
        "figures": {"reward/final": 0.5, "kl/final": 0.05},
    }
    assert made["measures"]["reward/final"]["better"] == "more"


def test_a_reward_that_only_collapsed_policies_get_is_not_the_one_to_reach() -> None:
    healthy, hacked = with_rewards("a", "a", [0.0] * 10 + [1.0] * 90), with_rewards("b", "b", [0.0] * 10 + [2.0] * 90)
    known = [replace(run, figures={**run.figures, "healthy": value}) for run, value in ((healthy, 1.0), (hacked, 0.0))]
    assert compare(known).target == pytest.approx(0.9)
    assert compare([healthy, hacked]).target == pytest.approx(1.8)


def test_the_first_run_given_is_of_the_baseline() -> None:
    given = [outcome(str(rate), optim__learning_rate=rate, seed=0) for rate in (0.3, 0.1)]
    made = compare(given)
    assert [arm.name for arm in made.arms] == ["0.1", "0.3"]
    assert made.baseline == 1
