"""Rewards of the study, named in the settings as `study.rewards:NAME`. bench.py puts it on its cells' path.

Adversarial ones for bench S: `constant`, `noise`, `tiny`, `huge`. Verifiable ones for bench L: `exact`, `listed`.
"""

from __future__ import annotations

import functools
import random
from collections.abc import Callable, Sequence
from typing import Any

from stable_rlhf.rewards.functions import resolve_reward

_WORDS = """
    bright calm clear cold dark deep dry early fair fast fresh full gentle good great green happy heavy high kind large
    late light long low near new old open plain quick quiet rich round sharp short slow small soft strong sweet tall
    thin warm wet white wide wild young
"""
LISTED = frozenset(_WORDS.split())
"""Common words of description, which any model writes now and then."""

MOST = 10
"""Words that count: where all of a completion's words may count, repeating one is the best answer."""


def constant(prompts: Sequence[Any], completions: Sequence[str], **columns: Any) -> list[float]:
    """The same for every text: there is nothing to learn."""
    return [1.0] * len(completions)


def noise(prompts: Sequence[Any], completions: Sequence[str], **columns: Any) -> list[float]:
    """Normal, whatever the text is: there is nothing to learn either."""
    return [random.gauss(0.0, 1.0) for _ in completions]


def tiny(prompts: Sequence[Any], completions: Sequence[str], **columns: Any) -> list[float]:
    """The built-in reward times 1e-6, plus 1e-3: a thousand deviations of offset."""
    return [1e-6 * score + 1e-3 for score in _builtin()(prompts, completions)]


def huge(prompts: Sequence[Any], completions: Sequence[str], **columns: Any) -> list[float]:
    """The built-in reward times 1e6, minus 1e9."""
    return [1e6 * score - 1e9 for score in _builtin()(prompts, completions)]


def exact(prompts: Sequence[Any], completions: Sequence[str], commas: Sequence[int], **columns: Any) -> list[float]:
    """1 where the completion has exactly the number of commas that the data set's column asks for, otherwise 0."""
    return [float(text.count(",") == wanted) for text, wanted in zip(completions, commas, strict=True)]


def listed(prompts: Sequence[Any], completions: Sequence[str], **columns: Any) -> list[float]:
    """Different words of LISTED in the completion, at most MOST, as a share of MOST."""
    found = [len(LISTED & {word.strip(".,;:!?\"'()").lower() for word in text.split()}) for text in completions]
    return [min(count, MOST) / MOST for count in found]


@functools.cache
def _builtin() -> Callable[..., Any]:
    return resolve_reward("builtin", device="cpu").function
