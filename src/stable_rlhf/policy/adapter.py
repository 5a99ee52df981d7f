"""LoRA adapters: made by the settings, refused where they would not train, told apart from those that have learned."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import functools
import json
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import Tensor
from transformers.utils.peft_utils import find_adapter_config_file

from stable_rlhf.config import ModelConfig
from stable_rlhf.errors import ConfigError
from stable_rlhf.policy.self_check import foreign_errors, probe, tolerance
from stable_rlhf.policy.transformer import causal_lm


@contextlib.contextmanager
def peft_unwarned() -> Iterator[None]:
    """For calls of PEFT that wrap a model: PEFT 0.21 asks by a name that Transformers 5.23 has renamed, and users would
    read the warning."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        yield


def lora_config(config: ModelConfig) -> LoraConfig | None:
    """The adapter that the settings ask for; None for ``model.lora_r=0``."""
    if config.lora_r == 0:
        return None
    fields: dict[str, Any] = {
        "r": config.lora_r,
        "lora_alpha": config.lora_alpha or 2 * config.lora_r,
        "lora_dropout": 0.0,  # dropout would make the ratio of two different policies
        "target_modules": config.lora_target_modules or "all-linear",
        "task_type": "CAUSAL_LM",
    }
    options, known = config.lora_options or {}, [field.name for field in dataclasses.fields(LoraConfig)]
    for name, value in options.items():
        remedy = "give a value of peft.LoraConfig; config.yaml cannot hold an object, so pass peft_config again"
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            remedy = f"peft.LoraConfig has no such field{f'. Did you mean {close[0]}?' if close else ''}"
        if name not in known or (isinstance(value, str) and value.startswith("<")):
            raise ConfigError(f"model.lora_options={{{name}: {value!r}}}: {remedy}")
    try:
        return LoraConfig(**{**fields, **options})
    except (TypeError, ValueError) as error:
        raise ConfigError(f"model.lora_options={options!r}: {error}") from error


def with_adapter(model: Any, config: ModelConfig, peft_config: LoraConfig | None = None) -> Any:
    """The model with the adapter that the settings or ``peft_config`` ask for, as it is where neither does.

    Raises ConfigError where the model has none of the adapter's target modules.
    """
    adapter = peft_config or lora_config(config)
    if adapter is None:
        return model
    try:
        with peft_unwarned():
            return get_peft_model(model, adapter)
    except ValueError as error:
        if "arget modules" not in str(error):
            raise
        setting = f"model.lora_target_modules={config.lora_target_modules!r}"
        setting = setting if peft_config is None else f"peft_config: target_modules={adapter.target_modules!r}"
        raise ConfigError(f"{setting}: {error}; name linear layers of the model, or leave it out") from error


def check_adapter(model: PeftModel) -> PeftModel:
    """Raises ConfigError for an adapter that would not train, or whose "off" would not be the reference."""
    for name, adapter in model.peft_config.items():
        kind = str(getattr(adapter.peft_type, "value", adapter.peft_type))
        if kind != "LORA":
            raise ConfigError(f"the adapter {name!r} is {kind}: the forward applies only LoRA; give a LoRA adapter")
        if (bias := getattr(adapter, "bias", "none")) != "none":
            raise ConfigError(
                f"the adapter {name!r} trains biases (bias={bias!r}), which stay on in the reference; set none"
            )
    if isinstance(causal_lm(model).get_output_embeddings(), LoraLayer):
        raise ConfigError("the adapter is on the LM head, whose weight is read without it: leave the LM head out")
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ConfigError("no weight of the policy is trainable: load the adapter with is_trainable=True")
    return model


def check_base(adapted: Any, before: Tensor) -> None:
    """Raises ConfigError for an initialisation that has changed the model's own weights (PiSSA, OLoRA, LoftQ).

    ``before``: ``own_logits`` of the model without an adapter.
    """
    with adapted.disable_adapter():
        difference = float((own_logits(adapted) - before).abs().amax())
    if not difference < tolerance(adapted, autocast=False):
        kind = getattr(adapted.active_peft_config, "init_lora_weights", None)
        raise ConfigError(
            f"peft_config: init_lora_weights={kind!r}: changes the model's own weights (without the adapter its "
            f"log-probs move by {difference:.2g} nats), so the saved adapter would not fit the model; use True or "
            "'gaussian'"
        )


def adapter_folder(config: ModelConfig) -> Path | None:
    """The folder of the adapter that ``model.name`` is, downloaded if need be; None for a model of its own."""
    if config.name == "builtin" or config.gguf_file is not None:
        return None
    if (folder := Path(config.name)).is_dir():
        return folder if (folder / "adapter_config.json").is_file() else None
    return _adapter_on_hub(config.name, config.revision)


@functools.cache  # loading a model asks several times, and each asks the network
def _adapter_on_hub(name: str, revision: str | None) -> Path | None:
    found = find_adapter_config_file(name, revision=revision)
    if found is None:
        return None
    snapshot_download(name, revision=revision, allow_patterns=["*.json", "*.safetensors", "*.jinja"])
    return Path(found).parent


def adapter_base(folder: Path) -> tuple[str, dict[str, Any]]:
    """(the model that the adapter in the folder belongs to, its arguments). Raises ConfigError."""
    try:
        settings = json.loads((folder / "adapter_config.json").read_text())
    except ValueError as error:
        raise ConfigError(f"model.name={str(folder)!r}: adapter_config.json is not JSON: {error}") from error
    settings = settings if isinstance(settings, dict) else {}
    name, revision = settings.get("base_model_name_or_path"), settings.get("revision")
    if not name:
        raise ConfigError(f"model.name={str(folder)!r}: is an adapter that does not say of which model; merge it first")
    return name, {} if revision is None or Path(name).is_dir() else {"revision": revision}


def adapter_settings(folder: Path) -> LoraConfig:
    """The settings of the adapter in the folder, to be trained further. Raises ConfigError."""
    try:
        settings: Any = LoraConfig.from_pretrained(str(folder))
    except (ValueError, TypeError) as error:
        raise ConfigError(f"model.name={str(folder)!r}: adapter_config.json is not LoRA's: {error}") from error
    settings.inference_mode = False
    return settings


def load_adapter(model: Any, folder: Path, config: ModelConfig) -> PeftModel:
    """The model with its adapter, which is trained further. Raises ConfigError."""
    if config.lora_r > 0:
        raise ConfigError(
            f"model.lora_r={config.lora_r}: model.name={config.name!r} is an adapter already and is trained further; "
            "leave model.lora_r out, or merge the adapter (stable-rlhf cannot stack two) and name the merged folder"
        )
    if not (folder / "adapter_model.safetensors").is_file():
        raise ConfigError(f"model.name={config.name!r}: its adapter is not in safetensors; save it again as such")
    device = str(next(model.parameters()).device)
    with foreign_errors(model, f"loading the adapter {config.name!r}"), peft_unwarned():
        return PeftModel.from_pretrained(model, str(folder), is_trainable=True, torch_device=device)


@torch.no_grad()
def own_logits(model: Any) -> Tensor:
    """Log-probs of a few tokens by the model's whole forward, each row padded on the right: [B, S, V]."""
    lm = causal_lm(model)
    device = next(lm.parameters()).device
    _, _, tokens = probe(lm.get_input_embeddings().weight.shape[0], device)
    return model.eval()(input_ids=tokens.ids, use_cache=False).logits.float().log_softmax(-1)


def adapter_is_new(policy: Any) -> bool:
    """Whether every LoRA layer adds exactly nothing, as after the usual initialisation: its B is 0."""
    ups: list[Any] = []
    for layer in (module for module in policy.modules() if isinstance(module, LoraLayer)):
        ups += [up.weight for up in layer.lora_B.values()] + list(layer.lora_embedding_B.values())
    return not any(bool(up.any()) for up in ups)
