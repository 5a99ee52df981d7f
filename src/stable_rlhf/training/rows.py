"""The rows that a step writes: one in metrics.jsonl, and those of its completions."""

from __future__ import annotations

from typing import Any

from stable_rlhf.control import RewardNormaliser
from stable_rlhf.data import prompt_text
from stable_rlhf.learner import rollout_metrics
from stable_rlhf.ops.masked import masked_sum
from stable_rlhf.records import Measured, Rollout
from stable_rlhf.runs import decision_metrics
from stable_rlhf.training.resume import Counters
from stable_rlhf.training.step import Step


def step_row(step: Step, counters: Counters, normaliser: RewardNormaliser, rollbacks: int | None) -> dict[str, Any]:
    """The step's row of metrics.jsonl (docs/metrics.md). ``rollbacks``: made so far; None without a guard."""
    row = {
        "step": counters.step,
        "episode": counters.episode,
        **rollout_metrics(step.rollout, step.measured),
        **step.batch_metrics,
        **step.stats.metrics,
        **decision_metrics(step.decision),
        "safe/reward_mean": normaliser.moments.mean,
        "safe/reward_std": normaliser.moments.deviation,
        **dict(zip(("lr", "lr_critic"), step.learning_rates, strict=False)),
    }
    row |= {f"user/{name}": value for name, value in step.rollout.metrics.items()}
    if rollbacks is not None:
        row["safe/rollbacks"] = rollbacks
    row["objective/non_score_reward"] *= normaliser.unit  # back in the scorer's units
    row["objective/rlhf_reward"] = row["objective/scores"] + row["objective/non_score_reward"]
    return row


def completion_rows(rollout: Rollout, measured: Measured) -> list[dict[str, Any]]:
    """Rows of completions/*.parquet; score and kl (nats per token) are None where there is no reward."""
    mask = measured.tokens.mask
    kl = masked_sum(measured.logp - measured.ref_logp, mask, dim=1) / mask.sum(1).clamp(min=1)
    return [
        {
            "prompt": prompt_text(rollout.prompts[row]),
            "completion": rollout.completions[row],
            "score": rollout.scores[row] if valid else None,
            "length": int(rollout.tokens.mask[row].sum()),
            "kl": float(kl[row]) if valid else None,
            **{name: values[row] for name, values in rollout.extra.items()},
        }
        for row, valid in enumerate(rollout.valid)
    ]
