"""RunMonitor: another trainer's figures get the decisions, verdicts and files that our own would."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from stable_rlhf import ConfigError, RunMonitor
from stable_rlhf.control import Action, GuardConfig, Observation, make_controller
from stable_rlhf.errors import RunError
from stable_rlhf.evidence import find_outcomes
from stable_rlhf.integrations import Seen
from stable_rlhf.report import write_report
from stable_rlhf.runs import incidents, read_rows


def kl_at(step: int) -> float:
    """A KL that climbs, passes 0.3 and swings."""
    return 0.6 * (1 - math.exp(-step / 15)) + 0.05 * math.sin(step)


def observe(monitor: RunMonitor, steps: range, scale: float = 1.0, **more: Any) -> list[Seen]:
    return [
        monitor.observe(
            scale * math.tanh(step / 20),
            kl_at(step),
            3.0 - kl_at(step),
            reward_std=scale * 0.5,
            rows=64,
            length=30.0,
            **more,
        )
        for step in steps
    ]


def test_the_decisions_are_those_of_the_controller_alone(tmp_path: Path) -> None:
    seen = observe(RunMonitor(tmp_path / "run", settings={"budget": 0.2}), range(60))
    alone = make_controller("safe", budget=0.2)
    expected = [
        alone.observe(Observation(step, math.tanh(step / 20), kl_at(step), 3.0 - kl_at(step), length=30.0))
        for step in range(60)
    ]
    assert [each.decision for each in seen] == expected
    assert [each.kl_coef for each in seen] == [each.kl_coef for each in expected]


def test_the_rows_hold_figures_and_decision_under_the_names_of_our_own_runs(tmp_path: Path) -> None:
    monitor = RunMonitor(tmp_path / "run", planned=3)
    seen = observe(monitor, range(3), figures={"completions/distinct_2": 0.5}, seconds=2.0)
    rows, torn = read_rows(tmp_path / "run" / "metrics.jsonl")
    assert not torn
    assert [row["step"] for row in rows] == [0, 1, 2]
    assert [row["objective/kl"] for row in rows] == [kl_at(step) for step in range(3)]
    assert [row["safe/kl_coef"] for row in rows] == [each.kl_coef for each in seen]
    assert rows[1]["completions/distinct_2"] == 0.5
    assert rows[1]["completions/mean_length"] == 30.0
    timings, _ = read_rows(tmp_path / "run" / "timings.jsonl")
    assert [row["total_s"] for row in timings] == [2.0, 2.0, 2.0]


def test_a_resumed_monitor_writes_and_decides_as_one_that_was_never_stopped(tmp_path: Path) -> None:
    whole = RunMonitor(tmp_path / "whole", units="reward")
    expected = observe(whole, range(80), scale=7.0)
    first = RunMonitor(tmp_path / "run", units="reward")
    observe(first, range(50), scale=7.0)
    first.save(tmp_path / "state.json")
    observe(first, range(50, 63), scale=7.0)  # steps that the resumed run repeats
    first.close()
    second = RunMonitor(tmp_path / "run", units="reward")
    second.load(tmp_path / "state.json")
    assert second.coefficient == expected[49].kl_coef
    assert observe(second, range(50, 80), scale=7.0) == expected[50:]
    for name in ("metrics.jsonl", "config.yaml"):
        assert (tmp_path / "run" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert json.dumps(second.state_dict()) == json.dumps(whole.state_dict())


def test_a_coefficient_in_units_of_the_reward_grows_with_it(tmp_path: Path) -> None:
    small, large, unit = (
        RunMonitor(tmp_path / name, units=units)
        for name, units in (("a", "reward"), ("b", "reward"), ("c", "deviation"))
    )
    once, ten = observe(small, range(40)), observe(large, range(40), scale=10.0)
    plain = observe(unit, range(40))
    assert [each.kl_coef for each in ten] == pytest.approx([10 * each.kl_coef for each in once], rel=1e-9)
    # the deviation over all scores so far: within a rollout 0.5, between rollouts that of tanh(step / 20)
    means = [math.tanh(step / 20) for step in range(40)]
    between = math.fsum((mean - math.fsum(means) / 40) ** 2 for mean in means) / 40
    assert once[39].kl_coef == pytest.approx(plain[39].kl_coef * math.sqrt(0.25 + between), rel=1e-9)
    with pytest.raises(ValueError, match="needs reward_std and rows"):
        small.observe(0.0, 0.1, 3.0)


def collapse(monitor: RunMonitor, steps: int = 60) -> tuple[int, Seen]:
    """The first step, from 0, with a verdict, of a policy whose entropy and variety go from step 20 on."""
    for step in range(steps):
        gone = step >= 20
        seen = monitor.observe(
            1.0, 3.0 if gone else 0.2, 0.1 if gone else 3.0, figures={"completions/distinct_2": 0.1 if gone else 0.8}
        )
        if seen.verdict.action is not Action.GO_ON:
            return step, seen
    raise AssertionError("no verdict")


def test_a_run_that_collapses_is_stopped_and_the_incident_says_why(tmp_path: Path) -> None:
    step, seen = collapse(RunMonitor(tmp_path / "run"))
    assert (step, seen.stop, seen.roll_back) == (20, True, False)  # the KL's ceiling acts at once
    (incident,) = incidents.read(tmp_path / "run")
    assert (incident["step"], incident["action"], incident["rule"]) == (20, "stop", "max_kl")
    assert incident["done"] == "asked the trainer to stop"
    assert seen.reason.startswith("stop: the KL is 3 nats per token")


def test_without_a_threshold_to_pass_variety_is_what_stops_it(tmp_path: Path) -> None:
    step, seen = collapse(RunMonitor(tmp_path / "run", guard=GuardConfig(max_kl_ratio=None, min_entropy=None)))
    assert (step, seen.verdict.rule) == (24, "min_distinct")  # five in a row


def test_a_roll_back_goes_on_from_the_saved_state_with_smaller_steps(tmp_path: Path) -> None:
    monitor = RunMonitor(tmp_path / "run", rolls_back=True)
    for _ in range(10):
        monitor.observe(1.0, 0.2, 3.0)
    saved, bound = json.loads(json.dumps(monitor.state_dict())), monitor.update_kl
    coefficient = monitor.coefficient
    _, seen = collapse(monitor)
    assert seen.roll_back
    assert monitor.coefficient != coefficient
    monitor.rolled_back(saved)
    assert monitor.coefficient == coefficient
    assert bound is not None
    assert monitor.update_kl == 0.5 * bound
    (incident,) = incidents.read(tmp_path / "run")
    assert "went back to the state after 10 steps (roll-back 1 of 3)" in incident["done"]
    assert incident["figures"]["objective/kl"] == 3.0
    with pytest.raises(ValueError, match="did not ask for a roll-back"):
        monitor.rolled_back(saved)
    after = monitor.observe(1.0, 0.2, 3.0)
    assert after.verdict.action is Action.GO_ON
    rows, _ = read_rows(tmp_path / "run" / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(32))  # steps stay counted
    assert rows[-1]["safe/rollbacks"] == 1


def test_a_figure_that_is_not_finite_is_the_guards_and_no_error(tmp_path: Path) -> None:
    monitor = RunMonitor(tmp_path / "run", rolls_back=True)
    before = observe(monitor, range(3))[-1]
    seen = monitor.observe(math.nan, math.inf, 3.0)
    assert seen.roll_back
    assert seen.verdict.rule == "non_finite"
    assert seen.kl_coef == before.kl_coef
    rows, _ = read_rows(tmp_path / "run" / "metrics.jsonl")
    assert rows[3]["objective/scores"] is None
    assert rows[3]["objective/kl"] is None


def test_without_the_guard_nothing_is_judged(tmp_path: Path) -> None:
    monitor = RunMonitor(tmp_path / "run", guard=GuardConfig(enabled=False))
    with pytest.raises(AssertionError, match="no verdict"):
        collapse(monitor)
    assert incidents.read(tmp_path / "run") == []


def test_report_and_compare_read_its_folder_as_a_run(tmp_path: Path) -> None:
    monitor = RunMonitor(tmp_path / "run", planned=40, about={"framework": "TRL GRPO", "seed": 3})
    observe(monitor, range(40))
    monitor.close()
    page = write_report(tmp_path / "run").read_text(encoding="utf-8")
    assert "Finished: 40 steps." in page
    (outcome,) = find_outcomes([tmp_path / "run"])
    assert outcome.status.value == "finished"
    assert outcome.settings["framework"] == "TRL GRPO"
    assert outcome.settings["seed"] == 3
    assert outcome.settings["kl.settings.budget"] == 0.3
    assert outcome.figures["kl/max"] == max(kl_at(step) for step in range(40))


def test_a_folder_with_a_run_is_refused_unless_it_is_to_be_replaced(tmp_path: Path) -> None:
    first = RunMonitor(tmp_path / "run")
    observe(first, range(5))
    first.close()
    with pytest.raises(ConfigError, match="holds a run already; choose another folder, set overwrite=True"):
        RunMonitor(tmp_path / "run").observe(0.0, 0.0, 3.0)
    observe(RunMonitor(tmp_path / "run", overwrite=True), range(2))
    assert len(read_rows(tmp_path / "run" / "metrics.jsonl")[0]) == 2


def test_a_state_of_before_the_first_step_continues_too(tmp_path: Path) -> None:
    first = RunMonitor(tmp_path / "run")
    first.save(tmp_path / "state.json")
    observe(first, range(3))
    first.close()
    second = RunMonitor(tmp_path / "run")
    second.load(tmp_path / "state.json")
    observe(second, range(1))
    assert len(read_rows(tmp_path / "run" / "metrics.jsonl")[0]) == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"controller": "sage"}, "controller 'sage' is unknown"),
        ({"settings": {"budgett": 1}}, "has no setting 'budgett'"),
        ({"settings": {"budget": -1}}, "budget=-1 is out of range"),
        ({"units": "points"}, "units='points': choose one of deviation, reward"),
    ],
)
def test_a_setting_that_cannot_be_used_is_named(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        RunMonitor(tmp_path / "run", **options)


@pytest.mark.parametrize("name", ["rewards", "objective/scores", "step"])
def test_a_metric_that_is_unknown_or_has_an_argument_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match=f"figures has '{name}'"):
        RunMonitor(tmp_path / "run").observe(0.0, 0.0, 3.0, figures={name: 1.0})


@pytest.mark.parametrize("content", ["", "{}", "[1]", '{"version": 9}'])
def test_a_state_that_is_none_is_refused_with_its_file(tmp_path: Path, content: str) -> None:
    (tmp_path / "state.json").write_text(content)
    monitor = RunMonitor(tmp_path / "run")
    with pytest.raises(RunError, match=r"state\.json: .*; resume from another checkpoint"):
        monitor.load(tmp_path / "state.json")
    assert monitor.steps == 0


def test_the_bound_on_an_update_is_known_before_the_first_decision(tmp_path: Path) -> None:
    assert RunMonitor(tmp_path / "a", settings={"budget": 0.1}).update_kl == pytest.approx(0.002)
    assert RunMonitor(tmp_path / "b", settings={"budget": 9.6, "budget_per": "sequence"}).update_kl is None
    assert RunMonitor(tmp_path / "c", controller="fixed").update_kl is None


def test_it_needs_no_torch(tmp_path: Path) -> None:
    code = (
        "import sys; from stable_rlhf import RunMonitor; "
        f"RunMonitor({str(tmp_path / 'run')!r}).observe(0.0, 0.1, 3.0); "
        "assert 'torch' not in sys.modules and 'transformers' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
