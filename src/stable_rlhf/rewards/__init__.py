"""Scores of completions: functions, reward models and reward servers."""

from stable_rlhf.rewards.build import listed, make_gold, make_scorer
from stable_rlhf.rewards.client import remote_reward
from stable_rlhf.rewards.functions import RewardFunction, resolve_reward
from stable_rlhf.rewards.model import RewardModel
from stable_rlhf.rewards.scorer import Scorer

__all__ = [
    "RewardFunction",
    "RewardModel",
    "Scorer",
    "listed",
    "make_gold",
    "make_scorer",
    "remote_reward",
    "resolve_reward",
]
