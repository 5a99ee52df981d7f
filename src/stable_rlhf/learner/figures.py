"""Metrics of the sampled text and of its distance to the reference."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from stable_rlhf.ops.masked import distinct_n, masked_mean, ratio_error
from stable_rlhf.ops.objective import kl_estimate
from stable_rlhf.records import Measured, Rollout


def rollout_metrics(rollout: Rollout, measured: Measured) -> dict[str, float | None]:
    """Metrics of the sampled text and of its distance to the reference (docs/metrics.md)."""
    mask, log_ratio = measured.tokens.mask, measured.log_ratio
    scores = torch.tensor([s for s, v in zip(rollout.scores, rollout.valid, strict=True) if v], dtype=torch.float64)
    lengths = rollout.tokens.mask.sum(1).double()
    distinct = distinct_n(rollout.tokens.response, rollout.tokens.mask, 2)
    metrics = {
        "objective/scores": scores.mean(),
        "objective/scores_std": scores.std(correction=0),
        "objective/kl": masked_mean(log_ratio, mask),
        "objective/kl_exact": None if measured.kl is None else masked_mean(measured.kl.double(), mask),
        "objective/kl_error": ratio_error(measured.observed_kl, mask),
        "objective/kl_k3": masked_mean(kl_estimate(measured.logp, measured.ref_logp, "k3").double(), mask),
        "objective/kl_per_sequence": (log_ratio * mask).sum() / mask.any(1).sum(),
        "objective/entropy": masked_mean(measured.entropy.double(), mask),
        "objective/ref_nll": masked_mean(-measured.ref_logp.double(), mask),
        "completions/mean_length": lengths.mean(),
        "completions/min_length": lengths.min(),
        "completions/max_length": lengths.max(),
        "completions/clipped_ratio": 1 - sum(rollout.ended) / len(rollout.ended),
        "completions/distinct_2": distinct,
        "completions/skipped": len(rollout.valid) - sum(rollout.valid),
        "prompts/truncated": rollout.truncated,
    }
    for name, values in rollout.per_function.items():
        given = [value for value in values if value is not None]
        if given:
            metrics[f"rewards/{name}/mean"] = sum(given) / len(given)
    if rollout.disagreement is not None:
        metrics["reward/disagreement"] = rollout.disagreement
    return plain(metrics)


def plain(metrics: Mapping[str, Tensor | float | None]) -> dict[str, float | None]:
    """The metrics as plain numbers, None where one is undefined.

    Undefined are ``val/explained_variance`` of constant returns, distinct-2 where no completion has two tokens, and the
    standard error of a single reward.
    """
    undefined = ("val/explained_variance", "completions/distinct_2", "distinct_2", "reward_se")
    plain = {name: None if value is None else float(value) for name, value in metrics.items()}
    return {name: None if name in undefined and value != value else value for name, value in plain.items()}
