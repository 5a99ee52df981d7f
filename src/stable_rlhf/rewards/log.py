"""Figures and columns that reward functions record besides their scores, as TRL's ``log_metric`` and ``log_extra``."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from stable_rlhf.errors import RewardError
from stable_rlhf.rewards.checks import shown

OWN_COLUMNS = frozenset({"prompt", "completion", "score", "length", "kl"})
"""Columns of completions/*.parquet that are the run's."""


class RewardLog:
    """The records of one batch of ``count`` samples. Raises RewardError for what cannot be recorded."""

    def __init__(self, count: int) -> None:
        self._count = count
        self._metrics: dict[str, list[float]] = {}
        self.columns: dict[str, list[Any]] = {}
        """Column -> one text, finite number or None a sample."""

    @property
    def metrics(self) -> dict[str, float]:
        """Name -> mean of the values recorded."""
        return {name: math.fsum(values) / len(values) for name, values in self._metrics.items()}

    def log_metric(self, name: str, value: Any) -> None:
        """Records a finite number as ``user/<name>``; several in one step are averaged."""
        number = value.item() if hasattr(value, "item") else value
        if not isinstance(number, int | float) or not math.isfinite(number):
            raise RewardError(f"log_metric({shown(name)}, {shown(value)}): the value must be a finite number")
        self._metrics.setdefault(_named("log_metric", name), []).append(float(number))

    def log_extra(self, column: str, values: Any) -> None:
        """Records a column of completions/*.parquet: one value a sample. What is neither number nor text is written
        as text."""
        values = values.tolist() if hasattr(values, "tolist") else values
        if not isinstance(values, Sequence) or isinstance(values, str) or len(values) != self._count:
            raise RewardError(
                f"log_extra({shown(column)}, {shown(values)}): give a list of {self._count} values, one a sample"
            )
        if _named("log_extra", column) in OWN_COLUMNS | self.columns.keys():
            raise RewardError(f"log_extra({shown(column)}): there is a column of this name already; choose another")
        if all(value is None or (isinstance(value, int | float) and math.isfinite(value)) for value in values):
            self.columns[column] = [None if value is None else float(value) for value in values]
        else:
            self.columns[column] = [None if value is None else str(value) for value in values]


def _named(call: str, name: Any) -> str:
    if not isinstance(name, str) or not name or not name.isprintable():
        raise RewardError(f"{call}({shown(name)}, ...): the name must be a text of printable characters")
    return name
