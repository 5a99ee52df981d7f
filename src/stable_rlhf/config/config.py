"""The complete settings of a run, and how presets and overrides make them.

``Config(preset="ppo")`` and ``stable-rlhf train --preset ppo`` give the same object: what is not given is the preset's.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from stable_rlhf.config.algorithm import OF_GROUPS, CriticConfig, KLConfig, OptimConfig, RolloutConfig
from stable_rlhf.config.checks import Named, check_types, is_url, made, only_with, require, url_without_secrets
from stable_rlhf.config.files import over, read_settings
from stable_rlhf.config.names import fields_of, setting_types, suggestion
from stable_rlhf.config.presets import PRESETS, preset_section
from stable_rlhf.config.sections import SECTIONS, DataConfig, LogConfig, ModelConfig, RewardConfig
from stable_rlhf.control import CONTROLLERS, GuardConfig, SafeSettings, has_threshold
from stable_rlhf.errors import ConfigError
from stable_rlhf.text import without_secrets


def complete_settings(config: Config, run_dir: Path) -> dict[str, Any]:
    """Every setting of a run, as config.yaml and the checkpoints hold them."""
    complete = {**config.to_dict(), "output_dir": str(run_dir)}
    complete["reward"]["url"] = None  # it is in functions
    complete["overwrite_output_dir"] = False  # `train --config RUN/config.yaml` must not remove the run
    return complete


def flat_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings as one dictionary by their full names, such as ``kl.settings.budget``, as trackers want them.

    Secrets in a URL, such as a query, are left out: trackers and model cards are shown to other people.
    """
    flat: dict[str, Any] = {}
    for name, value in settings.items():
        if isinstance(value, Mapping):
            flat |= {f"{name}.{field}": inner for field, inner in flat_settings(value).items()}
        elif isinstance(value, list):
            flat[name] = [url_without_secrets(item) if is_url(item) else item for item in value]
        else:
            flat[name] = without_secrets(value) if isinstance(value, str) else value
    return flat


EVALUATED = ("reward", "kl", "entropy", "distinct_2", "length")
"""Figures of an evaluation by which the best checkpoint can be chosen, besides the means of gold rewards."""

_FROM_PRESET: Any = None
"""Marks a section that the caller did not give. ``Config.__post_init__`` replaces it by the preset's."""


@dataclass(frozen=True, kw_only=True)
class Config(Named):
    """A whole run.

    A section that is not given is the preset's. A section given as a dictionary, as in a YAML file, changes the fields
    that it names; a section given as an object replaces the preset's.
    """

    preset: str = "safe"
    """Named set of values that settings not given come from: safe, paper, ppo, ppo-adaptive, ppo-nokl, asymmetric,
    pid-lagrangian, kl-adaptive-lr, vapo; without a critic: grpo, dr-grpo, rloo, safe-grpo; safe with a layer that is
    off in it: safe-double-critic, safe-gate; or safe without one layer: safe-no-regulation, safe-no-threshold,
    safe-no-preview, safe-no-guard. The layers: a second critic; the gate (low entropy raises the coefficient);
    regulation (the KL coefficient follows the KL); the threshold (the KL budget follows the reward); the preview
    (limits how far one update moves the policy); the guard (rolls a failing run back)."""
    output_dir: str | None = None
    """Folder of the run; None makes a new folder under runs/, named after the preset and the time."""
    overwrite_output_dir: bool = False
    """Replace the run that output_dir holds, finished or stopped, as a notebook needs whose cell runs again. A run that
    another process trains is never replaced. config.yaml records false, so that training from it destroys nothing."""
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
    """Figure of these evaluations by which the best checkpoint is chosen, and kept: reward, kl, entropy, distinct_2,
    length, or gold/NAME, the mean of a gold reward (reward.gold). None chooses none. Only with eval_steps above 0."""
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
    One that exists keeps its visibility, and a line says where it is another. Only with push_to_hub."""
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
        known = isinstance(self.preset, str) and self.preset in PRESETS
        require(known, "preset", self.preset, f"choose one of {', '.join(PRESETS)}")
        for name in SECTIONS:
            given = getattr(self, name)
            if given is None or isinstance(given, Mapping):
                object.__setattr__(self, name, self._section(name, given or {}))
        check_types("", self)
        for name in ("max_steps", "save_total_limit"):
            require(getattr(self, name) > 0, name, getattr(self, name), "must be greater than 0")
        for name in ("save_steps", "eval_steps"):
            require(getattr(self, name) >= 0, name, getattr(self, name), "must be 0 or more")
        self._check_best()
        for name in ("hub_model_id", "hub_private"):
            only_with("", self, name, self.push_to_hub, "push_to_hub is true")
        remedy = "set output_dir to the folder whose run is to be replaced, or leave it out"
        require(self.output_dir is not None or not self.overwrite_output_dir, "overwrite_output_dir", True, remedy)
        # 2^63: the seeds of permutations and generators are signed 64-bit numbers.
        require(0 <= self.seed < 2**63, "seed", self.seed, "must be 0 or more, and below 2^63")
        minibatches = self.optim.num_mini_batches
        both = math.lcm(minibatches, self.rollout.num_generations)
        nearest = max(1, round(self.rollout.batch_size / both)) * both
        remedy = f"must be divisible by optim.num_mini_batches={minibatches}: try {nearest}"
        require(self.rollout.batch_size % minibatches == 0, "rollout.batch_size", self.rollout.batch_size, remedy)
        remedy = f"the policy would never learn in max_steps={self.max_steps}: make it smaller"
        require(self.critic.warmup_steps < self.max_steps, "critic.warmup_steps", self.critic.warmup_steps, remedy)
        bounded = not self.optim.preview or self.optim.max_update_kl is not None or self.kl.controller == "safe"
        remedy = (
            f"has no bound on an update with kl.controller={self.kl.controller}: set optim.max_update_kl, or "
            "optim.preview=false"
        )
        require(bounded, "optim.preview", True, remedy)
        self._check_advantage()
        self._check_update_share()
        self._check_ceiling()
        remedy = "divides by the number of rewards minus 1: set rollout.batch_size to 2 or more"
        fits = self.reward.normalise != "paper" or self.rollout.batch_size > 1
        require(fits, "reward.normalise", self.reward.normalise, remedy)

    def _check_advantage(self) -> None:
        """Advantages need a critic or must have none, and those of a group need a group."""
        advantage, heads, group = self.optim.advantage, self.critic.heads, self.rollout.num_generations
        remedy = "needs a critic, and critic.heads=0 is none: set critic.heads=1, or optim.advantage to "
        remedy += "rloo, grpo, dr_grpo or reinforce_pp"
        require(advantage != "gae" or heads > 0, "optim.advantage", advantage, remedy)
        remedy = f"has no critic, and critic.heads={heads} would train one for nothing: set critic.heads=0, or "
        require(advantage == "gae" or heads == 0, "optim.advantage", advantage, f"{remedy}optim.advantage=gae")
        remedy = f"optim.advantage={advantage} compares the completions of a prompt: give 2 or more"
        require(group > 1 or advantage not in OF_GROUPS, "rollout.num_generations", group, remedy)
        remedy = (
            "divides by the group's deviation, so a KL in the reward would have no price: set kl.in_reward=false and "
        )
        remedy += "kl.in_loss=k2, as preset safe-grpo does"
        priced = self.kl.in_reward
        require(advantage != "grpo" or not priced, "optim.advantage", advantage, remedy)
        remedy = (
            "would leave out the KL of these groups, which is in the reward: set kl.in_reward=false and kl.in_loss=k2"
        )
        skips = self.optim.skip_zero_variance_groups
        require(not (skips and priced), "optim.skip_zero_variance_groups", skips, remedy)
        condition = "rollout.num_generations is 2 or more"
        only_with("optim", self.optim, "skip_zero_variance_groups", group > 1, condition)
        remedy = "is of a critic, and critic.heads=0 is none: leave it out"
        ruled = self.guard.min_explained_variance
        require(ruled is None or heads > 0, "guard.min_explained_variance", ruled, remedy)

    def _check_update_share(self) -> None:
        """The controller's bound on an update acts only where a preview enforces it, and no number takes its place."""
        if not isinstance(self.kl.settings, SafeSettings):
            return
        acts = self.optim.preview and self.optim.max_update_kl is None
        condition = "optim.preview is true and optim.max_update_kl is None"
        only_with("kl.settings", self.kl.settings, "update_share", acts, condition)

    def _check_ceiling(self) -> None:
        """The guard has one ceiling of the KL: a multiple of the controller's threshold or, without one, a number."""
        followed = has_threshold(self.kl.controller)
        acts, other = ("max_kl_ratio", "max_kl") if followed else ("max_kl", "max_kl_ratio")
        what = "a threshold" if followed else "no threshold"
        default = getattr(GuardConfig, other)
        remedy = (
            f"has no effect, since kl.controller={self.kl.controller} has {what}; set guard.{acts}, or leave it out"
        )
        value = getattr(self.guard, other)
        require(value in (default, None), f"guard.{other}", value, remedy)
        if self.guard.enabled:  # config.yaml shows the one that acts
            object.__setattr__(self, "guard", dataclasses.replace(self.guard, **{other: None}))

    def _check_best(self) -> None:
        best = self.metric_for_best_model
        remedy = "is chosen by evaluations in training, and there are none: set eval_steps above 0, or leave it out"
        require(best is None or self.eval_steps > 0, "metric_for_best_model", best, remedy)
        if best is not None and best.startswith("gold/"):  # the trainer knows which there are
            object.__setattr__(self, "metric_for_best_model", f"{best.removesuffix('/mean')}/mean")
        else:
            named = [urlsplit(name).netloc or Path(name.rpartition(":")[2]).name for name in self.reward.gold]
            self.check_best(named)
        for name in ("greater_is_better", "load_best_model_at_end"):
            only_with("", self, name, best is not None, "metric_for_best_model is set")
        remedy = "the policy farthest from the reference would be kept as the best: set greater_is_better=false"
        require(best != "kl" or not self.greater_is_better, "metric_for_best_model", best, remedy)

    def check_best(self, gold: Iterable[str]) -> None:
        """Refuses a metric_for_best_model that no evaluation has. ``gold``: the names of the gold rewards."""
        known = [*EVALUATED, *(f"gold/{name}/mean" for name in gold)]
        best = self.metric_for_best_model
        remedy = f"choose one of {', '.join(known)}"
        meant = (best or "").removeprefix("eval_")
        if meant != best and (meant in known or meant.startswith("gold/")):
            remedy = f"name it {meant}, without eval_; {remedy}"
        require(best is None or best in known, "metric_for_best_model", best, remedy)

    @classmethod
    def from_preset(cls, preset: str = "safe", **overrides: Any) -> Config:
        """The preset with overrides: the same as ``Config(preset=preset, **overrides)``.

        ``Config.from_preset("ppo", max_steps=10, optim={"learning_rate": 1e-4})``. Raises ConfigError.
        """
        return cls(preset=preset, **overrides)

    @classmethod
    def from_yaml(cls, file: str | Path, **overrides: Any) -> Config:
        """The settings of a YAML file, or of a recipe (``recipe:smollm2-sentiment``), with overrides.

        A section in ``overrides`` is a dictionary of the fields to change; they replace the file's fields. Raises
        ConfigError, which names the file, for a file that cannot be read and for wrong settings in it.
        """
        content = over({str(name): value for name, value in read_settings(file).items()}, overrides)
        try:
            return cls(**content)
        except ConfigError as error:
            raise ConfigError(f"{file}: {error}") from error

    @classmethod
    def _suggestion(cls, name: str, given: Mapping[str, Any]) -> str:
        return _similar(cls, name, given, also=[field.name for field in dataclasses.fields(cls)])

    def _section(self, name: str, given: Mapping[str, Any]) -> Any:
        """A section of the preset with the fields of a dictionary changed."""
        section = SECTIONS[name]
        for field, value in given.items():
            known = [f.name for f in dataclasses.fields(section)]
            if field not in known:
                close = _similar(type(self), f"{name}.{field}", {"preset": self.preset, name: given}, also=())
                raise ConfigError(f"{name}.{field}={value!r}: unknown setting{close}")
        return made(section, preset_section(self.preset, name, dict(given)))

    def to_dict(self) -> dict[str, Any]:
        """Every setting as plain dictionaries, the controller's own included: complete, and reusable as input."""
        return dataclasses.asdict(self)


def _similar(top: type, name: str, given: Mapping[str, Any], also: Iterable[str]) -> str:
    """The setting that an unknown name probably means, or the names that there are."""
    kl = given.get("kl")
    controller = kl.get("controller") if isinstance(kl, Mapping) else None
    if controller not in CONTROLLERS:
        preset = given.get("preset")
        controller = PRESETS.get(preset if isinstance(preset, str) else "", {}).get("kl", {}).get("controller", "safe")
    section = name.rpartition(".")[0]
    has = fields_of(section, controller) if section else also
    listed = f"; {section or 'the top level'} has {', '.join(has)}"
    return suggestion(name, [*also, *setting_types(top, controller)], controller, listed)
