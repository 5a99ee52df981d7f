"""Calls of reward functions: the arguments of each, and async ones at the same time."""

from __future__ import annotations

import asyncio
import copy
import inspect
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

from stable_rlhf.data import Text
from stable_rlhf.errors import RewardError
from stable_rlhf.rewards.checks import failures_named
from stable_rlhf.rewards.functions import RewardFunction
from stable_rlhf.rewards.model import RewardModel
from stable_rlhf.rewards.parameters import accepts, misfit
from stable_rlhf.rewards.run_async import waited_for


@dataclass(frozen=True, kw_only=True)
class Samples:
    """A batch for reward functions; every list has one entry a sample."""

    prompts: Sequence[Text]
    completions: Sequence[str]
    """Decoded without special tokens."""
    whole: Sequence[str] | None = None
    """Decoded with special tokens, for the functions that ask for them; None where none does."""
    columns: dict[str, Sequence[Any]]
    """The data set's other columns."""
    run: dict[str, Any] = field(default_factory=dict)
    """More arguments of TRL's, for the functions that accept them (``completion_ids``, ``trainer_state``, ...)."""

    def arguments(self, function: RewardFunction) -> dict[str, Any]:
        """The keyword arguments of a call. They are copies of its own: a function may change them.

        Raises RewardError where they do not fit the function's parameters.
        """
        if (fault := misfit(function.function, self.columns, self.run)) is not None:
            raise RewardError(f"{function.title} {fault}.")
        completions = self.whole if function.special_tokens and self.whole is not None else self.completions
        answers = [
            completion if isinstance(prompt, str) else [{"role": "assistant", "content": completion}]
            for prompt, completion in zip(self.prompts, completions, strict=True)
        ]
        given: dict[str, Any] = {"prompts": list(self.prompts), "completions": answers, **self.columns}
        given |= {name: value for name, value in self.run.items() if accepts(function.function, name)}
        return {name: value if callable(value) else _copied(name, value) for name, value in given.items()}


def call(
    functions: Sequence[RewardFunction], samples: Samples, shield: Callable[[], AbstractContextManager[Any]]
) -> list[Any]:
    """The raw answers, in order: plain functions one after the other, then all async ones at the same time.

    ``shield``: the context in which user code runs. Raises RewardError for a function that raises.
    """
    outputs: dict[str, Any] = {}
    waiting: dict[str, Callable[[], Any]] = {}

    titles = {function.name: function.title for function in functions}

    async def one(name: str, start: Callable[[], Any]) -> Any:
        with failures_named(titles[name], samples.prompts, samples.columns):
            return await start()

    async def gather() -> list[Any]:
        # return_exceptions: let the others finish instead of leaving their requests open behind an error
        return await asyncio.gather(*(one(*item) for item in waiting.items()), return_exceptions=True)

    for function in functions:
        arguments = samples.arguments(function)
        if _is_async(function.function):
            waiting[function.name] = lambda call=function.function, arguments=arguments: call(**arguments)
        elif isinstance(function.function, RewardModel):
            with failures_named(function.title, samples.prompts):
                outputs[function.name] = function.function(**arguments)
        else:
            with failures_named(function.title, samples.prompts, samples.columns), shield():
                output = function.function(**arguments)
            if inspect.isawaitable(output):  # of a lambda around an async function
                waiting[function.name] = lambda output=output: output
            outputs[function.name] = output
    if waiting:
        with shield():
            results = waited_for(gather)
        for name, result in zip(waiting, results, strict=True):
            if isinstance(result, asyncio.CancelledError):
                raise RewardError(f"{titles[name]} was cancelled before it gave scores") from result
            if isinstance(result, BaseException):
                raise result
            outputs[name] = result
    return [outputs[function.name] for function in functions]


def _copied(name: str, value: Any) -> Any:
    """A deep copy. The log in a trainer's state, whose entries hold numbers and texts, grows with every step: it is
    copied entry by entry, which is much faster. Raises RewardError for a value that has no copy."""
    log = getattr(value, "log_history", None)
    known = {id(log): [dict(entry) for entry in log]} if isinstance(log, list) else {}
    try:
        return copy.deepcopy(value, known)
    except Exception as error:  # of whatever class a stream's rows hold
        raise RewardError(
            f"the data set's column {name!r} cannot be copied for each reward ({type(error).__name__}: {error}). Leave "
            "it out of the rows, or give what it is made from, such as a path."
        ) from error


def _is_async(function: Callable[..., Any]) -> bool:
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(getattr(function, "__call__", None))  # noqa: B004
