"""The policy as a folder that ``from_pretrained`` loads: tried before training, written and checked after it."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import AutoPeftModelForCausalLM, PeftModel
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoConfig, PreTrainedTokenizerBase
from transformers.modeling_utils import remove_tied_weights_from_state_dict
from transformers.utils import logging

from stable_rlhf.console import tell
from stable_rlhf.errors import ConfigError
from stable_rlhf.policy.actor_critic import ActorCritic
from stable_rlhf.policy.adapter import peft_unwarned
from stable_rlhf.policy.transformer import causal_lm

HEADS = "value_heads.safetensors"

CHECKED = 2 << 30
"""Most bytes of weights that are loaded again to be checked: seconds, and memory that the run itself has just used. A
larger model would take minutes, and could lack the memory for a second copy."""

SAME_LOGITS = 1e-3
"""Largest difference between the logits of the policy and of what was saved, relative to the largest logit. Rounding in
float32 is a thousand times smaller; a weight that was not saved is far above."""


@dataclass(frozen=True)
class SavedFault:
    """What is wrong with a saved policy; ``str`` gives it as a clause."""

    clause: str
    proven: bool = True
    """False where the policy could not be loaded to be compared, because its base model is not here."""

    def __str__(self) -> str:
        return self.clause


@contextlib.contextmanager
def without_bars() -> Iterator[None]:
    """Without the progress bars of Transformers, which would write into the run's own."""
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


@without_bars()
def save_policy(model: ActorCritic, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Saves the policy or its adapter, its generation settings, the tokenizer, and the value heads (HEADS)."""
    policy: Any = model.policy
    policy.save_pretrained(folder)
    if isinstance(policy, PeftModel) and (settings := getattr(causal_lm(policy), "generation_config", None)):
        settings.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    save_heads(model.trained_state(), folder)


def save_heads(state: dict[str, Tensor], folder: Path) -> None:
    """Saves the value heads of a ``trained_state``. Without a critic the file is there and empty: it is the last of a
    folder, and tells that the folder is whole."""
    heads = {
        name: tensor.cpu().contiguous()
        for name, tensor in state.items()
        if name.startswith(("heads.", "target_heads."))
    }
    save_file(heads, folder / HEADS)


@without_bars()
def save_description(model: ActorCritic, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Saves everything of ``save_policy`` except weights: whether that is possible is known before training.

    The folder is replaced whole. Generation settings that Transformers would refuse to save are mended where
    ``do_sample=True`` is what they lack, and that is said. Raises ConfigError for a configuration, generation settings,
    an adapter's settings or a tokenizer that cannot be saved.
    """
    policy: Any = model.policy
    lm, aside = causal_lm(policy), folder.with_name(f".{folder.name}")
    shutil.rmtree(aside, ignore_errors=True)
    try:
        _mend_generation_config(lm, aside)
        lm.save_pretrained(aside, state_dict={})
        for file in aside.glob("*.safetensors*"):
            file.unlink()
        if isinstance(policy, PeftModel):
            policy.peft_config[_adapter(policy)].save_pretrained(str(aside))
        else:
            remove_tied_weights_from_state_dict(lm.state_dict(), lm)  # refuses tensors that share memory untold
        tokenizer.save_pretrained(aside)
        json.loads((aside / "config.json").read_text())
    except (ValueError, TypeError, AttributeError, KeyError, RuntimeError, NotImplementedError) as error:
        shutil.rmtree(aside, ignore_errors=True)
        fault = " ".join(str(error).split()) or type(error).__name__
        raise ConfigError(
            f"the policy ({type(lm).__name__}) could not be saved at the end of training: {fault}; correct its "
            "configuration, generation_config, adapter or tokenizer first"
        ) from error
    shutil.rmtree(folder, ignore_errors=True)
    aside.rename(folder)


def _mend_generation_config(lm: Any, folder: Path) -> None:
    """Transformers saves sampling settings only with do_sample; many published models have them without it."""
    settings = getattr(lm, "generation_config", None)
    if settings is None:
        return
    try:
        settings.save_pretrained(folder)
    except ValueError:
        was, settings.do_sample = settings.do_sample, True
        try:
            settings.save_pretrained(folder)
        except ValueError:
            settings.do_sample = was
            raise
        tell("generation_config has sampling settings without do_sample=True, which cannot be saved: it is set now")


def _adapter(policy: PeftModel) -> str:
    active = policy.active_adapter
    return active if isinstance(active, str) else active[0]


@without_bars()
@torch.no_grad()
def saved_fault(model: ActorCritic, folder: Path, trust_remote_code: bool = False) -> SavedFault | None:
    """What is wrong with a saved policy, or None where it loads and gives the policy's logits.

    A model of more than CHECKED bytes, or that does not fit next to the policy, is not loaded. Nor is an adapter whose
    base model is not on this machine by the name that the adapter's configuration gives: the clause then says so.
    """
    policy: Any = model.policy
    lm = causal_lm(policy)
    if sum(tensor.numel() * tensor.element_size() for tensor in policy.parameters()) > CHECKED:
        return None
    known: dict[str, Any] = {"local_files_only": True, "trust_remote_code": trust_remote_code}
    options = {"dtype": lm.dtype, **known}
    if isinstance(policy, PeftModel):
        base = policy.peft_config[_adapter(policy)].base_model_name_or_path
        if not base:
            remedy = "load the adapter onto the model that it was given"
            return SavedFault(f"its adapter_config.json names no base model: {remedy}", proven=False)
        try:
            AutoConfig.from_pretrained(base, **known)
        except (OSError, ValueError):
            return SavedFault(f"its base model {base!r} is not on this machine to compare it with", proven=False)
    try:
        if isinstance(policy, PeftModel):
            with peft_unwarned():
                saved: Any = AutoPeftModelForCausalLM.from_pretrained(folder, **options)
        else:
            saved = type(lm).from_pretrained(folder, use_safetensors=True, **options)
    except (OSError, ValueError, RuntimeError, ImportError) as error:
        return SavedFault(f"it does not load ({' '.join(str(error).split())})")
    device = next(policy.parameters()).device
    vocabulary = lm.get_output_embeddings().weight.shape[0]
    ids = torch.arange(2, 10, device=device)[None] % vocabulary  # any few tokens: every weight takes part
    attention = lm.config._attn_implementation
    try:
        saved = saved.to(device).eval()
        causal_lm(saved).set_attn_implementation(attention)
        with torch.autocast(device.type, torch.bfloat16, enabled=model.autocast):
            own, loaded = (m(input_ids=ids).logits.float() for m in (policy, saved))
    except torch.OutOfMemoryError:  # of a second copy: the training that it would fail is done, and its policy saved
        return None
    if own.shape != loaded.shape:
        return SavedFault(f"loaded again it has {loaded.shape[-1]} logits, the policy {own.shape[-1]}")
    difference = ((own - loaded).abs().max() / own.abs().max().clamp(min=1e-6)).item()
    # bfloat16's rounding, of which adapters merged in another order have some
    low = 100 if model.autocast or lm.dtype != torch.float32 else 1
    if not difference < SAME_LOGITS * low:
        return SavedFault(f"loaded again its logits differ from the policy's by {difference:.2g} of the largest")
    return None
