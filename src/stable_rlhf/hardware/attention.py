"""Attention: how far back a model's reaches, which function computes it, and which kernel is the fastest."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import AttentionInterface, StaticCache
from transformers.cache_utils import StaticLayer, StaticSlidingWindowLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward

UNBOUNDED = 2**30
"""More tokens than any text has."""

SHORT = 256
"""Positions up to which attention by plain products is faster than the CPU's fused kernel. On one core (AMD EPYC), 4
heads of 64, forward and backward: 1.3 against 14 ms for 32 rows of 25 positions, 44 against 127 ms for 64 rows of 128,
and 108 against 68 ms for 8 rows of 512."""

FEW = 64
"""Keys up to which the fused kernel is the faster one for a single new token: 0.10 against 0.18 ms for 20, 7.3 against
2.4 ms for 300, on the same core."""


def attend(
    module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, Tensor | None]:
    """Transformers' scaled dot-product attention, by the kernel that is fastest here."""
    with kernel(query.device, query.dtype, query.shape[2], key.shape[2]):
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)


def kernel(device: torch.device, dtype: torch.dtype, positions: int, keys: int) -> AbstractContextManager[Any]:
    """Makes scaled dot-product attention in float32 on a CPU use plain products where those are faster."""
    narrow = device.type != "cpu" or dtype != torch.float32
    plain = not narrow and positions <= SHORT and (positions > 1 or keys > FEW)
    return sdpa_kernel(SDPBackend.MATH) if plain else nullcontext()


UNMASKED = "stable_rlhf_unmasked"
"""Transformers' scaled dot-product attention by a name for which it makes no mask. By its own name it would look at the
tokens to see whether one is needed, and wait for the device, or make one wherever it cannot look: in a CUDA graph."""

AttentionInterface.register(UNMASKED, attend)


def attention_span(lm: Any) -> int:
    """Tokens up to which every layer attends to all earlier ones: the shortest sliding window, UNBOUNDED without.

    0 where a layer is of another kind (chunks, a recurrent state), or where `attend` does not compute the attention
    (sinks, soft caps, ALiBi, a class of the model's own).
    """
    if not (lm._supports_sdpa and lm._supports_attention_backend):
        return 0
    return min(
        getattr(layer, "max_cache_len", 0) if type(layer) in (StaticLayer, StaticSlidingWindowLayer) else 0
        for layer in StaticCache(lm.config, max_cache_len=UNBOUNDED).layers
    )


@contextmanager
def attending(lm: Any, implementation: str) -> Iterator[None]:
    """Makes the function registered under a name the model's attention, inside the context."""
    own = lm.config._attn_implementation
    lm.config._attn_implementation = implementation
    try:
        yield
    finally:
        lm.config._attn_implementation = own
