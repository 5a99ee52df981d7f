"""The scorer that a run's settings and objects ask for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from stable_rlhf.config import Config, is_url
from stable_rlhf.errors import ConfigError
from stable_rlhf.rewards.client import remote_reward
from stable_rlhf.rewards.functions import RewardFunction, resolve_reward
from stable_rlhf.rewards.scorer import Scorer


def listed(reward_funcs: Any) -> list[Any]:
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
    specs = listed(config.reward.functions if reward_funcs is None else reward_funcs)
    tokenizers = [None] * len(specs) if tokenizers is None else listed(tokenizers)
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
