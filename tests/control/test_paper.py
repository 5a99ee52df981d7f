"""The published controllers, call by call: 4 scenarios x 300 calls, to 1e-9."""

from __future__ import annotations

import dataclasses
import json
import random
from pathlib import Path
from typing import Any

import pytest

from stable_rlhf.control import Observation, controller_settings, make_controller
from stable_rlhf.control.baselines import AsymmetricSettings, asymmetric_penalty, momentum
from stable_rlhf.control.paper import PaperSettings, penalty
from tests.oracles import control as oracle

EXACT = 1e-9
SCENARIOS = ("calm", "runaway", "negative", "converged")


@pytest.fixture(scope="module")
def traces(shared_data: Path) -> dict[str, Any]:
    return json.loads((shared_data / "paper_traces.json").read_text())


def observations(rows: list[dict[str, Any]]) -> list[Observation]:
    return [Observation(step, row["reward"], row["kl"], row["entropy"]) for step, row in enumerate(rows)]


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_the_paper_controller_repeats_every_published_call(traces: dict[str, Any], scenario: str) -> None:
    rows = traces["controllers"][scenario]
    controller = make_controller("paper")
    assert len(rows) == 300
    for observation, row in zip(observations(rows), rows, strict=True):
        decision, published = controller.observe(observation), row["safe"]
        assert decision.phase == published["phase"], observation
        assert (decision.excess > 0.0) == published["active"], observation
        pid = decision.pid_p + decision.pid_i + decision.pid_d
        ours = [decision.threshold, decision.kl_short, decision.kl_long, decision.gate, pid]
        theirs = [published[key] for key in ("threshold", "kl_short", "kl_long", "gate", "pid")]
        assert ours == pytest.approx(theirs, rel=0, abs=EXACT), observation
        assert penalty(PaperSettings(), decision) == pytest.approx(published["penalty"], rel=0, abs=EXACT), observation


def test_the_traces_reach_every_published_phase_and_an_active_gate(traces: dict[str, Any]) -> None:
    rows = [row["safe"] for scenario in SCENARIOS for row in traces["controllers"][scenario]]
    assert {row["phase"] for row in rows} == {"WARMUP", "CLIMBING", "CONVERGED", "PLATEAU"}
    assert any(row["active"] and row["gate"] != 1.0 for row in rows)


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_the_asymmetric_penalty_repeats_every_published_call(traces: dict[str, Any], scenario: str) -> None:
    rows = traces["controllers"][scenario]
    settings = AsymmetricSettings()
    kls: tuple[float, ...] = ()
    for row in rows:
        kls = (*kls, row["kl"])[-settings.window :]
        published = row["asymmetric"]
        above, growth = asymmetric_penalty(settings, kls)
        ours = [above, growth, above + growth, momentum(settings, kls)]
        theirs = [published[key] for key in ("asymmetric", "momentum_penalty", "penalty", "momentum")]
        assert ours == pytest.approx(theirs, rel=0, abs=EXACT)


def test_the_paper_coefficient_is_the_slope_of_its_penalty(traces: dict[str, Any]) -> None:
    controller = make_controller("paper")
    decisions = [controller.observe(seen) for seen in observations(traces["controllers"]["runaway"])]
    active = [decision for decision in decisions if decision.excess > 0.0]
    assert len(active) > 50
    for decision in active:  # the penalty is quadratic in the excess, so a central difference is exact
        h = decision.excess / 4
        rise = 0.1 * decision.gate * ((decision.excess + h) ** 2 - (decision.excess - h) ** 2)
        assert decision.kl_coef == pytest.approx(rise / (2 * h), rel=1e-12)


def test_an_entropy_that_no_policy_has_is_refused_where_the_gate_would_use_it() -> None:
    controller = make_controller("paper")
    with pytest.raises(ValueError, match=r"Observation\.entropy is -0\.5: a policy's entropy is >= 0"):
        controller.observe(Observation(0, 0.5, 30.0, -0.5))


CHANGES: list[dict[str, float]] = [
    {},
    {"penalty_scale": 0.4, "base_threshold": 0.2, "threshold_min": 0.15, "threshold_max": 0.22},
    {"entropy_floor": 1.0, "gate_min": 0.9, "velocity_keep": 0.5, "velocity_target": 0.02},
    {"pid_kp": 1.5, "pid_ki": 0.2, "pid_kd": 3.0, "pid_integral_limit": 0.15},
]


def whole_run(seed: int) -> list[tuple[float, float, float]]:
    """A climb by halves, a reward that is high and still, one that is low: every phase; KL about the threshold."""
    rng = random.Random(seed)
    heights = [0.2] * 60 + [0.4] * 40 + [0.8] * 120 + [0.3] * 50 + [0.72] * 110
    rows = []
    for step, height in enumerate(heights):
        kl = 0.35 + 0.4 * ((step // 40) % 3 - 1) + 0.1 * rng.gauss(0, 1)
        rows.append((height + 0.01 * rng.gauss(0, 1), kl, 0.5 + 4.0 * rng.random()))
    return rows


@pytest.mark.parametrize(("seed", "changed"), list(enumerate(CHANGES)))
def test_a_run_is_that_of_plain_loops(seed: int, changed: dict[str, float]) -> None:
    rows = whole_run(seed)
    controller = make_controller("paper", **changed)
    expected = oracle.paper(rows, controller_settings("paper", changed))
    assert {figures["phase"] for figures in expected} == {"WARMUP", "CLIMBING", "CONVERGED", "PLATEAU"}
    assert min(figures["excess"] for figures in expected) == 0.0 < max(figures["excess"] for figures in expected)
    for step, (row, figures) in enumerate(zip(rows, expected, strict=True)):
        found = dataclasses.asdict(controller.observe(Observation(step, *row)))
        for name, value in figures.items():
            wanted = pytest.approx(value, rel=1e-9, abs=1e-12) if isinstance(value, float) else value
            assert found[name] == wanted, (step, name)


def test_the_first_two_calls_in_numbers() -> None:
    """kl_short 0.5 against min(0.6, 0.3 x 1.5): excess 0.05, gate 2 / (0.9 + 0.1), coefficient 2 x 0.1 x 2 x 0.05.

    Then the reward rises by 1: velocity 0.05, error 0.049, p = 0.3 e, i = 0.01 e, d = 0.05 e.
    """
    controller = make_controller("paper")
    first = controller.observe(Observation(0, 0.0, 5.0, 0.9))
    assert (first.threshold, first.excess, first.gate) == pytest.approx((0.45, 0.05, 2.0), rel=1e-12)
    assert (first.kl_coef, first.kl_long) == pytest.approx((0.02, 0.05), rel=1e-12)
    assert (first.pid_p, first.pid_i, first.pid_d, first.entropy_floor) == (0.0, 0.0, 0.0, 2.0)
    second = controller.observe(Observation(1, 1.0, -4.5, 0.9))
    assert (second.pid_p, second.pid_i, second.pid_d) == pytest.approx((0.0147, 0.00049, 0.00245), rel=1e-12)
    assert second.threshold == pytest.approx((0.3 + 0.01764) * 1.5, rel=1e-12)
    assert (second.kl_short, second.excess, second.gate, second.kl_coef) == (pytest.approx(0.0, abs=1e-15), 0, 1, 0)


def test_the_gate_has_no_pole_and_a_threshold_may_be_a_single_value() -> None:
    controller = make_controller("paper", threshold_min=0.25, threshold_max=0.25)
    assert controller.observe(Observation(0, 0.5, 5.0, 3.0)).threshold == 0.25
    with pytest.raises(ValueError, match=r"Observation\.entropy is -0\.1: a policy's entropy is >= 0"):
        controller.observe(Observation(1, 0.5, 5.0, -0.1))


def test_the_gate_acts_only_above_the_threshold() -> None:
    """At the threshold itself nothing is in excess: the gate is 1, whatever the entropy."""
    decision = make_controller("paper", threshold_min=0.0, threshold_max=0.0).observe(Observation(0, 0.5, 0.0, 0.1))
    assert (decision.kl_short, decision.excess, decision.gate, decision.kl_coef) == (0.0, 0.0, 1.0, 0.0)
