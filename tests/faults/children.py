"""Commands as processes of their own, which can be killed: they start in milliseconds, from a server that has torch.

They run `stable_rlhf.cli.main.main` with one thread, and end with its exit code; what they say goes to a file.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

CHILDREN = multiprocessing.get_context("forkserver")
# pytest: what the main module imports is imported again in each child unless the server has it.
CHILDREN.set_forkserver_preload(["tests.faults.checkpoints", "tests.faults.injections", "pytest"])
PATIENCE = 120.0
"""Seconds after which a command that should have ended has not: the longest takes three."""


@dataclass(frozen=True)
class Child:
    process: Any
    output: Path

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def said(self) -> str:
        return self.output.read_text(encoding="utf-8")

    def end(self, seconds: float = PATIENCE) -> int:
        """Waits for it; its exit code, or minus the number of the signal that killed it."""
        self.process.join(seconds)
        if self.process.exitcode is None:
            self.process.kill()
            raise AssertionError(f"it has not ended after {seconds:g} s: {self.said}")
        return self.process.exitcode


def start(arguments: list[str], output: Path, *prepare: Callable[[], None]) -> Child:
    """``prepare`` is called in the process first: what makes something go wrong there."""
    process = CHILDREN.Process(target=_command, args=(arguments, output, prepare))
    process.start()
    return Child(process, output)


def run(arguments: list[str], output: Path, *prepare: Callable[[], None]) -> tuple[int, str]:
    """(exit code, what it said) of a command that ends by itself."""
    child = start(arguments, output, *prepare)
    return child.end(), child.said


def _command(arguments: list[str], output: Path, prepare: tuple[Callable[[], None], ...]) -> None:
    import torch

    from stable_rlhf.cli.main import main

    file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(file, 1), os.dup2(file, 2)
    torch.set_num_threads(1)
    for step in prepare:
        step()
    sys.exit(main(arguments))
