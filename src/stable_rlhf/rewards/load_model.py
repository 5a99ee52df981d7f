"""Loads reward models and their tokenizers; the adapter of a LoRA reward model is merged."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer
from transformers.utils.hub import cached_file
from transformers.utils.peft_utils import find_adapter_config_file

from stable_rlhf.errors import RewardInputError
from stable_rlhf.files import ASSETS
from stable_rlhf.hardware import shortage
from stable_rlhf.hub import hub_fault, looked_up
from stable_rlhf.policy import peft_unwarned
from stable_rlhf.rewards.model import require_one_label

BUILTIN_MODEL = ASSETS / "reward_model"

_KINDS = "a sequence-classification model in safetensors (folder or hub name), 'builtin', or 'module:function'"
_ADAPTER = "adapter_model.safetensors"


def load_reward_model(
    path: str, spec: str, device: torch.device, dtype: torch.dtype, trust_remote_code: bool
) -> tuple[Any, Any]:
    """(model, its tokenizer) from safetensors. A LoRA adapter is merged into its base model.

    Raises RewardInputError where it cannot be loaded, has more than one output, or lacks a weight.
    """
    try:
        with looked_up(path):
            adapter = find_adapter_config_file(path)
            load = _whole if adapter is None else _merged
            model, missing, tokenizer_path = load(path, spec, dtype, trust_remote_code)
    except RewardInputError:
        raise
    except Exception as error:
        if shortage(error):
            raise
        raise RewardInputError(
            f"the reward model {spec!r} could not be loaded: {_said(error)} A reward is {_KINDS}."
        ) from error
    if missing:
        remedy = "Give a trained reward model (scripts/train_reward_model.py makes one)."
        lacks = f"lacks {len(missing)} weights ({', '.join(missing[:3])})"
        raise RewardInputError(f"the reward model {spec!r} {lacks}: they would be random, and so the reward. {remedy}")
    tokenizer = load_reward_tokenizer(tokenizer_path, spec, trust_remote_code)
    if isinstance(head := getattr(model, "score", None), torch.nn.Linear) and dtype != torch.float32:
        # bfloat16 has 8 bits: a reward of 3 would be rounded to steps of 1/64, and near answers would tie.
        head.float().register_forward_pre_hook(lambda _module, inputs: (inputs[0].float(),))
    return model.requires_grad_(False).to(device), tokenizer


def load_reward_tokenizer(path: str, name: str, trust_remote_code: bool = False) -> Any:
    """The tokenizer at a reward model's path. Raises RewardInputError where there is none."""
    what = f"the reward model {name} needs its tokenizer"
    if not path:
        raise RewardInputError(f"{what}: set reward_processing_classes.")
    try:
        with looked_up(path):
            return AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)
    except Exception as error:
        raise RewardInputError(
            f"{what}, which could not be loaded from {path!r}: {_said(error)} Save it next to the model's weights, or "
            "set reward_processing_classes."
        ) from error


def _whole(path: str, spec: str, dtype: torch.dtype, trust_remote_code: bool) -> tuple[Any, list[str], str]:
    """(model, names of the weights that it lacks, where its tokenizer is)."""
    trust = {"trust_remote_code": trust_remote_code}
    config = AutoConfig.from_pretrained(path, **trust)
    require_one_label(config, spec)
    model, missing = _loaded(path, config, dtype, trust)
    return model, missing, path


def _merged(path: str, spec: str, dtype: torch.dtype, trust_remote_code: bool) -> tuple[Any, list[str], str]:
    """The same of an adapter, whose base model it names."""
    trust = {"trust_remote_code": trust_remote_code}
    base = str(PeftConfig.from_pretrained(path).base_model_name_or_path)
    with looked_up(base):
        return _with_base(path, base, spec, dtype, trust)


def _with_base(
    path: str, base: str, spec: str, dtype: torch.dtype, trust: dict[str, bool]
) -> tuple[Any, list[str], str]:
    weights = cached_file(path, _ADAPTER, _raise_exceptions_for_missing_entries=False)
    if weights is None:  # the older format can run code when it is read
        raise RewardInputError(f"the reward model {spec!r} is an adapter without {_ADAPTER}: save it as safetensors.")
    with safe_open(weights, framework="pt") as file:
        given = set(file.keys())
    try:
        known = AutoConfig.from_pretrained(base, num_labels=1, **trust)
    except (OSError, ValueError) as error:
        raise RewardInputError(
            f"the reward model {spec!r} is an adapter of {base!r}, which could not be loaded: {_said(error)} Put the "
            "model there, or merge the adapter where it is."
        ) from error
    model, missing = _loaded(base, known, dtype, trust)
    missing = [name for name in missing if not any(key.endswith(f".{name}") for key in given)]
    with peft_unwarned():
        merged = PeftModel.from_pretrained(model, path).merge_and_unload()  # pyright: ignore[reportCallIssue]
    own = any((Path(path) / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json"))
    return merged, missing, path if own or not Path(path).is_dir() else base


def _loaded(path: str, config: Any, dtype: torch.dtype, trust: dict[str, bool]) -> tuple[Any, list[str]]:
    # safetensors only: the older format can run code when it is read
    settings = {"dtype": dtype, "use_safetensors": True, "output_loading_info": True} | trust
    model, info = AutoModelForSequenceClassification.from_pretrained(path, config=config, **settings)
    return model, sorted(info["missing_keys"])


def _said(error: Exception) -> str:
    """An exception's name and text on one line. OSErrors and ValueErrors of Transformers are sentences already."""
    if (fault := hub_fault(error)) is not None:
        return f"{fault}."
    text = " ".join(str(error).split()).rstrip(".") + "."
    return text if isinstance(error, OSError | ValueError) else f"{type(error).__name__}: {text}"
