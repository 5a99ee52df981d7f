"""The complete settings of a run, and how presets and overrides make them.

``Config(preset="ppo")`` and ``stable-rlhf train --preset ppo`` give the same object: a section that is not given is the
preset's. ``Config.from_preset`` takes partial overrides, as the command line does.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stable_rlhf.config.algorithm import CriticConfig, KLConfig, OptimConfig
from stable_rlhf.config.checks import check_types, is_url, made, only_with, require, url_without_secrets
from stable_rlhf.config.presets import PRESETS, preset_section
from stable_rlhf.config.sections import SECTIONS, DataConfig, LogConfig, ModelConfig, RewardConfig, RolloutConfig
from stable_rlhf.control import GuardConfig


def complete_settings(config: Config, run_dir: Path) -> dict[str, Any]:
    """Every setting of a run, as config.yaml and the checkpoints hold them."""
    complete = {**config.to_dict(), "output_dir": str(run_dir)}
    complete["reward"]["url"] = None  # it is in functions
    return complete


def flat_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings as one dictionary by their full names, such as ``kl.settings.budget``, as trackers want them.

    The query of a reward server's URL is left out: it may be secret, and trackers are other people's machines.
    """
    flat: dict[str, Any] = {}
    for name, value in settings.items():
        if isinstance(value, Mapping):
            flat |= {f"{name}.{field}": inner for field, inner in flat_settings(value).items()}
        elif isinstance(value, list):
            flat[name] = [url_without_secrets(item) if is_url(item) else item for item in value]
        else:
            flat[name] = value
    return flat


EVALUATED = ("reward", "kl", "entropy", "distinct_2", "length")
"""Figures of an evaluation by which the best checkpoint can be chosen."""

_FROM_PRESET: Any = None
"""Marks a section that the caller did not give. ``Config.__post_init__`` replaces it by the preset's."""


@dataclass(frozen=True, kw_only=True)
class Config:
    """A whole run.

    A section that is not given is the preset's; a section that is given replaces the preset's.
    """

    preset: str = "safe"
    """Named set of values that settings not given come from: safe, paper, ppo, ppo-adaptive, ppo-nokl, asymmetric, or
    safe without one layer: safe-single-critic, safe-no-regulation, safe-no-gate, safe-no-threshold, safe-no-preview,
    safe-no-guard. The layers: a second critic; regulation (the KL coefficient follows the KL); the gate (low entropy
    raises the coefficient); the threshold (the KL budget follows the reward); the preview (limits how far one optimiser
    step moves the policy); the guard (rolls a failing run back)."""
    output_dir: str | None = None
    """Folder of the run; None makes a new folder under runs/, named after the preset and the time."""
    max_steps: int = 60
    """Number of training steps. A step is one rollout and the updates made with it."""
    save_steps: int = 20
    """Save a checkpoint every this many steps, and at the end; 0 saves only at the end."""
    save_total_limit: int = 2
    """Number of checkpoints to keep; the oldest are removed first. The best one (metric_for_best_model) is kept besides
    them."""
    eval_steps: int = 0
    """Evaluate on the held-out prompts every this many steps of training, and at its end; 0 evaluates only before and
    after. An evaluation changes nothing of the training."""
    metric_for_best_model: str | None = None
    """Figure of these evaluations by which the best checkpoint is chosen, and kept: reward, kl, entropy, distinct_2 or
    length. None chooses none. Only with eval_steps above 0."""
    greater_is_better: bool = True
    """Whether a greater metric_for_best_model is better; set false for kl."""
    load_best_model_at_end: bool = False
    """Whether final/ gets the policy of the best checkpoint instead of the last one's. Only with
    metric_for_best_model."""
    push_to_hub: bool = False
    """Upload final/ (policy or adapter, tokenizer, value heads, model card) to the hub at the end of training. A failed
    upload is said and loses nothing: final/ stays where it is."""
    hub_model_id: str | None = None
    """Repository of the upload, such as ``me/my-policy``; a name without ``/`` is in the account of the token. None is
    the name of the run's folder. Only with push_to_hub."""
    hub_private: bool = True
    """Whether a repository that the upload makes is private; completions of the run are in no file of it either way.
    Only with push_to_hub."""
    seed: int = 0
    """Seed of everything random: value heads, prompt order, sampling and minibatches."""
    model: ModelConfig = _FROM_PRESET
    data: DataConfig = _FROM_PRESET
    reward: RewardConfig = _FROM_PRESET
    rollout: RolloutConfig = _FROM_PRESET
    optim: OptimConfig = _FROM_PRESET
    critic: CriticConfig = _FROM_PRESET
    kl: KLConfig = _FROM_PRESET
    guard: GuardConfig = _FROM_PRESET
    log: LogConfig = _FROM_PRESET

    def __post_init__(self) -> None:
        require(self.preset in PRESETS, "preset", self.preset, f"choose one of {', '.join(PRESETS)}")
        for name, section in SECTIONS.items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, made(section, preset_section(self.preset, name, {})))
        check_types("", self)
        for name in ("max_steps", "save_total_limit"):
            require(getattr(self, name) > 0, name, getattr(self, name), "must be greater than 0")
        for name in ("save_steps", "eval_steps"):
            require(getattr(self, name) >= 0, name, getattr(self, name), "must be 0 or more")
        self._check_best()
        for name in ("hub_model_id", "hub_private"):
            only_with("", self, name, self.push_to_hub, "push_to_hub is true")
        # 2^63: the seeds of permutations and generators are signed 64-bit numbers.
        require(0 <= self.seed < 2**63, "seed", self.seed, "must be 0 or more, and below 2^63")
        minibatches = self.optim.num_mini_batches
        nearest = max(1, round(self.rollout.batch_size / minibatches)) * minibatches
        remedy = f"must be divisible by optim.num_mini_batches={minibatches}: try {nearest}"
        require(self.rollout.batch_size % minibatches == 0, "rollout.batch_size", self.rollout.batch_size, remedy)
        remedy = f"the policy would never learn in max_steps={self.max_steps}: make it smaller"
        require(self.critic.warmup_steps < self.max_steps, "critic.warmup_steps", self.critic.warmup_steps, remedy)
        remedy = "divides by the number of rewards minus 1: set rollout.batch_size to 2 or more"
        fits = self.reward.normalise != "paper" or self.rollout.batch_size > 1
        require(fits, "reward.normalise", self.reward.normalise, remedy)

    def _check_best(self) -> None:
        best = self.metric_for_best_model
        only_with("", self, "metric_for_best_model", self.eval_steps > 0, "eval_steps is above 0")
        known = best is None or best in EVALUATED
        require(known, "metric_for_best_model", best, f"choose one of {', '.join(EVALUATED)}")
        for name in ("greater_is_better", "load_best_model_at_end"):
            only_with("", self, name, best is not None, "metric_for_best_model is set")

    @classmethod
    def from_preset(cls, preset: str = "safe", **overrides: Any) -> Config:
        """The preset with overrides: top-level settings as they are, a section as a dictionary of fields to change.

        ``Config.from_preset("ppo", max_steps=10, optim={"learning_rate": 1e-4})``. Raises ConfigError on unknown names.
        """
        require(preset in PRESETS, "preset", preset, f"choose one of {', '.join(PRESETS)}")
        top = [f.name for f in dataclasses.fields(cls)]
        for name, value in overrides.items():
            require(name in top, name, value, f"unknown setting; the top level has {', '.join(top)}")
        arguments = {"preset": preset, **{k: v for k, v in overrides.items() if k not in SECTIONS}}
        for name, section in SECTIONS.items():
            given = overrides.get(name, {})
            require(isinstance(given, dict), name, given, "a section is a dictionary of the fields to change")
            known = [f.name for f in dataclasses.fields(section)]
            for field, value in given.items():
                require(field in known, f"{name}.{field}", value, f"unknown setting; {name} has {', '.join(known)}")
            arguments[name] = made(section, preset_section(preset, name, given))
        return cls(**arguments)

    def to_dict(self) -> dict[str, Any]:
        """Every setting as plain dictionaries, the controller's own included: complete, and reusable as input."""
        return dataclasses.asdict(self)
