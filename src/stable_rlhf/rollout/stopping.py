"""Ends completions at the stop strings."""

from __future__ import annotations

import bisect
from collections.abc import Callable, Sequence

from torch import Tensor


def first_stop(text: str, stop_strings: Sequence[str]) -> int | None:
    """Where the first of the stop strings begins in a text; None where none is in it."""
    places = [place for stop in stop_strings if (place := text.find(stop)) >= 0]
    return min(places, default=None)


def stopped(
    completions: Sequence[str],
    mask: Tensor,
    ended: Tensor,
    stop_strings: Sequence[str],
    decode: Callable[[int, int], str],
) -> tuple[list[str], Tensor, Tensor]:
    """Ends each completion with the first token that completes a stop string.

    ``mask`` [B, T] is True for response tokens, ``ended`` [B] where there is an end token; ``decode(row, count)`` gives
    the text of a row's first ``count`` tokens. Returns (completions up to the stop string, mask, ended). The tokens
    before the end were sampled without a look at those after it, so what is left is what sampling would have given that
    stops there.
    """
    texts, mask, ended = list(completions), mask.clone(), ended.clone()
    for row, text in enumerate(completions):
        if first_stop(text, stop_strings) is None:
            continue

        def complete(count: int, row: int = row) -> bool:
            return first_stop(decode(row, count), stop_strings) is not None

        counts = range(1, int(mask[row].sum()) + 1)
        count = 1 + bisect.bisect_left(counts, True, key=complete)
        kept = decode(row, count)  # another stop string may begin earlier and be complete only later
        texts[row], ended[row], mask[row, count:] = kept[: first_stop(kept, stop_strings)], True, False
    return texts, mask, ended
