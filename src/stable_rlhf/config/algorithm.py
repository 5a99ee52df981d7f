"""The settings sections of the algorithm: sampling, optimiser, critic and KL."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from stable_rlhf.config.checks import Named, check_types, not_negative, only_with, positive, require
from stable_rlhf.config.presets import not_of_controller
from stable_rlhf.control import CONTROLLERS, ControllerSettings, settings_class
from stable_rlhf.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class RolloutConfig(Named):
    """How completions are sampled. A step is one rollout: a batch of prompts with one or several completions each."""

    batch_size: int = 64
    """Number of completions in a step. With num_generations at 1 it is the number of prompts, too."""
    num_generations: int = 1
    """Number of completions of each prompt: a group, which advantages without a critic compare (``optim.advantage``). A
    step has batch_size / num_generations prompts. An evaluation samples one completion of each held-out prompt."""
    max_completion_length: int = 32
    """Most tokens that are sampled for a completion."""
    temperature: float = 1.0
    """Temperature of sampling, log-probs, entropy and KL."""
    stop_tokens: list[str | int] | None = None
    """Tokens, by text or id, that end a completion as EOS does, such as [<|im_end|>] where a chat template ends turns
    with another token than the tokenizer's EOS."""
    stop_strings: list[str] | None = None
    """Texts that end a completion, such as ["\\nUser:"]. The token that completes one is the last that is learned from;
    the completion that rewards get ends before the text. Tokens after it are sampled all the same, and dropped."""

    def __post_init__(self) -> None:
        check_types("rollout", self)
        require(
            "" not in (self.stop_strings or []), "rollout.stop_strings", self.stop_strings, "an empty text ends nothing"
        )
        positive("rollout", self, "batch_size", "num_generations", "max_completion_length", "temperature")
        nearest = max(1, round(self.batch_size / self.num_generations)) * self.num_generations
        remedy = f"counts completions, and must be divisible by rollout.num_generations={self.num_generations}: "
        whole = self.batch_size % self.num_generations == 0
        require(whole, "rollout.batch_size", self.batch_size, f"{remedy}try {nearest}")

    @property
    def prompts(self) -> int:
        """Number of prompts in a step."""
        return self.batch_size // self.num_generations


OF_CRITIC = ("lam", "length_alpha", "skip_equal_scores")
"""Settings of ``optim`` that only GAE reads."""

OF_GROUPS = ("rloo", "grpo", "dr_grpo")
"""Advantages that compare the completions of a prompt with each other."""

OF_TOKENS = ("gamma", "whiten_floor")
"""Settings of ``optim`` that advantages read which differ from token to token."""


@dataclass(frozen=True, kw_only=True)
class OptimConfig(Named):
    """The policy's update (PPO), the optimiser, and the preview, which bounds each update.

    PPO is Schulman et al. 2017; docs/algorithm.md has the preview.
    """

    learning_rate: float = 1e-4
    """AdamW's step size for the policy. With 1e-4 the KL of the built-in policy (all weights trained) stays near its
    budget; with 3e-4 and no preview, noisy updates keep the KL above the budget. LoRA takes about three times as
    much."""
    adaptive_kl: float | None = None
    """KL of an update, nats per token, to hold by the learning rates: after an update beyond twice this they are
    divided by 1.5, after one below half of it multiplied, within 1/100 to 100 times their schedule. It is measured as
    ``policy/approxkl_avg``, the mean over the optimiser steps of the KL before each, so it needs two of them. None
    leaves the rates to their schedule."""
    lr_scheduler_type: Literal["constant", "linear", "cosine"] = "constant"
    """Shape of both learning rates (policy and value heads) over max_steps, after warm-up."""
    warmup_steps: int = 0
    """Number of steps over which both learning rates rise from 0."""
    weight_decay: float = 0.0
    """AdamW's decoupled weight decay of the policy."""
    num_iterations: int = 2
    """Number of passes over each rollout (PPO epochs)."""
    num_mini_batches: int = 2
    """Number of optimiser steps in a pass."""
    microbatch_tokens: int = 8192
    """Most tokens, prompts and padding included, in one forward and backward pass. A minibatch is split into as many
    passes as needed (at least one row each), with rows of similar length together. A smaller value takes less memory
    and gives the same gradient."""
    advantage: Literal["gae", "rloo", "grpo", "dr_grpo", "reinforce_pp"] = "gae"
    """How advantages are made. ``gae`` needs a critic (critic.heads 1 or 2), the others have none (critic.heads 0).
    ``rloo``, ``grpo`` and ``dr_grpo`` compare the completions of a prompt (rollout.num_generations 2 or more): less the
    mean of the others, less the mean and divided by the deviation, or only less the mean. ``reinforce_pp`` is each
    token's reward to go, normalised over the rollout."""
    skip_zero_variance_groups: bool = False
    """Leave the completions of a prompt whose rewards are all equal out of loss and denominators. They have no
    advantages, but count in the means and, with the KL in the loss, are pulled to the reference. Only with
    advantage=rloo, grpo or dr_grpo; with the KL in the reward, whose advantages they have, it is refused."""
    loss: Literal["clip", "cispo"] = "clip"
    """``clip`` is PPO's: a token whose ratio has left the clip range has no gradient. ``cispo`` (MiniMax-M1) clips only
    the weight of its gradient, at 1 + epsilon_high."""
    importance: Literal["token", "sequence", "product"] = "token"
    """Probability ratio that is clipped: of each ``token`` (PPO), or one of the whole completion, the geometric mean of
    its tokens' (``sequence``, GSPO) or their ``product`` (TRL's RLOO). One ratio of a completion counts at each of its
    tokens, so that with denominator=token a long completion weighs more; denominator=sequence is GSPO's and RLOO's."""
    denominator: Literal["token", "sequence", "length"] = "token"
    """What the policy's loss and the KL in it are divided by: the response tokens of an optimiser step (``token``,
    DAPO), so that a long completion weighs more; each completion's tokens and then the completions (``sequence``,
    GRPO); or completions times rollout.max_completion_length, a constant (``length``, Dr. GRPO)."""
    epsilon: float = 0.2
    """Clip range of the probability ratio (PPO, section 3). Not with loss=cispo where epsilon_high is given."""
    epsilon_high: float | None = None
    """Clip range above 1, where a likelier token is rewarded; None is epsilon on both sides. VAPO and DAPO: 0.28."""
    gamma: float = 1.0
    """Discount of later rewards, for each token; 1 does not discount. Only with advantage=gae or reinforce_pp."""
    lam: float = 0.95
    """GAE's lambda for the advantages (Schulman et al. 2016). Only with advantage=gae."""
    length_alpha: float | None = None
    """Make lambda 1 - 1 / (length_alpha x T), not below 0, for a response of T tokens, instead of lam: the share of a
    response over which a TD error is spread (VAPO: 0.05). Only with advantage=gae."""
    whiten_floor: float = 0.1
    """Smallest standard deviation that advantages are divided by, in normalised reward units. Below it the rewards of a
    batch hardly differ, and whitening would amplify noise. Only with advantage=gae or reinforce_pp."""
    skip_equal_scores: bool = True
    """Learn nothing from the scores of a rollout where all are equal: none of its completions is better than another,
    and what is left of their advantages are the critic's errors. The KL then acts alone; where it does not act either,
    the policy takes no step. Only with advantage=gae: the others are 0 then."""
    entropy_coef: float = 0.0
    """Weight of an entropy bonus in the loss, reward per nat. The default is 0, because with 0.01 the entropy grows
    until the text is gibberish (docs/deviations.md)."""
    max_grad_norm: float = 1.0
    """Norm to which the policy's gradient is clipped."""
    preview: bool = True
    """Keep each update within a trust region: its KL(before || after) is predicted, measured on a sixteenth of
    the rollout, and brought within its bound by shortening the steps."""
    max_update_kl: float | None = None
    """Bound of the preview on a whole update, nats per token. None takes the controller's, a share of its KL budget
    (``safe`` only). Only with preview."""

    def __post_init__(self) -> None:
        check_types("optim", self)
        if self.max_update_kl is not None:
            positive("optim", self, "max_update_kl")
        only_with("optim", self, "max_update_kl", self.preview, "optim.preview=true")
        for name in ("adaptive_kl", "epsilon_high", "length_alpha"):
            if getattr(self, name) is not None:
                positive("optim", self, name)
        several = self.num_iterations * self.num_mini_batches > 1
        only_with("optim", self, "adaptive_kl", several, "num_iterations or num_mini_batches is 2 or more")
        only_with("optim", self, "lam", self.length_alpha is None, "optim.length_alpha is none")
        positive("optim", self, "learning_rate", "num_iterations", "num_mini_batches", "microbatch_tokens")
        positive("optim", self, "epsilon", "whiten_floor", "max_grad_norm")
        not_negative("optim", self, "warmup_steps", "weight_decay", "entropy_coef")
        require(0 < self.gamma <= 1, "optim.gamma", self.gamma, "must be in (0, 1]")
        require(0 <= self.lam <= 1, "optim.lam", self.lam, "must be in [0, 1]")
        self._check_effects()

    def _check_effects(self) -> None:
        """Refuses settings that the advantage or the loss does not read."""
        for name in OF_CRITIC:
            only_with("optim", self, name, self.advantage == "gae", "optim.advantage=gae")
        for name in OF_TOKENS:
            condition = "optim.advantage is gae or reinforce_pp"
            only_with("optim", self, name, self.advantage in ("gae", "reinforce_pp"), condition)
        condition = f"optim.advantage is {', '.join(OF_GROUPS[:-1])} or {OF_GROUPS[-1]}"
        only_with("optim", self, "skip_zero_variance_groups", self.advantage in OF_GROUPS, condition)
        bounds = self.loss == "clip" or self.epsilon_high is None
        only_with("optim", self, "epsilon", bounds, "optim.loss is clip or optim.epsilon_high is None")


@dataclass(frozen=True, kw_only=True)
class CriticConfig(Named):
    """The value heads on the policy's last hidden state (docs/algorithm.md, Critic)."""

    heads: Literal[0, 1, 2] = 1
    """Number of value heads: 1 is PPO's, 2 the paper's pessimistic double critic. On our benches the second head
    changed neither reward nor stability (docs/results.md), so it is off. 0 is no critic: ``optim.advantage`` then says
    what takes its place, and no other setting of this section has an effect."""
    temperature: float = 0.3
    """Alpha of the soft-min of the two heads, in normalised reward units; a smaller value is closer to the minimum.
    Only with heads=2."""
    regress: Literal["each", "soft_min"] = "each"
    """Value that is fitted to the returns: ``each`` head, or only their ``soft_min``, which lets the heads drift apart.
    Only with heads=2."""
    bootstrap: Literal["online", "target", "mixed"] = "online"
    """Heads that give the values on the two sides of the TD error: ``online`` heads, ``target`` heads (a Polyak average
    of the online heads), or ``mixed``: the target's V(s_{t+1}) with the online V(s_t). ``mixed`` is the paper's choice
    and is biased by the target's lag."""
    target_tau: float = 0.05
    """Share of the online heads that enters the target heads after each optimiser step. With bootstrap=online the
    targets are only a measure of drift (``safe/target_gap``)."""
    loss: Literal["huber", "mse"] = "mse"
    """Regression loss of the value heads: the squared error, whose minimum is the mean return, or Huber's, which
    stands below it where a few returns are high, and above it where a few are low."""
    huber_delta: float = 0.5
    """Error above which the Huber loss is linear, in normalised reward units. Only with loss=huber."""
    cliprange_value: float | None = None
    """Distance from the value at sampling time to which a second, clipped value is limited, in normalised reward units;
    None does not clip."""
    clip_reduction: Literal["mean", "max"] = "mean"
    """How the losses of the value and of the clipped value combine: the published code's mean, or PPO's max. Only with
    cliprange_value."""
    vf_coef: float = 1.0
    """Weight of the value loss in the sum with the policy's loss."""
    zero_init: bool = True
    """Begin with a critic that says 0, the mean of normalised rewards, at every state, instead of random numbers, which
    the first advantages would repeat."""
    backbone_gradient: bool = False
    """Train the transformer with the value loss too, not only the heads."""
    learning_rate: float | None = 1e-3
    """AdamW's step size for the value heads; None is the policy's (the paper's "synchronised"). The heads are new where
    the policy is trained: at 1e-4 they need over 100 rollouts of 64 completions to explain what 1e-3 explains after 20.
    """
    max_grad_norm: float = 0.5
    """Norm to which the gradient of the value heads is clipped."""
    lam: float | None = None
    """GAE's lambda for the critic's returns; None is the value of optim.lam."""
    warmup_steps: int = 0
    """Number of first steps in which only the critic learns."""

    def __post_init__(self) -> None:
        check_types("critic", self)
        for name in (field.name for field in dataclasses.fields(self) if field.name != "heads"):
            only_with("critic", self, name, self.heads > 0, "critic.heads is 1 or 2")
        positive("critic", self, "temperature", "huber_delta", "vf_coef", "max_grad_norm")
        only_with("critic", self, "temperature", self.heads == 2, "critic.heads=2")
        only_with("critic", self, "regress", self.heads == 2, "critic.heads=2")
        only_with("critic", self, "huber_delta", self.loss == "huber", "critic.loss=huber")
        clips = self.cliprange_value is not None
        only_with("critic", self, "clip_reduction", clips, "critic.cliprange_value is given")
        not_negative("critic", self, "warmup_steps")
        require(0 < self.target_tau <= 1, "critic.target_tau", self.target_tau, "must be in (0, 1]")
        for name in ("learning_rate", "cliprange_value"):
            if getattr(self, name) is not None:
                positive("critic", self, name)
        if self.lam is not None:
            require(0 <= self.lam <= 1, "critic.lam", self.lam, "must be in [0, 1]")


_DEFAULTS: Any = None
"""Marks settings that the caller did not give. ``KLConfig.__post_init__`` replaces them by the controller's
defaults."""


@dataclass(frozen=True, kw_only=True)
class KLConfig(Named):
    """The controller, a rule that sets the KL coefficient at each step, and where the KL acts.

    docs/algorithm.md (Controllers) has the rules.
    """

    controller: Literal["none", "fixed", "adaptive", "asymmetric", "pid-lagrangian", "safe", "paper"] = "safe"
    """Rule that sets the KL coefficient, the weight of the KL to the reference policy."""
    settings: ControllerSettings = _DEFAULTS
    """The controller's own settings, such as ``beta`` of ``fixed`` or ``budget`` of ``safe``. A setting that is not
    given has the preset's value if the preset has the same controller, else its default. docs/algorithm.md lists them.
    A mapping is converted to the controller's settings class."""
    in_reward: bool = True
    """Subtract coefficient x (logp - ref) from every token's reward, so that the KL passes through GAE."""
    length_neutral: bool = True
    """In the reward, first subtract the rollout's mean from logp - ref. Without it the policy pays less KL by stopping
    early, although the mean KL per token, which the budget limits, stays the same. Only with in_reward."""
    in_loss: Literal["none", "k2", "exact"] = "none"
    """Add coefficient x KL to the loss: ``k2`` (half the squared log-ratio) or ``exact`` (over the whole
    vocabulary)."""
    observe: Literal["k1", "exact"] = "exact"
    """KL that the controller is told: ``exact`` is the mean over the sampled states of the KL over the whole
    vocabulary, ``k1`` the mean of logp - ref. ``exact`` has less noise and costs one more product with the LM head."""
    allow_both: bool = False
    """Allow the KL in the reward and in the loss at once; it then acts twice."""

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
    """The settings of a controller, made from a mapping of some of them or from None. Raises ConfigError."""
    kind = settings_class(controller)
    if isinstance(given, kind):
        return given
    remedy = f"give a mapping, such as {{name: value}}, or {kind.__name__}(...), for kl.controller={controller}"
    require(given is None or isinstance(given, Mapping), "kl.settings", given, remedy)
    given, known = given or {}, [field.name for field in dataclasses.fields(kind)]
    for name, value in given.items():
        remedy = f"unknown setting{not_of_controller(name, controller)}"
        require(name in known, f"kl.settings.{name}", value, remedy)
    try:
        return kind(**given)
    except ValueError as error:  # it begins with the setting's name
        raise ConfigError(f"kl.settings.{str(error).rstrip('.')}") from error
