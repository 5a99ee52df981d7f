"""The errors that a user can meet, in one tree. Each class has its exit code.

The command line catches ``StableRLHFError`` and ``Interrupted`` once, prints the message as one line and exits with
``exit_code``. Whoever calls the package from Python gets the same message. Any other exception is a bug.
"""

from __future__ import annotations

import enum
import signal
from collections.abc import Mapping
from typing import ClassVar

from stable_rlhf.text import without_secrets


class Exit(enum.IntEnum):
    """The command's exit codes; docs/operations.md says what to do about each."""

    DONE = 0
    FAILED = 1
    """An unexpected error, too little memory, or a failed check of `doctor`."""
    BAD_INPUT = 2
    """Settings, usage, a file or a model that cannot be used. Nothing was trained."""
    GUARD = 3
    """The guard stopped the run. The last checkpoint holds the last good state."""
    REWARD = 4
    """A reward could not be obtained. The run can be resumed from its last checkpoint."""
    DISK = 5
    """A checkpoint, or another file of the run, could not be written. The previous checkpoint is intact."""
    INTERRUPTED = 130
    """SIGINT (Ctrl-C): 128 + 2, as in shells."""
    TERMINATED = 143
    """SIGTERM: 128 + 15."""


class StableRLHFError(Exception):
    """The base class of this package's errors. The message says what is wrong and what to do about it.

    URLs in it are shown without name, password and query, which may be secret.
    """

    exit_code: ClassVar[Exit] = Exit.FAILED
    """The exit code of a command that ends with it."""

    def __str__(self) -> str:
        return without_secrets(super().__str__())


# -- before training ------------------------------------------------------------------------------------------------


class ConfigError(StableRLHFError, ValueError):
    """A setting is unknown, has the wrong type, is out of range, conflicts with another, or names something that does
    not exist."""

    exit_code = Exit.BAD_INPUT


class PromptError(StableRLHFError, ValueError):
    """Prompts cannot be used. The message names the source, the row, the value and the remedy."""

    exit_code = Exit.BAD_INPUT


class RunError(StableRLHFError, ValueError):
    """A run's folder, or a file in it, cannot be read. The message names the file and the line."""

    exit_code = Exit.BAD_INPUT


class NoRunError(RunError, FileNotFoundError):
    """A folder holds no run, or a run without a step."""


# -- rewards --------------------------------------------------------------------------------------------------------


class RewardError(StableRLHFError, RuntimeError):
    """A reward cannot be obtained or used. The message names the reward, the sample or setting, and the remedy."""

    exit_code = Exit.REWARD


class RewardUnavailable(RewardError):
    """A reward could not be obtained, although the request was repeated. A reward function may raise it too. Nothing
    was scored, so the run can be resumed from its checkpoint once the reward is available again."""


class RewardInputError(RewardError, ConfigError):
    """A reward that the settings name cannot be loaded, or the settings of rewards cannot be used."""

    exit_code = Exit.BAD_INPUT


# -- checkpoints and the disk ---------------------------------------------------------------------------------------


class CheckpointError(StableRLHFError, RuntimeError):
    """A checkpoint is missing, damaged, or of another run."""

    exit_code = Exit.BAD_INPUT


class SaveError(CheckpointError):
    """A checkpoint, or another file of a run, could not be written. The older checkpoints are unchanged."""

    exit_code = Exit.DISK


class NoRoomError(SaveError):
    """The disk is full, a quota is used up, or the file would exceed the allowed length."""


class UploadError(StableRLHFError, RuntimeError):
    """The hub did not take an upload. What was to be uploaded is still on the disk."""


# -- in training ----------------------------------------------------------------------------------------------------


class DivergenceError(StableRLHFError, ArithmeticError):
    """A figure of the policy or of its update is not finite. The files on disk are from before that step.

    ``figures``: name -> value of all figures that were checked together.
    """

    def __init__(self, message: str, figures: Mapping[str, float | None]) -> None:
        super().__init__(message)
        self.figures = dict(figures)


class GuardStop(StableRLHFError, RuntimeError):
    """The guard ended the run. The last checkpoint holds the last good state or, if that state could not be read, the
    last saved state."""

    exit_code = Exit.GUARD


class OutOfMemoryError(StableRLHFError, RuntimeError):
    """Memory ran out: while loading, in a step, or in a reward model. The message names settings that need less
    memory."""


class Interrupted(KeyboardInterrupt):
    """A signal ended the run. The last checkpoint holds the completed steps. ``signum`` is the signal's number.

    Not a StableRLHFError, so that ``except Exception`` does not catch it.
    """

    def __init__(self, signum: int, message: str | None = None) -> None:
        super().__init__(message or f"stopped by {signal.Signals(signum).name}")
        self.signum = signum

    @property
    def exit_code(self) -> Exit:
        return Exit(128 + self.signum)
