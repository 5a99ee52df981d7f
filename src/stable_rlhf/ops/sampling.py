"""Drawing a token from logits."""

from __future__ import annotations

import torch
from torch import Tensor

# Columns that are added up before sums are compared. One running sum over 151,936 columns of 16 rows took 253
# microseconds on an H100; sums of blocks and a running sum over one block take a few kernels of some microseconds each.
BLOCK = 512


@torch.no_grad()
def draw(logits: Tensor, uniform: Tensor, temperature: float = 1.0) -> Tensor:
    """Draws a token from softmax(logits / temperature) by inversion: the first at which the distribution passes u.

    min {j : sum_{i <= j} p_i > u sum_i p_i}: first the block of tokens in which that happens, then the token in it. The
    sums are float64: over 150,000 tokens those of float32 would be off by more than the probability of a rare token.
    One random number per token serves any vocabulary. The caller draws it, so that a draw depends only on its
    arguments.

    Args:
        logits: [B, V], unscaled, floating point.
        uniform: [B] float64, each in [0, 1).
        temperature: positive.

    Returns:
        [B] int64, each 0 to V - 1. Logits that are NaN give a meaningless number, which the caller must notice.

    Raises:
        ValueError: for a temperature that is not positive, or shapes that do not match.
    """
    if not temperature > 0:
        raise ValueError(f"temperature is {temperature}: give a positive number")
    if logits.ndim != 2 or uniform.shape != logits.shape[:1]:
        raise ValueError(f"logits {tuple(logits.shape)} and uniform {tuple(uniform.shape)}: give [B, V] and [B]")
    vocabulary = logits.shape[1]
    p = (logits / temperature).softmax(1)
    blocks = torch.nn.functional.pad(p, (0, -vocabulary % BLOCK)).unflatten(1, (-1, BLOCK))
    passed = blocks.sum(2, dtype=torch.float64).cumsum(1)
    threshold = uniform[:, None] * passed[:, -1:]
    block = _first_above(passed, threshold)
    before = torch.nn.functional.pad(passed, (1, 0)).gather(1, block)
    inside = blocks.gather(1, block[..., None].expand(-1, -1, BLOCK)).squeeze(1).cumsum(1, dtype=torch.float64)
    # Below the last sum, which rounding may else have reached: tokens of probability 0 may follow it.
    within = (threshold - before).minimum(inside[:, -1:] * (1 - 2.0**-52))
    token = block * BLOCK + _first_above(inside, within)
    return token.squeeze(1).clamp(max=vocabulary - 1)


def _first_above(sums: Tensor, threshold: Tensor) -> Tensor:
    """[B, 1]: the first column of rising sums [B, n] above the threshold [B, 1]; the last, if rounding leaves none."""
    return torch.searchsorted(sums, threshold, right=True).clamp(max=sums.shape[1] - 1)
