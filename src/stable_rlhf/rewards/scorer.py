"""The scores of several rewards, weighted and summed."""

from __future__ import annotations

import asyncio
import inspect
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from stable_rlhf.data import Text
from stable_rlhf.errors import RewardError, RewardInputError
from stable_rlhf.rewards.checks import checked, failures_named, shown
from stable_rlhf.rewards.functions import RewardFunction
from stable_rlhf.rewards.run_async import waited_for


@dataclass(frozen=True, kw_only=True)
class Scores:
    """The scores of a batch, in its order and in the reward functions' own units.

    total: sum_i weight_i * score_i, minus missing_eos_penalty where the completion did not end; 0.0 where not valid.
    valid: False where at least one reward function returned None: the sample has no score and must not be learned from.
    per_function: the scores of each reward function by its name, unweighted, None where it gave none.
    """

    total: list[float]
    valid: list[bool]
    per_function: dict[str, list[float | None]]


class Scorer:
    """Calls every reward function on a batch and adds up their scores.

    weights: one finite factor per function, all 1.0 by default.
    missing_eos_penalty: subtracted from the total of every completion without its end token, in reward units, >= 0;
        None for none. It keeps a policy from learning never to stop.
    """

    def __init__(
        self,
        functions: Sequence[RewardFunction],
        weights: Sequence[float] | None = None,
        missing_eos_penalty: float | None = None,
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

    @property
    def names(self) -> list[str]:
        """The names of the reward functions, unique, in the order of the weights."""
        return [function.name for function in self.functions]

    def score(
        self, prompts: Sequence[Text], completions: Sequence[str], columns: dict[str, list[Any]], ended: Sequence[bool]
    ) -> Scores:
        """Score `completions[i]` as the answer to `prompts[i]`.

        columns: the data set's other columns, one value per sample. ended[i]: True where completion i ends with EOS.

        Raises RewardError if a function raises, returns the wrong number of scores or a score that is neither None nor
        a finite number, or if no sample is left with a score; ValueError if the arguments differ in length.
        """
        lengths = {"completions": len(completions), "ended": len(ended)} | {k: len(v) for k, v in columns.items()}
        wrong = {name: length for name, length in lengths.items() if length != len(prompts)}
        if not prompts or wrong:
            raise ValueError(f"{len(prompts)} prompts to score, but {wrong or 'at least 1 is needed'}")
        if taken := {"prompts", "completions"} & set(columns):
            raise RewardError(f"the data set's column {taken.pop()!r} has the name of a reward argument. Rename it.")
        per_function = self.answers(prompts, completions, columns)
        samples = list(zip(*per_function.values(), strict=True))
        valid = [None not in sample for sample in samples]
        if not any(valid):
            unscored = f"none of {len(samples)} samples was scored by every reward ({', '.join(self.names)})"
            raise RewardError(f"{unscored}: nothing to learn from. The first prompt was {shown(prompts[0])}.")
        total = [self._total(sample, end) for sample, end in zip(samples, ended, strict=True)]
        return Scores(total=total, valid=valid, per_function=per_function)

    def answers(
        self, prompts: Sequence[Text], completions: Sequence[str], columns: dict[str, list[Any]]
    ) -> dict[str, list[float | None]]:
        """The validated scores of each reward function by its name; `score` adds them up."""
        texts = [
            completion if isinstance(prompt, str) else [{"role": "assistant", "content": completion}]
            for prompt, completion in zip(prompts, completions, strict=True)
        ]
        outputs = self._call(prompts, texts, columns)
        named = zip(self.functions, outputs, strict=True)
        return {function.name: checked(function.name, output, prompts) for function, output in named}

    def _total(self, sample: tuple[float | None, ...], ended: bool) -> float:
        known = [score for score in sample if score is not None]
        if len(known) < len(sample):
            return 0.0
        return math.fsum(w * x for w, x in zip(self._weights, known, strict=True)) - (0.0 if ended else self._penalty)

    def _call(self, prompts: Sequence[Text], answers: Sequence[Text], columns: dict[str, list[Any]]) -> list[Any]:
        """The raw answers, in order: plain functions one after the other, then all async ones at the same time."""

        def arguments() -> dict[str, Any]:  # new lists each time: a function may change its own
            return {"prompts": list(prompts), "completions": list(answers)} | {k: list(v) for k, v in columns.items()}

        async def one(function: RewardFunction) -> Any:
            with failures_named(function.name, prompts):
                return await function.function(**arguments())

        async def gather() -> list[Any]:
            # return_exceptions: let the others finish instead of leaving their requests open behind an error
            return await asyncio.gather(*map(one, waiting), return_exceptions=True)

        outputs: dict[str, Any] = {}
        waiting = [function for function in self.functions if _is_async(function.function)]
        for function in self.functions:
            if function not in waiting:
                with failures_named(function.name, prompts):
                    outputs[function.name] = function.function(**arguments())
        if waiting:
            results = waited_for(gather)
            for result in results:
                if isinstance(result, BaseException):
                    raise result
            outputs |= zip((function.name for function in waiting), results, strict=True)
        return [outputs[name] for name in self.names]


def _with_unique_names(functions: Sequence[RewardFunction]) -> list[RewardFunction]:
    unique: dict[str, RewardFunction] = {}
    for function in functions:
        names = (f"{function.name}-{copy}" if copy > 1 else function.name for copy in itertools.count(1))
        name = next(name for name in names if name not in unique)
        unique[name] = RewardFunction(name=name, function=function.function)
    return list(unique.values())


def _is_async(function: Callable[..., Any]) -> bool:
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(getattr(function, "__call__", None))  # noqa: B004
