"""The seconds of a step, by part (timings.jsonl)."""

from __future__ import annotations

import time
from collections.abc import Mapping


class Stopwatch:
    """Times the parts of a step from the moment it is made. ``lap`` names the seconds since the last lap or ``add``."""

    def __init__(self) -> None:
        self.started = self._last = time.perf_counter()
        self.seconds: dict[str, float] = {}

    def add(self, seconds: Mapping[str, float]) -> None:
        """Adds parts that were timed elsewhere, up to now."""
        self.seconds |= seconds
        self._last = time.perf_counter()

    def lap(self, name: str) -> None:
        now = time.perf_counter()
        self.seconds[name], self._last = now - self._last, now

    def timing(self, tokens: int) -> dict[str, float]:
        """The parts, the total up to now, and ``tokens`` sampled tokens per second of it."""
        total = time.perf_counter() - self.started
        return {**self.seconds, "total_s": total, "tokens_per_s": tokens / total}
