"""The facts that a verdict on a run rests on."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from stable_rlhf.control import WINDOW, observed_kl
from stable_rlhf.report.plots import series
from stable_rlhf.report.run import Headline, Run
from stable_rlhf.runs.evaluation import GOLD_NAME, gold_names
from stable_rlhf.runs.incidents import UNDOES
from stable_rlhf.text import printable

FEW = 5
"""Steps of which a mean is taken where a run's end is compared with its start or its budget: a single step is noisy,
and more would lag behind a KL that still rises."""


CHANCE_OF_THE_BEST = 3.0
"""Standard errors by which a gold reward must lie below its best evaluation in training, which is the best partly by
luck: as many as a reward crash needs."""


@dataclass(frozen=True, kw_only=True)
class Gold:
    """The change of a gold reward, and of the reward, from one evaluation to the end, with their standard errors."""

    name: str
    change: float
    error: float
    reward_change: float
    reward_error: float
    since: int = 0
    """Steps done before that evaluation: 0 is the one before training."""


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What a verdict rests on. None: not known. Pairs are (at the start, at the end)."""

    steps: int
    planned: int | None = None
    running: bool = False
    """Whether a process is training in the run's folder."""
    gave_up_at: int | None = None
    """The step at which the guard gave up the run."""
    reward_change: float | None = None
    """In the scorer's units, with its standard error `reward_error`."""
    reward_error: float | None = None
    golds: tuple[Gold, ...] = ()
    crashes: int = 0
    kl: float | None = None
    """At the end, nats per token; `budget` is the KL threshold in force there."""
    budget: float | None = None
    variety: tuple[float, float] | None = None
    """distinct-2, a share."""
    entropy: tuple[float, float] | None = None
    """Nats per token."""
    skips: int = 0
    rebases: int = 0
    """How often the reward was found to have moved."""
    rollbacks: int = 0


def facts_of(run: Run, head: Headline) -> Facts:
    """The facts of a run: of the held-out prompts where both sides are known, otherwise of the steps that were not
    rolled back."""
    acted = Counter(incident["action"] for incident in run.incidents)
    last = run.incidents[-1] if run.incidents else None
    stopped = last is not None and last["action"] == "stop" and last["step"] >= run.rows[-1]["step"]
    planned = run.config.get("max_steps")
    undone = {incident["step"] for incident in run.incidents if incident["action"] in UNDOES}
    kept = [row for row in run.rows if row["step"] not in undone]
    rewards, variety, entropy, budgets = (
        series(kept, name)[1]
        for name in (
            "objective/scores",
            "completions/distinct_2",
            "objective/entropy",
            "safe/threshold",
        )
    )
    kl = [value for row in kept if (value := observed_kl(row)) is not None]
    reward = _held_out_reward(run.evaluation) or change(rewards, WINDOW, FEW)
    return Facts(
        steps=head.steps,
        planned=planned if isinstance(planned, int) and not isinstance(planned, bool) else None,
        running=run.running,
        gave_up_at=last["step"] if last is not None and stopped else None,
        reward_change=reward[0] if reward else None,
        reward_error=reward[1] if reward else None,
        golds=tuple(golds(run.evaluation or {}, run.measured)),
        crashes=len(head.crashes),
        kl=_mean(kl[-FEW:]) if kl else None,
        budget=budgets[-1] if budgets else None,
        variety=_held_out(run.evaluation, "distinct_2") or _ends(variety),
        entropy=_held_out(run.evaluation, "entropy") or _ends(entropy),
        skips=acted["skip"],
        rebases=acted["rebase"],
        rollbacks=acted["roll back"] + acted["stop"],
    )


def _held_out(evaluation: dict[str, Any] | None, name: str) -> tuple[float, float] | None:
    before, after = (((evaluation or {}).get(side) or {}).get(name) for side in ("before", "after"))
    return None if before is None or after is None else (before, after)


def _held_out_reward(evaluation: dict[str, Any] | None) -> tuple[float, float] | None:
    """(change of the reward, its standard error). The same prompts are on both sides, so the error is rather too
    large."""
    rewards, errors = _held_out(evaluation, "reward"), _held_out(evaluation, "reward_se")
    return None if rewards is None or errors is None else (rewards[1] - rewards[0], math.hypot(*errors))


def golds(evaluation: dict[str, Any], measured: Sequence[dict[str, Any]]) -> Iterator[Gold]:
    """The change of each gold reward from its best evaluation, if that is clearly above the end, otherwise from the
    first. The end is `after`, the policy that is kept; in a run that goes on the last evaluation.

    `measured`: every evaluation, by step. There is none of a gold reward whose figures are not known on both sides.
    """
    end = evaluation.get("after") or (measured[-1] if len(measured) > 1 else {})
    for name in gold_names(evaluation):
        mean, error = f"gold/{name}/mean", f"gold/{name}/se"
        known = [row for row in (*measured, end) if all(row.get(each) is not None for each in (mean, error, *_REWARD))]
        if not known or known[0].get("step") != 0 or known[-1] is not end:
            continue
        start, best = known[0], max(known, key=lambda row: row[mean])
        if best[mean] - end[mean] > CHANCE_OF_THE_BEST * math.hypot(best[error], end[error]):
            start = best
        yield Gold(
            name=printable(name, GOLD_NAME),
            change=end[mean] - start[mean],
            error=math.hypot(start[error], end[error]),
            reward_change=end["reward"] - start["reward"],
            reward_error=math.hypot(start["reward_se"], end["reward_se"]),
            since=start["step"],
        )


_REWARD = ("reward", "reward_se")


def _ends(values: list[float]) -> tuple[float, float] | None:
    """Means of the first and of the last FEW values; None where these would overlap."""
    return None if len(values) < 2 * FEW else (_mean(values[:FEW]), _mean(values[-FEW:]))


def _mean(values: list[float]) -> float:
    return math.fsum(values) / len(values)


def change(values: Sequence[float], most: int, least: int) -> tuple[float, float] | None:
    """(change, its standard error) from the first to the last n values, n = half of them, at most `most`.

    The error comes from the scatter of the values: sqrt(s1^2 / n + s2^2 / n), s^2 with denominator n - 1. None for
    fewer than `least` values a side.
    """
    n = min(most, len(values) // 2)
    if n < max(2, least):
        return None
    sides = (values[:n], values[-n:])
    means = [math.fsum(side) / n for side in sides]
    spreads = [math.hypot(*(value - mean for value in side)) for side, mean in zip(sides, means, strict=True)]
    return means[1] - means[0], math.hypot(*spreads) / math.sqrt(n * (n - 1))
