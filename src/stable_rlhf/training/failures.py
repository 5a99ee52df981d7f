"""Turns failures of a run into this package's errors, whose messages say how to resume it."""

from __future__ import annotations

import contextlib
import os
import shlex
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import yaml
from safetensors import SafetensorError

from stable_rlhf.checkpoints import found, inspect, steps_of
from stable_rlhf.config import given_in_python
from stable_rlhf.errors import (
    ConfigError,
    GuardStop,
    Interrupted,
    NoRoomError,
    OutOfMemoryError,
    PromptError,
    RewardError,
    SaveError,
    StableRLHFError,
)
from stable_rlhf.files import NO_ROOM, error_number, existing
from stable_rlhf.hardware import shortage
from stable_rlhf.text import counted


@contextlib.contextmanager
def failures_named(run: Path, steps: Callable[[], int]) -> Iterator[None]:
    """Adds how to resume to an error that ends the training of a run.

    ``run``: its folder. ``steps``: gives the number of steps done.

    A full disk raises NoRoomError, a lack of memory OutOfMemoryError, and a signal or Ctrl-C Interrupted. The messages
    of SaveError, RewardError, PromptError and GuardStop get the sentence added. Any other exception passes unchanged.
    """
    try:
        yield
    except KeyboardInterrupt as error:
        signum = error.signum if isinstance(error, Interrupted) else signal.SIGINT
        raise Interrupted(signum, f"interrupted after {counted(steps(), 'step')}. {how_to_resume(run)}") from error
    except SaveError as error:
        error.args = (f"{error}. {how_to_resume(run)}",)
        raise
    except RewardError as error:
        if error.__cause__ is not None and (said := shortage(error.__cause__)) is not None:  # of a model that scores
            raise OutOfMemoryError(
                f"after {counted(steps(), 'step')}, in the reward: {said}; {_with_less(run)}"
            ) from error
        error.args = (f"{error} {how_to_resume(run)}",)
        raise
    except PromptError as error:  # a row of a stream: those of a data set are checked before
        error.args = (f"{error} {how_to_resume(run)}",)
        raise
    except GuardStop as error:
        error.args = (f"{error} {how_to_resume(run)}{_until_changed(run, error)}",)
        raise
    except StableRLHFError:
        raise
    except (OSError, SafetensorError) as error:  # of another file than a checkpoint, whose SaveErrors are above
        if (sentence := _no_room(run, error)) is None:
            raise
        raise NoRoomError(f"{sentence}. {how_to_resume(run)}") from error
    except RuntimeError as error:
        if (said := shortage(error)) is None:
            raise
        raise OutOfMemoryError(f"after {counted(steps(), 'step')}: {said}; {_with_less(run)}") from error


@contextlib.contextmanager
def misfits_named(resumed: bool) -> Iterator[None]:
    """Raises ConfigError where the saved state of a ``resumed`` run does not fit its settings.

    That happens where somebody has changed config.yaml.
    """
    try:
        yield
    except StableRLHFError:
        raise
    except ValueError as error:
        if not resumed:
            raise
        raise ConfigError(str(error)) from error


def how_to_resume(run: Path) -> str:
    """A sentence with the command that resumes a run and the step it continues from.

    A run whose model, data or reward were given as objects is resumed in Python. Without a checkpoint the sentence says
    that there is none and to start again.
    """
    saved, _ = inspect(run / "checkpoints")
    if saved is None:
        where = ", with another output_dir" if (run / "metrics.jsonl").exists() else ""
        return f"There is no checkpoint to resume from yet: start again{where}."
    if given_in_python(yaml.safe_load((run / "config.yaml").read_text())) is not None:
        how = f"`train(resume_from_checkpoint=True)` of a SAFETrainer made as before, with output_dir={str(run)!r},"
    else:
        how = f"`stable-rlhf resume {shlex.quote(str(run))}`"
    return f"{how} continues from step {steps_of(saved)}."


def _until_changed(run: Path, error: GuardStop) -> str:
    """A sentence that tells to change the guard's settings before a resume.

    It is empty where the guard stopped because the last good state could not be read.
    """
    if error.__cause__ is not None:
        return ""
    return f" The guard would stop it again for the same cause: change `guard` in {run / 'config.yaml'} first."


def _with_less(run: Path) -> str:
    """A sentence with the settings that save memory, first those that a resumed run may change."""
    return (
        f"lower optim.microbatch_tokens or reward.batch_size, or set model.gradient_checkpointing, in "
        f"{run / 'config.yaml'}. {how_to_resume(run)} A smaller rollout.batch_size or model.lora_r needs a new run."
    )


def _no_room(run: Path, error: Exception) -> str | None:
    """A sentence on a full disk: the bytes that are free and needed, and the remedy. None for any other error."""
    if (number := error_number(error)) not in NO_ROOM:
        return None
    saved = found(run / "checkpoints")
    need = sum(file.stat().st_size for file in saved[-1].iterdir()) if saved else 0
    needs = f", and its next checkpoint needs {need:,}" if need else ""
    free = shutil.disk_usage(existing(run)).free
    return f"{run} could not be written to: {os.strerror(number)}; {free:,} bytes are free{needs}; {NO_ROOM[number]}"
