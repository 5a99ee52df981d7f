"""Builds a run's scorer from its settings and the objects it was given."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch

from stable_rlhf.config import RewardConfig, is_url, only_with
from stable_rlhf.errors import ConfigError
from stable_rlhf.rewards.client import RemoteReward, remote_reward
from stable_rlhf.rewards.functions import RewardFunction, resolve_reward
from stable_rlhf.rewards.model import RewardModel
from stable_rlhf.rewards.scorer import Scorer
from stable_rlhf.user_code import RandomStream, Shield


def listed(reward_funcs: Any) -> list[Any]:
    """A list of what may be one object or a sequence of them."""
    one = isinstance(reward_funcs, str) or not isinstance(reward_funcs, Sequence)
    return [reward_funcs] if one else list(reward_funcs)


def make_gold(
    settings: RewardConfig,
    gold_funcs: Any,
    tokenizers: Sequence[Any] | None,
    device: torch.device,
    rewards: Scorer,
    stopping: Callable[[], bool] = lambda: False,
    shield: Shield | None = None,
    trainer_state: Callable[[], Any] | None = None,
) -> Scorer | None:
    """The scorer of the gold rewards ``gold_funcs``, or of ``settings.gold`` where these are None; None without any.

    Only its ``answers`` are of use: weights and penalties are those of training. They are loaded inside ``shield``
    (None: one of their own), so that a run with them draws and computes as one without. ``rewards``: those of the run,
    made with ``alone`` False, and before: a module of both then does to the run what it does without gold. The other
    arguments and errors are those of `make_scorer`.
    """
    specs = listed(settings.gold if gold_funcs is None else gold_funcs)
    random, shield = RandomStream(0), Shield() if shield is None else shield
    with shield.around(random):
        functions = _resolved("gold_", specs, settings, tokenizers, device, stopping)
    functions = [replace(function, kind="gold reward") for function in functions]
    _check_texts(settings, [*rewards.functions, *functions])
    return Scorer(functions, shield=shield, random=random, trainer_state=trainer_state) if functions else None


def make_scorer(
    settings: RewardConfig,
    reward_funcs: Any,
    tokenizers: Sequence[Any] | None,
    device: torch.device,
    stopping: Callable[[], bool] = lambda: False,
    shield: Shield | None = None,
    random: RandomStream | None = None,
    trainer_state: Callable[[], Any] | None = None,
    alone: bool = True,
) -> Scorer:
    """The scorer of ``reward_funcs``, or of ``settings`` where these are None.

    ``tokenizers``: one for each reward, None elsewhere. ``stopping``: whether the run is asked to stop; a reward server
    that does not answer is then no longer waited for. ``shield``, ``random``, ``trainer_state``: see Scorer. ``alone``:
    False where `make_gold` follows, which checks the settings of texts for both. Raises ConfigError or
    RewardInputError.
    """
    specs = listed(settings.functions if reward_funcs is None else reward_funcs)
    functions = _resolved("reward_", specs, settings, tokenizers, device, stopping)
    if alone:
        _check_texts(settings, functions)
    return Scorer(
        functions,
        settings.weights,
        settings.missing_eos_penalty,
        aggregate=settings.aggregate,
        uncertainty_coef=settings.uncertainty_coef,
        shield=shield,
        random=random,
        trainer_state=trainer_state,
    )


def _check_texts(settings: RewardConfig, functions: Sequence[RewardFunction]) -> None:
    """Refuses a setting of the texts that none of the rewards reads."""
    models = any(isinstance(function.function, RewardModel) for function in functions)
    only_with("reward", settings, "append_eos", models, "one of the rewards is a reward model")
    own = any(not isinstance(function.function, RewardModel | RemoteReward) for function in functions)
    only_with("reward", settings, "skip_special_tokens", own, "one of the rewards is a function")


def _resolved(
    prefix: str,
    specs: Sequence[Any],
    settings: RewardConfig,
    tokenizers: Sequence[Any] | None,
    device: torch.device,
    stopping: Callable[[], bool],
) -> list[RewardFunction]:
    """The reward functions of what the user named. ``prefix``: of SAFETrainer's two arguments."""
    tokenizers = [None] * len(specs) if tokenizers is None else listed(tokenizers)
    if len(tokenizers) != len(specs):
        raise ConfigError(f"{prefix}processing_classes has {len(tokenizers)} entries for {len(specs)} {prefix}funcs")
    return [
        remote_reward(spec, settings, stopping)
        if is_url(spec)
        else resolve_reward(
            spec,
            tokenizer=tokenizer,
            device=device,
            batch_size=settings.batch_size,
            append_eos=settings.append_eos,
            skip_special_tokens=settings.skip_special_tokens,
            trust_remote_code=spec in settings.trust_remote_code if isinstance(spec, str) else False,
        )
        for spec, tokenizer in zip(specs, tokenizers, strict=True)
    ]
