"""Reward functions: finds the function or model that a setting or argument names."""

from __future__ import annotations

import importlib
import os
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from stable_rlhf.errors import RewardInputError
from stable_rlhf.rewards.model import BUILTIN_MODEL, RewardModel, load_reward_model

_IMPORT_PATH = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_][\w.]*")


@dataclass(frozen=True, kw_only=True)
class RewardFunction:
    """A reward function with the name that errors and metrics (rewards/<name>/mean) give it."""

    name: str
    function: Callable[..., Any]


def resolve_reward(
    spec: Any,
    *,
    name: str | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    batch_size: int = 16,
    max_length: int | None = None,
    trust_remote_code: bool = False,
) -> RewardFunction:
    """Finds or loads the reward function that a user names.

    spec: a callable; "package.module:function" (the current directory can be imported from); "builtin", this package's
        reward model; a folder or hub name of a sequence-classification model in safetensors with one output; or such a
        model itself, then with its `tokenizer`.
    tokenizer: for a folder or hub name, instead of its own. device, dtype: where a model from a folder or hub name is
        put, and its weights (its head stays float32). batch_size, max_length (tokens): see RewardModel.
    trust_remote_code: run code that comes with this one model. Off: such a model is refused.

    Raises RewardInputError if it cannot be loaded exactly as named. A head that is not in the checkpoint is an error.
    """
    settings = {"batch_size": batch_size, "max_length": max_length}
    if isinstance(spec, torch.nn.Module):
        if tokenizer is None:
            kind = type(spec).__name__
            raise RewardInputError(f"the reward model {kind} needs its tokenizer: set reward_processing_classes.")
        name = name or Path(getattr(spec.config, "_name_or_path", "")).name or type(spec).__name__
        return RewardFunction(name=name, function=RewardModel(spec, tokenizer, name=name, **settings))
    if callable(spec):
        return RewardFunction(name=name or getattr(spec, "__name__", type(spec).__name__), function=spec)
    if not isinstance(spec, str | os.PathLike) or not os.fspath(spec):
        raise RewardInputError(f"the reward {spec!r} is neither a callable, a model, a name nor a path.")
    text = os.fspath(spec)
    if _IMPORT_PATH.fullmatch(text) and not Path(text).exists():
        return RewardFunction(name=name or text.rpartition(":")[2], function=_import(text))
    path = str(BUILTIN_MODEL if text == "builtin" else Path(text).expanduser() if text.startswith("~") else text)
    model, own_tokenizer = load_reward_model(path, text, torch.device(device), dtype, trust_remote_code)
    name = name or Path(text).resolve().name
    return RewardFunction(name=name, function=RewardModel(model, tokenizer or own_tokenizer, name=name, **settings))


def _import(path: str) -> Callable[..., Any]:
    module_name, _, attribute = path.partition(":")
    if os.getcwd() not in sys.path:  # at the end, so that no file next to the user's shadows an installed package
        sys.path.append(os.getcwd())
    importlib.invalidate_caches()
    try:
        value: Any = importlib.import_module(module_name)
    except Exception as error:
        what = f"importing {module_name!r} (from {os.getcwd()} or installed packages) failed"
        raise RewardInputError(f"reward {path!r}: {what}: {type(error).__name__}: {error}.") from error
    for part in attribute.split("."):
        if not hasattr(value, part):
            raise RewardInputError(
                f"reward {path!r}: {module_name!r} has no {attribute!r}. Check the name after the colon."
            )
        value = getattr(value, part)
    if not callable(value):
        raise RewardInputError(f"reward {path!r} is a {type(value).__name__}, which cannot be called. Name a function.")
    return value
