"""What is asked of whatever samples completions."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """What is sampled, the same at every step of a run."""

    max_new_tokens: int
    temperature: float
    eos_token_ids: tuple[int, ...]
    """Any of these ends a row."""
    pad_token_id: int
    """What stands after a row's end."""
