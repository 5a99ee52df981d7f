"""The parameters of a reward function against what it is called with: prompts, completions and columns, by name."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Collection
from typing import Any

OF_RUN = ("completion_ids", "trainer_state", "log_metric", "log_extra")
"""More arguments of TRL's that a run gives to the functions that accept them."""

_BY_NAME = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)


def accepts(function: Callable[..., Any], name: str) -> bool:
    """Whether a function has a parameter of this name, or takes any."""
    parameters = _parameters(function)
    return parameters is not None and (_takes_any(parameters) or _by_name(parameters, name))


def misfit(function: Callable[..., Any], columns: Collection[str], of_run: Collection[str] = OF_RUN) -> str | None:
    """What a function asks for and does not get, or gets and does not take, with the remedy; None where it fits.

    ``columns``: the data set's, besides the prompt. ``of_run``: which of the run's own arguments there are.
    """
    if (parameters := _parameters(function, follow_wrapped=False)) is None:  # a decorator may add what is asked for
        return None
    given = {"prompts", "completions", *columns, *of_run}
    for name, parameter in parameters.items():
        if parameter.default is inspect.Parameter.empty and parameter.kind in _BY_NAME and name not in given:
            close = difflib.get_close_matches(name, [*columns, "prompts", "completions"], n=1)
            meant = f" (did you mean {close[0]!r}?)" if close else ""
            return (
                f"asks for {name!r}, which is no column of the data set{meant}: besides the prompt it has "
                f"{listing(columns)}. Add the column, or give the parameter a default"
            )
    for name in ("prompts", "completions", *columns):
        if not (_takes_any(parameters) or _by_name(parameters, name)):
            what = "an argument of every reward" if name in ("prompts", "completions") else "a column of the data set"
            return f"does not take {name!r}, which is {what}: let it end with **columns, which takes all of them"
    return None


def listing(columns: Collection[str]) -> str:
    """The names of columns as a message has them."""
    return ", ".join(map(repr, columns)) or "none"


def _parameters(function: Callable[..., Any], follow_wrapped: bool = True) -> dict[str, inspect.Parameter] | None:
    try:
        return dict(inspect.signature(function, follow_wrapped=follow_wrapped).parameters)
    except (TypeError, ValueError):  # of a builtin
        return None


def _takes_any(parameters: dict[str, inspect.Parameter]) -> bool:
    return any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters.values())


def _by_name(parameters: dict[str, inspect.Parameter], name: str) -> bool:
    return name in parameters and parameters[name].kind in _BY_NAME
