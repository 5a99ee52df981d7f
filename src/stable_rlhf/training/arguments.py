"""Checks of the objects given to `SAFETrainer`: an argument of another kind is named, with what to give."""

from __future__ import annotations

import dataclasses
import difflib
import inspect
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

from peft import LoraConfig, PeftConfig, PeftModel
from torch import nn
from transformers import PreTrainedTokenizerBase, ProcessorMixin, TrainerCallback

from stable_rlhf.config import PRESETS, Config, ModelConfig, probable_setting
from stable_rlhf.errors import ConfigError
from stable_rlhf.rewards import listed
from stable_rlhf.text import kind_of, quoted
from stable_rlhf.training.scoring import GivenRewards

_BY_FIELD = {"r": "lora_r", "lora_alpha": "lora_alpha", "target_modules": "lora_target_modules"}
"""Fields of LoraConfig that have a setting of their own. The others are in `model.lora_options`."""

_NOT_CHOSEN = ("task_type", "base_model_name_or_path", "peft_version", "auto_mapping", "inference_mode")
"""Fields that PEFT fills in itself where an adapter is made. The task is a causal language model's always."""


_ELSEWHERE = {
    "config": "args",
    "tokenizer": "processing_class",
    "reward_model": "reward_funcs",
    "reward_fn": "reward_funcs",
    "dataset": "train_dataset",
    "reward_tokenizer": "reward_processing_classes",
    "ref_model": "",
    "value_model": "",
}
"""Arguments of other trainers, and what they are here; "" for those of models that `SAFETrainer` makes itself."""


class KnownArguments:
    """Base class of the trainer: an argument that it does not have is a ConfigError with the one that was meant.

    Subclasses may have others: those of their own ``__init__``, and any where that takes any.
    """

    def __new__(cls, *values: Any, **given: Any) -> Self:
        parameters = inspect.signature(cls).parameters
        if any(each.kind in (each.VAR_POSITIONAL, each.VAR_KEYWORD) for each in parameters.values()):
            return super().__new__(cls)
        has = list(parameters)
        for name in given:
            if name not in has:
                raise ConfigError(f"SAFETrainer({name}={quoted(given[name])}): {_meant(name, has)}")
        if len(values) > len(has) or set(given) & set(has[: len(values)]):
            raise ConfigError(f"SAFETrainer: an argument is given twice, or too many are; it has {', '.join(has)}")
        if not values and "model" in has and "model" not in given:
            raise ConfigError("SAFETrainer(): model is missing; give a causal language model, or its name")
        return super().__new__(cls)


def _meant(name: str, has: Sequence[str]) -> str:
    """What an argument that there is not was probably meant to be: another argument, or a setting."""
    if _ELSEWHERE.get(name) == "":
        return "unknown argument; none is needed: the reference and the value heads are made from the model"
    if name in [field.name for field in dataclasses.fields(Config)]:
        return f"is a setting: give args=Config({name}=...)"
    close = difflib.get_close_matches(name, has, n=1, cutoff=0.8)
    if meant := _ELSEWHERE.get(name) or "".join(close):
        return f"unknown argument. Did you mean {meant}?"
    if setting := probable_setting(name):
        end = "" if setting.endswith("?") else "."
        return f"unknown argument{setting}{end} Settings are given in args=Config(...)"
    return f"unknown argument; SAFETrainer has {', '.join(has)}"


def check_arguments(
    model: Any,
    rewards: GivenRewards,
    args: Any,
    processing_class: Any,
    callbacks: Any,
    peft_config: Any,
) -> None:
    """Raises ConfigError for the first argument of another kind than `SAFETrainer` takes."""
    if args is not None and not isinstance(args, Config):
        preset = f"Config(preset={args!r})" if args in list(PRESETS) else "Config(preset='safe', max_steps=100)"
        preset = "Config(**args)" if isinstance(args, Mapping) else preset
        raise _wrong("args", args, f"give {preset}, or Config.from_yaml(FILE)")
    if not isinstance(model, str | Path | nn.Module):
        raise _wrong("model", model, "give one causal language model, its folder, or its name on the hub")
    if isinstance(model, nn.Module) and not (isinstance(model, PeftModel) or hasattr(model, "config")):
        raise _wrong("model", model, "give a causal language model of Transformers, such as AutoModelForCausalLM loads")
    _check_tokenizer("processing_class", processing_class)
    _check_rewards("reward_", rewards.reward_funcs, rewards.reward_processing_classes)
    _check_rewards("gold_", rewards.gold_funcs, rewards.gold_processing_classes)
    if callbacks is not None and not isinstance(callbacks, Sequence):
        raise _wrong("callbacks", callbacks, "give a list of transformers.TrainerCallback objects")
    for callback in callbacks or []:
        if not (isinstance(callback, TrainerCallback) or _is_class_of(callback, TrainerCallback)):
            remedy = "each entry of the list must be a transformers.TrainerCallback; write a class with on_step_end"
            raise _wrong("callbacks", callback, remedy)
    if peft_config is not None and not isinstance(peft_config, LoraConfig):
        kind = "another adapter than LoRA" if isinstance(peft_config, PeftConfig) else "no adapter"
        raise _wrong("peft_config", peft_config, f"it is {kind}; give a peft.LoraConfig, or set model.lora_r")


def as_settings(settings: ModelConfig, adapter: LoraConfig) -> ModelConfig:
    """The model's settings with those of ``peft_config``, so that config.yaml has the adapter that is trained.

    Raises ConfigError where the settings ask for another adapter.
    """
    usual, given = LoraConfig().to_dict(), adapter.to_dict()
    own = {name for name, value in given.items() if value != usual.get(name)} - {*_BY_FIELD, *_NOT_CHOSEN}
    options = {name: _plain(given[name]) for name in sorted(own)}
    fields: dict[str, Any] = {"lora_r": adapter.r, "lora_alpha": float(adapter.lora_alpha)}
    targets = adapter.target_modules
    if isinstance(targets, str) and targets != "all-linear":  # a regular expression
        options["target_modules"] = targets
    fields["lora_target_modules"] = sorted(targets) if targets and not isinstance(targets, str) else None
    if targets is None:
        options["target_modules"] = None  # PEFT's own choice for the architecture
    recorded = dataclasses.replace(settings, **fields, lora_options=options or None)
    if settings.lora_r > 0 and settings != recorded:
        raise ConfigError(
            f"peft_config: model.lora_r={settings.lora_r!r} in args asks for an adapter too, and for another one; "
            "leave out peft_config or the settings model.lora_*"
        )
    return recorded


def _plain(value: Any) -> Any:
    """A value as config.yaml can hold it. An object becomes a text in angle brackets, which a resume refuses."""
    value = sorted(value) if isinstance(value, set) else value
    try:
        return json.loads(json.dumps(value))
    except TypeError:
        return f"<{type(value).__name__}>"


def _check_rewards(prefix: str, functions: Any, tokenizers: Any) -> None:
    """Checks ``reward_funcs`` with ``reward_processing_classes``, or those of another ``prefix``."""
    for function in [] if functions is None else listed(functions):
        if not (isinstance(function, str | Path) or callable(function)):
            remedy = "give functions, names such as 'package.module:function', or sequence-classification models"
            raise _wrong(f"{prefix}funcs", function, remedy)
    if isinstance(tokenizers, str) or not isinstance(tokenizers, Sequence | None):
        remedy = "give a list with a tokenizer or None for each reward"
        raise _wrong(f"{prefix}processing_classes", tokenizers, remedy)
    for tokenizer in tokenizers or []:
        _check_tokenizer(f"{prefix}processing_classes", tokenizer)


def _check_tokenizer(name: str, value: Any) -> None:
    if value is not None and not isinstance(value, PreTrainedTokenizerBase | ProcessorMixin):
        raise _wrong(name, value, "give a tokenizer, such as AutoTokenizer.from_pretrained(NAME), or None")


def _is_class_of(value: Any, kind: type) -> bool:
    return isinstance(value, type) and issubclass(value, kind)


def _wrong(argument: str, value: Any, remedy: str) -> ConfigError:
    return ConfigError(f"SAFETrainer({argument}={quoted(value)}): is {kind_of(value)}; {remedy}")
