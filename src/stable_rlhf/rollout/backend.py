"""The settings that a sampling backend receives."""

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
