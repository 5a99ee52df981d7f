"""The settings' checks, and what each preset is."""

from __future__ import annotations

import copy
import dataclasses
import math
import pickle
import typing
from pathlib import Path
from typing import Any

import pytest
import yaml
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

from stable_rlhf.config import files, loading
from stable_rlhf.config.algorithm import CriticConfig, KLConfig, OptimConfig
from stable_rlhf.config.config import Config
from stable_rlhf.config.presets import PRESETS
from stable_rlhf.config.resume import given_in_python, refuse_changes
from stable_rlhf.config.sections import SECTIONS, TRACKERS, ModelConfig
from stable_rlhf.control import (
    CONTROLLERS,
    AdaptiveSettings,
    FixedSettings,
    GuardConfig,
    NoneSettings,
    Observation,
    PaperSettings,
    SafeSettings,
    make_controller,
    settings_class,
)
from stable_rlhf.errors import CheckpointError, ConfigError

# The settings of the controllers, from the tables of algorithm.md (Controllers).
ADAPTIVE = {"init_beta": 0.05, "target": 0.3, "horizon": 16.0}
ASYMMETRIC = {"threshold": 0.3, "penalty_scale": 0.1, "momentum_scale": 5.0, "window": 50}
SAFE = {
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
}
PAPER_CONTROLLER = {
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
}
# What each preset resolves to where it differs from `safe`, written out from algorithm.md's presets and layers.
NO_GUARD = {"guard.enabled": False, "guard.max_kl": 2.0}  # and so no ceiling was taken for the one that acts
PLAIN = {"critic.zero_init": False, "critic.learning_rate": None, "critic.cliprange_value": 0.2}
PLAIN |= {"optim.skip_equal_scores": False, "optim.preview": False, "kl.observe": "k1", **NO_GUARD}
PPO = {"critic.clip_reduction": "max", "reward.normalise": "none", "optim.whiten_floor": 1e-4}
PPO |= PLAIN
FIXED = {"kl.controller": "fixed", "kl.settings": {"beta": 0.05}, "kl.length_neutral": False}
IN_LOSS = {"kl.in_reward": False, "kl.in_loss": "k2"}
FREE = {"kl.controller": "fixed", "kl.settings": {"beta": 0.0}, **IN_LOSS}
GROUPS = {"critic.heads": 0, "optim.num_iterations": 1, "optim.num_mini_batches": 1, "reward.normalise": "none"}
GROUPS |= {"optim.preview": False, "kl.observe": "k1", **NO_GUARD}
DIFFERENCES: dict[str, dict[str, Any]] = {
    "safe": {},
    "paper": {
        "critic.heads": 2,
        "critic.bootstrap": "mixed",
        "critic.regress": "soft_min",
        "critic.loss": "huber",
        "reward.normalise": "paper",
        "kl.controller": "paper",
        "kl.settings": PAPER_CONTROLLER,
        "optim.entropy_coef": 0.01,
        **PLAIN,
        **IN_LOSS,
    },
    "ppo": {**PPO, **FIXED},
    "ppo-adaptive": {**PPO, "kl.controller": "adaptive", "kl.settings": ADAPTIVE, "kl.length_neutral": False},
    "ppo-nokl": {**PPO, "kl.controller": "none", "kl.settings": {}, "kl.in_reward": False},
    "asymmetric": {**PPO, "kl.controller": "asymmetric", "kl.settings": ASYMMETRIC, **IN_LOSS},
    "pid-lagrangian": {
        **PPO,
        "kl.controller": "pid-lagrangian",
        "kl.settings": {"limit": 0.3, "kp": 0.5, "ki": 0.05, "kd": 1.0},
        "kl.length_neutral": False,
    },
    "kl-adaptive-lr": {**PPO, **FIXED, "optim.adaptive_kl": 0.01},
    "vapo": {
        **{name: value for name, value in PPO.items() if name != "critic.learning_rate"},
        **FIXED,
        "critic.lam": 1.0,
        "critic.warmup_steps": 20,
        "optim.length_alpha": 0.05,
        "optim.epsilon_high": 0.28,
    },
    "grpo": {**GROUPS, **FREE, "rollout.num_generations": 8, "optim.advantage": "grpo"},
    "dr-grpo": {
        **GROUPS,
        **FREE,
        "rollout.num_generations": 8,
        "optim.advantage": "dr_grpo",
        "optim.denominator": "length",
    },
    "rloo": {
        **GROUPS,
        **FIXED,
        "rollout.num_generations": 2,
        "optim.advantage": "rloo",
        "optim.importance": "product",
        "optim.denominator": "sequence",
    },
    "safe-grpo": {"critic.heads": 0, "rollout.num_generations": 8, "optim.advantage": "grpo", **IN_LOSS},
    "safe-double-critic": {"critic.heads": 2},
    "safe-gate": {"kl.settings": {**SAFE, "gate_on": True}},
    "safe-no-regulation": {
        "kl.controller": "none",
        "kl.settings": {},
        "kl.in_reward": False,
        "guard.max_kl_ratio": None,
        "optim.max_update_kl": 0.006,
    },
    "safe-no-threshold": {"kl.settings": {**SAFE, "threshold_on": False}},
    "safe-no-preview": {"optim.preview": False},
    "safe-no-guard": NO_GUARD,
}
# The figures of algorithm.md: layer 1 and "Notation".
PAPER_UPDATE = {
    "critic.heads": 2,
    "critic.temperature": 0.3,
    "critic.target_tau": 0.05,
    "critic.loss": "huber",
    "critic.huber_delta": 0.5,
    "critic.cliprange_value": 0.2,
    "critic.clip_reduction": "mean",
    "critic.learning_rate": None,
    "critic.max_grad_norm": 0.5,
    "critic.lam": None,
    "optim.gamma": 1.0,
    "optim.lam": 0.95,
    "optim.epsilon": 0.2,
    "optim.max_grad_norm": 1.0,
}


def flat(config: Config) -> dict[str, Any]:
    """Every setting but the preset's name, by its name on the command line."""
    settings = config.to_dict()
    nested = {f"{name}.{field}": value for name in SECTIONS for field, value in settings[name].items()}
    return nested | {name: value for name, value in settings.items() if name not in SECTIONS and name != "preset"}


# -- presets --------------------------------------------------------------------------------------------------------


def test_presets_are_those_of_the_table() -> None:
    assert list(PRESETS) == list(DIFFERENCES)


@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_differs_from_safe_by_what_it_says_and_nothing_else(preset: str) -> None:
    default = flat(Config())
    assert {
        name: value for name, value in flat(Config(preset=preset)).items() if value != default[name]
    } == DIFFERENCES[preset]


def test_paper_has_every_published_constant() -> None:
    config = flat(Config(preset="paper"))
    assert {name: config[name] for name in PAPER_UPDATE} == PAPER_UPDATE
    assert config["kl.settings"] == PAPER_CONTROLLER


def test_safe_has_one_head_and_no_gate_every_other_layer_and_no_bias_between_the_sides_of_the_td_error() -> None:
    config = Config()
    assert (config.preset, config.kl.controller, config.critic.heads) == ("safe", "safe", 1)
    assert (config.critic.bootstrap, config.critic.regress, config.reward.normalise) == ("online", "each", "running")
    assert isinstance(config.kl.settings, SafeSettings)
    assert (config.kl.settings.gate_on, config.kl.settings.threshold_on) == (False, True)
    assert config.optim.preview
    assert config.guard.enabled
    off = [name for name, value in config.to_dict()["guard"].items() if value is None]
    assert off == ["max_kl", "min_explained_variance"]  # there is a threshold; a saturated reward sets it off


def test_ppo_has_one_head_squared_error_and_a_fixed_kl_in_the_reward() -> None:
    config = Config(preset="ppo")
    assert (config.kl.controller, config.kl.settings) == ("fixed", FixedSettings(beta=0.05))
    assert (config.kl.in_reward, config.kl.in_loss) == (True, "none")
    assert (config.critic.heads, config.critic.loss, config.critic.clip_reduction) == (1, "mse", "max")


@pytest.mark.parametrize("preset", PRESETS)
def test_a_presets_settings_are_those_of_its_controller(preset: str) -> None:
    kl = Config(preset=preset).kl
    assert type(kl.settings) is settings_class(kl.controller)
    changed = PRESETS[preset].get("kl", {}).get("settings", {})
    assert dataclasses.asdict(kl.settings) == dataclasses.asdict(settings_class(kl.controller)()) | changed


def test_the_controllers_of_the_configuration_are_those_there_are() -> None:
    assert typing.get_args(typing.get_type_hints(KLConfig)["controller"]) == CONTROLLERS


def test_from_preset_changes_the_fields_that_are_given_and_a_section_given_whole_replaces_the_presets() -> None:
    partial = Config.from_preset("ppo", max_steps=10, critic={"lam": 0.5})
    assert (partial.max_steps, partial.critic.lam, partial.critic.clip_reduction) == (10, 0.5, "max")
    whole = Config(preset="ppo", critic=CriticConfig(lam=0.5))
    assert (whole.critic.lam, whole.critic.clip_reduction) == (0.5, "mean")
    assert whole.reward.normalise == "none"


def test_a_config_never_shares_its_lists_and_mappings_with_the_preset_or_the_caller() -> None:
    given = {"beta": 1.0}
    config = Config.from_preset("ppo", kl={"settings": given})
    given["beta"] = 2.0
    assert config.kl.settings == FixedSettings(beta=1.0)
    config.to_dict()["kl"]["settings"]["beta"] = 3.0
    assert config.kl.settings == FixedSettings(beta=1.0)
    Config(preset="ppo").reward.functions.append("x")
    assert Config(preset="ppo").reward.functions == ["builtin"]
    assert PRESETS["ppo"]["kl"]["settings"] == {"beta": 0.05}


# -- kl.settings ----------------------------------------------------------------------------------------------------


def test_settings_that_are_not_given_are_the_presets_for_its_own_controller_and_the_defaults_for_another() -> None:
    assert KLConfig().settings == SafeSettings()
    assert KLConfig(controller="paper").settings == PaperSettings()
    assert KLConfig(controller="none", settings={}).settings == NoneSettings()  # pyright: ignore
    for given in ({}, {"settings": None}, {"settings": {}}, {"controller": "safe"}):
        assert Config.from_preset("safe-no-threshold", kl=given).kl.settings == SafeSettings(threshold_on=False)
    other = Config.from_preset("safe-no-threshold", kl={"controller": "adaptive"}, optim={"preview": False})
    assert other.kl.settings == AdaptiveSettings()


def test_settings_given_as_a_mapping_are_made_the_controllers_own_class() -> None:
    assert KLConfig(controller="fixed", settings={"beta": 0.1}).settings == FixedSettings(beta=0.1)  # pyright: ignore
    assert Config.from_preset("safe", kl={"settings": {"budget": 0.2}}).kl.settings == SafeSettings(budget=0.2)
    kept = Config.from_preset("safe-no-threshold", kl={"settings": {"budget": 0.2}}).kl.settings
    assert kept == SafeSettings(budget=0.2, threshold_on=False)


def test_settings_given_whole_replace_the_presets() -> None:
    given = SafeSettings(budget=0.2)
    assert Config.from_preset("safe-no-threshold", kl={"settings": given}).kl.settings == given
    assert KLConfig(settings=given).settings == given


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        (
            {"settings": {"budget": -1.0}},
            "kl.settings.budget=-1.0 is out of range: give a finite number > 0.0 (the default is 0.3)",
        ),
        ({"settings": {"budget": "0.2"}}, "kl.settings.budget='0.2': give a number, such as 0.3"),
        ({"settings": {"window": True}}, "kl.settings.window=True: give a whole number, such as 40"),
        (
            {"settings": {"initial_coef": 1e-6}},
            "kl.settings.initial_coef=1e-06 is outside [min_coef=0.0001, max_coef=100.0]: move it between them, or "
            "widen them",
        ),
        (
            {"controller": "fixed", "settings": {"betta": 0.1}},
            "kl.settings.betta=0.1: unknown setting; kl.controller=fixed has beta",
        ),
        (
            {"controller": "none", "in_reward": False, "settings": {"beta": 0.1}},
            "kl.settings.beta=0.1: unknown setting; it belongs to kl.controller=fixed (preset ppo), not to "
            "kl.controller=none",
        ),
        (
            {"controller": "none", "in_reward": False, "settings": {"zeta": 0.1}},
            "kl.settings.zeta=0.1: unknown setting; kl.controller=none has no settings",
        ),
        (
            {"controller": "fixed", "settings": NoneSettings()},
            "kl.settings=NoneSettings(): give a mapping, such as {name: value}, or FixedSettings(...), for "
            "kl.controller=fixed",
        ),
        (
            {"settings": [0.2]},
            "kl.settings=[0.2]: give a mapping, such as {name: value}, or SafeSettings(...), for kl.controller=safe",
        ),
    ],
)
def test_wrong_settings_of_a_controller_are_refused_where_the_section_is_made(
    given: dict[str, Any], sentence: str
) -> None:
    for make in (lambda: KLConfig(**given), lambda: Config.from_preset(kl=given)):
        with pytest.raises(ConfigError) as caught:
            make()
        assert str(caught.value) == sentence


# -- round trip -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("preset", PRESETS)
def test_a_config_comes_back_from_its_yaml(preset: str, tmp_path) -> None:
    config = Config.from_preset(
        preset, output_dir="x", seed=3, optim={"learning_rate": 1e-5}, data={"limit": 5}, reward={"weights": [0.5]}
    )
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(config.to_dict(), sort_keys=False))
    assert loading.load_config(["--config", str(file)]) == config
    assert Config.from_preset(**yaml.safe_load(file.read_text())) == config


@pytest.mark.parametrize("section", [Config, *SECTIONS.values()])
def test_settings_are_frozen_and_keyword_only(section: type) -> None:
    made = section()
    for field in dataclasses.fields(made):
        assert field.kw_only
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(made, field.name, None)


# -- checks ---------------------------------------------------------------------------------------------------------

POSITIVE = {
    **dict.fromkeys(
        ["max_steps", "save_total_limit", "data.max_prompt_length", "data.limit", "reward.batch_size"], int
    ),
    **dict.fromkeys(["rollout.batch_size", "rollout.num_generations", "rollout.max_completion_length"], int),
    **dict.fromkeys(["optim.num_iterations", "optim.num_mini_batches", "optim.microbatch_tokens"], int),
    **dict.fromkeys(["reward.timeout", "reward.max_wait", "reward.uncertainty_coef"], float),
    **dict.fromkeys(["rollout.temperature", "optim.learning_rate", "optim.epsilon", "optim.whiten_floor"], float),
    **dict.fromkeys(["optim.max_grad_norm", "critic.temperature", "critic.huber_delta", "critic.vf_coef"], float),
    **dict.fromkeys(["critic.max_grad_norm", "critic.learning_rate", "critic.cliprange_value"], float),
    **dict.fromkeys(["guard.max_drawdown"], float),
    "guard.max_kl": float,
    **dict.fromkeys(["guard.patience", "guard.snapshot_steps"], int),
    "model.lora_alpha": float,
    "optim.max_update_kl": float,
    **dict.fromkeys(["optim.adaptive_kl", "optim.epsilon_high", "optim.length_alpha"], float),
}
NOT_NEGATIVE = {
    **dict.fromkeys(
        ["save_steps", "eval_steps", "model.lora_r", "data.eval_size", "optim.warmup_steps", "critic.warmup_steps"], int
    ),
    **dict.fromkeys(["log.completions_steps", "reward.retries", "guard.max_rollbacks"], int),
    **dict.fromkeys(["optim.weight_decay", "optim.entropy_coef", "reward.missing_eos_penalty"], float),
}
BETWEEN = {  # (outside, sentence)
    "seed": ([-1, 2**63], "must be 0 or more, and below 2^63"),
    "optim.gamma": ([0.0, 1.01, -1.0], "must be in (0, 1]"),
    "optim.lam": ([-0.01, 1.01], "must be in [0, 1]"),
    "critic.lam": ([-0.01, 1.01], "must be in [0, 1]"),
    "critic.target_tau": ([0.0, 1.01], "must be in (0, 1]"),
    "guard.min_entropy": ([1.0, 7.5], "must be below 1, the start itself"),
    "guard.min_distinct": ([1.0, 7.5], "must be below 1, the start itself"),
    "guard.min_length": ([1.0, 7.5], "must be below 1, the start itself"),
    "guard.max_entropy": ([1.0, 0.5], "must be above 1, the start itself"),
    "guard.max_kl_ratio": ([1.0, 0.5], "must be above 1, the threshold itself"),
    "guard.rollback_factor": ([0.0, -0.5, 1.01], "must be in (0, 1]"),
}
NEEDED = {  # what must be set for the field to have a range at all
    "model.lora_alpha": {"model": {"lora_r": 4}},
    "guard.max_kl": {"kl": {"controller": "none", "in_reward": False}, "optim": {"preview": False}},
    "critic.temperature": {"critic": {"heads": 2}},
    "critic.huber_delta": {"critic": {"loss": "huber"}},
    "reward.uncertainty_coef": {"reward": {"aggregate": "uncertainty"}},
}


def made(setting: str, value: Any, **context: Any) -> Config:
    section, _, field = setting.rpartition(".")
    given: dict[str, Any] = {**NEEDED.get(setting, {}), **context}
    if not section:
        return Config.from_preset(**given, **{field: value})
    return Config.from_preset(**{**given, section: {**given.get(section, {}), field: value}})


def refused(setting: str, value: Any, **context: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        made(setting, value, **context)
    return str(caught.value)


@pytest.mark.parametrize(("setting", "kind"), POSITIVE.items())
def test_what_must_be_positive_is(setting: str, kind: type) -> None:
    for value in (kind(0), kind(-1)):
        assert refused(setting, value) == f"{setting}={value!r}: must be greater than 0"
    if kind is float:
        assert made(setting, 1e-9)


@pytest.mark.parametrize(("setting", "kind"), NOT_NEGATIVE.items())
def test_what_must_not_be_negative_is_not(setting: str, kind: type) -> None:
    assert refused(setting, kind(-1)) == f"{setting}={kind(-1)!r}: must be 0 or more"
    assert made(setting, kind(0))


@pytest.mark.parametrize(("setting", "outside", "sentence"), [(name, *rest) for name, rest in BETWEEN.items()])
def test_what_has_two_bounds_keeps_them(setting: str, outside: list[float], sentence: str) -> None:
    for value in outside:
        assert refused(setting, value) == f"{setting}={value!r}: {sentence}"


@pytest.mark.parametrize("name", ["max_kl_ratio", "min_entropy", "max_entropy", "min_distinct", "min_length"])
def test_a_level_of_the_guard_is_above_0(name: str) -> None:
    for value in (0.0, -0.1):
        assert refused(f"guard.{name}", value) == f"guard.{name}={value!r}: must be greater than 0"


@pytest.mark.parametrize("value", [-1e9, 0.0, 1.0])
def test_the_least_explained_variance_may_be_any_number(value: float) -> None:
    assert made("guard.min_explained_variance", value).guard.min_explained_variance == value


@pytest.mark.parametrize("field", [field for field in dataclasses.fields(GuardConfig) if field.name != "enabled"])
def test_a_guard_that_is_off_has_no_settings(field: Any) -> None:
    default = field.default or 0.0
    value = default // 2 + 1 if isinstance(default, int) else default * 0.9 + 0.11
    kl = {"controller": "none", "in_reward": False} if field.name == "max_kl" else {}  # where it has an effect
    made_with: dict[str, Any] = {"guard": {field.name: value}, "kl": kl, "optim": {"preview": not kl}}
    assert Config.from_preset(**made_with).guard != GuardConfig()
    sentence = f"guard.{field.name}={value!r}: has no effect unless guard.enabled=true; leave it out"
    assert refused(f"guard.{field.name}", value, guard={"enabled": False}) == sentence
    assert refused(f"guard.{field.name}", value, preset="ppo") == sentence


@pytest.mark.parametrize("controller", CONTROLLERS)
def test_the_ceiling_of_the_kl_is_of_the_kind_that_the_controller_has(controller: str) -> None:
    """A controller whose decisions have a threshold takes the multiple of it, and no other takes it."""
    threshold = make_controller(controller).observe(Observation(0, 0.0, 0.1, 1.0)).threshold
    kl = {"controller": controller} | ({"in_reward": False} if controller == "none" else {})
    own, other, what = (
        ("max_kl_ratio", "max_kl", "a threshold") if threshold else ("max_kl", "max_kl_ratio", "no threshold")
    )
    without: dict[str, Any] = {"kl": kl, "optim": {"preview": False}}
    assert getattr(Config(**without, guard={own: 1.5, other: None}).guard, own) == 1.5
    with pytest.raises(ConfigError) as error:
        Config(**without, guard={other: 1.5})
    assert str(error.value) == (
        f"guard.{other}=1.5: has no effect, since kl.controller={controller} has {what}; set guard.{own}, "
        "or leave it out"
    )


def test_the_guard_can_be_turned_off_on_a_preset_that_sets_something_of_it() -> None:
    off = Config.from_preset("safe-no-regulation", guard={"enabled": False})
    assert off.guard == GuardConfig(enabled=False)


def test_without_a_critic_what_a_preset_sets_of_it_is_left_out() -> None:
    """The same for the settings of an advantage that is no longer the preset's."""
    made = Config.from_preset("ppo", critic={"heads": 0}, optim={"advantage": "reinforce_pp"})
    assert made.critic == CriticConfig(heads=0)
    assert made.optim == OptimConfig(advantage="reinforce_pp", preview=False)
    kept = Config.from_preset("ppo", optim={"advantage": "gae"})
    assert kept == Config(preset="ppo")


def test_a_batch_of_groups_is_one_of_prompts() -> None:
    assert [Config(preset=preset).rollout.prompts for preset in ("safe", "grpo", "rloo")] == [64, 8, 32]


ANY_NUMBER = ["guard.min_explained_variance"]


def test_every_number_has_a_range() -> None:
    for name, section in {"": Config, **SECTIONS}.items():
        for field, hint in typing.get_type_hints(section).items():
            if {int, float} & {hint, *typing.get_args(hint)}:
                setting = f"{name}.{field}".lstrip(".")
                assert [*POSITIVE, *NOT_NEGATIVE, *BETWEEN, *ANY_NUMBER].count(setting) == 1, setting


@pytest.mark.parametrize("section", ["", *SECTIONS])
def test_a_value_of_the_wrong_type_is_refused_in_every_field(section: str) -> None:
    """Python does not check annotations: a misspelt choice would otherwise silently be another one."""
    for field in dataclasses.fields(SECTIONS[section] if section else Config):
        setting = f"{section}.{field.name}".lstrip(".")
        assert refused(setting, object()).startswith(f"{setting}=<object object at ")
    numbers = [name for name in [*POSITIVE, *NOT_NEGATIVE, *BETWEEN, *ANY_NUMBER] if name.rpartition(".")[0] == section]
    for setting in numbers:
        assert refused(setting, True).startswith(f"{setting}=True: give a ")
        assert refused(setting, math.nan).startswith(f"{setting}=nan: give a ")
        assert refused(setting, math.inf).startswith(f"{setting}=inf: give a ")
        assert refused(setting, "1").startswith(f"{setting}='1': give a ")


@pytest.mark.parametrize(
    ("setting", "value", "context", "sentence"),
    [
        ("critic.bootstrap", "targets", {}, "choose one of online, target, mixed"),
        ("critic.heads", True, {}, "choose one of 0, 1, 2"),
        ("preset", "safer", {}, f"choose one of {', '.join(PRESETS)}"),
        ("model.lora_alpha", 8.0, {"model": {"lora_r": 0}}, "has no effect without an adapter: set model.lora_r to"),
        ("model.lora_target_modules", ["q_proj"], {}, "has no effect without an adapter: set model.lora_r to a rank"),
        ("model.lora_target_modules", [], {"model": {"lora_r": 2}}, "name at least one layer, or leave it out"),
        ("data.split", "test", {"data": {"train": "x.jsonl"}}, "has no effect unless data.train is a hub name, "),
        ("data.eval", "x.jsonl", {"data": {"eval_size": 0}}, "has no effect unless data.eval_size is above 0; leave"),
        ("data.eval_split", "a", {"data": {"eval": "x.csv"}}, "has no effect unless held-out prompts come from a hub "),
        ("data.eval_split", "a", {"data": {"train": "hub/name"}}, "has no effect unless held-out prompts come from a "),
        ("data.eval_split", "train", {"data": {"eval_size": 0}}, "has no effect unless held-out prompts come from a "),
        ("reward.functions", [], {}, "name at least one reward"),
        ("reward.weights", [0.0], {}, "nothing would be rewarded: give at least one weight other than 0"),
        ("reward.trust_remote_code", ["x"], {}, "every entry must be one of reward.functions"),
        ("reward.normalise", "paper", {"rollout": {"batch_size": 1}, "optim": {"num_mini_batches": 1}}, "divides by "),
        ("rollout.batch_size", 63, {}, "must be divisible by optim.num_mini_batches=2: try 64"),
        (
            "rollout.batch_size",
            20,
            {"optim": {"num_mini_batches": 8}},
            "must be divisible by optim.num_mini_batches=8: try",
        ),
        ("optim.microbatch_tokens", 0, {}, "must be greater than 0"),
        ("critic.temperature", 0.1, {"critic": {"heads": 1}}, "has no effect unless critic.heads=2; leave it out"),
        ("critic.regress", "soft_min", {}, "has no effect unless critic.heads=2; leave it out"),
        (
            "critic.huber_delta",
            0.1,
            {"critic": {"loss": "mse"}},
            "has no effect unless critic.loss=huber; leave it out",
        ),
        (
            "optim.lam",
            0.9,
            {"optim": {"length_alpha": 0.05}},
            "has no effect unless optim.length_alpha is none; leave it",
        ),
        (
            "optim.advantage",
            "gae",
            {"preset": "grpo"},
            "needs a critic, and critic.heads=0 is none: set critic.heads=1",
        ),
        ("optim.advantage", "grpo", {}, "has no critic, and critic.heads=1 would train one for nothing: set critic.he"),
        (
            "rollout.num_generations",
            1,
            {"preset": "rloo"},
            "optim.advantage=rloo compares the completions of a prompt: ",
        ),
        *(
            (
                "rollout.num_generations",
                1,
                {"critic": {"heads": 0}, "optim": {"advantage": name}},
                f"optim.advantage={name} compares the completions of a prompt: give 2 or more",
            )
            for name in ("grpo", "dr_grpo")
        ),
        ("rollout.batch_size", 60, {"preset": "grpo"}, "counts completions, and must be divisible by rollout.num_gene"),
        ("optim.lam", 0.9, {"preset": "grpo"}, "has no effect unless optim.advantage=gae; leave it out"),
        ("optim.gamma", 0.9, {"preset": "grpo"}, "has no effect unless optim.advantage is gae or reinforce_pp; leave"),
        (
            "optim.whiten_floor",
            0.2,
            {"preset": "rloo"},
            "has no effect unless optim.advantage is gae or reinforce_pp; ",
        ),
        ("optim.skip_equal_scores", False, {"preset": "rloo"}, "has no effect unless optim.advantage=gae; leave it ou"),
        (
            "optim.skip_zero_variance_groups",
            True,
            {},
            "has no effect unless optim.advantage is rloo, grpo or dr_grpo; ",
        ),
        (
            "optim.skip_zero_variance_groups",
            True,
            {"preset": "rloo", "kl": {"in_reward": True, "in_loss": "none"}},
            "would leave out the KL of these groups, which is in the reward: set kl.in_reward=false and kl.in_loss=k2",
        ),
        (
            "optim.advantage",
            "grpo",
            {
                "critic": {"heads": 0},
                "rollout": {"num_generations": 4},
                "kl": {"in_reward": True, "in_loss": "none"},
            },
            "divides by the group's deviation, so a KL in the reward would have no price: set kl.in_reward=false and ",
        ),
        (
            "rollout.batch_size",
            66,
            {"preset": "grpo", "rollout": {"num_generations": 3}, "optim": {"num_mini_batches": 4}},
            "must be divisible by optim.num_mini_batches=4: try 72",
        ),
        (
            "optim.epsilon",
            0.1,
            {"optim": {"loss": "cispo", "epsilon_high": 1.0}},
            "has no effect unless optim.loss is clip or optim.epsilon_high is None; leave it out",
        ),
        ("critic.vf_coef", 0.5, {"preset": "grpo"}, "has no effect unless critic.heads is 1 or 2; leave it out"),
        ("guard.min_explained_variance", 0.1, {"preset": "safe-grpo"}, "is of a critic, and critic.heads=0 is none: "),
        ("critic.clip_reduction", "max", {}, "has no effect unless critic.cliprange_value is given; leave it out"),
        ("critic.warmup_steps", 60, {}, "the policy would never learn in max_steps=60: make it smaller"),
        ("kl.in_loss", "k2", {}, "the KL is asked for twice, in the loss and in the reward (kl.in_reward=true): set "),
        ("kl.allow_both", True, {}, "has no effect unless the KL is in the reward and in the loss; leave it out"),
        ("kl.in_loss", "k2", {"preset": "ppo-nokl"}, "has no effect with kl.controller=none, whose coefficient is 0: "),
        ("log.report_to", ["wandbb"], {}, "there is no tracker 'wandbb'; did you mean wandb?"),
        ("log.report_to", ["none"], {}, "there is no tracker 'none'; choose from azure_ml, clearml, "),
        ("metric_for_best_model", "reward", {}, "is chosen by evaluations in training, and there are none: set "),
        ("metric_for_best_model", "kl", {"eval_steps": 1}, "the policy farthest from the reference would be kept as "),
        ("zzz", 0.1, {}, "unknown setting; the top level has preset, output_dir, "),
        ("optim.zzz", 0.1, {}, "unknown setting; optim has learning_rate, "),
        ("optim", 5, {}, "give a dictionary of the fields to change, or OptimConfig(...)"),
    ],
)
def test_a_setting_in_conflict_is_named_with_the_remedy(
    setting: str, value: Any, context: dict[str, Any], sentence: str
) -> None:
    assert refused(setting, value, **context).startswith(f"{setting}={value!r}: {sentence}")


@pytest.mark.parametrize("optim", [{"max_update_kl": 0.5}, {"preview": False}])
def test_a_share_for_updates_is_refused_where_it_bounds_none(optim: dict[str, Any]) -> None:
    shared = {"kl": {"settings": {"update_share": 0.05}}}
    assert Config.from_preset("safe", **shared).kl.settings.update_share == 0.05
    with pytest.raises(
        ConfigError, match=r"^kl\.settings\.update_share=0\.05: has no effect unless optim\.preview is tr"
    ):
        Config.from_preset("safe", optim=optim, **shared)


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("kl_coef", "; here it is kl.settings.beta with kl.controller=fixed, as in preset ppo; preset safe has "),
        ("beta", "; here it is kl.settings.budget, a KL in nats per token; with preset ppo a price, kl.settings.beta"),
        ("lr", "; here it is optim.learning_rate"),
        ("logging_steps", "; here there is none, nor is one needed: every step is written to metrics.jsonl"),
        ("num_return_sequences", "; here it is rollout.num_generations"),
        ("temperature", ". Did you mean rollout.temperature or critic.temperature?"),
    ],
)
def test_a_name_of_another_library_is_told_what_it_is_here_wherever_it_is_given(
    name: str, sentence: str, tmp_path: Path
) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(f"{name}: 1\n")
    for load in (
        lambda: Config(**{name: 1}),
        lambda: loading.load_config([f"--{name}", "1"]),
        lambda: loading.load_config([str(file)]),
        lambda: Config(guard={name: 1}),  # pyright: ignore
    ):
        with pytest.raises(ConfigError) as caught:
            load()
        before, told, _ = str(caught.value).partition(sentence)
        assert name in before
        assert told
    if "here" in sentence:
        with pytest.raises(ConfigError, match=r"unknown setting; here "):
            OptimConfig(**{name: 1})  # pyright: ignore


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (
            ["--model.revision", "v2"],
            "model.revision='v2': has no effect unless model.name is a hub name; leave it out",
        ),
        (
            ["--model.gguf_file", "x"],
            "model.gguf_file='x': has no effect unless model.name is a folder or a hub name; ",
        ),
        (["--model.trust_remote_code", "true"], "model.trust_remote_code=True: has no effect unless model.name is a "),
    ],
)
def test_how_to_load_the_builtin_model_is_no_setting_of_the_command_line(arguments: list[str], sentence: str) -> None:
    with pytest.raises(ConfigError) as caught:
        loading.load_config(arguments)
    assert str(caught.value).startswith(sentence)


def test_a_controller_needs_a_place_where_its_coefficient_acts() -> None:
    sentence = refused("kl.in_reward", False)
    assert sentence.startswith(
        "kl.controller='safe': its coefficient acts nowhere: set kl.in_reward=true or kl.in_loss"
    )


def test_the_kl_may_be_in_both_places_by_name() -> None:
    assert KLConfig(in_loss="k2", allow_both=True).in_reward


def test_the_batch_size_that_is_proposed_divides() -> None:
    context: dict[str, Any] = {"optim": {"num_mini_batches": 6}}
    sentence = refused("rollout.batch_size", 64, **context)
    proposed = int(sentence.rpartition(" ")[2])
    assert proposed == 66
    assert made("rollout.batch_size", proposed, **context)


def test_a_section_of_another_kind_is_refused() -> None:
    sentence = r"^optim=.*: give a dictionary of the fields to change, or OptimConfig\(\.\.\.\)$"
    with pytest.raises(ConfigError, match=sentence):
        Config(optim=ModelConfig())  # pyright: ignore[reportArgumentType]
    assert Config(optim=OptimConfig(lam=1)).optim.lam == 1  # a whole number is a number


# -- settings as people write them ----------------------------------------------------------------------------------


@pytest.mark.parametrize("preset", PRESETS)
def test_a_section_given_as_a_dictionary_changes_the_presets_and_is_checked(preset: str) -> None:
    given = Config(preset=preset, optim={"weight_decay": 0.5})  # pyright: ignore[reportArgumentType]
    assert given == Config.from_preset(preset, optim={"weight_decay": 0.5})
    assert given.optim == dataclasses.replace(Config(preset=preset).optim, weight_decay=0.5)
    with pytest.raises(ConfigError, match=r"^optim\.weight_decay=-1: must be 0 or more$"):
        Config(preset=preset, optim={"weight_decay": -1})  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: Config(max_step=5), "max_step=5: unknown setting. Did you mean max_steps?"),  # pyright: ignore
        (lambda: Config(learning_rate=1), "learning_rate=1: unknown setting. Did you mean optim.learning_rate or "),  # pyright: ignore
        (lambda: Config(optimm={}), "optimm={}: unknown setting. Did you mean optim?"),  # pyright: ignore
        (lambda: Config(preset="ppo", beta=0.1), "beta=0.1: unknown setting. Did you mean kl.settings.beta?"),  # pyright: ignore
        (lambda: Config.from_preset(optim={"lamm": 1}), "optim.lamm=1: unknown setting. Did you mean optim.lam?"),
        (lambda: Config.from_preset(rollout={"lam": 1}), "rollout.lam=1: unknown setting. Did you mean optim.lam or "),
        (lambda: OptimConfig(learning_rat=1), "learning_rat=1: unknown setting. Did you mean learning_rate?"),  # pyright: ignore
        (lambda: OptimConfig(zzz=1), "zzz=1: unknown setting; OptimConfig has learning_rate, "),  # pyright: ignore
        (lambda: Config("ppo"), "Config('ppo'): give each setting by its name, such as preset=VALUE"),  # pyright: ignore
        (lambda: Config(preset=["ppo"]), "preset=['ppo']: choose one of safe, "),  # pyright: ignore
    ],
)  # fmt: skip
def test_a_keyword_that_is_no_setting_is_named_with_the_one_that_was_meant(make: Any, sentence: str) -> None:
    with pytest.raises(ConfigError) as caught:
        make()
    assert str(caught.value).startswith(sentence)


def test_one_entry_is_a_list_of_one_and_a_number_without_a_fraction_is_whole() -> None:
    config = Config.from_preset(
        max_steps=1e2, reward={"functions": "x", "weights": 2.0}, guard={"patience": 3.0}, log={"report_to": "wandb"}
    )
    assert (config.max_steps, type(config.max_steps)) == (100, int)
    assert (config.reward.functions, config.reward.weights) == (["x"], [2.0])
    assert (config.guard.patience, type(config.guard.patience)) == (3, int)
    assert config.log.report_to == ["wandb"]
    window = Config.from_preset(kl={"settings": {"window": 2e1}}).kl.settings.window  # pyright: ignore
    assert (window, type(window)) == (20, int)
    for wrong in (1.5, math.inf, "1e2"):
        assert refused("max_steps", wrong) == f"max_steps={wrong!r}: give a whole number"


def test_a_copy_of_the_settings_is_equal() -> None:
    config = Config.from_preset("ppo", optim={"gamma": 0.5})
    assert copy.deepcopy(config) == pickle.loads(pickle.dumps(config)) == config  # noqa: S301  our own bytes


# -- files of settings ----------------------------------------------------------------------------------------------


def test_a_file_gives_the_settings_that_the_command_line_reads_from_it(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("preset: ppo\nmax_steps: 1e2\nmodel: {lora_r: 4e0, lora_alpha: None}\nreward: {functions: a:f}\n")
    config = Config.from_yaml(file)
    assert config == loading.load_config([str(file)]) == loading.load_config(["--config", str(file)])
    assert (config.max_steps, config.model.lora_r, config.model.lora_alpha) == (100, 4, None)
    assert config.reward.functions == ["a:f"]
    changed = Config.from_yaml(str(file), max_steps=3, optim={"lam": 0.5}, model={"lora_alpha": 2})
    assert (changed.max_steps, changed.optim.lam, changed.model.lora_r) == (3, 0.5, 4)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("optim: {lamm: 1}", "optim.lamm=1: unknown setting. Did you mean optim.lam?"),
        ("optim: {lam: 2}", "optim.lam=2: must be in [0, 1]"),
        ("1: 2", "1=2: unknown setting; the top level has preset, "),
        ("[1]", "is a list; give a mapping of settings, such as `preset: safe`"),
    ],
)
def test_a_wrong_file_is_named_in_python_too(text: str, sentence: str, tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(text)
    with pytest.raises(ConfigError) as caught:
        Config.from_yaml(tmp_path / "run.yaml")
    assert str(caught.value).startswith(f"{tmp_path / 'run.yaml'}: {sentence}")


@pytest.mark.parametrize("value", ["1e2", "None", "null", "1e-4", "12", "", "true", "~"])
def test_a_text_that_looks_like_something_else_comes_back_as_a_text(value: str, tmp_path: Path) -> None:
    settings = {"name": value, "lists": [value], "number": 1e-4, "nothing": None}
    (tmp_path / "x.yaml").write_text(files.settings_text(settings))
    assert files.read_settings(tmp_path / "x.yaml") == settings


def test_a_recipe_is_read_by_its_name_and_a_misspelt_one_is_named() -> None:
    config = Config.from_yaml("recipe:smollm2-sentiment", max_steps=1)
    assert config == loading.load_config(["recipe:smollm2-sentiment", "--max_steps", "1"])
    assert (config.model.lora_r, config.max_steps) == (32, 1)
    with pytest.raises(
        ConfigError, match=r"^recipe:smolm2-hh: there is no such recipe\. Did you mean recipe:smollm2-hh\?$"
    ):
        Config.from_yaml("recipe:smolm2-hh")
    with pytest.raises(ConfigError, match=r"^--config recipe:\.\./x: there is no such recipe\. The recipes are "):
        loading.load_config(["recipe:../x"])


def test_a_path_is_taken_wherever_a_text_is() -> None:
    config = Config(
        output_dir=Path("runs/x"),  # pyright: ignore
        model={"name": Path("a/b")},  # pyright: ignore
        data={"train": Path("a.jsonl"), "eval": Path("b.jsonl")},  # pyright: ignore
        reward={"functions": [Path("c")]},  # pyright: ignore
    )
    assert (config.output_dir, config.model.name) == ("runs/x", "a/b")
    assert (config.data.train, config.data.eval, config.reward.functions) == ("a.jsonl", "b.jsonl", ["c"])
    assert Config(reward={"functions": Path("c")}) == Config(reward={"functions": ["c"]})  # pyright: ignore
    with pytest.raises(ConfigError, match=r"^kl\.controller=PosixPath\('safe'\): choose one of "):
        Config(kl={"controller": Path("safe")})  # pyright: ignore


def test_pefts_word_for_every_linear_layer_is_none() -> None:
    for given in ("all-linear", ["all-linear"], None):
        assert ModelConfig(lora_r=2, lora_target_modules=given).lora_target_modules is None  # pyright: ignore


def test_the_trackers_are_those_of_transformers() -> None:
    assert set(TRACKERS) == set(INTEGRATION_TO_CALLBACK)


def test_a_gold_server_may_move() -> None:
    def saved(gold: str) -> dict[str, Any]:
        return Config.from_preset("safe", reward={"gold": gold}).to_dict()

    refuse_changes(saved("http://a/x"), saved("http://b/y"))
    with pytest.raises(CheckpointError, match=r"reward\.gold is \['m:f'\] here and \['http://b/y'\] in the checkpoint"):
        refuse_changes(saved("m:f"), saved("http://b/y"))
    assert given_in_python(saved("m:<lambda>")) == "reward.gold='m:<lambda>'"


def test_gold_rewards_are_checked_as_rewards_are() -> None:
    with pytest.raises(ConfigError, match=r"^reward\.gold: 'http://a.* is not a URL; give"):
        Config(reward={"gold": "http://a:b"})
    with pytest.raises(ConfigError, match="would be sent to a and b: use it with one server"):
        Config(reward={"functions": "http://a", "gold": "http://b", "token_env": "TOKEN"})
    with pytest.raises(ConfigError, match=r"every entry must be one of reward\.functions or reward\.gold"):
        Config(reward={"gold": "org/judge", "trust_remote_code": ["org/other"]})
    assert Config(reward={"gold": "org/judge", "trust_remote_code": ["org/judge"]}).reward.gold == ["org/judge"]
    best = {"eval_steps": 1, "metric_for_best_model": "gold/judge"}
    assert Config(**best).metric_for_best_model == Config(**Config(**best).to_dict()).metric_for_best_model


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--kl.settings.beta", "0.1"], "belongs to kl.controller=fixed (preset ppo), not to kl.controller=safe"),
        (
            ["--preset", "ppo", "--kl.settings.budget", "1"],
            "belongs to kl.controller=safe (preset safe), not to kl.controller=fixed",
        ),
        (
            ["--kl.settings.threshold", "1"],  # near threshold_on, which is another thing
            "belongs to kl.controller=asymmetric (preset asymmetric), not to kl.controller=safe",
        ),
        (["--kl.settings.bugdet", "1"], "Did you mean kl.settings.budget?"),
    ],
)
def test_a_setting_of_another_controller_is_told_whose_it_is(arguments: list[str], sentence: str) -> None:
    with pytest.raises(ConfigError) as caught:
        loading.load_config(arguments)
    assert str(caught.value).endswith(sentence)


def test_a_best_metric_by_transformers_name_is_told_its_name_here() -> None:
    gold = {"gold": ["my.module:judge", "org/model", "http://host:80/score"]}
    known = "choose one of reward, kl, entropy, distinct_2, length, gold/judge/mean, gold/model/mean, gold/host:80/mean"
    for given, said in {
        "eval_reward": f"name it reward, without eval_; {known}",
        "eval_gold/judge/mean": f"name it gold/judge/mean, without eval_; {known}",
        "eval_loss": known,
    }.items():
        with pytest.raises(ConfigError) as caught:
            Config(eval_steps=1, metric_for_best_model=given, reward=gold)  # pyright: ignore
        assert str(caught.value) == f"metric_for_best_model={given!r}: {said}"


def test_a_resume_names_the_controllers_setting_that_differs() -> None:
    def saved(**settings: Any) -> dict[str, Any]:
        return Config.from_preset("safe", kl={"settings": settings}).to_dict()

    with pytest.raises(CheckpointError, match=r"^kl\.settings\.budget_per is 'sequence' here and 'token' in the check"):
        refuse_changes(saved(budget_per="sequence"), saved())
