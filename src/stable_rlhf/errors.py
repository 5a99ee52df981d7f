"""Every error that a user can meet, each with its exit code."""

from __future__ import annotations

import enum
import signal
from collections.abc import Mapping


class RewardError(RuntimeError):
    """A reward that cannot be had or used. The message names the reward, the sample or setting, and the remedy."""


class RewardUnavailable(RewardError):
    """A reward that could not be had although it was tried for; a reward function may raise it. Nothing was scored, so
    the run can go on from its checkpoint once the reward is there again."""


class CheckpointError(RuntimeError):
    """A checkpoint is missing, damaged, or of another run."""


class SaveError(CheckpointError):
    """A checkpoint could not be written. The older ones are as they were."""


class NoRoomError(SaveError):
    """No room for a checkpoint: the disk is full, a quota is used up, or a file may not be that long."""


class Exit(enum.IntEnum):
    """What the command's exit code means; docs/operations.md says what to do about each."""

    DONE = 0
    FAILED = 1
    """Something that nobody foresaw, too little memory, or a check of `doctor` that failed."""
    BAD_INPUT = 2
    """Settings, usage, a file or a model that cannot be used. Nothing was trained."""
    GUARD = 3
    """The guard stopped the run, which is in its last checkpoint as it was before."""
    REWARD = 4
    """No reward could be had. The run is in its last checkpoint."""
    DISK = 5
    """A checkpoint, or another file of the run, could not be written. The checkpoint before is intact."""
    INTERRUPTED = 130
    """SIGINT (Ctrl-C): 128 + 2, as shells have it."""
    TERMINATED = 143
    """SIGTERM: 128 + 15."""


class DivergenceError(ArithmeticError):
    """A figure of the policy or of its update is not finite. What is on disk is from before.

    ``figures``: name -> value of all that were looked at together.
    """

    def __init__(self, message: str, figures: Mapping[str, float | None]) -> None:
        super().__init__(message)
        self.figures = dict(figures)


class PromptError(ValueError):
    """Prompts that cannot be used. The message names the source, the row, the value and the remedy."""


class GuardStop(RuntimeError):
    """The guard ended the run. Its last checkpoint holds it as it was when it was last good, or, where that state could
    not be read, as it was when it was last saved."""


class Interrupted(KeyboardInterrupt):
    """A signal ended the run. ``signum``: which; what was done is in its last checkpoint."""

    def __init__(self, signum: int) -> None:
        super().__init__(f"stopped by {signal.Signals(signum).name}")
        self.signum = signum


class ConfigError(ValueError):
    """A setting is unknown, of the wrong type, out of range, or in conflict with another."""
