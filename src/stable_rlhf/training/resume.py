"""Resuming a run: its counters, the check of its settings, and the removal of later steps from its folder."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stable_rlhf.checkpoints import store
from stable_rlhf.config import refuse_changes
from stable_rlhf.console import tell
from stable_rlhf.errors import ConfigError
from stable_rlhf.runs import MetricsWriter, incidents


@dataclass
class Counters:
    """Counts of a run's steps and completions."""

    step: int = 0
    """Steps done; a step is a rollout with its update."""
    episode: int = 0
    """Completions sampled for training."""
    best: float | None = None
    """``metric_for_best_model`` of the best evaluation so far."""
    best_step: int | None = None
    """Steps done at that evaluation, whose checkpoint is kept."""
    evaluates: bool = False
    """Whether an evaluation after the present step is still to be made, because its reward failed."""

    def is_best(self, value: float | None, greater: bool) -> bool:
        """Notes the evaluation of the present step as the best one if it is. ``greater``: a greater value is better."""
        if value is None or (self.best is not None and (value <= self.best if greater else value >= self.best)):
            return False
        self.best, self.best_step = value, self.step
        return True

    def state_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.step, self.episode = state["step"], state["episode"]
        self.best, self.best_step, self.evaluates = state["best"], state["best_step"], state["evaluates"]


class SameSettings:
    """A part that only checks: a checkpoint's settings must be the run's, except for those that may change."""

    def __init__(self, settings: Callable[[], dict[str, Any]]) -> None:
        self.settings = settings

    def state_dict(self) -> dict[str, Any]:
        return self.settings()

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Raises CheckpointError for a setting that differs; the message has both values."""
        refuse_changes(self.settings(), saved)


def forget_after(run_dir: Path, writer: MetricsWriter, step: int) -> None:
    """Removes from the run folder the steps that a resumed run is about to repeat: checkpoints, rows, incidents.

    Raises ConfigError for a line of those files that cannot be read, before anything is removed.
    """
    try:
        incidents.read(run_dir)
        writer.check()
    except ValueError as error:
        raise ConfigError(str(error)) from error
    # Checkpoints first: were only the rows gone, the next resume would start from a checkpoint that has no rows.
    folder = run_dir / "checkpoints"
    later = [path.name for path in store.found(folder) if store.steps_of(path) > step]
    for kept in store.forget_after(folder, step):
        tell(f"{kept}: a damaged checkpoint of a later step now has this name; you may remove it")
        later = [name for name in later if not kept.name.startswith(f"damaged-{name}")]
    if later:
        tell(f"Removed everything from step {step} on (including {', '.join(later)}); those steps will be repeated")
    writer.truncate(step)
    incidents.truncate(run_dir, step)
