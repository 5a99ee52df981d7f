"""What goes wrong inside a process that trains, at a step that is named: called there before the command begins."""

from __future__ import annotations

import os
import resource
import shutil
import signal
import sys
import time
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import torch

from stable_rlhf.learner import passes
from stable_rlhf.training import step as step_page
from stable_rlhf.training import trainer
from tests.tiny_runs import letters

YEAR = 365.25 * 86400
OPERATIONS = ("open", "os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.scandir", "os.listdir", "os.link")
"""Python's audit events of what changes or reads files; os.replace and Path.rename are os.rename."""
_present = -1
"""The step that is being made."""
_reward: dict[str, Any] = {}
"""What ``reward`` does else than to score; set in a process that trains."""


def reward(prompts: list[Any], completions: list[Any], **columns: Any) -> list[float]:
    scores = letters(prompts, completions)
    if _present in _reward.get("nan", ()):
        scores[-1] = float("nan")
    if _present == _reward.get("blocks at"):
        _reward["said"].touch()
        time.sleep(_reward["seconds"])
    return scores


# -- figures --------------------------------------------------------------------------------------------------------


def nan(where: str, steps: Collection[int]) -> None:
    """A figure of each of the steps is NaN: of ``reward``, ``loss``, ``gradient``, ``value head``, ``log-prob``, or a
    weight after the update (``weight``)."""
    _follow_steps()
    if where == "reward":
        _reward["nan"] = steps
        return
    module, name, act = {
        "loss": (passes, "objective", _spoil_loss),
        "gradient": (sys.modules["stable_rlhf.learner.update"], "_clipped_step", _spoil_gradient),
        "value head": (step_page, "measure", _spoil_head),
        "log-prob": (step_page, "measure", _spoil_logp),
        "weight": (step_page, "update", _spoil_weight),
    }[where]
    real = getattr(module, name)

    def injected(*arguments: Any, **named: Any) -> Any:
        return act(real, *arguments, **named) if _present in steps else real(*arguments, **named)

    setattr(module, name, injected)


def _spoil_loss(real: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
    loss, metrics = real(*arguments, **named)
    return loss * torch.nan, metrics


def _spoil_gradient(real: Callable[..., Any], passes: Any, *arguments: Any, **named: Any) -> Any:
    next(p for p in passes.model.policy_parameters() if p.grad is not None).grad.view(-1)[0] = torch.nan
    return real(passes, *arguments, **named)


def _spoil_head(real: Callable[..., Any], passes: Any, *arguments: Any, **named: Any) -> Any:
    with torch.no_grad():
        passes.model.critic_parameters()[0].view(-1)[0] = torch.nan
    return real(passes, *arguments, **named)


def _spoil_logp(real: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
    measured = real(*arguments, **named)
    measured.logp[0, 0] = torch.nan
    return measured


def _spoil_weight(real: Callable[..., Any], passes: Any, *arguments: Any, **named: Any) -> Any:
    stats = real(passes, *arguments, **named)
    with torch.no_grad():
        passes.model.policy_parameters()[-1].view(-1)[-1] = torch.nan
    return stats


def _follow_steps() -> None:
    at_step(-1, lambda: None)


def at_step(step: int, act: Callable[[], None]) -> None:
    """Calls ``act`` when the step begins."""
    real = trainer.SAFETrainer.step

    def train_step(self: trainer.SAFETrainer) -> Any:
        global _present
        _present = self.steps_done
        if self.steps_done == step:
            act()
        return real(self)

    setattr(trainer.SAFETrainer, "step", train_step)  # noqa: B010


# -- the machine ----------------------------------------------------------------------------------------------------


def blocking_reward(step: int, seconds: float, said: Path) -> None:
    """The reward of a step takes long; ``said`` is there once it has begun."""
    _follow_steps()
    _reward.update({"blocks at": step, "seconds": seconds, "said": said})


def clock_jumps() -> None:
    """Each reading of the wall clock is a year before or after the truth, in turn."""
    real, turn = time.time, [1.0]

    def jumping() -> float:
        turn[0] = -turn[0]
        return real() + turn[0] * YEAR

    time.time = jumping


def full_disk(step: int, disk: Path, room: int) -> None:
    """From a step on, ``disk`` has that many bytes left."""
    at_step(step, lambda: _fill(disk, room))


def _fill(disk: Path, room: int) -> None:
    (disk / "ballast").write_bytes(bytes(max(0, shutil.disk_usage(disk).free - room)))


def short_files(step: int, longest: int | Path) -> None:
    """From a step on, no file may have more bytes than that, or than a file has now and ten more."""

    def limit() -> None:
        length = longest if isinstance(longest, int) else longest.stat().st_size + 10
        resource.setrlimit(resource.RLIMIT_FSIZE, (length, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))

    at_step(step, limit)


def kill_at(operation: int, run: Path) -> None:
    """SIGKILL at an operation on the run's files, counted from 1."""
    left = [operation]

    def count(path: str) -> None:
        left[0] -= 1
        if left[0] == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    _watch(run, count)


def record_operations(run: Path, into: Path) -> None:
    """Writes each operation on the run's files as a line: seconds since now, and its path."""
    file, began = into.open("w", buffering=1), time.monotonic()
    _watch(run, lambda path: print(time.monotonic() - began, path, file=file))


def terminate_at(part: str, run: Path, signum: int, turn: int = 1) -> None:
    """A signal to oneself at the ``turn``th operation on a file of the run whose path has that part."""
    left = [turn]

    def send(path: str) -> None:
        if part in path:
            left[0] -= 1
            if left[0] == 0:
                os.kill(os.getpid(), signum)

    _watch(run, send)


def _watch(run: Path, see: Callable[[str], None]) -> None:
    inside = str(run)

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event in OPERATIONS and isinstance(arguments[0], str | Path):
            path = str(arguments[0])
            if path.startswith(inside) or event in ("os.remove", "os.rmdir"):  # the removal of a tree has names alone
                see(path)

    sys.addaudithook(hook)
