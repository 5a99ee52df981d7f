"""The critic's loss and how much of the returns it explains.

The denominator of the loss is that of `objective`: the response tokens of the whole minibatch.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from .masked import check_mask, masked_mean, masked_var


class ValueLoss(NamedTuple):
    """loss: scalar, with a gradient. clip_fraction: scalar, detached."""

    loss: Tensor
    clip_fraction: Tensor


def value_loss(
    values: Tensor,
    old_values: Tensor,
    returns: Tensor,
    mask: Tensor,
    kind: Literal["huber", "mse"] = "huber",
    huber_delta: float = 0.5,  # SAFE, published code
    cliprange: float | None = 0.2,  # SAFE, published code; PPO's usual figure
    reduction: Literal["mean", "max"] = "mean",  # SAFE, published code; PPO: max
    denominator: float | Tensor | None = None,
) -> ValueLoss:
    """sum m_t R(f(V_t - G_t), f(V'_t - G_t)) / denominator,  V' = V_old + clip(V - V_old, -cliprange, cliprange).

    huber: f(e) = e^2 / 2 for |e| <= delta, delta (|e| - delta / 2) beyond (the convention of torch's huber_loss).
    mse: f(e) = e^2 / 2, which is huber with an infinite delta, so that the kinds agree on small errors.
    R is the mean or the maximum of its two arguments; with cliprange None it is the first of them.
    Source: SAFE (arXiv 2602.04651), published code; the maximum is that of PPO (Schulman et al. 2017, reference code).

    Args:
        values: V [B, T], of one head or of their soft-min; carries the gradient.
        old_values: V_old [B, T], the same at the start of the update.
        returns: G [B, T] (`advantages.gae`).
        mask: bool [B, T], True on response tokens.
        huber_delta: delta, in the scorer's units, positive; read by huber only.
        cliprange: in the scorer's units, positive; None does not clip.
        denominator: number of response tokens; None is the number of True entries.

    Returns:
        The loss; the fraction (same denominator) of tokens with |V - V_old| > cliprange, 0 without clip.

    Raises:
        ValueError: for an unknown kind or reduction, a delta or a cliprange that is not positive. TypeError,
            ValueError: see `masked.check_mask` and `masked.masked_mean`.
    """
    if kind not in ("huber", "mse"):
        raise ValueError(f"the value loss is {kind!r}: give huber or mse")
    if reduction not in ("mean", "max"):
        raise ValueError(f"the value loss's reduction is {reduction!r}: give mean or max")
    if not huber_delta > 0:
        raise ValueError(f"huber_delta is {huber_delta}: give a positive number, in the scorer's units")
    if cliprange is not None and not cliprange > 0:
        raise ValueError(f"the value loss's cliprange is {cliprange}: give a positive number, or null for no clip")
    check_mask(mask, values=values, old_values=old_values, returns=returns)
    values, old_values, returns = (torch.where(mask, x, 0) for x in (values, old_values, returns))

    def error(predicted: Tensor) -> Tensor:
        if kind == "mse":
            return (predicted - returns).square() / 2
        return torch.nn.functional.huber_loss(predicted, returns, reduction="none", delta=huber_delta)

    unclipped = error(values)
    if cliprange is None:
        return ValueLoss(masked_mean(unclipped, mask, denominator), torch.zeros_like(unclipped).sum().detach())
    clipped = error(old_values + (values - old_values).clamp(-cliprange, cliprange))
    both = torch.maximum(unclipped, clipped) if reduction == "max" else (unclipped + clipped) / 2
    clip_fraction = masked_mean(((values - old_values).abs() > cliprange).to(values.dtype), mask, denominator)
    return ValueLoss(masked_mean(both, mask, denominator), clip_fraction)


def explained_variance(returns: Tensor, values: Tensor, mask: Tensor) -> Tensor:
    """1 - Var(G - V) / Var(G) over the True entries: 1 is a perfect critic, 0 one that knows only the mean.

    For the batch of all ranks: 1 - a.variance / b.variance of the merged `masked.totals` of G - V (a) and of G (b).

    Args:
        returns, values: G and V [B, T], the scorer's units.
        mask: bool [B, T], True on response tokens.

    Returns:
        A scalar, at most 1; NaN when the returns do not vary (the figure is then undefined).

    Raises:
        TypeError, ValueError: see `masked.check_mask` and `masked.masked_var`.
    """
    check_mask(mask, returns=returns, values=values)
    spread = masked_var(returns, mask)
    return torch.where(spread > 0, 1 - masked_var(returns - values, mask) / spread, torch.nan)
