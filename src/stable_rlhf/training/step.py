"""One step of training: rollout, measurement, decision, update, verdict."""

from __future__ import annotations

import dataclasses
from typing import Any

from stable_rlhf.control import Decision
from stable_rlhf.data import prompt_text
from stable_rlhf.ops.masked import masked_sum
from stable_rlhf.records import Measured, Rollout
from stable_rlhf.runs import METRICS


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
        }
        for row, valid in enumerate(rollout.valid)
    ]


def decision_metrics(decision: Decision) -> dict[str, Any]:
    """What a controller decided, as the metrics ``safe/...`` that it has among METRICS."""
    fields = dataclasses.asdict(decision)
    return {f"safe/{name}": value for name, value in fields.items() if f"safe/{name}" in METRICS}
