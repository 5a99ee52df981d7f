"""Reward functions: finds the function or model that a setting or argument names."""

from __future__ import annotations

import functools
import importlib
import os
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import PreTrainedTokenizerBase

from stable_rlhf.errors import RewardInputError
from stable_rlhf.rewards.load_model import BUILTIN_MODEL, load_reward_model, load_reward_tokenizer
from stable_rlhf.rewards.model import RewardModel
from stable_rlhf.text import kind_of

_IMPORT_PATH = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_][\w.]*")


@dataclass(frozen=True, kw_only=True)
class RewardFunction:
    """A reward function with the name that errors and metrics (rewards/<name>/mean) give it.

    special_tokens: whether it gets completions with their special tokens. kind: what errors call it.
    """

    name: str
    function: Callable[..., Any]
    special_tokens: bool = False
    kind: Literal["reward function", "gold reward"] = "reward function"

    @property
    def title(self) -> str:
        """What errors begin with, such as "gold reward 'judge'"."""
        return f"{self.kind} {self.name!r}"


def resolve_reward(
    spec: Any,
    *,
    name: str | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    batch_size: int = 16,
    max_length: int | None = None,
    append_eos: bool = False,
    skip_special_tokens: bool = True,
    trust_remote_code: bool = False,
) -> RewardFunction:
    """Finds or loads the reward function that a user names.

    spec: a callable; "package.module:function" (the current directory can be imported from); "builtin", this package's
        reward model; a folder or hub name of a sequence-classification model in safetensors with one output; or such a
        model itself, then with its `tokenizer` (None: that of the folder or hub name it came from). A LoRA adapter's
        folder or hub name is such a model too: the adapter is merged.
    tokenizer: for a folder or hub name, instead of its own. device, dtype: where a model from a folder or hub name is
        put, and its weights (its head stays float32). batch_size, max_length (tokens), append_eos: see RewardModel.
    skip_special_tokens: for a callable: whether completions come without special tokens. Its attribute of this name
        says it for one function.
    trust_remote_code: run code that comes with this one model. Off: such a model is refused.

    Raises RewardInputError if it cannot be loaded exactly as named. A head that is not in the checkpoint is an error.
    """
    settings: dict[str, Any] = {"batch_size": batch_size, "max_length": max_length, "append_eos": append_eos}
    if isinstance(spec, torch.nn.Module) and hasattr(spec, "config"):
        path = str(getattr(spec.config, "_name_or_path", ""))
        name = name or Path(path).name or type(spec).__name__
        reads: Any = tokenizer or load_reward_tokenizer(path, type(spec).__name__, trust_remote_code)
        return RewardFunction(name=name, function=RewardModel(spec, reads, name=name, **settings))
    if callable(spec):
        return _named(spec, name, skip_special_tokens)
    if not isinstance(spec, str | os.PathLike) or not os.fspath(spec):
        raise RewardInputError(f"the reward {spec!r} is neither a callable, a model, a name nor a path.")
    text = os.fspath(spec)
    if (meant := _function_in_a_file(text)) is not None:
        raise RewardInputError(f"reward {text!r}: a function is named MODULE:FUNCTION. Did you mean {meant}?")
    if _IMPORT_PATH.fullmatch(text) and not Path(text).exists():
        return _named(_import(text), name or text.rpartition(":")[2], skip_special_tokens)
    path = str(BUILTIN_MODEL if text == "builtin" else Path(text).expanduser() if text.startswith("~") else text)
    model, own_tokenizer = load_reward_model(path, text, torch.device(device), dtype, trust_remote_code)
    name = name or Path(text).resolve().name
    return RewardFunction(name=name, function=RewardModel(model, tokenizer or own_tokenizer, name=name, **settings))


def _function_in_a_file(text: str) -> str | None:
    """MODULE:FUNCTION where Python code in a file is named in another way: with dots only, or by the file."""
    path, _, attribute = text.removeprefix("./").partition(":")
    head, _, last = path.rpartition(".")
    module, attribute = (head, attribute or "FUNCTION") if last == "py" else (path, attribute)
    if attribute and last != "py":
        return None  # MODULE:FUNCTION already
    for name, function in ((module, attribute or "FUNCTION"), (head, last)):
        if name and Path(*name.replace("/", ".").split(".")).with_suffix(".py").is_file():
            return f"{name.replace('/', '.')}:{function}"
    return None


def _named(function: Callable[..., Any], name: str | None, skip_special_tokens: bool) -> RewardFunction:
    inner: Any = function
    while isinstance(inner, functools.partial):
        inner = inner.func
    skips = getattr(function, "skip_special_tokens", getattr(inner, "skip_special_tokens", skip_special_tokens))
    own = getattr(inner, "__name__", type(inner).__name__)
    return RewardFunction(name=name or str(own), function=function, special_tokens=not skips)


def _import(path: str) -> Callable[..., Any]:
    module_name, _, attribute = path.partition(":")
    if os.getcwd() not in sys.path:  # at the end, so that no file next to the user's shadows an installed package
        sys.path.append(os.getcwd())
    importlib.invalidate_caches()
    try:
        value: Any = importlib.import_module(module_name)
    except (Exception, SystemExit) as error:
        what = f"importing {module_name!r} (from {os.getcwd()} or installed packages) failed"
        raise RewardInputError(f"reward {path!r}: {what}: {type(error).__name__}: {error}.") from error
    for part in attribute.split("."):
        if not hasattr(value, part):
            raise RewardInputError(
                f"reward {path!r}: {module_name!r} has no {attribute!r}. Check the name after the colon."
            )
        value = getattr(value, part)
    if not callable(value):
        raise RewardInputError(f"reward {path!r} is {kind_of(value)}, which cannot be called. Name a function.")
    return value
