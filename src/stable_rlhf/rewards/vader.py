"""Reward of the recipe smollm2-sentiment: VADER's compound of a completion (Hutto and Gilbert 2014), -1 to 1.

Its name in the settings is ``stable_rlhf.rewards.vader:compound``. Importing it raises RewardInputError where
vaderSentiment (the extra ``sentiment``) is not installed.
"""

from __future__ import annotations

from typing import Any

from stable_rlhf.errors import RewardInputError

try:
    from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer
except ImportError as error:
    raise RewardInputError("it needs vaderSentiment: pip install 'stable-rlhf[sentiment]'") from error

_ANALYZER = SentimentIntensityAnalyzer()


def compound(prompts: list[Any], completions: list[str], **columns: Any) -> list[float]:
    """One compound for each completion; the prompt is not counted."""
    return [_ANALYZER.polarity_scores(text)["compound"] for text in completions]
