"""The guard's settings: which figures mean that a run goes wrong, and how often it may roll back."""

from __future__ import annotations

import dataclasses
import math
import typing
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class GuardConfig:
    """When a run goes wrong, and how the guard responds (algorithm.md, Guard).

    Levels are shares of the run's own start, the mean of its first five steps. Raises ValueError for a value of
    another type, out of its range, or without effect; the sentence names it as the setting ``guard.<name>``."""

    enabled: bool = True
    """Judge every step. Off, a figure that is not finite ends the run and nothing else does."""
    max_kl: float | None = 2.0
    """Ceiling of the KL, nats per token, that a step may not pass once: at 2 the reference finds the text e^2 times
    less likely at every token, and healthy runs stay below 1 (docs/LOG.md). None sets none."""
    min_entropy: float | None = 0.2
    """Share of its start below which the entropy has collapsed; healthy runs keep half or more. None sets none."""
    max_entropy: float | None = 2.0
    """Multiple of its start above which the entropy is that of gibberish. None sets none."""
    min_distinct: float | None = 0.25
    """Share of its start below which distinct-2 is that of one phrase repeated. None sets none."""
    min_length: float | None = 0.2
    """Share of its start below which the mean length has collapsed. None sets none."""
    max_drawdown: float | None = 0.5
    """Share of the reward gained since the start (moving average over 20 steps) that may be lost again; reports call a
    crash what loses a quarter of what was gained since step 20. None sets none."""
    min_explained_variance: float | None = None
    """The critic's explained variance below which its values mislead. None, the default, sets none: once a reward is
    saturated its returns hardly vary, and a critic that is good enough lies below any bound (docs/LOG.md)."""
    patience: int = 5
    """Steps in a row that a rule must be broken, except for max_kl and figures that are not finite, which act at
    once."""
    snapshot_steps: int = 20
    """The last good state is kept every this many steps: in memory with LoRA, else in the run's folder."""
    max_rollbacks: int = 3
    """Roll-backs of a run; the next one stops it instead."""
    rollback_factor: float = 0.5
    """At each roll-back the learning rate and the controller's KL threshold are multiplied by this."""

    def __post_init__(self) -> None:
        self._check_types()
        if not self.enabled:
            for field in dataclasses.fields(self):
                unused = field.name == "enabled" or getattr(self, field.name) == field.default
                self._require(unused, field.name, "has no effect unless guard.enabled=true; leave it out")
        for name in ("max_kl", "min_entropy", "max_entropy", "min_distinct", "min_length", "max_drawdown"):
            bound = getattr(self, name)
            self._require(bound is None or bound > 0, name, "must be greater than 0")
        for name in ("min_entropy", "min_distinct", "min_length"):
            share = getattr(self, name)
            self._require(share is None or share < 1, name, "must be below 1, the start itself")
        above = self.max_entropy is None or self.max_entropy > 1
        self._require(above, "max_entropy", "must be above 1, the start itself")
        for name in ("patience", "snapshot_steps"):
            self._require(getattr(self, name) > 0, name, "must be greater than 0")
        self._require(self.max_rollbacks >= 0, "max_rollbacks", "must be 0 or more")
        self._require(0 < self.rollback_factor <= 1, "rollback_factor", "must be in (0, 1]")

    def _check_types(self) -> None:
        hints = typing.get_type_hints(type(self))
        for field in dataclasses.fields(self):
            fits, remedy = _KINDS[hints[field.name]]
            self._require(fits(getattr(self, field.name)), field.name, remedy)

    def _require(self, ok: bool, name: str, remedy: str) -> None:
        if not ok:
            raise ValueError(f"guard.{name}={getattr(self, name)!r}: {remedy}")


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _finite(value: Any) -> bool:
    return _whole(value) or (isinstance(value, float) and math.isfinite(value))


_KINDS: dict[Any, tuple[Callable[[Any], bool], str]] = {
    bool: (lambda value: isinstance(value, bool), "give true or false"),
    int: (_whole, "give a whole number"),
    float: (_finite, "give a finite number"),
    float | None: (lambda value: value is None or _finite(value), "give a finite number, or null"),
}
"""Type of a field -> (check of a value, remedy); an int is a number, True is not."""
