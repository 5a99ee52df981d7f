"""Ratios of completions, CISPO and the three denominators, against loops over the tokens."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from stable_rlhf.ops import objective
from tests.oracles import objective as oracle

levels, kinds = st.sampled_from(["token", "sequence", "product"]), st.sampled_from(["token", "sequence", "length"])
MOST = 7


def some(seed: int, lengths: list[int]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(logp, old_logp, advantages, mask); NaN under the mask."""
    generator = torch.Generator().manual_seed(seed)
    mask = torch.arange(5) < torch.tensor(lengths)[:, None]
    logp, old, advantages = (
        torch.where(mask, 0.4 * torch.randn(len(lengths), 5, generator=generator, dtype=torch.float64), torch.nan)
        for _ in range(3)
    )
    return logp - 2, old - 2, 3 * advantages, mask


def denominator(kind: Any, mask: Tensor) -> int:
    return objective.loss_denominator(kind, int(mask.sum()), int(mask.any(1).sum()), MOST)


@given(st.integers(0, 10_000), st.lists(st.integers(0, 5), min_size=1, max_size=4).filter(any), levels, kinds)
def test_both_losses_are_their_definitions(seed: int, lengths: list[int], level: Any, kind: Any) -> None:
    logp, old, advantages, mask = some(seed, lengths)
    clip: list[list[float]] = []
    cispo: list[list[float]] = []
    for row, length in enumerate(lengths):
        if not length:
            continue
        now, before, own = (x[row, :length].tolist() for x in (logp, old, advantages))
        found = oracle.ratios([a - b for a, b in zip(now, before, strict=True)], level)
        tokens = list(zip(found, now, own, strict=True))
        clip.append([-min(r * a, min(max(r, 0.8), 1.28) * a) for r, _, a in tokens])
        cispo.append([oracle.cispo_token_loss(p, r, a, 0.28) for r, p, a in tokens])
    over = denominator(kind, mask)
    result = objective.ppo_clip_loss(logp, old, advantages, mask, 0.2, over, 0.28, level, kind)
    assert result.loss.item() == pytest.approx(oracle.mean_over(clip, kind, MOST), rel=1e-9, abs=1e-12)
    result = objective.cispo_loss(logp, old, advantages, mask, 0.28, over, level, kind)
    assert result.loss.item() == pytest.approx(oracle.mean_over(cispo, kind, MOST), rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("kind", ["token", "sequence", "length"])
@pytest.mark.parametrize("level", ["token", "sequence", "product"])
@pytest.mark.parametrize("loss", ["clip", "cispo", "kl"])
def test_microbatches_add_up_and_gradients_are_those_of_finite_differences(level: Any, kind: Any, loss: str) -> None:
    logp, old, advantages, mask = some(3, [5, 1, 0, 3])
    logp, bare = logp.nan_to_num(0.0), advantages.nan_to_num(0.0)

    def value(x: Tensor, rows: slice) -> Tensor:
        parts, over = (x[rows], old[rows], advantages[rows], mask[rows]), denominator(kind, mask)
        if loss == "kl":
            return objective.kl_penalty(x[rows], old[rows], None, "k2", mask[rows], over, kind)
        if loss == "clip":
            return objective.ppo_clip_loss(*parts, 0.5, over, None, level, kind).loss
        # With the weight as a number: finite differences would see it move.
        weight = objective.importance_ratio(logp, old, mask, level).clamp(max=1.3)[rows]
        return objective.loss_mean(-bare[rows] * weight * x[rows], mask[rows], over, kind)

    x = logp.clone().requires_grad_()
    whole = value(x, slice(None))
    assert sum(value(x, slice(i, i + 1)).item() for i in range(4)) == pytest.approx(whole.item(), rel=1e-12)
    (gradient,) = torch.autograd.grad(whole, x)
    if loss == "cispo":
        y = logp.clone().requires_grad_()
        found = objective.cispo_loss(y, old, advantages, mask, 0.3, denominator(kind, mask), level, kind).loss
        torch.testing.assert_close(torch.autograd.grad(found, y)[0], gradient, rtol=1e-12, atol=1e-15)
    for row, t in ((0, 0), (0, 4), (1, 0), (3, 2), (2, 0)):
        step = torch.zeros_like(logp)
        step[row, t] = 1e-6
        slope = (value(logp + step, slice(None)) - value(logp - step, slice(None))).item() / 2e-6
        assert gradient[row, t].item() == pytest.approx(slope, rel=1e-5, abs=1e-8)


def test_one_ratio_of_a_completion_is_the_mean_or_the_product_of_its_tokens() -> None:
    logp, old = torch.tensor([[-1.0, -3.0, 9.0], [-2.0, 9.0, 9.0]]), torch.tensor([[-2.0, -2.5, 9.0], [-1.0, 9.0, 9.0]])
    mask = torch.tensor([[True, True, False], [True, False, False]])
    for level, first in (("sequence", 0.25), ("product", 0.5)):
        ratio = objective.importance_ratio(logp, old, mask, level)  # pyright: ignore[reportArgumentType]
        assert ratio[0].tolist() == pytest.approx([math.exp(first)] * 3)
        assert ratio[1].tolist() == pytest.approx([math.exp(-1.0)] * 3)


def test_cispo_cuts_no_gradient_off_and_bounds_its_weight() -> None:
    logp, old = torch.tensor([[0.0, 0.0]], requires_grad=True), torch.tensor([[-1.0, 0.5]])
    mask, advantages = torch.ones(1, 2, dtype=torch.bool), torch.tensor([[2.0, 3.0]])
    result = objective.cispo_loss(logp, old, advantages, mask, 0.28, 1.0)
    assert torch.autograd.grad(result.loss, logp)[0].tolist()[0] == pytest.approx([-2 * 1.28, -3 * math.exp(-0.5)])
    assert result.clipped.tolist() == [[1.0, 0.0]]
    assert not result.ratio.requires_grad
    with pytest.raises(ValueError, match="epsilon_high is 0"):
        objective.cispo_loss(logp, old, advantages, mask, 0.0)


def test_without_a_denominator_it_is_that_of_the_rows() -> None:
    x, mask = torch.tensor([[1.0, 3.0], [5.0, 7.0], [9.0, 9.0]]), torch.tensor([[1, 1], [1, 0], [0, 0]]).bool()
    assert objective.loss_mean(x, mask).item() == 3.0
    assert objective.loss_mean(x, mask, kind="sequence").item() == (2 + 5) / 2
    assert objective.loss_mean(x, mask, kind="length").item() == 9 / 4
