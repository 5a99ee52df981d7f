"""The sections of a run's settings: one frozen, keyword-only dataclass each, checked when it is made."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit

from stable_rlhf.config.algorithm import CriticConfig, KLConfig, OptimConfig
from stable_rlhf.config.checks import check_types, check_url, is_url, not_negative, only_with, positive, require
from stable_rlhf.control import GuardConfig

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
    """Each is ``builtin``, ``package.module:function``, a folder or hub name of a sequence-classification model, or the
    http:// or https:// URL of a reward server (docs/rewards.md)."""
    url: str | None = None
    """URL of the reward server that is the only reward: short for ``functions`` with nothing else in it."""
    weights: list[float] | None = None
    """One weight a function (the trainer counts: functions may come as objects); None weighs all 1."""
    missing_eos_penalty: float | None = None
    """Subtracted from the reward (scorer's units) of a completion that did not end within max_completion_length; None
    subtracts nothing."""
    normalise: Literal["none", "running", "paper"] = "running"
    """``running`` subtracts the mean of all rewards seen so far and divides by their deviation, so that rewards of any
    scale and shift train alike; ``paper`` is the published code's rule; ``none`` takes them as they are."""
    batch_size: int = 64
    """Completions a reward model scores at once, and completions a request to a reward server; limits memory only."""
    timeout: float = 60.0
    """Seconds that one request to a reward server may take, from first byte to last, before it counts as failed. A
    model of several billion parameters scores a batch in less; a language model that judges may want more."""
    retries: int = 15
    """Times that a failed request is made again; 0 gives up at once. The pauses double from half a second to a minute
    (a quarter less on average, at random), so that the default spans seven minutes: a server can start again and load
    its model."""
    max_wait: float = 600.0
    """Seconds that the scores of a rollout may take in all, requests and pauses together, however many retries are
    left; then the run stops. Ten minutes: longer than a restart, short enough that somebody hears of it."""
    token_env: str | None = None
    """Name of the environment variable that holds the reward server's token, sent as ``Authorization: Bearer``. The
    token itself is in no setting, and so in no config.yaml. None sends none."""
    columns: list[str] = dataclasses.field(default_factory=list)
    """Columns of the data set that are sent to a reward server with each request, such as [labels]. None of them by
    default: a server sees prompts and completions only."""
    trust_remote_code: list[str] = dataclasses.field(default_factory=list)
    """Those of ``functions`` whose own Python code may run. Empty unless you have read that code."""

    def __post_init__(self) -> None:
        check_types("reward", self)
        require(len(self.functions) > 0, "reward.functions", self.functions, "name at least one reward")
        self._check_servers()
        if self.weights is not None:
            remedy = "nothing would be rewarded: give at least one weight other than 0"
            require(any(self.weights), "reward.weights", self.weights, remedy)
        if self.missing_eos_penalty is not None:
            not_negative("reward", self, "missing_eos_penalty")
        positive("reward", self, "batch_size")
        unknown = sorted(set(self.trust_remote_code) - set(self.functions))
        require(not unknown, "reward.trust_remote_code", unknown, "every entry must be one of reward.functions")

    def _check_servers(self) -> None:
        """Also makes ``url`` the only one of ``functions``, which config.yaml then holds: given so, it is accepted."""
        if self.url is not None:
            require(
                is_url(self.url), "reward.url", self.url, "give http://HOST:PORT/PATH, or name it in reward.functions"
            )
            check_url("reward.url", self.url)
            remedy = (
                f"reward.url={self.url!r} is the only reward where it is set; name both in reward.functions instead"
            )
            require(self.functions in (["builtin"], [self.url]), "reward.functions", self.functions, remedy)
            object.__setattr__(self, "functions", [self.url])
        servers = [function for function in self.functions if is_url(function)]
        for server in servers:
            check_url("reward.functions", server)
        positive("reward", self, "timeout", "max_wait")
        not_negative("reward", self, "retries")
        for name in sorted({"query", "prompts", "messages"} & set(self.columns)):
            require(False, "reward.columns", name, "is a field of the protocol itself; rename the column")
        hosts = sorted({urlsplit(server).netloc for server in servers})
        remedy = f"would be sent to {' and '.join(hosts)}: use it with one server, or leave it out"
        require(self.token_env is None or len(hosts) < 2, "reward.token_env", self.token_env, remedy)


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
    "guard": GuardConfig,
    "log": LogConfig,
}
