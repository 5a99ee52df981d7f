"""Several rewards of one kind made one score: their mean, their minimum, or their mean less their variance.

Reward models that were trained apart agree where they have seen data, and err apart where they have not. A policy that
is paid by one of them finds its errors; the minimum of several, or the mean less their disagreement, pays only for what
they all like (Coste et al. 2023, "Reward Model Ensembles Help Mitigate Overoptimization", section 3.3).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from stable_rlhf.errors import CheckpointError, RewardError, RewardInputError

ROUNDING = 1e-12  # of the mean's size: a smaller deviation is the rounding of equal scores, not a spread


class Ensemble:
    """Combines the scores of a sample, each in units of its own reward.

    The scores of one reward mean nothing next to those of another: the Bradley-Terry loss leaves a reward model's
    offset free, and says nothing of its scale. So each reward is measured once, on the first batch that is scored: its
    mean there is 0 afterwards and its standard deviation 1. These units are a part of the run's state. They do not move
    with the run, so a score keeps its meaning; multiplying a reward by 10 or adding 5 to it changes nothing.

    rule: "mean" sum_i z_i / k; "min" min_i z_i; "uncertainty" sum_i z_i / k - coefficient * sum_i (z_i - mean)^2 / k.
    names: of the k >= 2 rewards.
    """

    def __init__(self, rule: str, coefficient: float, names: Sequence[str]) -> None:
        if len(names) < 2:
            raise RewardInputError(
                f"reward.aggregate={rule!r} has no effect on one reward: name several in reward.functions, or leave it "
                "out."
            )
        self.rule, self.coefficient, self.names = rule, coefficient, list(names)
        self.units: list[tuple[float, float]] | None = None
        """(mean, deviation) of each reward on the first batch; None before it."""

    def combine(self, rows: Sequence[Sequence[float | None]]) -> tuple[list[float | None], float]:
        """(total of each row, disagreement). `rows[b][i]`: the score of sample b by reward i.

        The total of a row is None where a reward gave no score: its worst case is not known. The disagreement is the
        mean over the other rows of the standard deviation of z over the rewards (denominator k). Raises RewardError
        where the first batch shows no spread.
        """
        judged = [[score for score in row if score is not None] for row in rows if None not in row]
        if not judged:
            return [None] * len(rows), 0.0
        if self.units is None:
            columns = zip(*judged, strict=True)
            self.units = [self._measured(name, column) for name, column in zip(self.names, columns, strict=True)]
        totals, deviations = [], []
        for row in judged:
            standard = [(x - mean) / scale for x, (mean, scale) in zip(row, self.units, strict=True)]
            total, deviation = self._total(standard)
            totals.append(total)
            deviations.append(deviation)
        rest = iter(totals)
        return [None if None in row else next(rest) for row in rows], math.fsum(deviations) / len(deviations)

    def _total(self, scores: Sequence[float]) -> tuple[float, float]:
        """(score by the rule, standard deviation over the rewards)."""
        mean = math.fsum(scores) / len(scores)
        variance = math.fsum((score - mean) ** 2 for score in scores) / len(scores)
        total = min(scores) if self.rule == "min" else mean
        return total - (self.coefficient * variance if self.rule == "uncertainty" else 0.0), math.sqrt(variance)

    def _measured(self, name: str, scores: Sequence[float]) -> tuple[float, float]:
        mean = math.fsum(scores) / len(scores)
        deviation = math.sqrt(math.fsum((score - mean) ** 2 for score in scores) / len(scores))
        if deviation <= ROUNDING * max(map(abs, scores)):
            raise RewardError(
                f"reward.aggregate={self.rule!r}: {name} gave the first {len(scores)} samples that every reward judged "
                f"the same score, {mean:.6g}, so its unit is not known: raise rollout.batch_size, or data.eval_size "
                "where held-out prompts are scored first, or leave that reward out."
            )
        return mean, deviation

    def state_dict(self) -> dict[str, Any]:
        """The units, as plain JSON values."""
        return {"names": self.names, "units": None if self.units is None else [list(unit) for unit in self.units]}

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Continues from a `state_dict()`. Raises CheckpointError if it is not of as many rewards."""
        units = saved["units"]
        if units is not None and len(units) != len(self.names):
            raise CheckpointError(
                f"the checkpoint has the units of {len(units)} rewards, and there are {len(self.names)}: resume with "
                "the run's own reward.functions"
            )
        self.units = None if units is None else [(float(mean), float(scale)) for mean, scale in units]
