"""The sampler's side of a generation backend: the settings it is given and the one method it must have."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """Settings of the sampling, the same at every step of a run."""

    max_new_tokens: int
    temperature: float
    eos_token_ids: tuple[int, ...]
    """Any of these ends a row."""
    pad_token_id: int
    """Fills a row after its end."""


class Generator(Protocol):
    """Samples completions from the policy as it is now. `Decoder` is the one that ships."""

    @property
    def device(self) -> torch.device:
        """Where prompts must be, and tokens come from."""
        ...

    def sample(self, prompt: Tensor, prompt_mask: Tensor, sampling: Sampling) -> Tensor:
        """[B, T] int64 tokens, T <= max_new_tokens, for prompts [B, P] int64, padded on the left (``prompt_mask``
        is True for a token); pad tokens follow a row's end. From the whole distribution at the temperature."""
        ...
