"""A sampling backend: the settings that it receives and the protocol that it follows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How completions are sampled, the same at every step of a run."""

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
        """The device of prompts and tokens."""
        ...

    def sample(self, prompt: Tensor, prompt_mask: Tensor, sampling: Sampling) -> Tensor:
        """[B, T] int64 tokens with T <= max_new_tokens, sampled from the whole distribution at the temperature.

        ``prompt``: [B, P] int64, padded on the left. ``prompt_mask``: True for its tokens. After a row's end stand pad
        tokens.
        """
        ...
