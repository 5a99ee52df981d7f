"""report.verdict: rules against literal sentences; report.facts: what they rest on, from a run's files."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest

from stable_rlhf.report.facts import Facts, change, facts_of
from stable_rlhf.report.run import headline, read_run
from stable_rlhf.report.verdict import Tone, share_in_words, verdict
from stable_rlhf.runs import RunLock
from tests.report.test_report import incident

GOOD: dict[str, Any] = {
    "steps": 60, "planned": 60, "reward_change": 1.47, "reward_error": 0.05, "kl": 0.29, "budget": 0.3,
    "variety": (0.6, 0.56), "entropy": (2.0, 1.6),
}  # fmt: skip


def said(**changed: Any) -> tuple[str, Tone]:
    made = verdict(Facts(**GOOD | changed))
    return made.words, made.tone


def test_a_good_run_says_reward_budget_and_variety() -> None:
    assert said() == ("Reward rose by 1.47 ± 0.05, KL on budget, variety held.", Tone.FINE)


@pytest.mark.parametrize(
    ("changed", "words", "tone"),
    [
        ({"reward_change": 0.11, "reward_error": 0.05}, "Reward rose by 0.11 ± 0.05", Tone.FINE),
        (
            {"reward_change": 0.1, "reward_error": 0.05},
            "Reward did not change beyond its error (+0.1 ± 0.05)",
            Tone.LOOK,
        ),
        (
            {"reward_change": -0.09, "reward_error": 0.05},
            "Reward did not change beyond its error (-0.09 ± 0.05)",
            Tone.LOOK,
        ),
        ({"reward_change": None, "reward_error": None}, "Too few steps to say whether the reward rises", Tone.FINE),
        ({"reward_change": 0.0, "reward_error": 0.0}, "Reward did not change beyond its error (+0 ± 0)", Tone.LOOK),
        ({"crashes": 1}, "Reward rose by 1.47 ± 0.05, 1 reward crash", Tone.BAD),
        ({"crashes": 3}, "Reward rose by 1.47 ± 0.05, 3 reward crashes", Tone.BAD),
    ],
)
def test_the_reward_counts_beyond_two_standard_errors(changed: dict[str, Any], words: str, tone: Tone) -> None:
    assert said(**changed) == (f"{words}, KL on budget, variety held.", tone)


def test_a_reward_that_fell_asks_for_a_look_at_the_samples() -> None:
    words = "Reward fell by 0.4 ± 0.1, KL on budget, variety held: look at the samples."
    assert said(reward_change=-0.4, reward_error=0.1) == (words, Tone.BAD)


@pytest.mark.parametrize(
    ("kl", "budget", "words", "tone"),
    [
        (0.344, 0.3, "KL on budget", Tone.FINE),
        (0.256, 0.3, "KL on budget", Tone.FINE),
        (0.25, 0.3, "KL below its budget (0.25 of 0.3)", Tone.FINE),
        (-0.01, 0.3, "KL below its budget (-0.01 of 0.3)", Tone.FINE),
        (0.35, 0.3, "KL over its budget (0.35 of 0.3)", Tone.LOOK),
        (0.46, 0.3, "KL far over its budget (0.46 of 0.3)", Tone.BAD),
        (7.25, None, "KL 7.25 nats per token without a budget", Tone.FINE),
        (7.25, 0.0, "KL 7.25 nats per token without a budget", Tone.FINE),
    ],
)
def test_the_kl_is_on_budget_within_fifteen_percent(kl: float, budget: float | None, words: str, tone: Tone) -> None:
    assert said(kl=kl, budget=budget) == (f"Reward rose by 1.47 ± 0.05, {words}, variety held.", tone)


@pytest.mark.parametrize(
    ("end", "words", "tone"),
    [
        (0.49, "variety held.", Tone.FINE),
        (0.7, "variety held.", Tone.FINE),
        (0.47, "variety fell by a fifth: look at the samples.", Tone.LOOK),
        (0.4, "variety fell by a third: look at the samples.", Tone.LOOK),
        (0.29, "variety fell by half: look at the samples.", Tone.BAD),
        (0.05, "variety fell by nine tenths: look at the samples.", Tone.BAD),
    ],
)
def test_variety_that_fell_by_a_fifth_asks_for_a_look_at_the_samples(end: float, words: str, tone: Tone) -> None:
    assert said(variety=(0.6, end)) == (f"Reward rose by 1.47 ± 0.05, KL on budget, {words}", tone)


@pytest.mark.parametrize(
    ("end", "words", "tone"),
    [
        (1.0, "variety held.", Tone.FINE),
        (2.5, "variety held.", Tone.FINE),
        (0.9, "variety held, entropy fell by half: look at the samples.", Tone.LOOK),
        (0.4, "variety held, entropy fell by three quarters: look at the samples.", Tone.BAD),
        (2.7, "variety held, entropy rose by a third: look at the samples.", Tone.LOOK),
        (6.4, "variety held, entropy rose to 3.2 times its start: look at the samples.", Tone.LOOK),
    ],
)
def test_entropy_may_halve_and_may_hardly_rise(end: float, words: str, tone: Tone) -> None:
    assert said(entropy=(2.0, end)) == (f"Reward rose by 1.47 ± 0.05, KL on budget, {words}", tone)


def test_what_the_guard_did_is_counted_and_what_to_look_at_is_named_once() -> None:
    words, tone = said(skips=1, rollbacks=2, variety=(0.6, 0.4), entropy=(2.0, 0.9))
    assert words == (
        "Reward rose by 1.47 ± 0.05, KL on budget, variety fell by a third, entropy fell by half, the guard left out 1 "
        "update and rolled back 2 times: look at the samples and the incidents."
    )
    assert tone is Tone.LOOK
    assert said(skips=3)[0].endswith("variety held, the guard left out 3 updates: look at the incidents.")


def test_a_run_that_the_guard_gave_up_says_so_first_unless_it_goes_on() -> None:
    words, tone = said(steps=12, gave_up_at=11, rollbacks=4)
    assert words.startswith("Given up by the guard at step 11, reward rose")
    assert tone is Tone.BAD
    assert verdict(Facts(**GOOD | {"steps": 12, "gave_up_at": 11})).state == "Ended by the guard: 12 of 60 steps."
    assert said(gave_up_at=11, running=True)[0].startswith("Reward rose")


@pytest.mark.parametrize(
    ("changed", "state", "tone"),
    [
        ({}, "Finished: 60 steps.", Tone.FINE),
        ({"steps": 1, "planned": 1}, "Finished: 1 step.", Tone.FINE),
        ({"steps": 7}, "Stopped before its end: 7 of 60 steps.", Tone.LOOK),
        ({"steps": 7, "running": True}, "Still running: 7 of 60 steps.", Tone.FINE),
        ({"steps": 60, "running": True}, "Still running: 60 steps.", Tone.FINE),
        ({"planned": None}, "60 steps; how many were planned is not recorded.", Tone.FINE),
    ],
)
def test_the_state_tells_a_finished_run_from_one_that_runs_or_stopped(
    changed: dict[str, Any], state: str, tone: Tone
) -> None:
    made = verdict(Facts(**GOOD | changed))
    assert (made.state, made.tone) == (state, tone)


def test_of_a_run_that_recorded_nothing_the_verdict_claims_nothing() -> None:
    assert verdict(Facts(steps=1)).words == "Too few steps to say whether the reward rises."


def test_a_share_is_said_as_the_nearest_fraction() -> None:
    words = [share_in_words(share) for share in (0.05, 0.2, 0.24, 0.31, 0.44, 0.7, 0.74, 1.0)]
    assert words == [
        "a tenth", "a fifth", "a quarter", "a third", "half", "two thirds", "three quarters", "nine tenths",
    ]  # fmt: skip


# --- facts ---------------------------------------------------------------------------------------------------------


def test_a_change_compares_the_ends_and_has_the_error_of_their_scatter() -> None:
    values = [1.0, 3.0, 99.0, 6.0, 8.0]  # means 2 and 7, variances 2 and 2: sqrt(2 / 2 + 2 / 2)
    assert change(values, most=20, least=2) == (5.0, pytest.approx(math.sqrt(2)))
    assert change([0.0] * 30 + [1.0] * 20, most=20, least=5) == (1.0, 0.0)
    assert change([0.0] * 9, most=20, least=5) is None


def rows(steps: int) -> list[dict[str, Any]]:
    return [
        {
            "step": step,
            "objective/scores": float(step % 2) + (step >= steps // 2),
            "objective/kl": 0.1 * step,
            "objective/entropy": 2.0 - step / 10,
            "safe/threshold": 0.3,
            "completions/distinct_2": 0.9 - step / 100,
        }
        for step in range(steps)
    ]


def run(folder: Path, rows: list[dict[str, Any]], *, planned: int = 10, **files: Any) -> Path:
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "config.yaml").write_text(f"max_steps: {planned}\n")
    for name, lines in files.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def facts(folder: Path) -> Facts:
    read = read_run(folder)
    return facts_of(read, headline(read))


def test_while_a_run_goes_on_its_steps_are_the_facts(tmp_path: Path) -> None:
    found = facts(run(tmp_path, rows(10)))
    assert (found.steps, found.planned, found.running) == (10, 10, False)
    assert found.reward_change == pytest.approx(1.2)  # 0 1 0 1 0 and 2 1 2 1 2: means 0.4 and 1.6
    assert found.reward_error == pytest.approx(math.sqrt(0.3 / 5 + 0.3 / 5))
    assert (found.kl, found.budget) == (pytest.approx(0.7), 0.3)  # the last five
    assert found.variety == pytest.approx((0.88, 0.83))
    assert found.entropy == pytest.approx((1.8, 1.3))
    assert facts(run(tmp_path, rows(9))).variety is None


def test_once_both_evaluations_are_there_they_are_the_facts(tmp_path: Path) -> None:
    before = {"reward": 0.1, "reward_se": 0.03, "entropy": 2.5, "distinct_2": 0.8}
    after = {"reward": 0.9, "reward_se": 0.04, "entropy": 2.0, "distinct_2": 0.4}
    (tmp_path / "evaluation.json").write_text(json.dumps({"before": before, "after": after}))
    found = facts(run(tmp_path, rows(10)))
    assert (found.reward_change, found.reward_error) == (pytest.approx(0.8), pytest.approx(0.05))
    assert (found.variety, found.entropy) == ((0.8, 0.4), (2.5, 2.0))
    (tmp_path / "evaluation.json").write_text(json.dumps({"before": before}))
    assert facts(tmp_path).variety == pytest.approx((0.88, 0.83))


def test_incidents_are_counted_and_steps_that_were_rolled_back_are_no_facts(tmp_path: Path) -> None:
    told = [incident(3, "skip"), incident(9, "roll back"), incident(11, "stop")]
    found = facts(run(tmp_path, rows(12), planned=20, incidents=told))
    assert (found.skips, found.rollbacks, found.gave_up_at) == (1, 2, 11)
    assert found.kl == pytest.approx((0.5 + 0.6 + 0.7 + 0.8 + 1.0) / 5)  # without steps 9 and 11
    resumed = facts(run(tmp_path, rows(13), planned=20, incidents=told))
    assert resumed.gave_up_at is None  # it has gone on since


def test_a_run_is_running_as_long_as_another_holds_its_lock(tmp_path: Path) -> None:
    run(tmp_path, rows(10))
    lock = RunLock(tmp_path)
    lock.take()
    assert facts(tmp_path).running
    lock.release()
    assert not facts(tmp_path).running
    for left in ("{}", "torn"):
        (tmp_path / ".owner.json").write_text(left)
        assert not facts(tmp_path).running


def test_who_looks_at_a_run_does_not_take_its_lock(tmp_path: Path) -> None:
    run(tmp_path, rows(10))
    lock = RunLock(tmp_path)
    lock.take()
    note = json.loads((tmp_path / ".owner.json").read_text())
    lock.release()
    (tmp_path / ".lock").unlink(missing_ok=True)
    child = subprocess.Popen([sys.executable, "-c", ""])
    for changed, running in (
        ({}, True),
        ({"started": note["started"] - 3600}, False),  # the number is another process's now
        ({"pid": child.pid}, False),  # it has ended, and nobody has asked for its exit code
        ({"host": "another"}, True),
    ):
        (tmp_path / ".owner.json").write_text(json.dumps(note | changed))
        os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
        assert facts(tmp_path).running == running
        assert not (tmp_path / ".lock").exists()
    started = psutil.Process(child.pid).create_time()
    (tmp_path / ".owner.json").write_text(json.dumps(note | {"pid": child.pid, "started": started}))
    assert not facts(tmp_path).running  # a zombie
    child.wait()
    assert not facts(tmp_path).running
