"""Every setting of a run: frozen, keyword-only dataclasses, checked before any model loads.

``Config(preset="ppo")`` and ``stable-rlhf train --preset ppo`` give the same object: a section that is not given is the
preset's. ``Config.from_preset`` takes partial overrides, as the command line does.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, Literal

_FROM_PRESET: Any = None
"""Marks a section that the caller did not give: ``Config.__post_init__`` puts the preset's there."""


class ConfigError(ValueError):
    """A setting is unknown, of the wrong type, out of range, or in conflict with another."""


def _require(ok: bool, setting: str, value: object, remedy: str) -> None:
    if not ok:
        raise ConfigError(f"{setting}={value!r}: {remedy}")


def _positive(section: str, config: object, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        _require(value > 0 and math.isfinite(value), f"{section}.{name}", value, "must be greater than 0")


def _not_negative(section: str, config: object, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        _require(value >= 0 and math.isfinite(value), f"{section}.{name}", value, "must be 0 or more")


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The policy that is trained, and how it is held in memory."""

    name: str = "builtin"
    """Policy: ``builtin`` (the small model that ships with the package), a folder, or a hub name."""
    revision: str | None = None
    """Commit, tag or branch on the hub; None is its default branch."""
    gguf_file: str | None = None
    """Name of a GGUF file inside ``name``; its weights are dequantised on loading."""
    trust_remote_code: bool = False
    """Run Python code that comes with this model. Off unless you have read that code."""
    device: str = "auto"
    """``auto`` (the first CUDA device, else the CPU), or a torch device such as ``cpu`` or ``cuda:1``."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Arithmetic of the transformer: ``auto`` is bfloat16 on CUDA and float32 on the CPU. Value heads, log-probs and
    trained weights are float32 always."""
    lora_r: int = 0
    """Rank of the LoRA adapter; 0 trains every weight. With LoRA the reference is the same weights, adapter off."""
    lora_alpha: float | None = None
    """LoRA scale; None is twice the rank (the usual choice). Only with lora_r > 0."""
    lora_target_modules: list[str] | None = None
    """Names of the linear layers that get an adapter; None is every linear layer but the LM head. Only with lora_r > 0."""
    gradient_checkpointing: bool = False
    """Recompute each layer's activations in the backward pass: less memory, about a third more time."""

    def __post_init__(self) -> None:
        _not_negative("model", self, "lora_r")
        for name in ("lora_alpha", "lora_target_modules"):
            value = getattr(self, name)
            remedy = "has no effect without an adapter: set model.lora_r to a rank above 0, or leave it out"
            _require(value is None or self.lora_r > 0, f"model.{name}", value, remedy)
        if self.lora_alpha is not None:
            _positive("model", self, "lora_alpha")


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Where prompts come from."""

    train: str = "builtin"
    """``builtin``, a .jsonl, .json, .csv or .parquet file (.gz too), or a hub name."""
    split: str = "train"
    """Split of a hub data set or of the built-in prompts to train on."""
    format: Literal["auto", "prompt", "hh"] = "auto"
    """``prompt``: a ``prompt`` column, text or chat messages. ``hh``: Anthropic's HH-RLHF dialogues (``chosen``), whose
    prompt is the dialogue up to the last assistant turn. ``auto`` looks at the columns."""
    eval: str | None = None
    """Held-out prompts, as ``train``; None holds out ``eval_size`` rows of the training set (the built-in prompts have
    their own)."""
    eval_split: str = "test"
    """Split of ``eval`` to read."""
    eval_size: int = 128
    """Number of held-out prompts that are measured before and after training; 0 measures nothing."""
    max_prompt_length: int = 512
    """Tokens kept of a prompt; what is longer is cut on the left and counted (``prompts/truncated``)."""
    limit: int | None = None
    """Read only the first ``limit`` rows of the training set; None reads all."""

    def __post_init__(self) -> None:
        _positive("data", self, "max_prompt_length")
        _not_negative("data", self, "eval_size")
        if self.limit is not None:
            _positive("data", self, "limit")


@dataclass(frozen=True, kw_only=True)
class RewardConfig:
    """What is rewarded."""

    functions: list[str] = dataclasses.field(default_factory=lambda: ["builtin"])
    """Each is ``builtin``, ``package.module:function``, or a folder or hub name of a sequence-classification model."""
    weights: list[float] | None = None
    """One weight a function; None weighs all 1."""
    missing_eos_penalty: float | None = None
    """Subtracted from the reward (scorer's units) of a completion that did not end within max_completion_length."""
    normalise: Literal["none", "running", "paper"] = "running"
    """``running`` divides by the running standard deviation, after subtracting the running mean, of all rewards seen, so
    that rewards of any scale and shift train alike; ``paper`` is the published code's rule; ``none`` takes them as they are."""
    batch_size: int = 64
    """Completions a reward model scores at once; limits memory only."""
    trust_remote_code: list[str] = dataclasses.field(default_factory=list)
    """Those of ``functions`` whose own Python code may run. Empty unless you have read that code."""

    def __post_init__(self) -> None:
        _require(len(self.functions) > 0, "reward.functions", self.functions, "name at least one reward")
        if self.weights is not None:
            remedy = f"give one weight for each of the {len(self.functions)} reward.functions"
            _require(len(self.weights) == len(self.functions), "reward.weights", self.weights, remedy)
        _positive("reward", self, "batch_size")
        unknown = sorted(set(self.trust_remote_code) - set(self.functions))
        _require(not unknown, "reward.trust_remote_code", unknown, "every entry must be one of reward.functions")


@dataclass(frozen=True, kw_only=True)
class RolloutConfig:
    """How completions are sampled. A step is one rollout."""

    batch_size: int = 64
    """Prompts, and so completions, a step, over all devices."""
    max_completion_length: int = 32
    """Tokens sampled at most for a prompt."""
    temperature: float = 1.0
    """Sampling temperature. Log-probs, ratios, entropy and KL are of the distribution at this temperature."""

    def __post_init__(self) -> None:
        _positive("rollout", self, "batch_size", "max_completion_length", "temperature")


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """The policy's update (Schulman et al. 2017) and the optimiser."""

    learning_rate: float = 3e-4
    """AdamW's step size for the policy."""
    lr_scheduler_type: Literal["constant", "linear", "cosine"] = "constant"
    """Course of both learning rates over max_steps, after warm-up."""
    warmup_steps: int = 0
    """Steps (rollouts) over which both learning rates rise from 0."""
    weight_decay: float = 0.0
    """AdamW's decoupled weight decay of the policy."""
    num_iterations: int = 2
    """Passes over each rollout (PPO epochs)."""
    num_mini_batches: int = 2
    """Optimiser steps a pass."""
    gradient_accumulation_steps: int = 1
    """Forward and backward passes an optimiser step: more of them, less memory, the same gradient."""
    epsilon: float = 0.2
    """Clip range of the probability ratio (PPO section 3)."""
    gamma: float = 1.0
    """Discount a token."""
    lam: float = 0.95
    """GAE's lambda for the advantages (Schulman et al. 2016)."""
    whiten_floor: float = 0.1
    """Least deviation that advantages are divided by, in normalised reward units: below it the batch is saturated and
    whitening would blow up noise."""
    entropy_coef: float = 0.0
    """Coefficient of an entropy bonus in the loss. 0: with 0.01 entropy inflates into gibberish (docs/deviations.md)."""
    max_grad_norm: float = 1.0
    """Gradient norm at which the policy's gradient is clipped."""

    def __post_init__(self) -> None:
        _positive("optim", self, "learning_rate", "num_iterations", "num_mini_batches", "gradient_accumulation_steps")
        _positive("optim", self, "epsilon", "whiten_floor", "max_grad_norm")
        _not_negative("optim", self, "warmup_steps", "weight_decay", "entropy_coef")
        _require(0 < self.gamma <= 1, "optim.gamma", self.gamma, "must be in (0, 1]")
        _require(0 <= self.lam <= 1, "optim.lam", self.lam, "must be in [0, 1]")


@dataclass(frozen=True, kw_only=True)
class CriticConfig:
    """The value heads on the policy's last hidden state (algorithm.md, layer 1)."""

    heads: Literal[1, 2] = 2
    """2 is the pessimistic double critic; 1 is PPO's."""
    temperature: float = 0.3
    """Alpha of the soft-min of the two heads, in normalised reward units: smaller is closer to the minimum."""
    regress: Literal["each", "soft_min"] = "each"
    """What is fitted to the returns: each head, or only their soft-min, which leaves the heads free to drift apart."""
    bootstrap: Literal["online", "target", "mixed"] = "online"
    """Values on the two sides of the TD error: ``online`` heads, Polyak ``target`` heads, or ``mixed``: the target's
    V(s_{t+1}) beside the online V(s_t), which is the paper's and is biased by the target's lag."""
    target_tau: float = 0.05
    """Share of the online heads that enters the target heads after each optimiser step. With bootstrap=online the targets
    only show drift (``safe/target_gap``)."""
    loss: Literal["huber", "mse"] = "huber"
    """Regression loss of the values."""
    huber_delta: float = 0.5
    """Error, in normalised reward units, above which the Huber loss is linear. Only with loss=huber."""
    cliprange_value: float | None = 0.2
    """Values are also clipped to this distance from their value at sampling time; None does not clip."""
    clip_reduction: Literal["mean", "max"] = "mean"
    """How the loss of V and of the clipped V combine: the published code's mean, or PPO's max."""
    vf_coef: float = 1.0
    """Weight of the value loss beside the policy's."""
    backbone_gradient: bool = False
    """Let the value loss train the transformer too, not only the heads."""
    learning_rate: float | None = None
    """AdamW's step size for the heads; None is the policy's (the paper's "synchronised")."""
    max_grad_norm: float = 0.5
    """Gradient norm at which the heads' gradient is clipped."""
    lam: float | None = None
    """GAE's lambda for the critic's returns; None is optim.lam."""
    warmup_steps: int = 0
    """First steps in which only the critic learns."""

    def __post_init__(self) -> None:
        _positive("critic", self, "temperature", "huber_delta", "vf_coef", "max_grad_norm")
        _not_negative("critic", self, "warmup_steps")
        _require(0 < self.target_tau <= 1, "critic.target_tau", self.target_tau, "must be in (0, 1]")
        for name in ("learning_rate", "cliprange_value"):
            if getattr(self, name) is not None:
                _positive("critic", self, name)
        if self.lam is not None:
            _require(0 <= self.lam <= 1, "critic.lam", self.lam, "must be in [0, 1]")


@dataclass(frozen=True, kw_only=True)
class KLConfig:
    """Which rule sets the KL coefficient each step, and where the KL acts (algorithm.md, layers 2 and 3)."""

    controller: Literal["none", "fixed", "adaptive", "asymmetric", "safe", "paper"] = "safe"
    """The rule that yields the coefficient."""
    settings: dict[str, Any] = dataclasses.field(default_factory=dict)
    """The rule's own settings, such as ``beta`` of ``fixed`` or ``budget`` of ``safe``; what is left out has its default.
    docs/algorithm.md lists them."""
    in_reward: bool = True
    """Subtract coefficient x (logp - ref) from every token's reward, so that it passes through GAE."""
    in_loss: Literal["none", "k2", "exact"] = "none"
    """Add coefficient x KL to the loss: ``k2`` (half the squared log-ratio) or ``exact`` (over the whole vocabulary)."""
    allow_both: bool = False
    """Take the KL in the reward and in the loss: it is then applied twice."""

    def __post_init__(self) -> None:
        in_loss = self.in_loss != "none"
        both = self.in_reward and in_loss
        remedy = (
            "the KL is asked for twice, in the loss and in the reward (kl.in_reward=true): set kl.in_reward=false or "
            "kl.in_loss=none, or kl.allow_both=true if you mean it"
        )
        _require(not both or self.allow_both, "kl.in_loss", self.in_loss, remedy)
        remedy = "has no effect unless the KL is in the reward and in the loss; leave it out"
        _require(both or not self.allow_both, "kl.allow_both", self.allow_both, remedy)
        acts = self.in_reward or in_loss
        remedy = "its coefficient acts nowhere: set kl.in_reward=true or kl.in_loss, or kl.controller=none"
        _require(acts or self.controller == "none", "kl.controller", self.controller, remedy)


@dataclass(frozen=True, kw_only=True)
class LogConfig:
    """What is recorded besides metrics.jsonl."""

    report_to: list[str] = dataclasses.field(default_factory=list)
    """Trackers, by Transformers' names, such as ``tensorboard`` or ``wandb``."""
    completions_steps: int = 10
    """Write a step's prompts and completions to completions/ every this many steps; 0 never."""
    progress: bool = True
    """Show the progress bar and the closing tables on the console."""

    def __post_init__(self) -> None:
        _not_negative("log", self, "completions_steps")


SECTIONS: dict[str, type] = {
    "model": ModelConfig,
    "data": DataConfig,
    "reward": RewardConfig,
    "rollout": RolloutConfig,
    "optim": OptimConfig,
    "critic": CriticConfig,
    "kl": KLConfig,
    "log": LogConfig,
}

_PPO: dict[str, Any] = {
    "critic": {"heads": 1, "loss": "mse", "clip_reduction": "max", "bootstrap": "online"},
    "reward": {"normalise": "none"},
}
"""PPO as Ouyang et al. (2022) and TRL had it: one value head, squared error, clipped by the maximum, rewards as they come."""

PRESETS: dict[str, dict[str, Any]] = {
    "safe": {},
    "paper": {
        "critic": {"bootstrap": "mixed", "regress": "soft_min"},
        "reward": {"normalise": "paper"},
        "kl": {"controller": "paper", "in_reward": False, "in_loss": "k2"},
        "optim": {"entropy_coef": 0.01},
    },
    "ppo": {**_PPO, "kl": {"controller": "fixed", "settings": {"beta": 0.05}}},
    "ppo-adaptive": {**_PPO, "kl": {"controller": "adaptive"}},
    "ppo-nokl": {**_PPO, "kl": {"controller": "none", "in_reward": False}},
    "asymmetric": {**_PPO, "kl": {"controller": "asymmetric", "in_reward": False, "in_loss": "k2"}},
    # Ablations: each takes one layer out of `safe`.
    "safe-single-critic": {"critic": {"heads": 1}},
    "safe-no-regulation": {"kl": {"controller": "none", "in_reward": False}},
    "safe-no-gate": {"kl": {"settings": {"gate_on": False}}},
    "safe-no-threshold": {"kl": {"settings": {"threshold_on": False}}},
}
"""What each preset changes in the defaults, which are ``safe``."""


@dataclass(frozen=True, kw_only=True)
class Config:
    """A whole run. A section left out is the preset's; a section given replaces the preset's."""

    preset: str = "safe"
    """Where the settings that are not given come from: one of ``PRESETS``."""
    output_dir: str | None = None
    """Run folder; None makes one under runs/, named after the preset and the time."""
    max_steps: int = 60
    """Rollouts to train on."""
    save_steps: int = 20
    """Save a checkpoint every this many steps, and at the end; 0 saves only at the end."""
    save_total_limit: int = 2
    """Checkpoints kept; the oldest go first."""
    seed: int = 0
    """Seed of everything random: value heads, prompt order, sampling, minibatches."""
    model: ModelConfig = _FROM_PRESET
    data: DataConfig = _FROM_PRESET
    reward: RewardConfig = _FROM_PRESET
    rollout: RolloutConfig = _FROM_PRESET
    optim: OptimConfig = _FROM_PRESET
    critic: CriticConfig = _FROM_PRESET
    kl: KLConfig = _FROM_PRESET
    log: LogConfig = _FROM_PRESET

    def __post_init__(self) -> None:
        _require(self.preset in PRESETS, "preset", self.preset, f"choose one of {', '.join(PRESETS)}")
        for name, section in SECTIONS.items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, section(**PRESETS[self.preset].get(name, {})))
        for name in ("max_steps", "save_total_limit"):
            _require(getattr(self, name) > 0, name, getattr(self, name), "must be greater than 0")
        for name in ("save_steps", "seed"):
            _require(getattr(self, name) >= 0, name, getattr(self, name), "must be 0 or more")
        self._check_divisible()
        both = self.critic.warmup_steps < self.max_steps
        remedy = f"the policy would never learn in max_steps={self.max_steps}: make it smaller"
        _require(both, "critic.warmup_steps", self.critic.warmup_steps, remedy)

    def _check_divisible(self) -> None:
        pieces = self.optim.num_mini_batches * self.optim.gradient_accumulation_steps
        remedy = (
            f"must divide by optim.num_mini_batches x optim.gradient_accumulation_steps = {pieces}: "
            f"try {max(1, round(self.rollout.batch_size / pieces)) * pieces}"
        )
        _require(self.rollout.batch_size % pieces == 0, "rollout.batch_size", self.rollout.batch_size, remedy)

    @classmethod
    def from_preset(cls, preset: str = "safe", **overrides: Any) -> Config:
        """The preset with overrides: top-level settings as they are, a section as a dictionary of the fields to change.

        ``Config.from_preset("ppo", max_steps=10, optim={"learning_rate": 1e-4})``. Raises ConfigError on an unknown name.
        """
        _require(preset in PRESETS, "preset", preset, f"choose one of {', '.join(PRESETS)}")
        top = {f.name for f in dataclasses.fields(cls)}
        for name, value in overrides.items():
            _require(name in top, name, value, f"unknown setting; the top level has {', '.join(sorted(top))}")
        arguments = {"preset": preset, **{k: v for k, v in overrides.items() if k not in SECTIONS}}
        for name, section in SECTIONS.items():
            given = overrides.get(name, {})
            known = [f.name for f in dataclasses.fields(section)]
            for field, value in given.items():
                _require(field in known, f"{name}.{field}", value, f"unknown setting; {name} has {', '.join(known)}")
            arguments[name] = section(**{**PRESETS[preset].get(name, {}), **given})
        return cls(**arguments)

    def to_dict(self) -> dict[str, Any]:
        """Every setting as plain dictionaries, complete and reusable as input."""
        return dataclasses.asdict(self)
