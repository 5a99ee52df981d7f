"""Reductions over the True entries of a mask: sum, mean, variance, whitening, distinct-n.

Statistics that must hold for the batch of all ranks travel as `Totals`: every rank makes its own with `totals`, the
caller exchanges them, `merge` makes them one, and `whiten` takes the result. Nothing here knows about ranks.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

# Advantages of rewards of unit deviation spread over some tenths or more while there is something to learn, and over
# about 0.02 once the rewards have saturated: a floor of 0.1 leaves the first as it is and keeps the second small (0.2
# instead of 1), so that its noise is not amplified into a full-sized update.
DEVIATION_FLOOR = 0.1


class Totals(NamedTuple):
    """Count, mean and sum of squared deviations of the True entries: float64 scalars that merge without cancellation.

    A sum and a sum of squares would say the same, but their difference loses every digit when the mean is large
    compared with the deviation. With a count of 0 the mean and m2 are 0 and the variance is NaN.
    """

    count: Tensor
    mean: Tensor
    m2: Tensor

    @property
    def variance(self) -> Tensor:
        """Population variance, m2 / count (the denominator is count, not count - 1). NaN when count is 0."""
        return self.m2 / self.count


def check_mask(mask: Tensor, **tensors: Tensor) -> None:
    """Raises TypeError unless `mask` is boolean, ValueError unless every named tensor has the mask's shape.

    Broadcasting is refused: [B] against [B, T] would go through unseen when B happens to equal T.
    """
    if mask.dtype != torch.bool:
        raise TypeError(f"mask has dtype {mask.dtype}: give a boolean mask, True on response tokens")
    for name, tensor in tensors.items():
        if tensor.shape != mask.shape:
            raise ValueError(
                f"{name} has shape {tuple(tensor.shape)} and the mask {tuple(mask.shape)}: give both the same shape"
            )


def masked_sum(x: Tensor, mask: Tensor, dim: int | None = None) -> Tensor:
    """Sum of x over the True entries of the mask.

    Args:
        x: any shape.
        mask: bool, the shape of x; True marks the entries that count.
        dim: the dimension to sum over (1 gives sums per sequence of a [B, T] tensor); None sums over all.

    Returns:
        A scalar, or x's shape without `dim`. 0 where the mask has no True entry. The gradient is exactly 0 outside
        the mask.

    Raises:
        TypeError, ValueError: see `check_mask`.
    """
    check_mask(mask, x=x)
    kept = torch.where(mask, x, 0)
    return kept.sum() if dim is None else kept.sum(dim)


def masked_mean(x: Tensor, mask: Tensor, denominator: float | Tensor | None = None) -> Tensor:
    """Mean of x over the True entries: their sum divided by `denominator`.

    Args:
        x: any shape.
        mask: bool, the shape of x; True marks the entries that count.
        denominator: what the sum is divided by; None is the number of True entries. Give the number of response
            tokens of the whole minibatch, over all microbatches and ranks, and the results of the parts add up to
            the mean of the whole, whatever the microbatch size (and an empty part gives 0). A tensor is taken as it
            is: to look at its value, the host would wait for the device at every call. The caller checks that it is
            positive; over 0 the mean is NaN or infinite.

    Raises:
        TypeError, ValueError: see `check_mask`; ValueError for a number that is not positive, and for an empty mask
            when no denominator is given (to see that, the host waits for the device).
    """
    total = masked_sum(x, mask)
    if denominator is None:
        denominator = mask.sum()
        if denominator == 0:
            raise ValueError("the mask has no True entry, so a mean over it is undefined: give a denominator")
    elif not isinstance(denominator, Tensor) and not denominator > 0:
        raise ValueError(f"denominator is {denominator}: give the positive number of response tokens")
    return total / denominator


def ratio_error(x: Tensor, mask: Tensor) -> float:
    """Standard error of the mean of x over the True entries, where the rows, not the entries, are independent.

    The mean is a ratio, sum_b S_b / sum_b L_b with S_b the sum of row b and L_b its count. By linearisation
        error^2 = n / (n - 1) sum_b (S_b - mean L_b)^2 / (sum_b L_b)^2,
    n the number of rows with an entry. Source: Cochran, "Sampling Techniques" (1977), section 6.4.

    Args:
        x: floating point, [B, T].
        mask: bool, [B, T]; True marks the entries that count.

    Returns:
        In x's unit; 0 where fewer than two rows have an entry, which do not show their error.

    Raises:
        TypeError, ValueError: see `check_mask`.
    """
    lengths = mask.sum(1).double()
    rows = int((lengths > 0).sum())
    if rows < 2:
        check_mask(mask, x=x)
        return 0.0
    sums = masked_sum(x.double(), mask, 1)
    residuals = sums - sums.sum() / lengths.sum() * lengths
    return float((residuals.square().sum() * rows / (rows - 1)).sqrt() / lengths.sum())


def totals(x: Tensor, mask: Tensor) -> Totals:
    """Count, mean and sum of squared deviations of x over the True entries, in float64, by two passes.

    Args:
        x: floating point, any shape.
        mask: bool, the shape of x; True marks the entries that count. It may be empty: the result is then neutral in
            `merge`.

    Raises:
        TypeError, ValueError: see `check_mask`.
    """
    check_mask(mask, x=x)
    kept = torch.where(mask, x, 0).double()
    count = mask.sum().double()
    mean = kept.sum() / count.clamp(min=1)  # the clamp keeps an empty mask's mean at 0
    return Totals(count, mean, torch.where(mask, kept - mean, 0).square().sum())


_totals = totals  # `whiten` has an argument of that name


def merge(parts: Iterable[Totals]) -> Totals:
    """The totals of the union of disjoint parts (microbatches, ranks), in any order.

    n = sum n_i,  mean = sum n_i mean_i / n,  m2 = sum m2_i + sum n_i (mean_i - mean)^2.
    Source: Chan, Golub and LeVeque, "Algorithms for computing the sample variance" (1983), equation 2.1.

    Raises:
        ValueError: when there are no parts.
    """
    rows = list(parts)
    if not rows:
        raise ValueError("no totals to merge: give at least one part")
    counts, means, m2s = (torch.stack(column) for column in zip(*rows, strict=True))
    count = counts.sum()
    mean = (counts * means).sum() / count.clamp(min=1)
    return Totals(count, mean, m2s.sum() + (counts * (means - mean).square()).sum())


def masked_var(x: Tensor, mask: Tensor) -> Tensor:
    """Population variance of x over the True entries: sum (x - mean)^2 / count. In x's dtype.

    Raises:
        TypeError, ValueError: see `check_mask`; ValueError for an empty mask.
    """
    if not mask.any():
        raise ValueError("the mask has no True entry, so a variance over it is undefined")
    return totals(x, mask).variance.to(x.dtype)


def whiten(x: Tensor, mask: Tensor, floor: float = DEVIATION_FLOOR, totals: Totals | None = None) -> Tensor:
    """(x - mean) / max(deviation, floor) on the True entries, 0 elsewhere.

    Above the floor the True entries of the result have mean 0 and population variance 1. Below it the mean is still
    0 and the deviation is deviation / floor, less than 1: a batch that says nearly nothing moves nearly nothing.

    Args:
        x: floating point, any shape (advantages: [B, T]).
        mask: bool, the shape of x; True marks the entries that count.
        floor: the least deviation that is divided by, in the units of x; positive.
        totals: the merged totals of the batch of all ranks; None takes those of x itself. The denominator of mean
            and variance is their count.

    Returns:
        The shape and dtype of x. All zeros for an empty mask.

    Raises:
        TypeError, ValueError: see `check_mask`; ValueError for a floor that is not positive.
    """
    if not floor > 0:
        raise ValueError(f"floor is {floor}: give a positive deviation, or a constant batch would be divided by 0")
    check_mask(mask, x=x)
    over_batch = _totals(x, mask) if totals is None else totals
    deviation = over_batch.variance.sqrt().clamp(min=floor)
    return torch.where(mask, (x.double() - over_batch.mean) / deviation, 0).to(x.dtype)


def distinct_n(tokens: Tensor, mask: Tensor, n: int) -> Tensor:
    """Unique n-grams / n-grams, over the whole batch (Li et al. 2016, "A Diversity-Promoting Objective Function").

    Args:
        tokens: integer ids [B, T].
        mask: bool [B, T]; only windows of n consecutive True positions count, so no n-gram crosses two rows or
            touches padding.
        n: the length of the n-grams, 1 or more.

    Returns:
        A float64 scalar in (0, 1]; NaN when no row has n response tokens (the figure is then undefined).

    Raises:
        TypeError, ValueError: see `check_mask`; ValueError for n below 1.
    """
    if n < 1:
        raise ValueError(f"n is {n}: n-grams have at least 1 token")
    check_mask(mask, tokens=tokens)
    long_enough = tokens.shape[1] >= n
    grams = tokens.unfold(1, n, 1)[mask.unfold(1, n, 1).all(-1)] if long_enough else tokens[:0]
    share = len(torch.unique(grams, dim=0)) / len(grams) if len(grams) else torch.nan
    return torch.tensor(share, dtype=torch.float64, device=tokens.device)
