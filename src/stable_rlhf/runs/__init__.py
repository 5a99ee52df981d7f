"""The files of a run: metrics, incidents, evaluation, starts, model card, lock; and of a sweep. Needs no torch."""

from stable_rlhf.runs import evaluation, incidents, starts, sweeps
from stable_rlhf.runs.card import model_card
from stable_rlhf.runs.evaluation import evaluation_rows, gold_figures, read
from stable_rlhf.runs.lock import RunLock
from stable_rlhf.runs.metrics import (
    LARGEST_FIGURE,
    STEP_LIMIT,
    MetricsWriter,
    decision_metrics,
    is_metric,
    read_rows,
    write_completions,
)
from stable_rlhf.runs.names import METRICS, TEXT_METRICS, TIMINGS
from stable_rlhf.runs.output import check_output, check_writable, remove_run

__all__ = [
    "LARGEST_FIGURE",
    "METRICS",
    "STEP_LIMIT",
    "TEXT_METRICS",
    "TIMINGS",
    "MetricsWriter",
    "RunLock",
    "check_output",
    "check_writable",
    "decision_metrics",
    "evaluation",
    "evaluation_rows",
    "gold_figures",
    "incidents",
    "is_metric",
    "model_card",
    "read",
    "read_rows",
    "remove_run",
    "starts",
    "sweeps",
    "write_completions",
]
