"""Attention of one new token to a cache."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers import AttentionInterface

from stable_rlhf.hardware import attention


def attend(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, Tensor | None]:
    """Attention of one new token, without copying keys for each query head.

    Query heads that share a key head are read as positions of one head. Prompts, and arguments that this does not
    support, go to Transformers' own function.
    """
    known = {"scaling", "dropout", "sliding_window", "is_causal", "position_ids", "use_cache"}
    odd = [name for name, argument in kwargs.items() if name not in known and argument is not None]
    batch, heads, length, _ = query.shape
    per_head = attention_mask is not None and attention_mask.shape[1] > 1  # a bias that the model adds for each head
    if length > 1 or odd or per_head:
        return attention.attend(module, query, key, value, attention_mask, **kwargs)
    groups = key.shape[1]
    query = query.reshape(batch, groups, heads // groups, -1)
    with attention.kernel(query.device, query.dtype, length, key.shape[2]):
        out = nn.functional.scaled_dot_product_attention(
            query, key, value, attn_mask=attention_mask, scale=kwargs.get("scaling")
        )
    return out.reshape(batch, 1, heads, -1), None


ATTENTION = "stable_rlhf_decoding"

AttentionInterface.register(ATTENTION, attend)
