"""The settings sections of a run: frozen, keyword-only dataclasses that check themselves."""

from __future__ import annotations

import dataclasses
import difflib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

from stable_rlhf.config.algorithm import CriticConfig, KLConfig, OptimConfig, RolloutConfig
from stable_rlhf.config.checks import Named, check_types, check_url, is_url, not_negative, only_with, positive, require
from stable_rlhf.control import GuardConfig

_FILE_SUFFIXES = (".jsonl", ".jsonl.gz", ".json", ".csv", ".csv.gz", ".parquet")
"""Endings of prompt files. A file is one split and is read whole."""

TRACKERS = (
    "azure_ml",
    "clearml",
    "codecarbon",
    "comet_ml",
    "dagshub",
    "dvclive",
    "flyte",
    "kubeflow",
    "mlflow",
    "neptune",
    "swanlab",
    "tensorboard",
    "trackio",
    "wandb",
)
"""Transformers' names of trackers, which settings can be checked against without loading Transformers."""


@dataclass(frozen=True, kw_only=True)
class ModelConfig(Named):
    """The policy to train, and how it is held in memory."""

    name: str = "builtin"
    """The policy to train: ``builtin`` (the small model that ships with the package), a folder, or a hub name. A LoRA
    adapter, named like a model, is trained further, and its reference is the adapter as it was."""
    revision: str | None = None
    """Commit, tag or branch of a hub model; None is the default branch."""
    gguf_file: str | None = None
    """Name of a GGUF file inside ``name``. Its weights are dequantised when they are loaded."""
    trust_remote_code: bool = False
    """Run Python code that comes with this model. Leave it off unless you have read that code."""
    device: str = "auto"
    """``auto`` (the first CUDA device, or the CPU if there is none), or a torch device such as ``cpu`` or
    ``cuda:1``."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Number type in which the transformer computes. ``auto`` is bfloat16 on CUDA and float32 on a CPU. Value heads,
    log-probs and trained weights are always float32."""
    lora_r: int = 0
    """Rank of the LoRA adapter; 0 trains every weight. With LoRA the reference is the same model with the adapter
    switched off."""
    lora_alpha: float | None = None
    """LoRA scale; None is twice the rank, the usual choice. Only with lora_r > 0."""
    lora_target_modules: list[str] | None = None
    """Names of the linear layers that get an adapter; None, or ``all-linear``, is every one except the LM head. Only
    with lora_r > 0."""
    lora_options: dict[str, Any] | None = None
    """More fields of peft.LoraConfig, such as {use_rslora: true} or {target_modules: REGULAR_EXPRESSION}; None leaves
    them at PEFT's defaults. Only with lora_r > 0."""
    gradient_checkpointing: bool = False
    """Recompute each layer's activations in the backward pass. This takes less memory and about a third more time."""
    cuda_graphs: bool | None = None
    """Replay forward, backward and sampling as CUDA graphs, one for each shape, instead of launching every operation.
    The figures are the same and the launch time is saved. None: on if the device is CUDA."""
    torch_compile: bool = False
    """Fuse the operations of each layer with torch.compile. Compiling takes a minute or two at the start; afterwards a
    step takes less time and memory. Figures differ by the rounding of the model's dtype."""

    self_check: bool = True
    """Try the model on a few tokens when it is loaded: each row alone and beside others, a changed last token, the
    tokens that are sampled, gradient checkpointing, the reference. It takes a few forward passes; a model that fails is
    refused, or sampled in a slower way that passes."""

    def __post_init__(self) -> None:
        check_types("model", self)
        not_negative("model", self, "lora_r")
        for name in ("lora_alpha", "lora_target_modules", "lora_options"):
            value = getattr(self, name)
            remedy = "has no effect without an adapter: set model.lora_r to a rank above 0, or leave it out"
            require(value is None or self.lora_r > 0, f"model.{name}", value, remedy)
        if self.lora_alpha is not None:
            positive("model", self, "lora_alpha")
        if self.lora_target_modules == ["all-linear"]:  # PEFT's word for what None is here
            object.__setattr__(self, "lora_target_modules", None)
        remedy = "name at least one layer, or leave it out for every linear layer"
        require(self.lora_target_modules != [], "model.lora_target_modules", self.lora_target_modules, remedy)
        for name in ("r", "lora_alpha"):
            remedy = f"set model.{'lora_r' if name == 'r' else name} instead"
            require(name not in (self.lora_options or {}), "model.lora_options", self.lora_options, remedy)

    def check_source(self, given_as_object: bool = False) -> None:
        """Refuses settings that say how to load a model where ``name`` cannot be loaded so.

        Called once the name is known: `SAFETrainer` may be given it, or a model, next to these settings.
        """
        if given_as_object:
            for name in ("gguf_file", "revision", "trust_remote_code"):
                only_with("model", self, name, False, "the model is given by its name; this one is an object")
        for name in ("gguf_file", "trust_remote_code"):
            only_with("model", self, name, self.name != "builtin", "model.name is a folder or a hub name")
        on_hub = self.name != "builtin" and not Path(self.name).is_dir()
        only_with("model", self, "revision", on_hub, "model.name is a hub name")


@dataclass(frozen=True, kw_only=True)
class DataConfig(Named):
    """The prompts to train on and to evaluate on."""

    train: str = "builtin"
    """Training prompts: ``builtin``, a .jsonl, .json, .csv or .parquet file (.jsonl and .csv also as .gz), a folder
    (of ``save_to_disk``, or with such files), or a hub name. docs/data.md has the columns that are read."""
    split: str = "train"
    """Split of a hub data set, of a saved one, or of the built-in prompts, to train on."""
    config_name: str | None = None
    """Configuration (subset) of a hub data set, such as ``main`` of openai/gsm8k; None is the default one."""
    revision: str | None = None
    """Commit, tag or branch of a hub data set; None is the default branch. If ``eval`` names the same data set, it
    uses the same configuration and revision."""
    format: Literal["auto", "prompt", "messages", "preference", "hh"] = "auto"
    """``prompt`` reads a ``prompt`` column of text or chat messages. ``messages`` reads whole chats; the prompt is
    everything before a last assistant turn. ``preference`` reads ``chosen`` and ``rejected``; the prompt is what both
    begin with. ``hh`` reads Anthropic's HH-RLHF dialogues (column ``chosen``); the prompt is everything before the last
    assistant turn. ``auto`` decides by the columns."""
    prompt_column: str | None = None
    """Column that holds the prompts, such as ``question``, if it is not called ``prompt`` (or ``messages``). Rewards
    get it under its own name too."""
    eval: str | None = None
    """Held-out prompts, named as in ``train``. None holds out ``eval_size`` rows of the training set (the built-in
    prompts have a held-out split of their own)."""
    eval_split: str = "test"
    """Split of ``eval`` to read."""
    eval_size: int = 128
    """Number of held-out prompts on which the policy is evaluated before and after training; 0 evaluates nothing."""
    max_prompt_length: int = 512
    """Most tokens of a prompt. A longer prompt is cut on the left and counted (``prompts/truncated``)."""
    limit: int | None = None
    """Read only the first ``limit`` rows of the training set; None reads all."""
    streaming: bool = False
    """Read the training rows as they are needed, in the order of arrival, instead of loading all before training: for a
    data set that does not fit the disk. Held-out prompts then need ``eval``, whose first ``eval_size`` rows are
    read."""

    def __post_init__(self) -> None:
        check_types("data", self)
        positive("data", self, "max_prompt_length")
        not_negative("data", self, "eval_size")
        if self.limit is not None:
            positive("data", self, "limit")
        whole = self.train.endswith(_FILE_SUFFIXES)
        condition = "data.train is a hub name, a saved data set or builtin (a file is one split)"
        only_with("data", self, "split", not whole, condition)
        on_hub = not (whole or self.train == "builtin" or self.train.startswith("<") or Path(self.train).exists())
        for name in ("config_name", "revision"):
            only_with("data", self, name, on_hub, "data.train is a hub name")
        named = self.train != "builtin" and not self.train.startswith("<")
        only_with("data", self, "streaming", named, "data.train is a file, a folder or a hub name")
        named = self.format not in ("preference", "hh")
        only_with("data", self, "prompt_column", named, "data.format is auto, prompt or messages")
        only_with("data", self, "eval", self.eval_size > 0, "data.eval_size is above 0")
        source = self.train if self.eval is None and self.train == "builtin" else self.eval
        split = self.eval_size > 0 and source is not None and not source.endswith(_FILE_SUFFIXES)
        only_with("data", self, "eval_split", split, "held-out prompts come from a hub name or builtin")


@dataclass(frozen=True, kw_only=True)
class RewardConfig(Named):
    """The rewards: where they come from, how they are scaled, and how reward servers are called."""

    functions: list[str] = dataclasses.field(default_factory=lambda: ["builtin"])
    """List of rewards. Each is ``builtin``, ``package.module:function``, a folder or hub name of a
    sequence-classification model, or the http:// or https:// URL of a reward server (docs/rewards.md)."""
    url: str | None = None
    """URL of a reward server that is the only reward; a short form of ``functions`` with one entry."""
    weights: list[float] | None = None
    """Weights of the rewards in their sum, one for each entry of ``functions``; None gives each the weight 1. A reward
    that gives a sample no score is left out of its sum. The trainer checks the number, because functions may also be
    given as Python objects."""
    aggregate: Literal["sum", "mean", "min", "uncertainty"] = "sum"
    """How several rewards become one: their weighted ``sum``; or, for several reward models of one kind, their
    ``mean``, their ``min``, or their mean less ``uncertainty_coef`` times their variance (``uncertainty``). Except for
    ``sum``, each reward is first put in units of its own mean and deviation on the first batch, and a sample that one
    of them does not score is not learned from (docs/rewards.md)."""
    uncertainty_coef: float = 0.5
    """Weight of the variance over the rewards, only with aggregate=uncertainty. With 0.5, rewards that lie one
    deviation apart from their mean cost half a deviation of reward."""
    gold: list[str] = dataclasses.field(default_factory=list)
    """List of gold rewards, named as in ``functions``. They are only measured, never trained on: each by itself, on the
    held-out prompts, before and after training and every ``eval_steps``. A gold reward that falls while the reward
    rises shows over-optimisation (docs/rewards.md)."""
    missing_eos_penalty: float | None = None
    """Amount subtracted from the reward, in the scorer's units, if a completion did not end within
    max_completion_length; None subtracts nothing."""
    normalise: Literal["none", "running", "paper"] = "running"
    """``running`` subtracts the mean of all rewards so far and divides by their standard deviation, so that a reward's
    scale and offset do not matter; ``paper`` is the rule of the published code; ``none`` changes nothing."""
    batch_size: int = 64
    """Number of completions that a reward model scores at once, and that one request to a reward server holds. It
    does not change the scores."""
    append_eos: bool = False
    """End every text that a reward model reads with its end token, where it does not end so. True for a model that was
    trained so (OpenRLHF trains all, TRL those on text that is not chats). False is what model cards and TRL's GRPO do;
    chat templates mostly end the answer themselves."""
    skip_special_tokens: bool = True
    """Give reward functions completions without special tokens. False shows the policy's end token and its other
    special tokens. A function's attribute ``skip_special_tokens`` says it for one function. Reward models and servers
    never get them."""
    timeout: float = 60.0
    """Seconds that one request to a reward server may take, from first byte to last, before it counts as failed. A
    model of several billion parameters scores a batch in less; a language model as judge may need more."""
    retries: int = 15
    """Number of times that a failed request is repeated; 0 gives up at once. Pauses double from half a second to a
    minute, shortened at random by a quarter on average. The default spans seven minutes, enough for a server to restart
    and load its model."""
    max_wait: float = 600.0
    """Most seconds to wait for the scores of one rollout, requests and pauses together, even if retries are left; then
    the run stops. Ten minutes is longer than a server's restart, and short enough that a failure is noticed."""
    token_env: str | None = None
    """Name of the environment variable that holds the reward server's token, sent as ``Authorization: Bearer``. The
    token itself is in no setting, so config.yaml never holds it. None sends no token."""
    columns: list[str] = dataclasses.field(default_factory=list)
    """Columns of the data set to send to a reward server with each request, such as [labels]. By default a server
    receives only prompts and completions."""
    accept_changed: bool = False
    """Resume although the code or the weights of a reward (or gold reward) are not those that the run began with, as
    after a repair.
    False refuses: the rewards before and after would not be comparable."""
    trust_remote_code: list[str] = dataclasses.field(default_factory=list)
    """Entries of ``functions`` or ``gold`` whose own Python code may run. Leave it empty unless you have read that
    code."""

    def __post_init__(self) -> None:
        check_types("reward", self)
        require(len(self.functions) > 0, "reward.functions", self.functions, "name at least one reward")
        self._check_servers()
        if self.weights is not None:
            remedy = "nothing would be rewarded: give at least one weight other than 0"
            require(any(self.weights), "reward.weights", self.weights, remedy)
        only_with("reward", self, "weights", self.aggregate == "sum", "reward.aggregate=sum")
        positive("reward", self, "uncertainty_coef")
        only_with("reward", self, "uncertainty_coef", self.aggregate == "uncertainty", "reward.aggregate=uncertainty")
        if self.missing_eos_penalty is not None:
            not_negative("reward", self, "missing_eos_penalty")
        positive("reward", self, "batch_size")
        unknown = sorted(set(self.trust_remote_code) - {*self.functions, *self.gold})
        remedy = "every entry must be one of reward.functions or reward.gold"
        require(not unknown, "reward.trust_remote_code", unknown, remedy)

    @property
    def servers(self) -> list[str]:
        """The reward servers' URLs, those of gold rewards included."""
        return [name for name in (*self.functions, *self.gold) if is_url(name)]

    def _check_servers(self) -> None:
        """Checks the reward servers, and makes ``url`` the only entry of ``functions``, as in config.yaml."""
        if self.url is not None:
            require(
                is_url(self.url), "reward.url", self.url, "give http://HOST:8000/PATH, or name it in reward.functions"
            )
            check_url("reward.url", self.url)
            remedy = (
                f"reward.url={self.url!r} is the only reward where it is set; name both in reward.functions instead"
            )
            require(self.functions in (["builtin"], [self.url]), "reward.functions", self.functions, remedy)
            object.__setattr__(self, "functions", [self.url])
        for setting, names in (("reward.functions", self.functions), ("reward.gold", self.gold)):
            for server in names:
                if is_url(server):
                    check_url(setting, server)
        positive("reward", self, "timeout", "max_wait")
        not_negative("reward", self, "retries")
        for name in sorted({"query", "prompts", "messages"} & set(self.columns)):
            require(False, "reward.columns", name, "is a field of the protocol itself; rename the column")
        hosts = sorted({urlsplit(server).netloc for server in self.servers})
        remedy = f"would be sent to {' and '.join(hosts)}: use it with one server, or leave it out"
        require(self.token_env is None or len(hosts) < 2, "reward.token_env", self.token_env, remedy)


@dataclass(frozen=True, kw_only=True)
class LogConfig(Named):
    """Records and output besides metrics.jsonl."""

    report_to: list[str] = dataclasses.field(default_factory=list)
    """Trackers to report to, by Transformers' names, such as ``tensorboard`` or ``wandb``."""
    run_name: str | None = None
    """Name of the run in the trackers; None is the name of the run's folder. Only with report_to."""
    completions_steps: int = 10
    """Write the prompts and completions of a step to completions/ every this many steps, and as a table to those of the
    trackers that have tables; 0 never does."""
    progress: bool = True
    """Show the progress bar and the closing tables on the console. False leaves one closing line of a command."""

    def __post_init__(self) -> None:
        check_types("log", self)
        for name in self.report_to:
            close = difflib.get_close_matches(name, TRACKERS, n=1)
            meant = f"did you mean {close[0]}?" if close else f"choose from {', '.join(TRACKERS)}, or leave it out"
            require(name in TRACKERS, "log.report_to", self.report_to, f"there is no tracker {name!r}; {meant}")
        not_negative("log", self, "completions_steps")
        only_with("log", self, "run_name", bool(self.report_to), "log.report_to names a tracker")


SECTIONS: dict[str, type] = {
    "model": ModelConfig,
    "data": DataConfig,
    "reward": RewardConfig,
    "rollout": RolloutConfig,
    "optim": OptimConfig,
    "critic": CriticConfig,
    "kl": KLConfig,
    "guard": GuardConfig,
    "log": LogConfig,
}
