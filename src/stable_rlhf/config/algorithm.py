"""The sections of a run's settings that say how it learns: optimiser, critic and KL."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from stable_rlhf.config.checks import check_types, not_negative, only_with, positive, require
from stable_rlhf.control import CONTROLLERS, ControllerSettings, settings_class
from stable_rlhf.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """The policy's update (Schulman et al. 2017) and the optimiser."""

    learning_rate: float = 1e-4
    """AdamW's step size for the policy. 1e-4 holds the KL of the built-in policy, all weights trained; with 3e-4 and
    no preview the noise of the updates keeps it above the budget (docs/LOG.md). LoRA takes about three times as
    much."""
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
    max_preview_kl: float | None = 0.005
    """Bound on KL(before || after) of one optimiser step, nats per token, measured on a 32nd of the rollout: above it
    only a part of the step is taken (algorithm.md, The preview). None takes every step whole, and measures nothing.
    0.005 is about twice the median step at the default learning rate, so that a third of them is scaled; with it 1 to
    30 times that rate end at one reward, with 0.02 (and 0.01 at 10 times) they do not (docs/LOG.md)."""

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
    """The value heads on the policy's last hidden state (algorithm.md, Critic)."""

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


_DEFAULTS: Any = None
"""Marks settings that the caller did not give: ``KLConfig.__post_init__`` puts the controller's defaults there."""


@dataclass(frozen=True, kw_only=True)
class KLConfig:
    """Which rule sets the KL coefficient each step, and where the KL acts (algorithm.md, Controllers)."""

    controller: Literal["none", "fixed", "adaptive", "asymmetric", "safe", "paper"] = "safe"
    """The rule that yields the coefficient."""
    settings: ControllerSettings = _DEFAULTS
    """The rule's own settings, such as ``beta`` of ``fixed`` or ``budget`` of ``safe``; what is left out has the
    preset's value if the preset has the same rule, else its default. docs/algorithm.md lists them. A mapping of them is
    made the rule's own class."""
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
        if self.controller in CONTROLLERS:
            object.__setattr__(self, "settings", _settings_of(self.controller, self.settings))
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


def _settings_of(controller: str, given: Any) -> ControllerSettings:
    """The settings of a controller, out of a mapping of some of them, or None. Raises ConfigError."""
    kind = settings_class(controller)
    if isinstance(given, kind):
        return given
    remedy = f"give a mapping, such as {{name: value}}, or {kind.__name__}(...), for kl.controller={controller}"
    require(given is None or isinstance(given, Mapping), "kl.settings", given, remedy)
    given, known = given or {}, [field.name for field in dataclasses.fields(kind)]
    for name, value in given.items():
        has = f"kl.controller={controller} has {', '.join(known) or 'no settings'}"
        require(name in known, f"kl.settings.{name}", value, f"unknown setting; {has}")
    try:
        return kind(**given)
    except ValueError as error:  # it begins with the setting's name
        raise ConfigError(f"kl.settings.{str(error).rstrip('.')}") from error
