"""What `SAFETrainer` is given as objects: settings that tell the truth about it, and a scorer."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel

from stable_rlhf.config import Config, ConfigError
from stable_rlhf.control import controller_settings
from stable_rlhf.remote import remote_reward
from stable_rlhf.scoring import RewardFunction, Scorer, resolve_reward
from stable_rlhf.validation import is_url, only_with


def as_given(config: Config, model: Any, reward_funcs: Any, train: Any) -> Config:
    """The settings with what is really trained and rewarded, so that config.yaml tells the truth.

    What is no name has none that could be loaded: `stable-rlhf resume` refuses it instead of taking another. A reward
    server is tried here, before a model loads. Raises ConfigError, or RewardError for a server that is not there.
    """
    base: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    name = model if isinstance(model, str) else base.config._name_or_path or type(base).__name__
    given: dict[str, Any] = {"model": dataclasses.replace(config.model, name=name)}
    if reward_funcs is not None:
        functions = [_reward_name(function) for function in _listed(reward_funcs)]
        given["reward"] = dataclasses.replace(config.reward, functions=functions, url=None)
    if train is not None:
        given["data"] = dataclasses.replace(config.data, train="<train_dataset>")
    config = dataclasses.replace(config, **given)
    weights, count = config.reward.weights, len(config.reward.functions)
    if weights is not None and len(weights) != count:
        raise ConfigError(f"reward.weights={weights!r}: give one weight for each of the {count} rewards")
    servers = [function for function in config.reward.functions if is_url(function)]
    for name in ("timeout", "retries", "max_wait", "token_env", "columns"):
        only_with("reward", config.reward, name, bool(servers), "one of reward.functions is the URL of a server")
    for server in servers:
        remote_reward(server, config.reward).function.probe()
    return config


def complete_settings(config: Config, run_dir: Path) -> dict[str, Any]:
    """Every setting of a run, the controller's own included: what config.yaml and the checkpoints hold."""
    complete = {**config.to_dict(), "output_dir": str(run_dir)}
    complete["kl"]["settings"] = controller_settings(config.kl.controller, config.kl.settings)
    complete["reward"]["url"] = None  # it is in functions
    return complete


def _reward_name(function: Any) -> str:
    if isinstance(function, str):
        return function
    if isinstance(function, torch.nn.Module):
        return getattr(getattr(function, "config", None), "_name_or_path", "") or f"<{type(function).__name__}>"
    own = function if hasattr(function, "__qualname__") else type(function)
    return f"{own.__module__}:{own.__qualname__}"


def _listed(reward_funcs: Any) -> list[Any]:
    one = isinstance(reward_funcs, str) or not isinstance(reward_funcs, Sequence)
    return [reward_funcs] if one else list(reward_funcs)


def make_scorer(
    config: Config,
    reward_funcs: Any,
    tokenizers: Sequence[Any] | None,
    device: torch.device,
    stopping: Callable[[], bool] = lambda: False,
) -> Scorer:
    """``stopping``: whether the run is asked to stop; reward servers that do not answer are then not waited for."""
    specs = _listed(config.reward.functions if reward_funcs is None else reward_funcs)
    tokenizers = [None] * len(specs) if tokenizers is None else _listed(tokenizers)
    if len(tokenizers) != len(specs):
        raise ConfigError(f"reward_processing_classes has {len(tokenizers)} entries for {len(specs)} reward_funcs")
    functions: list[RewardFunction] = [
        remote_reward(spec, config.reward, stopping)
        if is_url(spec)
        else resolve_reward(
            spec,
            tokenizer=tokenizer,
            device=device,
            batch_size=config.reward.batch_size,
            trust_remote_code=spec in config.reward.trust_remote_code if isinstance(spec, str) else False,
        )
        for spec, tokenizer in zip(specs, tokenizers, strict=True)
    ]
    return Scorer(functions, config.reward.weights, config.reward.missing_eos_penalty)
