"""Evaluates the policy on held-out prompts."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from stable_rlhf.checkpoints import RandomState
from stable_rlhf.data import EncodedPrompts, prompt_text
from stable_rlhf.learner import Passes, measure, plain
from stable_rlhf.ops.masked import distinct_n
from stable_rlhf.records import Measured, Rollout
from stable_rlhf.rewards import Scorer
from stable_rlhf.rollout import Sampler
from stable_rlhf.runs import gold_figures

SEED = 12_345
"""Seed of the sampling in every evaluation, so that before and after differ only by the policy."""

SAMPLES = 16
"""Completions kept in evaluation.json, before and after training: a page of the report."""


def evaluate(
    passes: Passes, sampler: Sampler, dataset: Any, encoded: EncodedPrompts, step: int, gold: Scorer | None = None
) -> tuple[dict[str, float | None], list[dict[str, Any]]]:
    """Samples and scores every held-out prompt; returns (figures over all rows, the first SAMPLES completions).

    ``step``: the measurement is as in this step of training, such as one past the critic's warm-up. ``gold``: rewards
    that are only measured. The random generators, those of the reward functions too, are then put back, so that an
    evaluation does not change the training after it.
    """
    size, parts = sampler.config.batch_size, []
    draws = {"run": RandomState(), "rewards": sampler.scorer.random}
    before = {name: part.state_dict() for name, part in draws.items()}
    try:
        torch.manual_seed(SEED)
        sampler.scorer.random.seed(SEED)
        if gold is not None:
            gold.random.seed(SEED, 1)  # other numbers than the rewards', which would agree by chance
        for start in range(0, len(dataset), size):
            indices = range(start, min(start + size, len(dataset)))
            rollout, _ = sampler.collect(dataset, encoded, indices, gold)
            parts.append((rollout, measure(passes, rollout, step)))
    finally:
        for name, part in draws.items():
            part.load_state_dict(before[name])
    samples = [
        {"prompt": prompt_text(prompt), "completion": completion, "reward": score if valid else None}
        for rollout, _ in parts
        for prompt, completion, score, valid in zip(
            rollout.prompts, rollout.completions, rollout.scores, rollout.valid, strict=True
        )
    ]
    return evaluation_metrics(parts), samples[:SAMPLES]


def evaluation_metrics(parts: list[tuple[Rollout, Measured]]) -> dict[str, float | None]:
    """The figures of one side of evaluation.json, before or after training, over all rows of all parts.

    reward_se is the standard error of the mean reward. kl and entropy are means over response tokens, nats per token.
    Each gold reward has its own mean and standard error, and the number of completions that it judged.
    """
    scores = [s for rollout, _ in parts for s, v in zip(rollout.scores, rollout.valid, strict=True) if v]
    reward = torch.tensor(scores, dtype=torch.float64)
    tokens = sum(measured.tokens.mask.sum() for _, measured in parts)
    kl = sum(((m.logp - m.ref_logp).double() * m.tokens.mask).sum() for _, m in parts)
    entropy = sum((m.entropy.double() * m.tokens.mask).sum() for _, m in parts)
    width = max(rollout.tokens.mask.shape[1] for rollout, _ in parts)
    masks, responses = (
        torch.cat([nn.functional.pad(t, (0, width - t.shape[1])) for t in tensors])
        for tensors in zip(*((rollout.tokens.mask, rollout.tokens.response) for rollout, _ in parts), strict=True)
    )
    metrics = {
        "reward": reward.mean(),
        "reward_se": reward.std() / len(scores) ** 0.5 if len(scores) > 1 else torch.nan,
        "kl": kl / tokens,
        "entropy": entropy / tokens,
        "distinct_2": distinct_n(responses, masks, 2),
        "length": masks.sum(1).double().mean(),
        "prompts": len(masks),
    }
    figures = plain(metrics)
    for name in parts[0][0].gold:
        judged = [score for rollout, _ in parts for score in rollout.gold[name] if score is not None]
        figures |= gold_figures(name, judged)
    return figures
