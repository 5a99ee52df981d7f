"""What holds for every controller: settings, step order, state, purity."""

from __future__ import annotations

import ast
import dataclasses
import json
import math
import random
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import stable_rlhf.control
from stable_rlhf.control import CONTROLLERS, Observation, controller_settings, make_controller
from stable_rlhf.control.pid import PidState

FINITE = st.floats(-5, 5)
MADE: list[tuple[str, dict[str, Any]]] = [*((name, {}) for name in CONTROLLERS), ("safe", {"gate_on": True})]
"""Controllers with settings; the last has a layer of `safe` that is off by default."""
RUNS = st.lists(st.tuples(FINITE, FINITE, st.floats(0.0, 6.0)), min_size=1, max_size=60)


def noisy_run(steps: int, seed: int = 0) -> list[Observation]:
    """A climb, a plateau and a fall, KL across the budget, entropy down to a tenth: every layer has something to do."""
    rng = random.Random(seed)
    rows = []
    for step in range(steps):
        share = step / steps
        reward = min(share, 0.4) - max(0.0, share - 0.7) + 0.02 * rng.gauss(0, 1)
        kl = 0.45 * min(1.0, 2 * share) + 0.03 * rng.gauss(0, 1)
        rows.append(Observation(step, reward, kl, 3.0 * (1.0 - 0.9 * share)))
    return rows


def test_the_names_are_the_documented_ones() -> None:
    assert CONTROLLERS == ("none", "fixed", "adaptive", "asymmetric", "pid-lagrangian", "safe", "paper")


@pytest.mark.parametrize(("name", "changed"), MADE)
def test_a_run_saved_as_json_at_any_step_continues_bit_for_bit(name: str, changed: dict[str, Any]) -> None:
    rows = noisy_run(130)
    controller = make_controller(name, **changed)
    for row in rows:
        copy = make_controller(name, **changed)
        copy.load_state_dict(json.loads(json.dumps(controller.state_dict(), allow_nan=False)))
        decision = controller.observe(row)
        assert copy.observe(row) == decision
        assert copy.state_dict() == controller.state_dict()
        assert json.loads(json.dumps(dataclasses.asdict(decision), allow_nan=False)) == dataclasses.asdict(decision)


@pytest.mark.parametrize(("name", "changed"), MADE)
def test_the_state_stops_growing(name: str, changed: dict[str, Any]) -> None:
    controller = make_controller(name, **changed)
    sizes = []
    for row in noisy_run(400):
        controller.observe(row)
        sizes.append(len(json.dumps(controller.state_dict())))
    assert max(sizes[200:]) <= max(sizes[:200]) * 1.02


@pytest.mark.parametrize("name", CONTROLLERS)
@pytest.mark.parametrize(("step", "first"), [(0, 1), (2, 1), (1, 0)])
def test_a_repeated_or_skipped_step_says_which_was_expected(name: str, step: int, first: int) -> None:
    controller = make_controller(name)
    for row in noisy_run(10)[:first]:
        controller.observe(row)
    before = controller.state_dict()
    message = rf"Observation\.step is {step}, expected step {first}:.*load the controller's state"
    with pytest.raises(ValueError, match=message):
        controller.observe(Observation(step, 0.0, 0.0, 1.0))
    assert controller.state_dict() == before


@pytest.mark.parametrize(("name", "changed"), MADE)
@given(run=RUNS)
@settings(max_examples=25, deadline=None)
def test_every_decision_is_finite_and_never_pulls_the_wrong_way(
    name: str, changed: dict[str, Any], run: list[tuple[float, ...]]
) -> None:
    controller = make_controller(name, **changed)
    for step, (reward, kl, entropy) in enumerate(run):
        decision = dataclasses.asdict(controller.observe(Observation(step, reward, kl, entropy)))
        numbers = [value for value in decision.values() if isinstance(value, float)]
        assert all(math.isfinite(value) for value in numbers), decision
        assert decision["kl_coef"] >= 0.0
        assert decision["excess"] >= 0.0
        assert decision["gate"] > 0.0
        assert "\n" not in decision["reason"]
        assert decision["reason"]
        assert not any("penalty" in key for key in decision)


@pytest.mark.parametrize("name", CONTROLLERS)
def test_the_recorded_settings_are_complete_and_make_the_same_controller(name: str) -> None:
    recorded = controller_settings(name, {})
    assert json.loads(json.dumps(recorded)) == recorded
    assert make_controller(name, **recorded).settings == make_controller(name).settings


@pytest.mark.parametrize(
    ("name", "given_settings", "message"),
    [
        ("sfae", {}, r"controller 'sfae' is unknown: choose one of none, fixed"),
        ("fixed", {"betta": 0.1}, r"controller 'fixed' has no setting 'betta' \(given 0\.1\): choose from beta"),
        ("none", {"beta": 0.1}, r"controller 'none' has no setting 'beta' \(given 0\.1\): it has none"),
        ("fixed", {"beta": -0.1}, r"controller 'fixed': beta=-0\.1 is out of range: give a finite number >= 0"),
        ("fixed", {"beta": math.nan}, r"beta=nan is out of range"),
        ("fixed", {"beta": "0.1"}, r"beta='0\.1': give a number, such as 0\.05"),
        ("safe", {"window": 20.5}, r"window=20\.5: give a whole number"),
        ("adaptive", {"target": 0}, r"target=0 is out of range: give a finite number > 0"),
        ("safe", {"gate_on": 1}, r"gate_on=1: give true or false, such as False"),
        ("safe", {"budget": True}, r"budget=True: give a number"),
        ("safe", {"budget_per": "word"}, r"budget_per='word': choose one of token, sequence"),
        ("safe", {"budget_per": 1}, r"budget_per=1: choose one of token, sequence"),
        ("safe", {"threshold_rate": 0.5}, r"threshold_rate=0\.5 is out of range: .* > 0\.0 and <= 0\.2"),
        ("safe", {"initial_coef": 1e-6}, r"initial_coef=1e-06 is outside \[min_coef=0\.0001, max_coef=100\.0\]"),
        ("paper", {"threshold_min": 0.7}, r"threshold_min=0\.7 is above threshold_max=0\.6"),
        (
            "safe",
            {"gate_max": 9.0},
            r"gate_max=9\.0 has no effect, since gate_on is false: set gate_on=true, or leave it",
        ),
        ("safe", {"gate_max": 0.5}, r"gate_max=0\.5 is out of range"),
        ("safe", {"threshold_on": False, "window": 20}, r"window=20 has no effect, since threshold_on is false"),
        ("safe", {"threshold_on": False, "pid_ki": 0.0}, r"pid_ki=0\.0 has no effect, since threshold_on is false"),
    ],
)
def test_a_wrong_setting_is_named_with_its_value_and_a_remedy(
    name: str, given_settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        make_controller(name, **given_settings)
    with pytest.raises(ValueError, match=message):
        controller_settings(name, given_settings)


@pytest.mark.parametrize(
    ("name", "key", "allowed", "refused"),
    [
        ("fixed", "beta", 0.0, -5e-324),  # >= 0
        ("fixed", "beta", 1e300, math.inf),
        ("adaptive", "target", 5e-324, 0.0),  # > 0
        ("safe", "lead", 20.0, math.nextafter(20.0, 21)),  # <= 20
        ("safe", "gate_fraction", 1.0, math.nextafter(1.0, 2)),
        ("safe", "gate_max", 1.0, math.nextafter(1.0, 0)),
        ("safe", "window", 10, 9),
        ("safe", "window", 1000, 1001),
        ("safe", "window", 10, True),  # a bool is no number
        ("asymmetric", "threshold", -3.0, -math.inf),  # no range, yet finite
        ("paper", "velocity_keep", 1.0, math.nan),
    ],
)
def test_the_bounds_of_a_setting_belong_to_its_range_or_do_not(
    name: str, key: str, allowed: float, refused: float
) -> None:
    on = {"gate_on": True} if name == "safe" else {}  # the gate's have no effect without it
    assert controller_settings(name, {**on, key: allowed})[key] == allowed
    with pytest.raises(ValueError, match=rf"^controller '{name}': {key}="):
        controller_settings(name, {**on, key: refused})


def test_the_defaults_are_the_documented_ones() -> None:
    """Those of `safe` have their reasons in its source; those of the others are published."""
    assert {name: controller_settings(name, {}) for name in CONTROLLERS} == {
        "none": {},
        "fixed": {"beta": 0.05},
        "adaptive": {"init_beta": 0.05, "target": 0.3, "horizon": 16.0},
        "asymmetric": {"threshold": 0.3, "penalty_scale": 0.1, "momentum_scale": 5.0, "window": 50},
        "pid-lagrangian": {"limit": 0.3, "kp": 0.5, "ki": 0.05, "kd": 1.0},
        "safe": {
            "budget": 0.3,
            "budget_per": "token",
            "initial_coef": 0.05,
            "min_coef": 1e-4,
            "max_coef": 100.0,
            "gain": 0.3,
            "lead": 2.9,
            "update_share": 0.02,
            "gate_on": False,
            "gate_fraction": 0.6,
            "gate_power": 2.0,
            "gate_max": 8.0,
            "threshold_on": True,
            "threshold_min": 0.5,
            "threshold_max": 1.5,
            "threshold_rate": 0.01,
            "window": 40,
            "pid_kp": 0.1,
            "pid_ki": 0.01,
            "pid_kd": 0.1,
        },
        "paper": {
            "penalty_scale": 0.1,
            "base_threshold": 0.3,
            "threshold_min": 0.1,
            "threshold_max": 0.6,
            "entropy_floor": 2.0,
            "gate_min": 0.5,
            "velocity_keep": 0.95,
            "velocity_target": 0.001,
            "pid_kp": 0.3,
            "pid_ki": 0.01,
            "pid_kd": 0.05,
            "pid_integral_limit": 1.0,
        },
    }


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ((0, math.nan, 0.0, 1.0), r"Observation\.reward is nan at step 0: a controller needs a finite number"),
        ((3, 0.0, math.inf, 1.0), r"Observation\.kl is inf at step 3"),
        ((0, 0.0, 0.0, "1"), r"Observation\.entropy is '1'"),
        ((-1, 0.0, 0.0, 1.0), r"Observation\.step is -1: it counts rollouts"),
        ((True, 0.0, 0.0, 1.0), r"Observation\.step is True"),
        ((0.0, 0.0, 0.0, 1.0), r"Observation\.step is 0\.0"),
    ],
)
def test_an_observation_that_is_no_figure_is_refused(values: tuple[Any, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Observation(*values)


def test_a_state_that_does_not_fit_is_refused_and_changes_nothing() -> None:
    controller = make_controller("safe", gate_on=True)
    for row in noisy_run(20):
        controller.observe(row)
    good = controller.state_dict()
    state = good["state"]
    for bad, message in (
        ({**good, "version": 0}, "version 0, this code reads 3"),
        ({**good, "controller": "paper"}, "is of 'paper', this run's controller is 'safe'"),
        ({**good, "extra": 1}, "expected .'controller', 'next_step'"),
        ({**good, "next_step": -2}, "next_step=-2"),
        ({**good, "next_step": True}, "next_step=True"),
        ({**good, "state": [1]}, "is a list: expected a mapping"),
        ({**good, "state": {**state, "unheard": 1}}, r"unknown keys \['unheard'\]"),
        ({**good, "state": {"regulator": state["regulator"]}}, r"lacks \['entropy', 'length', 'threshold'\]"),
        ({**good, "state": {**state, "entropy": {**state["entropy"], "count": 1.5}}}, r"state\.entropy\.count is 1\.5"),
        ({**good, "state": {**state, "entropy": {**state["entropy"], "start": math.inf}}}, r"expected a finite float"),
        ({**good, "state": {**state, "length": "x"}}, r"finite float or null"),
        ({**good, "state": {**state, "threshold": {**state["threshold"], "kls": 3}}}, r"expected a list of numbers"),
        ({**good, "state": {**state, "threshold": {**state["threshold"], "kls": [None]}}}, r"threshold\.kls is None"),
    ):
        with pytest.raises(ValueError, match=message):
            controller.load_state_dict(bad)
        assert controller.state_dict() == good
    with pytest.raises(ValueError, match="expected a mapping"):
        controller.load_state_dict({**good, "next_step": 7, "state": None})  # a good step with a bad state
    assert controller.state_dict() == good


def test_whole_numbers_in_a_saved_state_read_as_floats() -> None:
    controller = make_controller("paper")
    controller.observe(Observation(0, 1, 0, 2))
    saved = json.loads(json.dumps(controller.state_dict()).replace('"velocity": 0.0', '"velocity": 0'))
    controller.load_state_dict(saved)
    assert isinstance(controller.state.velocity, float)
    assert controller.state.pid == PidState()


TURNED: dict[str, dict[str, Any]] = {
    "fixed": {"beta": 0.2},
    "adaptive": {"init_beta": 0.2, "target": 0.1, "horizon": 8.0},
    "asymmetric": {"threshold": 0.2, "penalty_scale": 0.3, "momentum_scale": 50.0, "window": 20},
    "pid-lagrangian": {"limit": 0.1, "kp": 0.3, "ki": 0.2, "kd": 2.0},
    "safe": {
        "budget": 0.2,
        "budget_per": "sequence",
        "update_share": 0.01,
        "initial_coef": 0.1,
        "min_coef": 0.05,
        "max_coef": 0.06,
        "gain": 2.0,
        "lead": 0.2,
        "gate_on": True,
        "gate_fraction": 0.8,
        "gate_power": 1.0,
        "gate_max": 2.0,
        "threshold_on": False,
        "threshold_min": 0.9,
        "threshold_max": 1.05,
        "threshold_rate": 0.001,
        "window": 20,
        "pid_kp": 0.3,
        "pid_ki": 0.05,
        "pid_kd": 0.5,
    },
    "paper": {
        "penalty_scale": 0.3,
        "base_threshold": 0.2,
        "threshold_min": 0.25,
        "threshold_max": 0.26,
        "entropy_floor": 1.0,
        "gate_min": 3.0,
        "velocity_keep": 0.5,
        "velocity_target": 0.1,
        "pid_kp": 1.0,
        "pid_ki": 0.2,
        "pid_kd": 0.5,
        "pid_integral_limit": 0.01,
    },
}


OF_THE_GATE = ("gate_fraction", "gate_power", "gate_max")
"""Settings of `safe` that act with its gate, which is off by default."""


@pytest.mark.parametrize(("name", "key"), [(name, key) for name in TURNED for key in TURNED[name]])
def test_every_setting_changes_a_decision(name: str, key: str) -> None:
    assert set(TURNED[name]) == set(controller_settings(name, {}))
    acts = {"gate_on": True} if key in OF_THE_GATE else {}
    plain, turned = make_controller(name, **acts), make_controller(name, **acts, **{key: TURNED[name][key]})
    rows = [dataclasses.replace(row, length=20.0) for row in noisy_run(150)]
    ours = [dataclasses.replace(plain.observe(row), reason="") for row in rows]
    theirs = [dataclasses.replace(turned.observe(row), reason="") for row in rows]
    assert any(a != b for a, b in zip(ours, theirs, strict=True))


def test_every_setting_is_documented_where_it_stands() -> None:
    for path in Path(stable_rlhf.control.__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if not (isinstance(node, ast.ClassDef) and node.name.endswith("Settings")):
                continue
            for field, below in zip(node.body, [*node.body[1:], None], strict=True):
                if isinstance(field, ast.AnnAssign) and node.name != "Settings":
                    text = below.value if isinstance(below, ast.Expr) else None
                    documented = isinstance(text, ast.Constant) and isinstance(text.value, str)
                    assert documented, (node.name, ast.unparse(field.target))


def test_control_imports_the_standard_library_and_itself_only() -> None:
    for path in Path(stable_rlhf.control.__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            for module in names:
                own = module.startswith("stable_rlhf.control")
                assert own or module.split(".")[0] in sys.stdlib_module_names, (path.name, module)
