"""The guard's settings: the bounds of its rules, and its roll-backs."""

from __future__ import annotations

import dataclasses
import math
import typing
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from stable_rlhf.control.base import as_whole


@dataclass(frozen=True, kw_only=True)
class GuardConfig:
    """The guard: it checks every step for signs of a failing run, and rolls the run back to its last good state.

    docs/algorithm.md (Guard) has the rules. A share or multiple is of the run's own start, the mean of its first five
    steps. Raises ValueError for a value of another type, out of its range, or without effect; the message names the
    setting as ``guard.<name>``.
    """

    enabled: bool = True
    """Check every step. If it is off, only a figure that is not finite ends the run."""
    max_kl_ratio: float | None = 5.0
    """Ceiling of the KL as a multiple of the threshold in force (``safe/threshold``), for controllers that have one.
    Healthy runs stay below 1.5 of it. None sets no ceiling."""
    max_kl: float | None = 2.0
    """Ceiling of the KL, nats per token, for controllers without a threshold (``none`` and ``fixed``). At 2
    the reference finds the text e^2 times less likely at every token. None sets no ceiling."""
    min_entropy: float | None = 0.2
    """Share of the starting entropy below which the entropy has collapsed. Healthy runs keep half or more. None
    switches the rule off."""
    max_entropy: float | None = 2.0
    """Multiple of the starting entropy above which the text is gibberish. None switches the rule off."""
    min_distinct: float | None = 0.25
    """Share of the starting distinct-2 (share of distinct word pairs) below which the policy repeats one phrase. None
    switches the rule off."""
    min_length: float | None = 0.2
    """Share of the starting mean length below which completions have collapsed to almost nothing. None switches the
    rule off."""
    max_drawdown: float | None = 0.5
    """Share of the reward gained since the start (moving average over 20 steps) that may be lost again. Reports count a
    crash earlier: at a quarter of what was gained since step 20. None switches the rule off."""
    min_explained_variance: float | None = None
    """Explained variance below which the critic's values mislead. None, the default, switches the rule off: once a
    reward is saturated its returns hardly vary, and even a good critic is below any bound."""
    patience: int = 5
    """Number of steps in a row in which a rule must be broken before the guard acts. It acts at once for the ceiling of
    the KL and for figures that are not finite."""
    snapshot_steps: int = 20
    """Keep the last good state every this many steps: in memory with LoRA, else in the run's folder."""
    max_rollbacks: int = 3
    """Number of roll-backs allowed in a run. Where one more would be needed, the guard stops the run."""
    rollback_factor: float = 0.5
    """Factor on both learning rates, and on how far one update may move the policy, at each roll-back."""

    def __post_init__(self) -> None:
        self._check_types()
        if not self.enabled:
            for field in dataclasses.fields(self):
                unused = field.name == "enabled" or getattr(self, field.name) == field.default
                self._require(unused, field.name, "has no effect unless guard.enabled=true; leave it out")
        for name in _ABOVE_0:
            bound = getattr(self, name)
            self._require(bound is None or bound > 0, name, "must be greater than 0")
        for name in ("min_entropy", "min_distinct", "min_length"):
            share = getattr(self, name)
            self._require(share is None or share < 1, name, "must be below 1, the start itself")
        above = self.max_entropy is None or self.max_entropy > 1
        self._require(above, "max_entropy", "must be above 1, the start itself")
        above = self.max_kl_ratio is None or self.max_kl_ratio > 1
        self._require(above, "max_kl_ratio", "must be above 1, the threshold itself")
        for name in ("patience", "snapshot_steps"):
            self._require(getattr(self, name) > 0, name, "must be greater than 0")
        self._require(self.max_rollbacks >= 0, "max_rollbacks", "must be 0 or more")
        self._require(0 < self.rollback_factor <= 1, "rollback_factor", "must be in (0, 1]")

    def _check_types(self) -> None:
        hints = typing.get_type_hints(type(self))
        for field in dataclasses.fields(self):
            fits, remedy = _KINDS[hints[field.name]]
            if hints[field.name] is int:
                object.__setattr__(self, field.name, as_whole(getattr(self, field.name)))
            self._require(fits(getattr(self, field.name)), field.name, remedy)

    def _require(self, ok: bool, name: str, remedy: str) -> None:
        if not ok:
            raise ValueError(f"guard.{name}={getattr(self, name)!r}: {remedy}")


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _finite(value: Any) -> bool:
    return _whole(value) or (isinstance(value, float) and math.isfinite(value))


_ABOVE_0 = ("max_kl_ratio", "max_kl", "min_entropy", "max_entropy", "min_distinct", "min_length", "max_drawdown")
_KINDS: dict[Any, tuple[Callable[[Any], bool], str]] = {
    bool: (lambda value: isinstance(value, bool), "give true or false"),
    int: (_whole, "give a whole number"),
    float: (_finite, "give a finite number"),
    float | None: (lambda value: value is None or _finite(value), "give a finite number, or null"),
}
"""Type of a field -> (check of a value, remedy); an int is a number, True is not."""
