"""Loads policy and tokenizer, and refuses models that cannot be trained."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel
from safetensors import SafetensorError
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from stable_rlhf.config import ModelConfig
from stable_rlhf.errors import ConfigError
from stable_rlhf.files import ASSETS
from stable_rlhf.hardware import resolve_device
from stable_rlhf.hub import hub_fault, looked_up
from stable_rlhf.policy.adapter import (
    adapter_base,
    adapter_folder,
    check_adapter,
    check_base,
    load_adapter,
    own_logits,
    with_adapter,
)
from stable_rlhf.policy.self_check import foreign_errors
from stable_rlhf.policy.transformer import causal_lm

HEAD_TOLERANCE = 1e-3
"""Largest difference, in nats, between the model's own log-probs and ours that the check at loading accepts: rounding
in float32 stays below 1e-4, and a head with a bias, a scale or a soft cap is far above."""

_TOKENIZER_FILES = ("*token*", "vocab*", "merges.txt", "*.model", "tekken.json", "*.tiktoken", "*.vocab", "*.bpe")
_GIVE_TOKENIZER = (
    "Save that of its base model there, by AutoTokenizer.from_pretrained(BASE).save_pretrained(FOLDER), or give it as "
    "processing_class to SAFETrainer"
)


def check_model(config: ModelConfig) -> None:
    """Raises ConfigError for a name that is not a model's, before anything else loads."""
    if config.name == "builtin" or config.gguf_file is not None:  # reading a GGUF file's settings is reading all of it
        return
    if not config.name or (config.name.startswith((".", "/", "~")) and not Path(config.name).is_dir()):
        raise _not_a_model(config, "there is no such folder")
    with model_named(config):
        name, arguments = policy_source(config)
        AutoConfig.from_pretrained(name, **arguments)


@contextlib.contextmanager
def model_named(config: ModelConfig) -> Iterator[None]:
    """Turns Transformers' errors about a model into a ConfigError that names the model.

    These are errors about settings, a tokenizer, weights or a GGUF file that are missing, damaged or not those of a
    language model.
    """
    try:
        with looked_up(*_names(config)):
            yield
    except (OSError, ValueError, ImportError, SafetensorError) as error:  # ImportError: of the package gguf
        raise _not_a_model(config, hub_fault(error) or str(error)) from error


def _names(config: ModelConfig) -> list[str]:
    """What is loaded by name: the model, and the base of an adapter that is a folder."""
    if config.name == "builtin":
        return []
    folder = Path(config.name)
    has_base = config.gguf_file is None and (folder / "adapter_config.json").is_file()
    return [config.name, adapter_base(folder)[0]] if has_base else [config.name]


def _not_a_model(config: ModelConfig, fault: str) -> ConfigError:
    setting = f"model.name={config.name!r}" + (f", model.gguf_file={config.gguf_file!r}" if config.gguf_file else "")
    remedy = "give builtin, the folder of a causal language model in safetensors or GGUF, or a hub name"
    return ConfigError(f"{setting}: {fault.rstrip('.')}; {remedy}")


def load_tokenizer(config: ModelConfig) -> PreTrainedTokenizerBase:
    """The policy's tokenizer. Raises ConfigError where the model has none."""
    name, arguments = policy_source(config)
    with model_named(config):
        folder = adapter_folder(config)
        if folder and (folder / "tokenizer_config.json").is_file():
            name, arguments = str(folder), {"trust_remote_code": config.trust_remote_code}
    if config.gguf_file is None and os.path.isdir(name) and not _has_tokenizer(Path(name)):
        raise ConfigError(f"model.name={config.name!r}: {name} holds no tokenizer. {_GIVE_TOKENIZER}")
    with model_named(config):
        tokenizer = AutoTokenizer.from_pretrained(name, **arguments)
    return prepare_tokenizer(tokenizer)


def _has_tokenizer(folder: Path) -> bool:
    """Whether a folder has a file of a tokenizer, by the names that Transformers' tokenizers save themselves under."""
    return any(file for pattern in _TOKENIZER_FILES for file in folder.glob(pattern))


def prepare_tokenizer(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """Sets padding to the left, and the pad token to EOS where there is none.

    Masks are built from the first EOS, not from the pad id. Raises ConfigError without an EOS token, and for a
    tokenizer of special tokens alone, as Transformers makes it where the files of a vocabulary are missing.
    """
    if len(tokenizer) <= len(tokenizer.all_special_tokens):
        raise ConfigError(
            f"the tokenizer of {tokenizer.name_or_path!r} has no vocabulary: it knows only its special tokens. "
            f"{_GIVE_TOKENIZER}"
        )
    if tokenizer.eos_token_id is None:
        raise ConfigError(
            f"the tokenizer of {tokenizer.name_or_path!r} has no EOS token, so no completion could end: set eos_token"
        )
    tokenizer.padding_side = "left"
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_policy(config: ModelConfig, peft_config: LoraConfig | None = None) -> tuple[Any, bool]:
    """Loads the policy: (model on its device, whether to run it under bfloat16 autocast).

    Weights come only from safetensors or GGUF. Raises ConfigError for a device, a model, weights or an adapter's target
    modules that are not there.
    """
    name, arguments = policy_source(config)
    device = resolve_device(config.device)
    dtype, low = policy_dtype(config, adapter=peft_config is not None)
    with model_named(config):
        model: Any = AutoModelForCausalLM.from_pretrained(name, dtype=dtype, use_safetensors=True, **arguments)
        folder = adapter_folder(config)
    if config.gguf_file is not None:  # dequantised on loading, but it still calls itself quantised: no saving then
        model.hf_quantizer = None
        model.is_quantized = False
        model.config.__dict__.pop("quantization_config", None)
    model = model.to(device)
    return wrap_policy(load_adapter(model, folder, config) if folder else model, config, peft_config), low


def policy_dtype(config: ModelConfig, adapter: bool = False) -> tuple[torch.dtype, bool]:
    """(dtype in which weights are loaded, whether to run under bfloat16 autocast)."""
    low = config.dtype == "bfloat16" or (config.dtype == "auto" and resolve_device(config.device).type == "cuda")
    # Weights that are trained stay float32: bfloat16 has 8 bits of mantissa, and a step of 1e-5 would round away.
    adapter = adapter or config.lora_r > 0 or (low and adapter_folder(config) is not None)
    return torch.bfloat16 if low and adapter else torch.float32, low


def wrap_policy(model: Any, config: ModelConfig, peft_config: LoraConfig | None = None) -> Any:
    """The model with the adapter that the settings or ``peft_config`` ask for.

    Raises ConfigError for a model or an adapter that cannot be trained.
    """
    if getattr(model, "_hf_peft_config_loaded", False):
        raise ConfigError(
            f"model.name={config.name!r}: Transformers has loaded an adapter into it, which would stay frozen; give "
            "the folder, or PeftModel.from_pretrained(..., is_trainable=True)"
        )
    with foreign_errors(causal_lm(model), "a forward of a few tokens"):
        check_lm_head(model)
        before = own_logits(model)
    if isinstance(model, PeftModel):
        return check_adapter(model)
    adapted = with_adapter(model, config, peft_config)
    if not isinstance(adapted, PeftModel):
        return adapted
    check_adapter(adapted)
    check_base(adapted, before)
    return adapted


def given_policy(model: Any, config: ModelConfig, peft_config: LoraConfig | None = None) -> tuple[Any, bool]:
    """The same as ``load_policy`` for a model given as an object; ``model.dtype=auto`` is the object's own."""
    if config.device != "auto" or torch.cuda.is_available():
        model = model.to(resolve_device(config.device))
    own = next(model.parameters()).dtype
    low = own == torch.bfloat16 if config.dtype == "auto" else config.dtype == "bfloat16"
    model = wrap_policy(model if low or own == torch.float32 else model.float(), config, peft_config)
    for parameter in model.parameters():
        if parameter.requires_grad:  # trained weights are float32: see load_policy
            parameter.data = parameter.data.float()
    return model, low


@torch.no_grad()
def check_lm_head(model: Any) -> None:
    """Raises ConfigError unless logits = hidden @ lm_head.weight.T, which is what the chunked head computes."""
    lm = causal_lm(model.eval())
    head = lm.get_output_embeddings()
    device = next(lm.parameters()).device
    ids = torch.arange(2, 10, device=device)[None] % head.weight.shape[0]
    own = lm(input_ids=ids, use_cache=False).logits
    hidden = lm.get_decoder()(input_ids=ids, use_cache=False).last_hidden_state
    ours = nn.functional.linear(hidden, head.weight)  # in the model's own precision: the very product, or another head
    difference = (own.float().log_softmax(-1) - ours.float().log_softmax(-1)).abs().amax().item()
    tolerance = HEAD_TOLERANCE if own.dtype == torch.float32 else 100 * HEAD_TOLERANCE
    if not difference < tolerance:
        raise ConfigError(
            f"{type(lm).__name__}: its logits differ from hidden @ lm_head.weight by {difference:.2g} nats (a bias, a "
            "scale or a soft cap on the logits), which the chunked LM head does not compute; choose another model"
        )


def policy_source(config: ModelConfig) -> tuple[str, dict[str, Any]]:
    """(name, arguments) of the model's own weights: of ``model.name``, or of the model that an adapter belongs to."""
    if config.name == "builtin":
        return str(ASSETS / "policy"), {}
    arguments: dict[str, Any] = {"trust_remote_code": config.trust_remote_code}
    if folder := adapter_folder(config):
        name, own = adapter_base(folder)
        return name, arguments | own
    if config.revision is not None:
        arguments["revision"] = config.revision
    if config.gguf_file is not None:
        arguments["gguf_file"] = config.gguf_file
    return config.name, arguments
