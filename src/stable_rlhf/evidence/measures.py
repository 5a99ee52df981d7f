"""The figures that a comparison tabulates: what each is, its unit, and which direction is better."""

from __future__ import annotations

import enum
import math
import re
from dataclasses import dataclass


class Better(enum.Enum):
    """Which of two values is better."""

    MORE = "more"
    LESS = "less"
    NEITHER = "neither"


@dataclass(frozen=True, kw_only=True)
class Measure:
    """A figure of a run. `text` is its definition in words."""

    key: str
    title: str
    unit: str
    text: str
    group: str
    better: Better = Better.NEITHER

    @property
    def is_binary(self) -> bool:
        """Whether a run has 0 or 1: five runs of five must not get an interval without width."""
        return self.key in ("healthy", "reward/reached")

    @property
    def bounds(self) -> tuple[float, float]:
        """No value lies outside: an interval is cut there."""
        never = self.key in NEVER_NEGATIVE or (self.unit in NEVER_NEGATIVE and self.key != "explained_variance")
        return 0.0 if never else -math.inf, 1.0 if self.unit == "share" else math.inf


NEVER_NEGATIVE = (
    *("share", "count", "steps", "s", "tokens", "tokens per s", "GB"),
    *("entropy/final", "ref_nll/final", "drawdown"),
)
"""Units, and figures of other units. A KL is not among them: its estimate k1 may be slightly below 0."""

NEAR = 0.15
"""Share of the threshold within which a step's KL counts as on it (docs/metrics.md)."""

END = 5
"""Steps of which a mean stands for the end of a run: one step is noisy, and more would lag behind what still moves."""

REACH = 0.9
"""Share of the way from the start to the best arm's reward at which that reward counts as reached."""


def _measure(
    group: str, key: str, title: str, unit: str, text: str, better: Better = Better.NEITHER
) -> tuple[str, Measure]:
    return key, Measure(key=key, title=title, unit=unit, text=text, group=group, better=better)


_REWARD, _POLICY, _STABILITY, _COST = "Reward", "Policy", "Stability", "Cost"

MEASURES: dict[str, Measure] = dict(
    [
        _measure(
            _REWARD, "reward/average", "training average", "reward", "mean reward of all steps", Better.MORE
        ),
        _measure(
            _REWARD, "reward/final", "final", "reward", "mean reward of the last 20 steps", Better.MORE
        ),
        _measure(
            _REWARD, "reward/held_out", "held-out", "reward", "mean reward of the held-out prompts after training",
            Better.MORE,
        ),
        _measure(
            _REWARD, "reward/reached", "reached the reward", "share",
            "1 for a run whose 20-step mean has gone 90 % of the way from where it started, over all runs, to the "
            "final reward of the best arm that is mostly healthy; 0 for one that ended before it got there",
            Better.MORE,
        ),
        _measure(
            _REWARD, "reward/steps_to", "steps to the reward", "steps",
            "steps until then, of the runs that got there: the mean leaves out the others", Better.LESS,
        ),
        _measure(
            _REWARD, "reward/seconds_to", "seconds to the reward", "s", "the same in seconds of training steps",
            Better.LESS,
        ),
        _measure(_POLICY, "kl/final", "KL, final", "nats per token", f"mean KL of the last {END} steps"),
        _measure(_POLICY, "kl/max", "KL, largest", "nats per token", "largest KL of a step", Better.LESS),
        _measure(
            _POLICY, "kl/near", "KL near its threshold", "share",
            f"share of the steps with a threshold whose KL is within {NEAR:.0%} of it",
        ),
        _measure(_POLICY, "entropy/final", "entropy, final", "nats per token", f"mean of the last {END} steps"),
        _measure(
            _POLICY, "distinct_2/final", "distinct-2, final", "share",
            f"different token pairs / all token pairs, mean of the last {END} steps", Better.MORE,
        ),
        _measure(
            _POLICY, "ref_nll/final", "NLL of the reference, final", "nats per token",
            f"how unlikely the reference finds the text, mean of the last {END} steps", Better.LESS,
        ),
        _measure(_POLICY, "length/final", "length, final", "tokens", f"mean of the last {END} steps"),
        _measure(
            _POLICY, "explained_variance", "explained variance", "share",
            "share of the returns' variance that the critic explains, mean of all steps", Better.MORE,
        ),
        _measure(
            _STABILITY, "healthy", "healthy", "share",
            "1 for a run that finished without a reward crash or a roll-back and kept half of its distinct-2 and a "
            f"quarter of its entropy, the last {END} steps against the first {END}; 0 for another",
            Better.MORE,
        ),
        _measure(_STABILITY, "crashes", "reward crashes", "count", "as the report counts them", Better.LESS),
        _measure(
            _STABILITY, "drawdown", "largest drawdown", "reward",
            "how far the 20-step mean of the reward fell below its highest value so far, at most", Better.LESS,
        ),
        _measure(_STABILITY, "incidents", "incidents", "count", "whatever the guard did", Better.LESS),
        _measure(_STABILITY, "rollbacks", "roll-backs", "count", "those of the guard, and its stop", Better.LESS),
        _measure(
            _STABILITY, "skipped", "steps skipped", "count",
            "updates that the guard left out and optimiser steps whose gradient was not finite", Better.LESS,
        ),
        _measure(
            _STABILITY, "step_scale", "share of steps taken", "share",
            "share of the proposed optimiser steps that the preview took, mean over the updates",
        ),
        _measure(_COST, "seconds", "seconds a step", "s", "median over the steps", Better.LESS),
        _measure(_COST, "tokens_per_s", "tokens a second", "tokens per s", "median over the steps", Better.MORE),
        _measure(_COST, "memory", "peak memory", "GB", "largest of the steps", Better.LESS),
    ]
)  # fmt: skip
"""Key -> measure, in the order of the table."""

GOLD = re.compile(r"gold/(.+)")
"""Keys of gold rewards: known only from the runs."""


def measure(key: str) -> Measure:
    """The measure of a key, that of a gold reward included."""
    if found := GOLD.fullmatch(key):
        text = "mean of this gold reward, on which nothing was trained, over the held-out prompts after training"
        return Measure(key=key, title=f"gold, {found[1]}", unit="reward", text=text, group=_REWARD, better=Better.MORE)
    return MEASURES[key]


def in_order(keys: set[str]) -> list[str]:
    """Keys in the order of the table: gold rewards come after the rewards that were trained on."""
    gold = sorted(key for key in keys if GOLD.fullmatch(key))
    known = [key for key in MEASURES if key in keys]
    after = sum(key in ("reward/average", "reward/final", "reward/held_out") for key in known)
    return [*known[:after], *gold, *known[after:]]
