"""Sampling: prompts in, scored completions out."""

from stable_rlhf.rollout.decoder import SHORTEST, Decoder
from stable_rlhf.rollout.sampler import Sampler

__all__ = [
    "SHORTEST",
    "Decoder",
    "Sampler",
]
