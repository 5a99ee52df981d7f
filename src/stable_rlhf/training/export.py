"""A checkpoint as a folder that ``from_pretrained`` loads."""

from __future__ import annotations

import contextlib
import shutil
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from stable_rlhf.checkpoints import store
from stable_rlhf.config import ModelConfig, flat_settings
from stable_rlhf.errors import CheckpointError, ConfigError
from stable_rlhf.files import replace_text
from stable_rlhf.policy import model_named, peft_unwarned, policy_source, save_heads, without_bars
from stable_rlhf.runs import model_card

ADAPTER = "adapter_config.json"


@without_bars()
def export(checkpoint: Path, out: Path, merge: bool = False) -> None:
    """Writes the policy of a checkpoint to ``out``, with tokenizer, generation settings, value heads and model card.

    A policy with an adapter is written as the adapter, or with ``merge`` as the whole model. ``checkpoint`` is in the
    folder of its run, whose ``model`` describes the policy. Raises ConfigError, and CheckpointError for a checkpoint
    that is damaged or lacks weights.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"{out} exists already; choose another folder")
    described = checkpoint.resolve().parent.parent / "model"
    if not (described / "config.json").is_file():
        raise ConfigError(
            f"{described} is missing, which describes the policy: give a checkpoint in the folder of its run"
        )
    adapted = (described / ADAPTER).is_file()
    if merge and not adapted:
        raise ConfigError(f"--merge: the policy of {checkpoint} has no adapter; leave it out")
    tensors, state = store.load(checkpoint)
    trained = tensors["model"]
    weights = {name.removeprefix("policy."): t for name, t in trained.items() if name.startswith("policy.")}
    settings = ModelConfig(**state["parts"]["settings"]["model"])
    aside = out.with_name(f".exporting-{out.name}")
    shutil.rmtree(aside, ignore_errors=True)
    try:
        model = _adapted(described, settings, weights, merge) if adapted else _whole(described, settings, weights)
        model.save_pretrained(aside)
        for file in described.iterdir():  # as they were: tokenizer, generation settings, the adapter's configuration
            if file.name != "config.json" and not (merge and file.name == ADAPTER):
                # A folder is `additional_chat_templates`, of a tokenizer with several.
                (shutil.copytree if file.is_dir() else shutil.copy2)(file, aside / file.name)
        save_heads(trained, aside)
        known = flat_settings(state["parts"]["settings"])
        card = model_card(described.parent, known, adapter=adapted and not merge, steps=state["step"])
        replace_text(aside / "README.md", card)
        if out.exists():
            out.rmdir()
        aside.rename(out)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _whole(described: Path, settings: ModelConfig, weights: dict[str, Tensor]) -> Any:
    """The model with every weight of the checkpoint; those that were frozen come from the model by its name."""
    model = _empty(described, settings)
    if _lacking(model, weights):
        model = _by_name(settings)
        _fill(model, weights)
    return model


def _lacking(model: Any, weights: dict[str, Tensor]) -> list[str]:
    """Loads the weights; returns the names that they lack, tied ones aside."""
    known = {id(model.state_dict(keep_vars=True)[name]) for name in weights if name in model.state_dict()}
    _fill(model, weights)
    return [name for name, tensor in model.state_dict(keep_vars=True).items() if id(tensor) not in known]


def _fill(model: Any, weights: dict[str, Tensor], assign: bool = False) -> None:
    if odd := model.load_state_dict(weights, strict=False, assign=assign).unexpected_keys:
        raise CheckpointError(f"the checkpoint is of another model: {odd[:3]} are not in it")


def _adapted(described: Path, settings: ModelConfig, weights: dict[str, Tensor], merge: bool) -> Any:
    """The adapter on a model without weights, or merged into its base."""
    adapter: Any = LoraConfig.from_pretrained(str(described))
    adapter.init_lora_weights = False  # all of its weights are loaded
    adapter.inference_mode = False
    with contextlib.nullcontext() if merge else torch.device("meta"), peft_unwarned():
        base = _by_name(settings) if merge else _empty(described, settings)
        adapter.base_model_name_or_path = base.name_or_path  # PEFT warns of another; what is written is a copy
        model: Any = get_peft_model(base, adapter)
    _fill(model, weights, assign=not merge)
    return model.merge_and_unload() if merge else model


def _empty(described: Path, settings: ModelConfig) -> Any:
    with model_named(settings):
        config = AutoConfig.from_pretrained(described, trust_remote_code=settings.trust_remote_code)
        return AutoModelForCausalLM.from_config(
            config, dtype=torch.float32, trust_remote_code=settings.trust_remote_code
        )


def _by_name(settings: ModelConfig) -> Any:
    if settings.name.startswith("<"):
        raise ConfigError(
            f"model.name={settings.name!r}: weights that were not trained are not in the checkpoint, and the model was "
            "given as an object: in Python, call load_checkpoint() and save_model() of a SAFETrainer made as before"
        )
    name, arguments = policy_source(settings)
    with model_named(settings):
        return AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32, use_safetensors=True, **arguments)
