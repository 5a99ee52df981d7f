"""Reward of configs/smollm2-sentiment.yaml: the VADER compound of the completion (Hutto and Gilbert 2014), -1 to 1.

Name it as ``reward.functions: [scripts.vader_reward:compound]`` and run from the root of the checkout. Needs
vaderSentiment.
"""

from __future__ import annotations

from typing import Any

from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

_ANALYZER = SentimentIntensityAnalyzer()


def compound(prompts: list[Any], completions: list[str], **columns: Any) -> list[float]:
    """One compound a completion; the prompt is not counted."""
    return [_ANALYZER.polarity_scores(text)["compound"] for text in completions]
