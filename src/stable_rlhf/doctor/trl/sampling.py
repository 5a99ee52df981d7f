"""Samples groups of completions from a TRL script's model, with its settings, until a deadline."""

from __future__ import annotations

import importlib
import inspect
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedTokenizerBase

from stable_rlhf.config import ModelConfig
from stable_rlhf.doctor.trl.arguments import SCRIPTS, TRLArguments
from stable_rlhf.policy import policy_source

FURTHER = 2
"""Completions are sampled to this many times max_completion_length, so that the length that would do is seen."""


@dataclass(frozen=True, kw_only=True)
class Completion:
    """A completion as TRL would have it, and how it went on."""

    ids: list[int]
    """Its tokens, at most max_completion_length, the end token included."""
    length: int | None
    """Tokens until its end, the end token included; None where it had not ended when sampling stopped."""
    seen: int
    """Tokens that were sampled."""

    def is_cut(self, limit: int) -> bool:
        """Whether max_completion_length cuts it off."""
        return self.length is None or self.length > limit

    def is_known(self, limit: int) -> bool:
        """Whether enough was sampled to tell; where the deadline came first it was not."""
        return self.length is not None or self.seen >= limit


def load_model(given: TRLArguments, device: torch.device) -> Any:
    """The model's weights in the number type and with the quantisation that the script asks for."""
    trl: Any = importlib.import_module("trl")
    model, name = given.model, given.model.model_name_or_path
    source, arguments = (
        (policy_source(ModelConfig())) if name == "builtin" else (name, {"revision": model.model_revision})
    )
    more = given.training.model_init_kwargs or {}
    quantised = trl.get_quantization_config(model)
    arguments |= {"quantization_config": quantised, "device_map": {"": device}} if quantised is not None else {}
    arguments |= {
        "trust_remote_code": given.training.trust_remote_code,
        "attn_implementation": model.attn_implementation,
    }
    loaded: Any = AutoModelForCausalLM.from_pretrained(source, **{**arguments, "dtype": model.dtype, **more})
    return (loaded if quantised is not None else loaded.to(device)).eval()


def end_ids(given: TRLArguments, model: Any, tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """(ids that end a completion in this version of TRL, ids that end one by the model's settings only).

    TRL 1.12 ends completions at the tokenizer's EOS only, later versions at those of the model's generation settings
    too. The trainer's code tells, since the change came without a setting.
    """
    own: Any = tokenizer.eos_token_id
    named = getattr(model.generation_config, "eos_token_id", None) or []
    named = [named] if isinstance(named, int) else list(named)
    trainer = getattr(importlib.import_module("trl"), f"{SCRIPTS[given.kind]}Trainer")
    if "generation_config.eos_token_id" in inspect.getsource(trainer.__init__):
        return sorted({own, *named}), []
    return [own], [number for number in named if number != own]


class GroupSampler:
    """Samples ``num_generations`` completions of one prompt at a time, by Transformers' `generate` as TRL does.

    Not by this package's decoder: a script may ask for top_p, top_k, min_p or a repetition penalty, and for a model
    whose head ours does not compute.
    """

    def __init__(self, given: TRLArguments, model: Any, tokenizer: Any, eos: Sequence[int], deadline: float) -> None:
        self._model, self._tokenizer, self._eos, self._deadline = model, tokenizer, list(eos), deadline
        self._training, self._limit, self._count = given.training, given.limit, given.group

    def sample(self, prompt: list[int], context: int | None) -> list[Completion]:
        """A group of completions. ``context``: positions that the model has; None is unlimited."""
        room = FURTHER * self._limit if context is None else max(self._limit, context - len(prompt))
        most = min(FURTHER * self._limit, room)
        ids = torch.tensor([prompt], device=self._model.device).repeat(self._count, 1)
        low = self._training.bf16 and ids.device.type == "cuda"
        with torch.no_grad(), torch.autocast(ids.device.type, torch.bfloat16, enabled=low):
            out = self._model.generate(
                input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=self._settings(most)
            )
        return [self._completion(row) for row in out[:, len(prompt) :].tolist()]

    def is_late(self) -> bool:
        return time.monotonic() >= self._deadline

    def text(self, completion: Completion) -> str:
        return self._tokenizer.decode(completion.ids, skip_special_tokens=True)

    def _settings(self, most: int) -> GenerationConfig:
        training = self._training
        names = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "cache_implementation")
        settings = {name: getattr(training, name) for name in names}
        if training.generation_kwargs and not training.use_vllm:  # vLLM's have other names
            settings |= training.generation_kwargs
        settings |= {"max_new_tokens": most, "do_sample": True, "eos_token_id": self._eos}
        settings |= {"pad_token_id": self._tokenizer.pad_token_id, "bos_token_id": self._tokenizer.bos_token_id}
        return GenerationConfig(**settings, max_time=max(self._deadline - time.monotonic(), 1.0), disable_compile=True)

    def _completion(self, row: list[int]) -> Completion:
        end = next((place for place, token in enumerate(row, start=1) if token in self._eos), None)
        return Completion(ids=row[: min(end or len(row), self._limit)], length=end, seen=len(row))
