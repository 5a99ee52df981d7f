"""The presets: the settings in which each differs from the defaults, which are ``safe``."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping
from typing import Any

from stable_rlhf.control import CONTROLLERS, settings_class

_PPO: dict[str, Any] = {
    "critic": {
        "heads": 1,
        "loss": "mse",
        "cliprange_value": 0.2,
        "clip_reduction": "max",
        "bootstrap": "online",
        "zero_init": False,
        "learning_rate": None,
    },
    "reward": {"normalise": "none"},
    "optim": {"whiten_floor": 1e-4, "skip_equal_scores": False, "preview": False},
    "guard": {"enabled": False},
}
"""PPO as Ouyang et al. (2022) and TRL had it: one value head, squared error, clipped by the maximum, rewards as they
come, advantages whitened whatever their size (1e-4 is TRL's 1e-8 under the root), every optimiser step taken whole."""

_FIXED: dict[str, Any] = {
    "controller": "fixed",
    "settings": {"beta": 0.05},
    "length_neutral": False,
    "observe": "k1",
}

_GROUPS: dict[str, Any] = {
    "critic": {"heads": 0},
    "reward": {"normalise": "none"},
    "optim": {"num_iterations": 1, "num_mini_batches": 1, "preview": False},
    "guard": {"enabled": False},
}
"""No critic and one optimiser step a rollout, as the defaults of TRL 1.16 have it in GRPO and in RLOO: num_iterations 1
and steps_per_generation as gradient_accumulation_steps. TRL's learning rate, 1e-6, is for models of billions of
weights; ours stays at 1e-4, so that the presets differ by their method."""

# GRPO's defaults in TRL 1.16: num_generations 8, loss_type dapo (a mean over tokens), scale_rewards group, beta 0,
# epsilon 0.2. At a beta above 0 TRL's KL in the loss, k3 times the ratio, has at a ratio of 1 the gradient of k2.
_NO_PRICE: dict[str, Any] = {
    "controller": "fixed",
    "settings": {"beta": 0.0},
    "in_reward": False,
    "in_loss": "k2",
    "observe": "k1",
}

PRESETS: dict[str, dict[str, Any]] = {
    "safe": {},
    "paper": {
        "critic": {
            "heads": 2,
            "bootstrap": "mixed",
            "regress": "soft_min",
            "loss": "huber",
            "cliprange_value": 0.2,
            "zero_init": False,
            "learning_rate": None,
        },
        "reward": {"normalise": "paper"},
        "kl": {"controller": "paper", "in_reward": False, "in_loss": "k2", "observe": "k1"},
        # the published code never calls its preview
        "optim": {"entropy_coef": 0.01, "skip_equal_scores": False, "preview": False},
        "guard": {"enabled": False},
    },
    # Ziegler et al. (2019) subtract the sum of the log-ratios, so length pays.
    "ppo": {**_PPO, "kl": _FIXED},
    "ppo-adaptive": {**_PPO, "kl": {"controller": "adaptive", "length_neutral": False, "observe": "k1"}},
    "ppo-nokl": {**_PPO, "kl": {"controller": "none", "in_reward": False, "observe": "k1"}},
    "asymmetric": {**_PPO, "kl": {"controller": "asymmetric", "in_reward": False, "in_loss": "k2", "observe": "k1"}},
    "pid-lagrangian": {**_PPO, "kl": {"controller": "pid-lagrangian", "length_neutral": False, "observe": "k1"}},
    "kl-adaptive-lr": {**_PPO, "kl": _FIXED, "optim": {**_PPO["optim"], "adaptive_kl": 0.01}},  # rsl_rl's target
    # Yue et al. (2025). They pre-train the critic until it explains the returns, in 50 steps of 8,192 completions; ours
    # has the rate at which it does so in 20 of 64.
    "vapo": {
        **_PPO,
        "critic": {**_PPO["critic"], "lam": 1.0, "warmup_steps": 20, "learning_rate": 1e-3},
        "kl": _FIXED,
        "optim": {**_PPO["optim"], "length_alpha": 0.05, "epsilon_high": 0.28},
    },
    "grpo": {
        **_GROUPS,
        "rollout": {"num_generations": 8},
        "kl": _NO_PRICE,
        "optim": {**_GROUPS["optim"], "advantage": "grpo"},
    },
    # Liu et al. (2025), in TRL scale_rewards none and loss_type dr_grpo: no division by a deviation or by a length.
    "dr-grpo": {
        **_GROUPS,
        "rollout": {"num_generations": 8},
        "kl": _NO_PRICE,
        "optim": {**_GROUPS["optim"], "advantage": "dr_grpo", "denominator": "length"},
    },
    # RLOO's defaults in TRL 1.16: num_generations 2, beta 0.05 in the reward, one ratio a completion, epsilon 0.2,
    # normalize_advantages off.
    "rloo": {
        **_GROUPS,
        "rollout": {"num_generations": 2},
        "kl": _FIXED,
        "optim": {**_GROUPS["optim"], "advantage": "rloo", "importance": "product", "denominator": "sequence"},
    },
    # GRPO's advantages under SAFE: the KL in the loss, where GRPO has it. In the reward a group's deviation would
    # divide the coefficient too.
    "safe-grpo": {
        "critic": {"heads": 0},
        "rollout": {"num_generations": 8},
        "optim": {"advantage": "grpo"},
        "kl": {"in_reward": False, "in_loss": "k2"},
    },
    # Layers of the paper that showed nothing on our benches (docs/results.md): each puts one into `safe`.
    "safe-double-critic": {"critic": {"heads": 2}},
    "safe-gate": {"kl": {"settings": {"gate_on": True}}},
    # Ablations: each takes one layer out of `safe`. Nothing holds the KL in the first: a ceiling would take its place.
    # The trust region stays, at what the default budget gives.
    "safe-no-regulation": {
        "kl": {"controller": "none", "in_reward": False},
        "guard": {"max_kl": None},
        "optim": {"max_update_kl": 0.006},
    },
    "safe-no-threshold": {"kl": {"settings": {"threshold_on": False}}},
    "safe-no-preview": {"optim": {"preview": False}},
    "safe-no-guard": {"guard": {"enabled": False}},
}
"""Preset -> section -> field -> value. ``kl.settings`` holds only changes from the controller's defaults."""


_OF_ADVANTAGE = ("lam", "length_alpha", "gamma", "whiten_floor", "skip_equal_scores", "skip_zero_variance_groups")
"""Settings of ``optim`` that act only with some advantages: another one than the preset's leaves them at defaults."""


def owners(field: str) -> list[str]:
    """The controllers that have a setting, each with the first preset that chooses it."""
    found: list[str] = []
    for name in CONTROLLERS:
        if field in (known.name for known in dataclasses.fields(settings_class(name))):
            presets = [one for one in PRESETS if PRESETS[one].get("kl", {}).get("controller", "safe") == name]
            found.append(f"kl.controller={name}" + (f" (preset {presets[0]})" if presets else ""))
    return found


def not_of_controller(field: str, controller: str) -> str:
    """The end of a sentence on a setting that a controller does not have: those that have it, else what there is."""
    if others := owners(field):
        return f"; it belongs to {' and to '.join(others)}, not to kl.controller={controller}"
    fields = [known.name for known in dataclasses.fields(settings_class(controller))]
    return f"; kl.controller={controller} has {', '.join(fields) or 'no settings'}"


def preset_section(preset: str, name: str, given: dict[str, Any]) -> dict[str, Any]:
    """The fields of a section that the preset or the caller sets. The caller's values win.

    The preset's kl.settings apply only if the caller keeps the preset's controller.
    """
    base = copy.deepcopy(PRESETS[preset].get(name, {}))
    if name == "optim" and given.get("advantage", base.get("advantage", "gae")) != base.get("advantage", "gae"):
        base = {field: value for field, value in base.items() if field not in _OF_ADVANTAGE}
    merged = {**base, **copy.deepcopy(given)}
    if name == "kl":
        own = base.get("controller", "safe")  # the default of kl.controller
        kept = base.get("settings", {}) if merged.get("controller", own) == own else {}
        changes = given.get("settings")
        if changes is None or isinstance(changes, Mapping):
            merged["settings"] = {**kept, **(changes or {})}
    without = {"guard": ("enabled", False), "critic": ("heads", 0)}  # what the preset sets of it has no effect then
    if name in without and given.get(without[name][0]) == without[name][1]:
        return dict(given)
    return merged
