"""The sections of a run's settings: one frozen, keyword-only dataclass each, checked when it is made."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from stable_rlhf.validation import check_types, not_negative, only_with, positive, require

_FILE_SUFFIXES = (".jsonl", ".jsonl.gz", ".json", ".csv", ".csv.gz", ".parquet")
"""Endings of prompt files: a file is one split, taken whole."""


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
    """Names of the linear layers that get an adapter; None is every one but the LM head. Only with lora_r > 0."""
    gradient_checkpointing: bool = False
    """Recompute each layer's activations in the backward pass: less memory, about a third more time."""
    cuda_graphs: bool | None = None
    """Replay forward, backward and sampling as CUDA graphs, one for each shape, instead of launching every operation:
    the same figures, without the time that launching takes. None: where the device is CUDA."""
    torch_compile: bool = False
    """Fuse the operations of each layer with torch.compile: a minute or two at the start, then less time and memory a
    step, and figures that differ by the rounding of the model's own dtype."""

    def __post_init__(self) -> None:
        check_types("model", self)
        not_negative("model", self, "lora_r")
        for name in ("gguf_file", "trust_remote_code"):
            only_with("model", self, name, self.name != "builtin", "model.name is a folder or a hub name")
        on_hub = self.name != "builtin" and not Path(self.name).is_dir()
        only_with("model", self, "revision", on_hub, "model.name is a hub name")
        for name in ("lora_alpha", "lora_target_modules"):
            value = getattr(self, name)
            remedy = "has no effect without an adapter: set model.lora_r to a rank above 0, or leave it out"
            require(value is None or self.lora_r > 0, f"model.{name}", value, remedy)
        if self.lora_alpha is not None:
            positive("model", self, "lora_alpha")
        remedy = "name at least one layer, or leave it out for every linear layer"
        require(self.lora_target_modules != [], "model.lora_target_modules", self.lora_target_modules, remedy)


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
        check_types("data", self)
        positive("data", self, "max_prompt_length")
        not_negative("data", self, "eval_size")
        if self.limit is not None:
            positive("data", self, "limit")
        whole = self.train.endswith(_FILE_SUFFIXES)
        only_with("data", self, "split", not whole, "data.train is a hub name or builtin (a file is taken whole)")
        only_with("data", self, "eval", self.eval_size > 0, "data.eval_size is above 0")
        source = self.train if self.eval is None and self.train == "builtin" else self.eval
        split = self.eval_size > 0 and source is not None and not source.endswith(_FILE_SUFFIXES)
        only_with("data", self, "eval_split", split, "held-out prompts come from a hub name or builtin")


@dataclass(frozen=True, kw_only=True)
class RewardConfig:
    """What is rewarded."""

    functions: list[str] = dataclasses.field(default_factory=lambda: ["builtin"])
    """Each is ``builtin``, ``package.module:function``, or a folder or hub name of a sequence-classification model."""
    weights: list[float] | None = None
    """One weight a function (the trainer counts: functions may come as objects); None weighs all 1."""
    missing_eos_penalty: float | None = None
    """Subtracted from the reward (scorer's units) of a completion that did not end within max_completion_length; None
    subtracts nothing."""
    normalise: Literal["none", "running", "paper"] = "running"
    """``running`` subtracts the mean of all rewards seen so far and divides by their deviation, so that rewards of any
    scale and shift train alike; ``paper`` is the published code's rule; ``none`` takes them as they are."""
    batch_size: int = 64
    """Completions a reward model scores at once; limits memory only."""
    trust_remote_code: list[str] = dataclasses.field(default_factory=list)
    """Those of ``functions`` whose own Python code may run. Empty unless you have read that code."""

    def __post_init__(self) -> None:
        check_types("reward", self)
        require(len(self.functions) > 0, "reward.functions", self.functions, "name at least one reward")
        if self.weights is not None:
            remedy = "nothing would be rewarded: give at least one weight other than 0"
            require(any(self.weights), "reward.weights", self.weights, remedy)
        if self.missing_eos_penalty is not None:
            not_negative("reward", self, "missing_eos_penalty")
        positive("reward", self, "batch_size")
        unknown = sorted(set(self.trust_remote_code) - set(self.functions))
        require(not unknown, "reward.trust_remote_code", unknown, "every entry must be one of reward.functions")


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
        check_types("rollout", self)
        positive("rollout", self, "batch_size", "max_completion_length", "temperature")


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """The policy's update (Schulman et al. 2017) and the optimiser."""

    learning_rate: float = 1e-4
    """AdamW's step size for the policy. 1e-4 holds the KL of the built-in policy, all weights trained; with 3e-4 the
    noise of the updates alone keeps it above the budget (docs/LOG.md). LoRA takes about three times as much."""
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
    microbatch_tokens: int = 8192
    """Most tokens, prompts and padding included, of one forward and backward pass: a minibatch is cut into as many
    passes as that takes (at least one row each), rows of like length together. Less memory, the same gradient."""
    epsilon: float = 0.2
    """Clip range of the probability ratio (PPO section 3)."""
    gamma: float = 1.0
    """Discount of later rewards, a token; 1 is none."""
    lam: float = 0.95
    """GAE's lambda for the advantages (Schulman et al. 2016)."""
    whiten_floor: float = 0.1
    """Least deviation that advantages are divided by, in normalised reward units: below it the batch is saturated and
    whitening would blow up noise."""
    entropy_coef: float = 0.0
    """Weight of an entropy bonus in the loss, per nat. 0: with 0.01 entropy inflates into gibberish
    (docs/deviations.md)."""
    max_grad_norm: float = 1.0
    """Gradient norm at which the policy's gradient is clipped."""
    max_preview_kl: float | None = 0.05
    """Bound on KL(before || after) of one optimiser step, nats per token, measured on a 32nd of the rollout: above
    it only a part of the step is taken (algorithm.md, layer 4). None takes every step whole, and measures nothing."""

    def __post_init__(self) -> None:
        check_types("optim", self)
        if self.max_preview_kl is not None:
            positive("optim", self, "max_preview_kl")
        positive("optim", self, "learning_rate", "num_iterations", "num_mini_batches", "microbatch_tokens")
        positive("optim", self, "epsilon", "whiten_floor", "max_grad_norm")
        not_negative("optim", self, "warmup_steps", "weight_decay", "entropy_coef")
        require(0 < self.gamma <= 1, "optim.gamma", self.gamma, "must be in (0, 1]")
        require(0 <= self.lam <= 1, "optim.lam", self.lam, "must be in [0, 1]")


@dataclass(frozen=True, kw_only=True)
class CriticConfig:
    """The value heads on the policy's last hidden state (algorithm.md, layer 1)."""

    heads: Literal[1, 2] = 2
    """2 is the pessimistic double critic; 1 is PPO's."""
    temperature: float = 0.3
    """Alpha of the soft-min of the two heads, in normalised reward units: smaller is closer to the minimum. Only with
    heads=2."""
    regress: Literal["each", "soft_min"] = "each"
    """What is fitted to the returns: each head, or only their soft-min, which leaves the heads free to drift apart.
    Only with heads=2."""
    bootstrap: Literal["online", "target", "mixed"] = "online"
    """Values on the two sides of the TD error: ``online`` heads, Polyak ``target`` heads, or ``mixed``: the target's
    V(s_{t+1}) beside the online V(s_t), which is the paper's and is biased by the target's lag."""
    target_tau: float = 0.05
    """Share of the online heads that enters the target heads after each optimiser step. With bootstrap=online the
    targets only show drift (``safe/target_gap``)."""
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
        check_types("critic", self)
        positive("critic", self, "temperature", "huber_delta", "vf_coef", "max_grad_norm")
        only_with("critic", self, "temperature", self.heads == 2, "critic.heads=2")
        only_with("critic", self, "regress", self.heads == 2, "critic.heads=2")
        only_with("critic", self, "huber_delta", self.loss == "huber", "critic.loss=huber")
        not_negative("critic", self, "warmup_steps")
        require(0 < self.target_tau <= 1, "critic.target_tau", self.target_tau, "must be in (0, 1]")
        for name in ("learning_rate", "cliprange_value"):
            if getattr(self, name) is not None:
                positive("critic", self, name)
        if self.lam is not None:
            require(0 <= self.lam <= 1, "critic.lam", self.lam, "must be in [0, 1]")


@dataclass(frozen=True, kw_only=True)
class KLConfig:
    """Which rule sets the KL coefficient each step, and where the KL acts (algorithm.md, layers 2 and 3)."""

    controller: Literal["none", "fixed", "adaptive", "asymmetric", "safe", "paper"] = "safe"
    """The rule that yields the coefficient."""
    settings: dict[str, Any] = dataclasses.field(default_factory=dict)
    """The rule's own settings, such as ``beta`` of ``fixed`` or ``budget`` of ``safe``; what is left out has the
    preset's value if the preset has the same rule, else its default. docs/algorithm.md lists them."""
    in_reward: bool = True
    """Subtract coefficient x (logp - ref) from every token's reward, so that it passes through GAE."""
    length_neutral: bool = True
    """In the reward, subtract the rollout's mean from logp - ref first. Otherwise a policy pays less by stopping early,
    while the mean per token, which a budget is on, stays. Only with in_reward."""
    in_loss: Literal["none", "k2", "exact"] = "none"
    """Add coefficient x KL to the loss: ``k2`` (half the squared log-ratio), ``exact`` (over the whole vocabulary)."""
    allow_both: bool = False
    """Take the KL in the reward and in the loss: it is then applied twice."""

    def __post_init__(self) -> None:
        check_types("kl", self)
        in_loss = self.in_loss != "none"
        both = self.in_reward and in_loss
        remedy = (
            "the KL is asked for twice, in the loss and in the reward (kl.in_reward=true): set kl.in_reward=false or "
            "kl.in_loss=none, or kl.allow_both=true if you mean it"
        )
        require(not both or self.allow_both, "kl.in_loss", self.in_loss, remedy)
        remedy = "has no effect unless the KL is in the reward and in the loss; leave it out"
        require(both or not self.allow_both, "kl.allow_both", self.allow_both, remedy)
        acts = self.in_reward or in_loss
        remedy = "its coefficient acts nowhere: set kl.in_reward=true or kl.in_loss, or kl.controller=none"
        require(acts or self.controller == "none", "kl.controller", self.controller, remedy)
        remedy = "has no effect with kl.controller=none, whose coefficient is 0: set kl.in_loss=none"
        require(not in_loss or self.controller != "none", "kl.in_loss", self.in_loss, remedy)


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
        check_types("log", self)
        not_negative("log", self, "completions_steps")


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
