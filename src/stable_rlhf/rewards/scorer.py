"""The scores of several rewards made one: weighted and summed, or combined as reward.aggregate says."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

from stable_rlhf.data import Text
from stable_rlhf.errors import RewardError, RewardInputError
from stable_rlhf.rewards.calls import Samples, call
from stable_rlhf.rewards.checks import LARGEST, checked, failures_named, shown
from stable_rlhf.rewards.ensemble import Ensemble
from stable_rlhf.rewards.functions import RewardFunction
from stable_rlhf.rewards.log import RewardLog
from stable_rlhf.rewards.parameters import misfit
from stable_rlhf.user_code import RandomStream, Shield


@dataclass(frozen=True, kw_only=True)
class Scores:
    """The scores of a batch, in its order and in the reward functions' own units.

    total: sum_i weight_i * score_i over the functions that gave a score, or what Ensemble makes of them, minus
        missing_eos_penalty where the completion did not end; 0.0 where not valid.
    valid: False where every reward function returned None, or with an ensemble one of them: the sample has no score and
        must not be learned from.
    per_function: the scores of each reward function by its name, unweighted, None where it gave none.
    disagreement: of an ensemble's rewards, see Ensemble.combine; None without one.
    metrics: figures that functions recorded by log_metric. extra: columns that they recorded by log_extra.
    """

    total: list[float]
    valid: list[bool]
    per_function: dict[str, list[float | None]]
    disagreement: float | None = None
    metrics: dict[str, float] = field(default_factory=dict)
    extra: dict[str, list[Any]] = field(default_factory=dict)


class Scorer:
    """Calls every reward function on a batch and makes their scores one.

    weights: one finite factor per function, all 1.0 by default, of their sum.
    aggregate, uncertainty_coef: "sum", or the rule and the coefficient of an Ensemble.
    missing_eos_penalty: subtracted from the total of every completion without its end token, in reward units, >= 0;
        None for none. It keeps a policy from learning never to stop.
    shield: keeps user code and a run apart; None where there is no run. random: the random numbers of user code then.
    trainer_state: gives the run's state. Functions get a copy of it, ``log_metric`` and ``log_extra``; None where there
        is no run.
    """

    def __init__(
        self,
        functions: Sequence[RewardFunction],
        weights: Sequence[float] | None = None,
        missing_eos_penalty: float | None = None,
        *,
        aggregate: str = "sum",
        uncertainty_coef: float = 0.0,
        shield: Shield | None = None,
        random: RandomStream | None = None,
        trainer_state: Callable[[], Any] | None = None,
    ) -> None:
        if not functions:
            raise RewardInputError("there is no reward function: name at least one.")
        weights = [1.0] * len(functions) if weights is None else list(weights)
        if len(weights) != len(functions) or not all(math.isfinite(weight) for weight in weights):
            raise RewardInputError(
                f"reward.weights must be {len(functions)} finite numbers, one for each reward; got {weights}."
            )
        if missing_eos_penalty is not None and not 0 <= missing_eos_penalty < math.inf:
            raise RewardInputError(
                f"reward.missing_eos_penalty must be finite and at least 0, got {missing_eos_penalty}."
            )
        self.functions = _with_unique_names(functions)
        self._weights = weights
        self._penalty = missing_eos_penalty or 0.0
        self.ensemble = None if aggregate == "sum" else Ensemble(aggregate, uncertainty_coef, self.names)
        self._shield, self._trainer_state = shield, trainer_state
        self.random = random or RandomStream(0)

    @property
    def names(self) -> list[str]:
        """The names of the reward functions, unique, in the order of the weights."""
        return [function.name for function in self.functions]

    @property
    def special_tokens(self) -> bool:
        """Whether a function asks for completions with their special tokens."""
        return any(function.special_tokens for function in self.functions)

    def check_columns(self, columns: Collection[str]) -> None:
        """Raises RewardInputError for a function whose parameters do not fit a data set with these other columns."""
        for function in self.functions:
            if (fault := misfit(function.function, columns)) is not None:
                raise RewardInputError(f"{function.title} {fault}.")

    @contextmanager
    def drawing_from(self, random: RandomStream) -> Iterator[None]:
        """Inside, functions draw from ``random``: the scorer's own stream stays where it is."""
        own, self.random = self.random, random
        try:
            yield
        finally:
            self.random = own

    def score(
        self,
        prompts: Sequence[Text],
        completions: Sequence[str],
        columns: dict[str, list[Any]],
        ended: Sequence[bool],
        completion_ids: Sequence[Sequence[int]] | None = None,
        whole: Sequence[str] | None = None,
    ) -> Scores:
        """Score `completions[i]` as the answer to `prompts[i]`.

        columns: the data set's other columns, one value per sample. ended[i]: True where completion i ends with EOS.
        completion_ids[i]: the policy's tokens of completion i, EOS included. whole[i]: completion i with its special
        tokens. None where there are none: functions do not get them then.

        Raises RewardError if a function raises, returns the wrong number of scores or a score that is neither None nor
        a finite number, or if no sample is left with a score; ValueError if the arguments differ in length.
        """
        lengths = {"completions": len(completions), "ended": len(ended)} | {k: len(v) for k, v in columns.items()}
        wrong = {name: length for name, length in lengths.items() if length != len(prompts)}
        if not prompts or wrong:
            raise ValueError(f"{len(prompts)} prompts to score, but {wrong or 'at least 1 is needed'}")
        per_function, log = self._answers(prompts, completions, columns, completion_ids, whole)
        rows = list(zip(*per_function.values(), strict=True))
        sums, disagreement = self._combined(rows)
        if all(found is None for found in sums):
            by = "any reward" if self.ensemble is None else "every reward, as reward.aggregate needs"
            unscored = f"none of {len(rows)} samples was scored by {by} ({', '.join(self.names)})"
            raise RewardError(f"{unscored}: nothing to learn from. The first prompt was {shown(prompts[0])}.")
        total = [
            0.0 if found is None else found - (0.0 if end else self._penalty)
            for found, end in zip(sums, ended, strict=True)
        ]
        if (largest := max(map(abs, total))) > LARGEST:
            raise RewardError(
                f"a weighted sum of scores is {largest:.3g} in size, more than {LARGEST:g}: lower reward.weights or "
                "the scores."
                if self.ensemble is None
                else f"an aggregate of scores is {largest:.3g} in size, more than {LARGEST:g}, in deviations of the "
                "first batch: that batch had hardly any spread; raise rollout.batch_size."
            )
        return Scores(
            total=total,
            valid=[found is not None for found in sums],
            per_function=per_function,
            disagreement=disagreement,
            metrics=log.metrics,
            extra=log.columns,
        )

    def answers(
        self,
        prompts: Sequence[Text],
        completions: Sequence[str],
        columns: dict[str, list[Any]],
        completion_ids: Sequence[Sequence[int]] | None = None,
        whole: Sequence[str] | None = None,
    ) -> dict[str, list[float | None]]:
        """The validated scores of each reward function by its name; `score`, which has the arguments, adds them up."""
        return self._answers(prompts, completions, columns, completion_ids, whole)[0]

    def _answers(
        self,
        prompts: Sequence[Text],
        completions: Sequence[str],
        columns: dict[str, list[Any]],
        completion_ids: Sequence[Sequence[int]] | None,
        whole: Sequence[str] | None,
    ) -> tuple[dict[str, list[float | None]], RewardLog]:
        log = RewardLog(len(prompts))
        run: dict[str, Any] = {}
        if completion_ids is not None:
            run["completion_ids"] = completion_ids
        if self._trainer_state is not None:
            run |= {"trainer_state": self._trainer_state(), "log_metric": log.log_metric, "log_extra": log.log_extra}
        if taken := {"prompts", "completions", *run} & set(columns):
            raise RewardError(f"the data set's column {taken.pop()!r} has the name of a reward argument. Rename it.")
        samples = Samples(prompts=prompts, completions=completions, whole=whole, columns=dict(columns), run=run)
        scores: dict[str, list[float | None]] = {}
        for function, output in zip(self.functions, call(self.functions, samples, self._shielded), strict=True):
            with failures_named(function.title, samples.prompts):  # of an output that cannot be read
                scores[function.name] = checked(function.title, output, samples.prompts)
        return scores, log

    def _shielded(self) -> AbstractContextManager[Any]:
        return nullcontext() if self._shield is None else self._shield.around(self.random)

    def _combined(self, rows: Sequence[Sequence[float | None]]) -> tuple[list[float | None], float | None]:
        """(the score of each row or None, before the penalty; the disagreement)."""
        if self.ensemble is not None:
            return self.ensemble.combine(rows)
        return [self._sum(row) for row in rows], None

    def _sum(self, scores: Sequence[float | None]) -> float | None:
        known = [(w, score) for w, score in zip(self._weights, scores, strict=True) if score is not None]
        return math.fsum(w * score for w, score in known) if known else None


def _with_unique_names(functions: Sequence[RewardFunction]) -> list[RewardFunction]:
    unique: dict[str, RewardFunction] = {}
    for function in functions:
        names = (f"{function.name}-{copy}" if copy > 1 else function.name for copy in itertools.count(1))
        name = next(name for name in names if name not in unique)
        unique[name] = replace(function, name=name)
    return list(unique.values())
