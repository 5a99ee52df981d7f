"""What `SAFETrainer.train` returns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


class TrainResult(dict[str, Any]):
    """The figures of a run whose training has ended.

    As a dictionary it is the content of evaluation.json: ``result["after"]["reward"]``; empty without held-out prompts.
    Its attributes are those of Transformers' TrainOutput, and ``rollbacks``.

    Attributes:
        global_step: steps done, those of earlier calls included.
        training_loss: mean of ``loss/policy_avg`` over all steps of the run; NaN before the first.
        metrics: seconds and speed of this call (``train_runtime``, ``train_steps_per_second``,
            ``train_samples_per_second``), ``train_loss``, ``epoch``, ``rollbacks``; the last step's row of
            metrics.jsonl, by its names; ``eval_reward`` and the other figures after training,
            ``eval_reward_before`` before it, where they were measured.
        rollbacks: roll-backs of the guard in the whole run.
    """

    def __init__(
        self,
        global_step: int,
        evaluation: Mapping[str, Any],
        log_history: Sequence[Mapping[str, Any]],
        rollbacks: int,
        seconds: float,
        steps: int,
        samples: int,
    ) -> None:
        """``log_history``: of the whole run, as callbacks see it; ``seconds``, ``steps``, ``samples``: of this call."""
        super().__init__(evaluation)
        rows = [entry for entry in log_history if "episode" in entry]
        losses = [entry["loss/policy_avg"] for entry in rows if "loss/policy_avg" in entry]
        last = rows[-1] if rows else {"epoch": 0.0}
        self.rollbacks = rollbacks
        self.global_step = global_step
        self.training_loss = sum(losses) / len(losses) if losses else float("nan")
        self.training: dict[str, float] = {
            "train_runtime": seconds,
            "train_steps_per_second": steps / seconds,
            "train_samples_per_second": samples / seconds,
            **({"train_loss": self.training_loss} if losses else {}),
        }
        """Figures of the whole call, which trackers get at its end."""
        numbers = {name: value for name, value in last.items() if isinstance(value, int | float) and name != "step"}
        self.metrics: dict[str, float] = {**self.training, **numbers, "rollbacks": rollbacks}
        for side, suffix in (("before", "_before"), ("after", "")):
            for name, value in evaluation.get(side, {}).items():
                if value is not None:
                    self.metrics[f"eval_{name}{suffix}"] = value
