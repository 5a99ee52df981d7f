"""Attention: how far a model's reaches, which kernel computes it, and that every kernel computes the softmax."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from stable_rlhf.hardware import attention
from stable_rlhf.rollout import attend as one_token
from tests.policy.test_architectures import PARTICULAR, PECULIAR, WINDOWED, make

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
SPANS = [
    *((name, attention.UNBOUNDED) for name in PARTICULAR),
    *((name, 0 if name == "gemma2" else 4) for name in WINDOWED),  # whose class may cap, whatever its settings say
    *((name, 0) for name in PECULIAR),
]


@pytest.mark.parametrize(("name", "span"), SPANS)
def test_the_span_is_the_shortest_window_or_nothing_for_other_kinds_of_layers(name: str, span: int) -> None:
    family, changes = (PARTICULAR | WINDOWED | PECULIAR)[name]
    assert attention.attention_span(make(family, **changes)) == span


@pytest.mark.parametrize(
    ("device", "dtype", "positions", "keys", "plain"),
    [
        (CPU, torch.float32, 256, 256, True),
        (CPU, torch.float32, 257, 257, False),
        (CPU, torch.float32, 2, 2, True),
        (CPU, torch.float32, 1, 64, False),
        (CPU, torch.float32, 1, 65, True),
        (CPU, torch.float32, 1, 1000, True),
        (CPU, torch.bfloat16, 25, 25, False),
        (CUDA, torch.float32, 25, 25, False),
    ],
)
def test_plain_products_are_used_in_float32_on_a_cpu_up_to_256_positions_and_beyond_64_keys_of_one(
    device: torch.device, dtype: torch.dtype, positions: int, keys: int, plain: bool
) -> None:
    def allowed() -> tuple[bool, bool]:
        return torch.backends.cuda.math_sdp_enabled(), torch.backends.cuda.flash_sdp_enabled()

    before = allowed()
    assert before == (True, True)
    with attention.kernel(device, dtype, positions, keys):
        assert allowed() == ((True, False) if plain else before)
    assert allowed() == before


def by_hand(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """[B, positions, heads, d] in float64, head by head and position by position."""
    batch, heads, positions, _ = query.shape
    shared = heads // key.shape[1]
    out = torch.zeros(batch, positions, heads, value.shape[3], dtype=torch.float64)
    for b in range(batch):
        for h in range(heads):
            for t in range(positions):
                scores = key[b, h // shared].double() @ query[b, h, t].double() * scale
                if mask is not None:
                    scores = scores.masked_fill(~mask[b, 0, t], -math.inf)
                out[b, t, h] = scores.softmax(0) @ value[b, h // shared].double()
    return out


@pytest.mark.parametrize("attend", [attention.attend, one_token.attend])
@pytest.mark.parametrize("positions", [1, 5])
@pytest.mark.parametrize("scaling", [None, 0.5])
def test_attention_is_the_softmax_over_what_may_be_seen_at_the_models_own_scale(
    attend: Any, positions: int, scaling: float | None
) -> None:
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(2, 4, positions, 8, generator=generator)
    key, value = (torch.randn(2, 2, 9, 8, generator=generator) for _ in range(2))
    mask = torch.rand(2, 1, positions, 9, generator=generator) > 0.4
    mask[..., 0] = True
    module = torch.nn.Module()
    module.num_key_value_groups, module.is_causal, module.training = 2, True, False
    out, _ = attend(module, query, key, value, mask, scaling=scaling, dropout=0.0)
    expected = by_hand(query, key, value, mask, 8**-0.5 if scaling is None else scaling)
    torch.testing.assert_close(out.double(), expected, atol=1e-6, rtol=0)


def test_a_model_has_its_own_attention_again_also_after_an_error() -> None:
    lm = make("qwen2")
    own = lm.config._attn_implementation
    inside: list[str] = []

    def fails() -> None:
        with attention.attending(lm, attention.UNMASKED):
            inside.append(lm.config._attn_implementation)
            raise KeyError

    with pytest.raises(KeyError):
        fails()
    assert inside == [attention.UNMASKED]
    assert lm.config._attn_implementation == own != attention.UNMASKED
