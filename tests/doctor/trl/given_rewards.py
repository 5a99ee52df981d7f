"""Reward functions that the files of test_trl.py name, each with one fault or none."""

from __future__ import annotations

import itertools

_calls = itertools.count()


def length(completions, **kwargs):
    return [float(len(completion)) for completion in completions]


def constant(completions, **kwargs):
    return [0.5] * len(completions)


def by_prompt(prompts, completions, **kwargs):
    """Differs between prompts only."""
    return [float(len(prompt)) for prompt in prompts]


def unsolved(completions, **kwargs):
    """Tells the two known texts apart, and nothing that a model without training writes."""
    return [float("wonderful" in completion) for completion in completions]


def noisy(completions, **kwargs):
    """Another score at every call."""
    return [float(len(completion)) + 10.0 * next(_calls) for completion in completions]


def silent(completions, **kwargs):
    """No score for what is sampled."""
    return [
        1.0 if "wonderful" in completion else 0.0 if "terrible" in completion else None for completion in completions
    ]


def sometimes(completions, **kwargs):
    """No score for the first of several completions."""
    return [None if place == 0 and len(completions) > 2 else len(text) for place, text in enumerate(completions)]


def not_a_number(completions, **kwargs):
    return [float("nan")] * len(completions)


def raises(completions, **kwargs):
    raise KeyError("\x1b[31mno lexicon\u202e")


def strict(prompts, completions):
    """Takes none of the other arguments that TRL passes."""
    return [float(len(completion)) for completion in completions]
