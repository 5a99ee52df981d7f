"""A cache of fixed size: one layer's keys and values while tokens are sampled."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers.cache_utils import StaticLayer


class Slots(StaticLayer):
    """One layer's keys and values [B, heads, L, d]: the prompt's in columns 0 .. P-1, a new token's at ``position``."""

    def __init__(self, length: int, position: Tensor) -> None:
        super().__init__(max_cache_len=length)
        self.position = position
        self.filled = length  # columns that are shown: those beyond hold nothing yet, and cost time

    keys: Tensor
    values: Tensor

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Plain tensors: StaticLayer would mark their addresses, and each layer be a program of its own to compile."""
        self.dtype, self.device = key_states.dtype, key_states.device
        self.keys, self.values = (
            states.new_zeros(*states.shape[:2], self.max_cache_len, states.shape[3])
            for states in (key_states, value_states)
        )
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        count = key_states.shape[2]
        if count > 1:  # the prompt, which sees only itself
            self.keys[:, :, :count].copy_(key_states)
            self.values[:, :, :count].copy_(value_states)
            return key_states, value_states
        self.keys.index_copy_(2, self.position, key_states)
        self.values.index_copy_(2, self.position, value_states)
        return self.keys[:, :, : self.filled], self.values[:, :, : self.filled]

    def keep(self, rows: Tensor) -> None:
        self.keys, self.values = self.keys[rows], self.values[rows]
