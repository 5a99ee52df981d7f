"""Reward errors and validation of reward outputs."""

from __future__ import annotations

import numbers
import traceback
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import stable_rlhf
from stable_rlhf.data import Text
from stable_rlhf.errors import RewardError, RewardInputError
from stable_rlhf.rewards.parameters import listing
from stable_rlhf.text import kind_of, quoted, visible

LARGEST = 1e30
"""Largest size of a score: deviations are sums of squares, which must stay far below the largest float64."""


@contextmanager
def failures_named(title: str, prompts: Sequence[Text], columns: Collection[str] = ()) -> Iterator[None]:
    """Turns an exception of a reward function into a RewardError that names it; RewardErrors pass unchanged.

    ``title``: what the error calls it. ``columns``: those that it gets besides prompts and completions.
    """
    try:
        yield
    except RewardInputError as error:  # met while scoring, so training has begun
        raise RewardError(str(error)) from error
    except RewardError:
        raise
    except (Exception, SystemExit) as error:
        cause: BaseException = error
        while isinstance(cause, BaseExceptionGroup):  # of tasks that ran at the same time
            cause = cause.exceptions[0]
        raise RewardError(
            f"{title} raised {type(cause).__name__}: {str(cause)!r}{_place(cause)} on "
            f"{len(prompts)} samples, the first prompt being {shown(prompts[0])}. It gets prompts, completions and "
            f"the data set's other columns ({listing(columns)}), and returns None where it cannot score."
        ) from error


def _place(error: BaseException) -> str:
    """The line of the reward's own file that an exception came through last, as " in FILE, line N"."""
    ours = str(Path(stable_rlhf.__file__).parent)
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if not frame.filename.startswith(ours)]
    of_file = [frame for frame in frames if frame.filename == frames[0].filename]
    return f" in {visible(Path(of_file[-1].filename).name)}, line {of_file[-1].lineno}" if of_file else ""


def checked(title: str, output: Any, prompts: Sequence[Text]) -> list[float | None]:
    """Validates the scores of one function and returns them as floats and None.

    Raises RewardError, which names the first wrong one.
    """
    values = output.tolist() if hasattr(output, "tolist") else output  # tensors and arrays
    if not isinstance(values, list | tuple) or len(values) != len(prompts):
        got = f"{len(values)} scores" if isinstance(values, list | tuple) else kind_of(output)
        raise RewardError(f"{title} returned {got}; it must return a list of {len(prompts)} scores.")
    checked: list[float | None] = []
    for number, (value, prompt) in enumerate(zip(values, prompts, strict=True), start=1):
        value = value.tolist() if hasattr(value, "tolist") else value
        if value is not None and not _is_score(value):
            got = f"returned {shown(value)} for sample {number}, whose prompt is {shown(prompt)}"
            wanted = "A score is a finite number, at most 1e30 in size, or None for no score."
            raise RewardError(f"{title} {got}. {wanted}")
        checked.append(None if value is None else float(value))
    return checked


def _is_score(value: Any) -> bool:
    return isinstance(value, numbers.Real) and bool(-LARGEST <= value <= LARGEST)  # pyright: ignore[reportOperatorIssue]


def shown(value: Any) -> str:
    """repr() of a value, or of a chat's last message; control characters are escaped and a long middle is left out."""
    if isinstance(value, list) and value and isinstance(value[-1], dict):
        value = value[-1].get("content")
    return quoted(value)
