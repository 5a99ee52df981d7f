"""Settings that name the objects given to `SAFETrainer`."""

from __future__ import annotations

import dataclasses
import difflib
import inspect
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel
from transformers.integrations.integration_utils import get_available_reporting_integrations

from stable_rlhf.config import Config, only_with
from stable_rlhf.errors import ConfigError
from stable_rlhf.hardware import resolve_device
from stable_rlhf.policy import check_model
from stable_rlhf.rewards import Scorer, listed, remote_reward
from stable_rlhf.training.arguments import as_settings


def as_given(
    config: Config,
    model: Any,
    reward_funcs: Any,
    train: Any,
    peft_config: LoraConfig | None = None,
    gold_funcs: Any = None,
) -> Config:
    """Puts the names of the model, rewards and data actually used into the settings, so that config.yaml is true.

    An object that was not loaded by name gets a name that cannot be loaded: `stable-rlhf resume` then refuses it
    instead of taking something else. Raises ConfigError.
    """
    base: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    name = model if isinstance(model, str) else base.config._name_or_path or f"<{type(base).__name__}>"
    if (
        isinstance(model, str) and Path(name).expanduser().is_dir()
    ):  # a run is resumed and its adapter loaded from anywhere
        name = os.path.abspath(Path(name).expanduser())
    settings = dataclasses.replace(config.model, name=name)
    settings.check_source(given_as_object=not isinstance(model, str))
    given: dict[str, Any] = {"model": settings if peft_config is None else as_settings(settings, peft_config)}
    rewards = listed(config.reward.functions if reward_funcs is None else reward_funcs)
    gold = listed(config.reward.gold if gold_funcs is None else gold_funcs)
    _refuse_trained_gold(gold, rewards)
    named: dict[str, Any] = {}
    if reward_funcs is not None:
        named = {"functions": [_reward_name(function) for function in rewards], "url": None}
    if gold_funcs is not None:
        named["gold"] = [_reward_name(function) for function in gold]
    given["reward"] = dataclasses.replace(config.reward, **named)
    if train is not None:
        given["data"] = dataclasses.replace(config.data, train="<train_dataset>")
    config = dataclasses.replace(config, **given)
    weights, count = config.reward.weights, len(config.reward.functions)
    if weights is not None and len(weights) != count:
        raise ConfigError(f"reward.weights={weights!r}: give a list of {count}, one weight for each reward")
    for name in ("timeout", "retries", "max_wait", "token_env", "columns"):
        condition = "one of reward.functions is the URL of a server, or one of reward.gold"
        only_with("reward", config.reward, name, bool(config.reward.servers), condition)
    return config


def probe_servers(config: Config) -> None:
    """Tries each reward server, before a model loads. Raises RewardError for one that is not there."""
    for server in config.reward.servers:
        remote_reward(server, config.reward).function.probe()


def check_named(config: Config, model: Any) -> None:
    """Raises ConfigError for a device, tracker or model that the settings name and that is not there.

    It is called before anything loads.
    """
    resolve_device(config.model.device)
    available = get_available_reporting_integrations()
    if missing := [name for name in config.log.report_to if name not in available]:
        raise ConfigError(
            f"log.report_to={config.log.report_to!r}: {missing[0]} is not a tracker that is installed here; install "
            f"it, or choose from {', '.join(sorted(available)) or 'none'}"
        )
    if isinstance(model, str):
        check_model(config.model)


def check_held_out(config: Config, held_out: Any) -> None:
    """Raises ConfigError where training or gold rewards are to be evaluated and there are no held-out prompts."""
    asked = {"eval_steps": config.eval_steps, "reward.gold": config.reward.gold}
    for name, value in asked.items():
        if value and held_out is None:
            raise ConfigError(f"{name}={value!r}: there are no held-out prompts; {held_out_remedy(config)}")


def held_out_remedy(config: Config) -> str:
    """What gives a run held-out prompts: none can be held out of a stream."""
    if config.data.streaming:
        return "give eval_dataset, or name held-out rows in data.eval with data.eval_size above 0"
    return "give eval_dataset, or name data.train with data.eval_size above 0"


def check_columns(config: Config, rows: Any) -> None:
    """Raises ConfigError for a column that a reward server is to be sent and the data set does not have."""
    known = [name for name in getattr(rows, "column_names", config.reward.columns) if name != "prompt"]
    for name in config.reward.columns:
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            meant = f". Did you mean {close[0]}?" if close else f"; it has {', '.join(known) or 'no other column'}"
            raise ConfigError(f"reward.columns={config.reward.columns!r}: the data set has no column {name!r}{meant}")


def check_asked(scorer: Scorer | None, *prompts: Any) -> None:
    """Raises RewardInputError for a reward function that asks for a column which one of the data sets does not have.

    ``prompts``: each data set's, None for one that is not there. The columns of a stream show with its rows.
    """
    for rows in (getattr(given, "dataset", None) for given in prompts):
        if rows is not None and scorer is not None:
            scorer.check_columns([name for name in rows.column_names if name != "prompt"])


def _refuse_trained_gold(gold: Sequence[Any], rewards: Sequence[Any]) -> None:
    """Raises ConfigError for a gold reward that is also a reward: it would be trained on."""

    def same(one: Any, other: Any) -> bool:
        named = any(isinstance(each, str | Path) for each in (one, other))
        if named and not any(isinstance(each, torch.nn.Module) for each in (one, other)):
            return _place(one) == _place(other)
        return one is other or (inspect.ismethod(one) and one == other)

    for function in gold:
        if any(same(function, reward) for reward in rewards):
            raise ConfigError(
                f"reward.gold: {_reward_name(function)!r} is one of the rewards (reward.functions), so it is trained "
                "on; a gold reward is only measured: leave it out of one of them"
            )


def _place(reward: Any) -> str:
    """The name of a reward, of a folder the one path that it has whichever way it is written."""
    name = _reward_name(reward)
    return os.path.realpath(name) if os.path.exists(name) else name


def _reward_name(function: Any) -> str:
    if isinstance(function, str | Path):
        return str(function)
    if isinstance(function, torch.nn.Module):
        return getattr(getattr(function, "config", None), "_name_or_path", "") or f"<{type(function).__name__}>"
    own = function if hasattr(function, "__qualname__") else type(function)
    return f"{own.__module__}:{own.__qualname__}"
