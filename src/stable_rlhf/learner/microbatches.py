"""Divides the rows of each optimiser step into microbatches, one forward and backward pass each."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from stable_rlhf.config import OptimConfig

PASS_COST = {"cpu": 256, "cuda": 2048}
"""Fixed cost of a pass, counted in tokens: one more pass saves time only where it saves more padding than this.

CPU: on two cores the built-in policy's step took 2.00, 1.98 and 1.76 s at 64, 128 and 256, timed alternately, and in
another run 1.05 and 1.19 s at 256 and 512. CUDA: on one H200 a pass of 1,792 tokens took 26 ms at 135M, whose
arithmetic takes one, and at 3B its fixed part was worth 300 tokens; a new pass must also pay for the shape that it adds
(docs/LOG.md)."""


@dataclass(frozen=True, kw_only=True)
class Microbatch:
    """One forward and backward pass: rows of the rollout, and how much of them is not padding."""

    rows: Tensor
    """[n] int64, on the CPU. After the first ``count`` a row is repeated, only to fill the shape."""
    count: int
    """Rows that are learned from."""
    width: int
    """Columns of ``Tokens.ids``: the longest prompt with its response, less the last token, which predicts nothing."""
    length: int
    """Columns of the response: the longest of these rows."""


class Grain(NamedTuple):
    """How the shapes of passes are rounded up."""

    rows: int = 1
    """Rows are filled up to a multiple of this, where the budget has room for it."""
    columns: int = 1
    """Widths and lengths are a multiple of this."""
    limit: int = 2**30
    """Columns that the model has positions for: no width is rounded beyond it."""


EXACT = Grain()


@dataclass(frozen=True, kw_only=True)
class Lengths:
    """Lengths of every row of a rollout, kept on the host so that `plan` does not wait for the device."""

    prompt: list[int]
    """Tokens of the prompt."""
    response: list[int]
    """True entries of the response's mask: 0 for a row without a reward, which no pass takes."""


def permutation(rows: int, seed: int, step: int, iteration: int) -> Tensor:
    """The order of the rows in one pass over the rollout, [rows] int64.

    It depends only on the arguments, so a resumed run repeats it.
    """
    # Primes keep the seeds of neighbouring steps and iterations apart.
    generator = torch.Generator().manual_seed((seed * 1_000_003 + step * 1_009 + iteration) % 2**63)
    return torch.randperm(rows, generator=generator)


def plan(
    lengths: Lengths,
    optim: OptimConfig,
    seed: int,
    step: int,
    iteration: int,
    device: torch.device,
    grain: Grain = EXACT,
) -> Iterator[list[Microbatch]]:
    """Yields the microbatches of each minibatch in one pass over the rollout; [] where no row of it has a reward.

    The configuration has checked that the rows divide by the number of minibatches. A minibatch is divided to stay
    within ``optim.microbatch_tokens`` and to save padding. That changes no gradient: every pass divides by the
    minibatch's number of response tokens. ``grain`` rounds the shapes up.
    """
    budget = optim.microbatch_tokens
    order = permutation(len(lengths.prompt), seed, step, iteration)
    for rows in order.chunk(optim.num_mini_batches):
        scored = [row for row in rows.tolist() if lengths.response[row] > 0]
        scored.sort(key=lambda row: -(lengths.prompt[row] + lengths.response[row]))  # stable: ties keep the order
        exact = [lengths.prompt[row] + lengths.response[row] - 1 for row in scored]
        widths = [max(width, min(up(width, grain.columns), grain.limit)) for width in exact]
        cost = PASS_COST["cpu" if device.type == "cpu" else "cuda"]
        yield [
            Microbatch(
                rows=torch.tensor((scored[first:last] + [scored[first]] * grain.rows)[:taken]),
                count=last - first,
                width=widths[first],
                length=up(max(lengths.response[row] for row in scored[first:last]), grain.columns),
            )
            for first, last in cuts(widths, budget, cost, grain.rows)
            for taken in [filled(last - first, widths[first], budget, grain.rows)]
        ]


def filled(rows: int, width: int, budget: int, multiple: int) -> int:
    """The number of rows, rounded up to ``multiple`` where that fits into the budget of tokens."""
    more = up(rows, multiple)
    return more if more * width <= budget else rows


def cuts(widths: Sequence[int], budget: int, cost: int, multiple: int = 1) -> list[tuple[int, int]]:
    """Divides rows, sorted from the widest on, into the cheapest groups [first, last).

    The cost is the sum of (rows x widest + cost) over the groups. A group has at most ``budget`` tokens, or a single
    row. Rows count as ``filled`` up to a multiple.

    Dynamic programming from the end: least[i] = min over j of filled(j - i) widths[i] + cost + least[j].
    """
    count = len(widths)
    least, after = [0] * (count + 1), [count] * count
    for first in reversed(range(count)):
        width = widths[first]
        most = max(1, budget // width)
        least[first], after[first] = min(
            (filled(last - first, width, budget, multiple) * width + cost + least[last], last)
            for last in range(first + 1, min(count, first + most) + 1)
        )
    groups, first = [], 0
    while first < count:
        groups.append((first, after[first]))
        first = after[first]
    return groups


def up(number: int, multiple: int) -> int:
    """The number rounded up to a multiple."""
    return -(-number // multiple) * multiple
