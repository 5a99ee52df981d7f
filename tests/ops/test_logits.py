"""The logits that tokens are drawn from: as exact as those of the log-probabilities."""

from __future__ import annotations

import pytest
import torch

from stable_rlhf.ops.logprobs import logits, token_statistics


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize(
    ("hidden_dtype", "weight_dtype", "dtype", "tolerance"),
    [
        (torch.float64, torch.float64, torch.float64, 1e-13),
        (torch.float32, torch.float32, torch.float32, 1e-5),
        (torch.bfloat16, torch.bfloat16, torch.float32, 1e-5),
        (torch.float16, torch.float16, torch.float32, 1e-5),
        (torch.bfloat16, torch.float32, torch.float32, 1e-5),
        (torch.float32, torch.float64, torch.float64, 1e-13),
    ],
)
def test_logits_are_the_products_in_float32_or_wider_whatever_the_inputs(
    hidden_dtype: torch.dtype, weight_dtype: torch.dtype, dtype: torch.dtype, tolerance: float, autocast: bool
) -> None:
    generator = torch.Generator().manual_seed(5)
    hidden = torch.randn(6, 64, generator=generator, dtype=torch.float64).to(hidden_dtype)
    weight = torch.randn(200, 64, generator=generator, dtype=torch.float64).to(weight_dtype).requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        found = logits(hidden, weight)
    assert found.dtype == dtype
    assert not found.requires_grad
    expected = hidden.double() @ weight.detach().double().T
    assert expected.abs().max() > 10
    torch.testing.assert_close(found.double(), expected, atol=tolerance, rtol=tolerance)
    tokens = torch.arange(6)
    logp = token_statistics(hidden, weight, tokens, 0.7).logp
    own = (found / 0.7).log_softmax(1).gather(1, tokens[:, None])[:, 0]
    torch.testing.assert_close(own, logp.detach(), atol=10 * tolerance, rtol=0)
