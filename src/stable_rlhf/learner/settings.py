"""The settings that the learner reads."""

from __future__ import annotations

from dataclasses import dataclass

from stable_rlhf.config import CriticConfig, KLConfig, OptimConfig


@dataclass(frozen=True, kw_only=True)
class Learning:
    """How a run learns from its rollouts, the same from its first step to its last."""

    optim: OptimConfig
    critic: CriticConfig
    kl: KLConfig
    temperature: float
    """Sampling temperature: log-probs, ratios, entropy and KL are those of the distribution at this temperature."""
    num_generations: int
    """Completions of a prompt, next to each other in a rollout."""
    max_completion_length: int
    """Most tokens of a completion: ``optim.denominator=length`` divides by it."""
    seed: int
    """Determines the order of the rows in every pass over a rollout, and the rows that the preview measures."""
