"""The controller `safe` inside verl: figures, coefficient, settings, checkpoint, and what is replaced when."""

from __future__ import annotations

import json
import logging
import math
import os
import random
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from stable_rlhf.control import Observation, SafeSettings, controller_of, make_controller
from stable_rlhf.errors import CheckpointError, ConfigError
from stable_rlhf.integrations import verl_attach
from stable_rlhf.integrations.verl import (
    STATE_FILE,
    SUPPORTED,
    RolloutFigures,
    SafeKLController,
    controller_from,
    load_state,
    measure,
    save_state,
)
from stable_rlhf.runs.names import METRICS
from tests.control.plants import Policy, hold
from tests.integrations.verl_places import Fixed, Settings, Verl, batch_of, installed, stand_in, trainer_of

ROOT = Path(__file__).resolve().parents[2]
SAFE = ("algorithm.use_kl_in_reward=true", "algorithm.kl_ctrl.type=safe", "+algorithm.kl_ctrl.budget=0.1")
"""The three lines of docs/verl.md."""


@pytest.fixture(params=["stand-in", "installed"])
def verl(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Verl]:
    """verl with its own functions: the stand-in, and the installed one where there is one."""
    verl_attach.warn_once.cache_clear()
    if request.param == "stand-in":
        yield stand_in(monkeypatch)
        return
    with installed() as places:
        yield places


def figures(kl: float = 0.2, rewards: tuple[float, ...] = (1.0, 3.0)) -> RolloutFigures:
    return RolloutFigures(rewards=rewards, kl=kl, entropy=2.0, kl_error=0.01, length=4.0)


# -- the figures of a batch -----------------------------------------------------------------------------------------


def test_figures_are_those_of_a_naive_loop_over_response_tokens() -> None:
    torch.manual_seed(1)
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 0, 1, 1, 0], [0, 0, 0, 0, 0], [1, 1, 1, 1, 1]])
    batch = {name: torch.randn(4, 5) for name in ("token_level_scores", "old_log_probs", "ref_log_prob")}
    batch["token_level_scores"] *= mask
    batch["ref_log_prob"][mask == 0] = math.nan  # never read
    batch["response_mask"] = mask
    found = measure(batch)

    rows = [0, 1, 3]  # the third has no response
    ratios = [
        [
            float(batch["old_log_probs"][b, t].double() - batch["ref_log_prob"][b, t].double())
            for t in range(5)
            if mask[b, t]
        ]
        for b in rows
    ]
    tokens = sum(len(row) for row in ratios)
    kl = sum(sum(row) for row in ratios) / tokens
    squares = sum((sum(row) - kl * len(row)) ** 2 for row in ratios)
    entropy = -sum(float(batch["old_log_probs"][b, t]) for b in rows for t in range(5) if mask[b, t]) / tokens
    assert found.kl == pytest.approx(kl, abs=1e-12)
    assert found.kl_error == pytest.approx(math.sqrt(squares * 3 / 2) / tokens, abs=1e-12)
    assert found.entropy == pytest.approx(entropy, abs=1e-6)
    assert found.length == pytest.approx(tokens / 3)
    assert found.rewards == pytest.approx([float(batch["token_level_scores"][b].sum()) for b in rows], abs=1e-6)


@pytest.mark.parametrize("name", ["entropys", "entropy"])
def test_an_exact_entropy_of_the_batch_is_taken(name: str) -> None:
    batch = batch_of(0.1, entropy=2.0)
    assert measure(batch).entropy == pytest.approx(2.0, abs=1e-12)
    assert measure({**batch, name: torch.full((2, 4), 1.5)}).entropy == pytest.approx(1.5, abs=1e-12)


# -- the coefficient ------------------------------------------------------------------------------------------------


def test_the_coefficient_is_that_of_the_law_times_the_running_deviation_of_the_rewards() -> None:
    ours, law = SafeKLController(SafeSettings(budget=0.1)), make_controller("safe", budget=0.1)
    for step, (kl, rewards) in enumerate([(0.05, (1.0, 3.0)), (0.09, (5.0, 9.0)), (0.12, (4.0, 4.0))]):
        ours.observe(figures(kl, rewards))
        decision = law.observe(Observation(step, sum(rewards) / 2, kl, 2.0, kl_error=0.01, length=4.0))
        deviation = [1.0, math.sqrt(8.75), math.sqrt(53) / 3][step]  # of 1 3; of 1 3 5 9; of 1 3 5 9 4 4
        assert ours.value == pytest.approx(decision.kl_coef * deviation, rel=1e-12)
        ours.update(kl, 2)


def test_the_law_is_given_every_figure_as_it_was_measured() -> None:
    settings = SafeSettings(budget=2.0, budget_per="sequence", gate_on=True)
    ours, law = SafeKLController(settings), controller_of(settings)
    rng = random.Random(2)
    gates = set()
    for step in range(30):
        seen = RolloutFigures(
            rewards=(1.0, 4.0),
            kl=abs(rng.gauss(0.1, 0.05)),
            entropy=3.0 if step < 15 else 1.0,
            kl_error=rng.choice([0.0, 0.2]),
            length=rng.uniform(10, 30),
        )
        decision = law.observe(
            Observation(step, 2.5, seen.kl, seen.entropy, kl_error=seen.kl_error, length=seen.length)
        )
        assert ours.observe(seen) == decision
        gates.add(decision.gate)
    assert len(gates) > 1


def test_rewards_in_another_unit_give_the_coefficient_in_that_unit() -> None:
    one, other = SafeKLController(), SafeKLController()
    rng = random.Random(3)
    for _ in range(30):
        kl, rewards = abs(rng.gauss(0.3, 0.1)), tuple(rng.gauss(0, 1) for _ in range(8))
        one.observe(figures(kl, rewards))
        other.observe(figures(kl, tuple(10 * reward - 70 for reward in rewards)))
        assert other.value == pytest.approx(10 * one.value, rel=1e-9)


def test_the_coefficient_is_never_0_whatever_the_kl_and_the_rewards() -> None:
    for kl in (0.0, -0.05, 1e-9, 5.0):
        for rewards in ((2.0, 2.0), (0.0, 1e-3)):
            ours = SafeKLController()
            assert ours.value > 0.0
            for _ in range(20):
                ours.observe(figures(kl, rewards))
                assert ours.value >= 1e-4 * ours.unit > 0.0


def test_an_update_without_a_rollout_is_an_error_and_so_is_a_rollout_without_responses() -> None:
    ours = SafeKLController()
    with pytest.raises(RuntimeError, match="without showing it the rollout"):
        ours.update(0.1, 2)
    ours.observe(figures())
    ours.update(0.1, 2)
    with pytest.raises(RuntimeError, match="apply_kl_penalty of its own"):
        ours.update(0.1, 2)
    with pytest.raises(ValueError, match="no response with a token"):
        ours.observe(figures(rewards=()))
    with pytest.raises(ValueError, match=r"Observation.reward is nan at step 1"):
        ours.observe(figures(rewards=(math.nan, 1.0)))


# -- settings -------------------------------------------------------------------------------------------------------

DEFAULTS = {"_target_": "x", "type": "safe", "kl_coef": 0.001, "horizon": 10000, "target_kl": 0.1}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"bugdet": 0.1}, r"algorithm.kl_ctrl: controller 'safe' has no setting 'bugdet' \(given 0.1\): choose from"),
        ({"budget": -1.0}, r"algorithm.kl_ctrl: controller 'safe': budget=-1.0 is out of range"),
        ({"budget": "much"}, r"budget='much': give a number"),
        ({"kl_coef": 0.05}, r"algorithm.kl_ctrl.kl_coef=0.05 has no effect on type=safe"),
        ({"target_kl": 0.2}, r"algorithm.kl_ctrl.target_kl=0.2 has no effect"),
        ({"horizon": 1}, r"algorithm.kl_ctrl.horizon=1 has no effect"),
        ({"update_share": 0.02}, r"algorithm.kl_ctrl.update_share=0.02 has no effect in verl"),
        ({"resume_without_state": 1}, r"algorithm.kl_ctrl.resume_without_state=1: give true or false"),
    ],
)
def test_a_setting_that_is_unknown_wrong_or_without_effect_is_refused_by_name(given: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        controller_from({**DEFAULTS, **given})


def test_settings_of_kl_ctrl_are_those_of_the_law() -> None:
    made = controller_from({**DEFAULTS, "budget": 0.05, "gate_on": True, "gate_power": 3})
    assert made.controller.settings == SafeSettings(budget=0.05, gate_on=True, gate_power=3)
    assert controller_from(DEFAULTS).controller.settings == SafeSettings()


def test_the_three_lines_are_accepted_by_verl_and_make_the_controller(verl: Verl) -> None:
    verl_attach.attach()
    config = verl.settings(*SAFE)
    verl.config.validate_config(config, use_reference_policy=True, use_critic=False)
    made = verl.core.get_kl_controller(config.algorithm.kl_ctrl)
    assert isinstance(made, SafeKLController)
    assert made.controller.settings == SafeSettings(budget=0.1)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ((*SAFE, "algorithm.use_kl_in_reward=false"), "no effect, since algorithm.use_kl_in_reward is false"),
        ((*SAFE, "algorithm.kl_penalty=low_var_kl"), r"algorithm.kl_penalty='low_var_kl' does not go with type=safe"),
        ((*SAFE, "+algorithm.kl_ctrl.windows=40"), "no setting 'windows'"),
    ],
)
def test_a_configuration_that_cannot_work_is_refused_before_anything_starts(
    verl: Verl, overrides: tuple[str, ...], message: str
) -> None:
    verl_attach.attach()
    with pytest.raises(ConfigError, match=message):
        verl.config.validate_config(verl.settings(*overrides), use_reference_policy=True, use_critic=False)


# -- in verl --------------------------------------------------------------------------------------------------------


def safe_in(verl: Verl, *overrides: str) -> SafeKLController:
    verl_attach.attach()
    made = verl.core.get_kl_controller(verl.settings(*SAFE, *overrides).algorithm.kl_ctrl)
    assert isinstance(made, SafeKLController)
    return made


@pytest.mark.parametrize("place", ["ray", "v1"])
def test_the_penalty_has_the_coefficient_of_its_own_rollout(verl: Verl, place: str) -> None:
    ours, alone = safe_in(verl), SafeKLController(SafeSettings(budget=0.1))
    for kl in (0.02, 0.08, 0.15):
        batch = batch_of(kl, 0.01, (1.0, 4.0))
        data, metrics = getattr(verl, place).apply_kl_penalty(verl.data(batch), kl_ctrl=ours, kl_penalty="kl")
        alone.observe(measure(batch_of(kl, 0.01, (1.0, 4.0))))
        assert metrics["actor/reward_kl_penalty_coeff"] == ours.value == alone.value
        wanted = batch["token_level_scores"] - alone.value * (batch["old_log_probs"] - batch["ref_log_prob"])
        torch.testing.assert_close(data.batch["token_level_rewards"], wanted, rtol=0, atol=1e-12)
        assert metrics["objective/kl"] == pytest.approx(kl, abs=1e-12)
        assert metrics["objective/scores"] == 2.5
        assert metrics["objective/entropy"] == pytest.approx(2.0)
        assert metrics["safe/reward_std"] == pytest.approx(1.5)
        assert {name for name in metrics if not name.startswith("actor/")} <= set(METRICS)
    assert ours.controller.next_step == 3


def test_another_estimate_of_the_kl_is_refused_at_the_penalty_too(verl: Verl) -> None:
    ours = safe_in(verl)
    with pytest.raises(ConfigError, match=r"algorithm.kl_penalty='k3'"):
        verl.ray.apply_kl_penalty(verl.data(batch_of(0.1)), kl_ctrl=ours, kl_penalty="k3")


@pytest.mark.parametrize(("budget", "size"), [(0.05, 0.02), (0.1, 0.05), (0.3, 0.1)])
def test_a_simulated_policy_is_held_to_its_budget_through_verls_functions(
    verl: Verl, budget: float, size: float
) -> None:
    """Updates of a size that no bound limits, as in verl; rewards around 20 with a deviation of 7."""
    ours = safe_in(verl, f"algorithm.kl_ctrl.budget={budget}")
    rng = random.Random(0)

    def law(seen: Observation) -> tuple[float, None]:
        rewards = tuple(rng.gauss(20, 7) for _ in range(64))
        data = verl.data(batch_of(seen.kl, seen.kl_error, rewards, entropy=seen.entropy))
        _, metrics = verl.ray.apply_kl_penalty(data, kl_ctrl=ours, kl_penalty="kl")
        return metrics["actor/reward_kl_penalty_coeff"] / 7, None

    kls = [each.kl / budget for each in hold(Policy(size=size), law, 200)]
    late = kls[100:]
    assert max(kls) < 1.25
    assert 0.9 < sum(late) / len(late) < 1.05
    assert sum(abs(kl - 1) < 0.15 for kl in late) > 0.95 * len(late)
    assert ours.unit == pytest.approx(7, rel=0.05)


# -- the checkpoint -------------------------------------------------------------------------------------------------


def rollouts(count: int) -> list[RolloutFigures]:
    rng = random.Random(5)
    return [figures(abs(rng.gauss(0.1, 0.05)), tuple(rng.gauss(3, 2) for _ in range(6))) for _ in range(count)]


@pytest.mark.parametrize("trainer", ["RayPPOTrainer", "PPOTrainer"])
@pytest.mark.parametrize("mode", ["auto", "resume_path"])
def test_a_resumed_controller_equals_an_uninterrupted_one_bit_for_bit(
    verl: Verl, trainer: str, mode: str, tmp_path: Path
) -> None:
    overrides = (*SAFE, f"trainer.default_local_dir={tmp_path}")
    whole, first = safe_in(verl), safe_in(verl)
    seen = rollouts(40)
    saving = trainer_of(verl, trainer, verl.settings(*overrides), first)
    for one in seen[:25]:
        whole.observe(one)
        first.observe(one)
    saving.global_steps = 25
    saving._save_checkpoint()
    first.observe(seen[25])  # a step that is lost

    folder = tmp_path / "global_step_25"
    assert {path.name for path in folder.iterdir()} == {"data.pt", STATE_FILE}
    if mode == "resume_path":
        folder = folder.rename(tmp_path / "kept_global_step_25")  # anywhere: verl looks for the number only
        overrides += ("trainer.resume_mode=resume_path", f"trainer.resume_from_path={folder}")
    resumed = safe_in(verl)
    loading = trainer_of(verl, trainer, verl.settings(*overrides), resumed)
    loading._load_checkpoint()
    assert loading.global_steps == 25
    assert resumed.state_dict() == whole.state_dict()
    for one in seen[25:]:
        assert resumed.observe(one) == whole.observe(one)
        assert resumed.value == whole.value
    assert resumed.state_dict() == whole.state_dict()


@pytest.mark.parametrize("trainer", ["RayPPOTrainer", "PPOTrainer"])
def test_a_run_that_begins_needs_no_state_and_a_checkpoint_without_it_is_refused(
    verl: Verl, trainer: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = verl.settings(*SAFE, f"trainer.default_local_dir={tmp_path}")
    trainer_of(verl, trainer, config, safe_in(verl))._load_checkpoint()
    saving = trainer_of(verl, trainer, config, None)  # a run with another controller
    saving.global_steps = 4
    saving._save_checkpoint()
    assert not (tmp_path / "global_step_4" / STATE_FILE).exists()
    with pytest.raises(CheckpointError, match=r"global_step_4/stable_rlhf_safe.json is missing.*resume_without_state"):
        trainer_of(verl, trainer, config, safe_in(verl))._load_checkpoint()
    anew = safe_in(verl, "+algorithm.kl_ctrl.resume_without_state=true")
    with caplog.at_level(logging.WARNING):
        trainer_of(verl, trainer, config, anew)._load_checkpoint()
    assert "begins anew" in caplog.text
    assert anew.controller.next_step == 0


def test_the_state_is_written_before_verl_names_the_checkpoint(verl: Verl, tmp_path: Path) -> None:
    config = verl.settings(*SAFE, f"trainer.default_local_dir={tmp_path}")
    trainer = trainer_of(verl, "RayPPOTrainer", config, safe_in(verl))
    trainer.global_steps = 7
    (tmp_path / "latest_checkpointed_iteration.txt").mkdir()  # verl's own last write fails
    with pytest.raises(OSError, match="latest_checkpointed_iteration"):
        trainer._save_checkpoint()
    load_state(SafeKLController(), tmp_path / "global_step_7", 7)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda saved: "{", "cannot be read"),
        (lambda saved: "[]", "cannot be read"),
        (lambda saved: json.dumps(saved | {"global_step": 8}), "it is of step 8, the checkpoint of step 3"),
        (lambda saved: json.dumps(saved | {"value": 0}), "value=0: expected a number above 0"),
        (lambda saved: json.dumps(saved | {"extra": 1}), r"unknown keys \['extra'\]"),
        (lambda saved: json.dumps(saved | {"normaliser": None}), "cannot be read"),
        (lambda saved: json.dumps(saved | {"controller": {}}), "controller state has the keys"),
        (lambda saved: json.dumps(saved).replace("0.2", "NaN"), "is not a finite number"),
    ],
)
def test_a_damaged_state_is_refused_by_name_and_changes_nothing(tmp_path: Path, change: Any, message: str) -> None:
    ours = SafeKLController()
    ours.observe(figures(kl=0.2))
    save_state(ours, tmp_path, 3)
    path = tmp_path / STATE_FILE
    path.write_text(change(json.loads(path.read_text())))
    fresh = SafeKLController()
    before = fresh.state_dict()
    with pytest.raises(CheckpointError, match=message) as caught:
        load_state(fresh, tmp_path, 3)
    assert str(path) in str(caught.value)
    assert fresh.state_dict() == before


# -- inert, refused, not attached -----------------------------------------------------------------------------------


def test_without_safe_verl_acts_as_before_and_its_trainers_are_not_touched(verl: Verl, tmp_path: Path) -> None:
    untouched = {name: (cls._save_checkpoint, cls._load_checkpoint) for name, cls in verl.trainers.items()}
    penalty = verl.ray.apply_kl_penalty
    fixed = verl.settings("algorithm.use_kl_in_reward=true").algorithm.kl_ctrl
    before = verl.core.get_kl_controller(fixed)
    verl_attach.attach()
    after = verl.core.get_kl_controller(fixed)
    assert type(after) is type(before) is verl.core.FixedKLController
    assert vars(after) == vars(before)
    wrong = verl.settings("algorithm.kl_ctrl.type=mine").algorithm.kl_ctrl
    with pytest.raises(NotImplementedError):
        verl.core.get_kl_controller(wrong)
    config = verl.settings("algorithm.kl_penalty=mse", f"trainer.default_local_dir={tmp_path}")
    verl.config.validate_config(config, use_reference_policy=False, use_critic=False)
    assert verl.ray.apply_kl_penalty is verl.v1.apply_kl_penalty is penalty
    assert untouched == {name: (cls._save_checkpoint, cls._load_checkpoint) for name, cls in verl.trainers.items()}

    safe_in(
        verl
    )  # and once another run of the process has asked for it, those with a controller of verl's are the same
    results = [function(verl.data(batch_of(0.1)), kl_ctrl=before) for function in (penalty, verl.ray.apply_kl_penalty)]
    assert results[0][1] == results[1][1]
    assert torch.equal(*(data.batch["token_level_rewards"] for data, _ in results))
    trainer = trainer_of(verl, "RayPPOTrainer", config, before)
    trainer.global_steps = 2
    trainer._save_checkpoint()
    trainer._load_checkpoint()
    assert {path.name for path in (tmp_path / "global_step_2").iterdir()} == {"data.pt"}


def test_attaching_twice_is_attaching_once(verl: Verl) -> None:
    for _ in range(2):
        ours = safe_in(verl)
    verl.ray.apply_kl_penalty(verl.data(batch_of(0.1)), kl_ctrl=ours)
    assert ours.controller.next_step == 1


@pytest.mark.parametrize("version", ["0.8.0", "0.10.0"])
def test_another_version_is_refused_by_name_and_only_where_safe_is_asked_for(
    monkeypatch: pytest.MonkeyPatch, version: str, caplog: pytest.LogCaptureFixture
) -> None:
    verl = stand_in(monkeypatch, version)
    assert version not in SUPPORTED
    assert verl_attach.attach()
    verl.core.get_kl_controller(verl.settings().algorithm.kl_ctrl)
    verl.config.validate_config(verl.settings())
    assert caplog.text == ""
    for call in (
        lambda: verl.core.get_kl_controller(verl.settings(*SAFE).algorithm.kl_ctrl),
        lambda: verl.config.validate_config(verl.settings(*SAFE)),
    ):
        with pytest.raises(ConfigError, match=rf"not supported on verl {version}: install verl 0.9.1"):
            call()


@pytest.mark.parametrize("name", ["get_kl_controller", "validate_config"])
def test_a_failure_to_attach_says_once_what_was_not_found_and_in_which_version(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, name: str
) -> None:
    verl_attach.warn_once.cache_clear()
    verl = stand_in(monkeypatch, "0.9.1", without=name)
    for _ in range(3):
        assert not verl_attach.attach()
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert record.getMessage().startswith("stable-rlhf cannot attach to verl 0.9.1: it has no verl.")
    assert f":{name} (" in record.getMessage()
    others = {"get_kl_controller", "validate_config"} - {name}
    assert not any(
        hasattr(vars(place).get(other), "stable_rlhf") for place in (verl.core, verl.config) for other in others
    )


@pytest.mark.parametrize("name", ["apply_kl_penalty", "RayPPOTrainer", "PPOTrainer"])
def test_a_trainer_that_cannot_be_attached_to_is_an_error_where_safe_is_asked_for(
    monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    verl = stand_in(monkeypatch, without=name)
    with pytest.raises(RuntimeError, match=rf"cannot attach to verl 0.9.1: it has no verl\.[\w.]+:{name}"):
        safe_in(verl)


def test_a_trainer_that_saves_in_its_own_way_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    verl = stand_in(monkeypatch)
    below = type("FullyAsyncTrainer", (type("Between", (verl.trainers["RayPPOTrainer"],), {}),), {})
    with pytest.raises(ConfigError, match="not supported with verl's FullyAsyncTrainer"):
        safe_in(verl)
    del below


def test_the_plugin_attaches_when_it_is_imported_and_says_why_it_cannot(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    plugin = "stable_rlhf.integrations.verl_plugin"
    (entry,) = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]["verl.plugins"].values()
    assert entry == plugin
    verl = stand_in(monkeypatch)
    monkeypatch.delitem(sys.modules, plugin, raising=False)
    __import__(plugin)
    assert isinstance(verl.core.get_kl_controller(verl.settings(*SAFE).algorithm.kl_ctrl), SafeKLController)

    monkeypatch.delitem(sys.modules, plugin)
    monkeypatch.setattr(verl_attach, "attach", lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        __import__(plugin)
    assert "stable-rlhf could not attach to verl: ZeroDivisionError: division by zero" in caplog.text
    monkeypatch.delitem(sys.modules, plugin, raising=False)


def test_importing_the_integration_imports_neither_verl_nor_torch() -> None:
    code = (
        "import sys, stable_rlhf.integrations.verl, stable_rlhf.integrations.verl_attach\n"
        "print(sorted({'torch', 'verl', 'transformers', 'numpy', 'rich'} & set(sys.modules)))"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "[]"


def test_the_settings_of_the_stand_in_are_those_that_verl_ships(verl: Verl) -> None:
    made = verl.settings(*SAFE)
    kl_ctrl = {name: made.algorithm.kl_ctrl[name] for name in made.algorithm.kl_ctrl if name != "_target_"}
    assert kl_ctrl == {"type": "safe", "kl_coef": 0.001, "horizon": 10000, "target_kl": 0.1, "budget": 0.1}
    assert made.algorithm.kl_penalty == "kl"
    assert isinstance(made, Settings) == (verl.name == "stand-in")


# -- verl's default trainer, on its own data ------------------------------------------------------------------------


def test_the_default_trainer_of_verl_asks_for_the_controller_and_shows_it_its_rollouts(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """PPOTrainerSync as verl makes it, and its step from stored log-probs to advantages (GRPO, groups of two).

    The store is the only stand-in. Responses have 2, 4, 3 and 1 tokens and are stored without padding, as verl does.
    """
    with installed() as verl:
        from tensordict import NonTensorData, NonTensorStack, TensorDict

        verl_attach.attach()
        config = verl.settings(*SAFE, "algorithm.adv_estimator=grpo", "actor_rollout_ref.rollout.n=2")
        trainer = verl.trainers["PPOTrainer"](config=config)
        ours = trainer.kl_ctrl_in_reward
        assert isinstance(ours, SafeKLController)

        def rows(*values: list[float]) -> torch.Tensor:
            return torch.nested.as_nested_tensor([torch.tensor(row) for row in values], layout=torch.jagged)

        logp = [[-1.0, -2.0], [-1.0, -1.0, -1.0, -1.0], [-3.0, -1.0, -2.0], [-4.0]]
        ref = [[-1.5, -2.0], [-1.0, -1.25, -1.0, -1.25], [-3.0, -1.0, -2.5], [-4.0]]
        scores = [[0.0, 1.0], [0.0, 0.0, 0.0, 3.0], [0.0, 0.0, 2.0], [2.0]]
        stored = TensorDict(
            {
                "response_mask": rows(*[[1.0] * len(row) for row in logp]),
                "rm_scores": rows(*scores),
                "old_log_probs": rows(*logp),
                "ref_log_prob": rows(*ref),
                "uid": NonTensorStack(*[NonTensorData(uid) for uid in "aabb"]),
            },
            batch_size=[4],
        )
        written: dict[str, Any] = {}
        monkeypatch.setattr(verl.v1.tq, "kv_batch_get", lambda **kwargs: stored)
        monkeypatch.setattr(verl.v1.tq, "kv_batch_put", lambda **kwargs: written.update(kwargs["fields"]))
        names = ["a_0_0", "a_1_0", "b_0_0", "b_1_0"]
        keys = verl.v1.KVBatchMeta(keys=names, partition_id="train", tags=[{} for _ in names])
        metrics: dict[str, float] = {}
        trainer._compute_advantage(keys, metrics)

        assert metrics["objective/kl"] == pytest.approx((0.5 + 0.5 + 0.5) / 10)
        assert metrics["objective/entropy"] == pytest.approx((3 + 4 + 6 + 4) / 10)
        assert metrics["objective/scores"] == 2.0
        assert metrics["safe/reward_std"] == pytest.approx(math.sqrt(0.5))
        beta = metrics["actor/reward_kl_penalty_coeff"]
        assert beta == ours.value > 0.0
        rewards = written["token_level_rewards"].unbind()
        for row, (p, q, score) in enumerate(zip(logp, ref, scores, strict=True)):
            wanted = [s - beta * (a - b) for a, b, s in zip(p, q, score, strict=True)]
            assert rewards[row].tolist() == pytest.approx(wanted, abs=1e-6)
        assert ours.controller.next_step == 1


@pytest.mark.parametrize(
    ("environment", "attached"),
    [
        ({"VERL_USE_EXTERNAL_MODULES": "stable_rlhf.integrations.verl_plugin"}, True),
        ({"VERL_USE_EXTERNAL_PLUGINS": "none"}, False),
    ],
)
def test_verl_loads_the_plugin_by_itself(environment: dict[str, str], attached: bool) -> None:
    with installed():
        code = "from verl.trainer.ppo import core_algos\nprint(hasattr(core_algos.get_kl_controller, 'stable_rlhf'))"
        ran = subprocess.run(
            [sys.executable, "-W", "ignore", "-c", code],
            capture_output=True,
            text=True,
            check=True,
            env={**os.environ, **environment},
        )
        assert ran.stdout.split()[-1] == str(attached)


# -- the page -------------------------------------------------------------------------------------------------------

PAGE = (ROOT / "docs" / "verl.md").read_text(encoding="utf-8")


def test_the_page_has_the_version_the_lines_and_the_file() -> None:
    assert re.findall(r"verl==([\d.]+)", PAGE) == list(SUPPORTED)
    shown = re.findall(r"^  (\+?algorithm\.\S+=\S+)", PAGE, flags=re.MULTILINE)
    assert [line.lower() for line in shown] == list(SAFE)
    assert f"global_step_N/{STATE_FILE}" in PAGE
    assert verl_attach.FULLY_ASYNC in PAGE
    named = set(re.findall(r"`((?:objective|safe)/\w+)`", PAGE))
    ours = SafeKLController()
    ours.observe(figures())
    assert len(named) >= 4
    assert named <= set(ours.metrics())


def test_the_recipe_for_skyrl_observes_every_rollout_and_resumes(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Its code on a stand-in of SkyRL's trainer, which keeps what the recipe relies on."""

    class RayPPOTrainer:
        def __init__(self, cfg: Any) -> None:
            self.cfg, self.global_step, self.reward_kl_controller = cfg, 0, None

        def apply_reward_kl_penalty(self, data: dict[str, Any]) -> dict[str, Any]:
            assert isinstance(self.reward_kl_controller, Fixed)
            kl = data["action_log_probs"] - data["base_action_log_probs"]
            return data | {"rewards": data["rewards"] - self.reward_kl_controller.value * kl}

        def save_checkpoints(self) -> str:
            return str(Path(self.cfg.trainer.ckpt_path) / f"global_step_{self.global_step}")

        def load_checkpoints(self) -> tuple[int, str | None]:
            found = list(Path(self.cfg.trainer.ckpt_path).glob("global_step_*"))
            return (int(found[0].name.split("_")[-1]), str(found[0])) if found else (0, None)

    for name, content in {
        "skyrl.train.trainer": {"RayPPOTrainer": RayPPOTrainer},
        "skyrl.backends.skyrl_train.utils.ppo_utils": {"FixedKLController": Fixed},
    }.items():
        parts = name.split(".")
        for end in range(1, len(parts) + 1):
            module = ModuleType(".".join(parts[:end]))
            monkeypatch.setitem(sys.modules, module.__name__, module)
        module.__dict__.update(content)
    (recipe,) = re.findall(r"```python\n(.*?)```", PAGE.split("## SkyRL")[1], flags=re.DOTALL)
    space: dict[str, Any] = {}
    exec(recipe, space)  # noqa: S102

    def data(kl: float) -> dict[str, Any]:
        batch = batch_of(kl, 0.01)
        names = {"response_mask": "loss_mask", "token_level_scores": "rewards"}
        names |= {"old_log_probs": "action_log_probs", "ref_log_prob": "base_action_log_probs"}
        return {names[name]: value for name, value in batch.items()}

    config = Settings(trainer={"ckpt_path": str(tmp_path)})
    first, alone = space["SafeTrainer"](cfg=config), SafeKLController(SafeSettings(budget=0.1))
    assert first.load_checkpoints() == (0, None)
    for kl in (0.05, 0.12):
        given = data(kl)
        scores = first.apply_reward_kl_penalty(given)["rewards"]
        alone.observe(measure(batch_of(kl, 0.01)))
        ratio = given["action_log_probs"] - given["base_action_log_probs"]
        torch.testing.assert_close(scores, given["rewards"] - alone.value * ratio)
    first.global_step = 2
    first.save_checkpoints()
    second = space["SafeTrainer"](cfg=config)
    assert second.load_checkpoints()[0] == 2
    assert second.safe.state_dict() == alone.state_dict()
