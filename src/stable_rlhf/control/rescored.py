"""Earlier texts whose scores were asked for again: whether a fall of the reward is the reward's own doing."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from stable_rlhf.control.guard_rules import standard_error

CLEAR = 3.0
"""Standard errors by which the same texts must score lower: by the noise of a reward alone one in 700 does."""


@dataclass(frozen=True, kw_only=True)
class Rescored:
    """Scores of the same texts: when they were sampled around the best of the reward, and now."""

    step: int
    """That sampled the last of them, from 0."""
    before: tuple[float, ...]
    now: tuple[float, ...]

    @property
    def drop(self) -> float:
        """Mean of the differences before - now: what the reward has moved down by."""
        return (math.fsum(self.before) - math.fsum(self.now)) / len(self.before)

    @property
    def error(self) -> float | None:
        """Standard error of ``drop`` over the pairs; None where there are too few."""
        mean, count = self.drop, len(self.before)
        squares = math.fsum((old - new - mean) ** 2 for old, new in zip(self.before, self.now, strict=True))
        return standard_error(math.sqrt(squares / count), count)

    def explains(self, fall: float, allowed: float) -> bool:
        """Whether the reward has clearly moved, and without that the ``fall`` is one that is ``allowed``."""
        return self.error is not None and self.drop > CLEAR * self.error and fall - self.drop <= allowed

    def __str__(self) -> str:
        return (
            f"{len(self.before)} texts of step {self.step} scored again give {_mean(self.now):.3g}, then "
            f"{_mean(self.before):.3g}"
        )


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)
