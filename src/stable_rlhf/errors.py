"""Every error that a user can meet, in one tree, each class with its exit code.

The command line catches ``StableRLHFError`` and ``Interrupted`` once, prints the message as one line and exits with
``exit_code``. Whoever calls the package from Python gets the same message. Any other exception is a bug.
"""

from __future__ import annotations

import enum
import signal
from collections.abc import Mapping
from typing import ClassVar


class Exit(enum.IntEnum):
    """The command's exit codes; docs/operations.md says what to do about each."""

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


class StableRLHFError(Exception):
    """The base of every error of this package. The message says what is wrong and what to do about it."""

    exit_code: ClassVar[Exit] = Exit.FAILED
    """The exit code of a command that ends with it."""


# -- before training ------------------------------------------------------------------------------------------------


class ConfigError(StableRLHFError, ValueError):
    """A setting is unknown, of the wrong type, out of range, in conflict with another, or names something that is not
    there."""

    exit_code = Exit.BAD_INPUT


class PromptError(StableRLHFError, ValueError):
    """Prompts that cannot be used. The message names the source, the row, the value and the remedy."""

    exit_code = Exit.BAD_INPUT


class RunError(StableRLHFError, ValueError):
    """A run's folder, or a file in it, cannot be read. The message names the file and the line."""

    exit_code = Exit.BAD_INPUT


class NoRunError(RunError, FileNotFoundError):
    """A folder holds no run, or a run without a step."""


# -- rewards --------------------------------------------------------------------------------------------------------


class RewardError(StableRLHFError, RuntimeError):
    """A reward that cannot be had or used. The message names the reward, the sample or setting, and the remedy."""

    exit_code = Exit.REWARD


class RewardUnavailable(RewardError):
    """A reward that could not be had although it was tried for; a reward function may raise it. Nothing was scored, so
    the run can be resumed from its checkpoint once the reward is there again."""


class RewardInputError(RewardError, ConfigError):
    """A reward that the settings name and that cannot be loaded, or settings of rewards that cannot be used."""

    exit_code = Exit.BAD_INPUT


# -- checkpoints and the disk ---------------------------------------------------------------------------------------


class CheckpointError(StableRLHFError, RuntimeError):
    """A checkpoint is missing, damaged, or of another run."""

    exit_code = Exit.BAD_INPUT


class SaveError(CheckpointError):
    """A checkpoint, or another file of a run, could not be written. The older checkpoints are as they were."""

    exit_code = Exit.DISK


class NoRoomError(SaveError):
    """The disk is full, a quota is used up, or a file may not be that long."""


# -- in training ----------------------------------------------------------------------------------------------------


class DivergenceError(StableRLHFError, ArithmeticError):
    """A figure of the policy or of its update is not finite. The files on disk are from before.

    ``figures``: name -> value of all that were looked at together.
    """

    def __init__(self, message: str, figures: Mapping[str, float | None]) -> None:
        super().__init__(message)
        self.figures = dict(figures)


class GuardStop(StableRLHFError, RuntimeError):
    """The guard ended the run. Its last checkpoint holds it as it was when it was last good, or, where that state could
    not be read, as it was when it was last saved."""

    exit_code = Exit.GUARD


class OutOfMemoryError(StableRLHFError, RuntimeError):
    """Memory ran out: while loading, in a step, or in a reward model. The message says what takes less."""


class Interrupted(KeyboardInterrupt):
    """A signal ended the run. ``signum``: which; what was done is in its last checkpoint.

    Not a StableRLHFError, so that ``except Exception`` does not catch it.
    """

    def __init__(self, signum: int, message: str | None = None) -> None:
        super().__init__(message or f"stopped by {signal.Signals(signum).name}")
        self.signum = signum

    @property
    def exit_code(self) -> Exit:
        return Exit(128 + self.signum)
