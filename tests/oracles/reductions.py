"""Masked reductions, one entry at a time, in Python's float64."""

from __future__ import annotations

import math

from torch import Tensor


def kept(x: Tensor, mask: Tensor) -> list[float]:
    """The True entries of x, as a list."""
    entries, flags = x.flatten().tolist(), mask.flatten().tolist()
    return [entry for entry, flag in zip(entries, flags, strict=True) if flag]


def mean(entries: list[float]) -> float:
    return math.fsum(entries) / len(entries)


def variance(entries: list[float]) -> float:
    """Population variance."""
    centre = mean(entries)
    return math.fsum((entry - centre) ** 2 for entry in entries) / len(entries)


def ratio_error(rows: list[list[float]]) -> float:
    """Standard error of the mean over all entries, for independent rows; 0 of a single one."""
    count = sum(map(len, rows))
    centre = mean([entry for row in rows for entry in row])
    squares = math.fsum((math.fsum(row) - centre * len(row)) ** 2 for row in rows)
    return math.sqrt(squares * len(rows) / (len(rows) - 1)) / count if len(rows) > 1 else 0.0


def distinct_n(tokens: Tensor, mask: Tensor, n: int) -> float:
    """Unique n-grams / n-grams; NaN without any."""
    grams = []
    for row, flags in zip(tokens.tolist(), mask.tolist(), strict=True):
        for start in range(len(row) - n + 1):
            if all(flags[start : start + n]):
                grams.append(tuple(row[start : start + n]))
    return len(set(grams)) / len(grams) if grams else math.nan
