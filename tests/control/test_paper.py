"""The published controllers, call by call: 4 scenarios x 300 calls, to 1e-9."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from stable_rlhf.control import Observation, make_controller
from stable_rlhf.control.baselines import AsymmetricSettings, asymmetric_penalty, momentum
from stable_rlhf.control.paper import PaperSettings, penalty

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
