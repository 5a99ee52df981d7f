"""What the tests of the guard in real runs share: runs with a short guard, what happens to them, what is known."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedTokenizerFast, TrainerCallback

from stable_rlhf import SAFETrainer
from stable_rlhf.checkpoints import snapshots
from stable_rlhf.checkpoints import state as checkpoints_state
from stable_rlhf.runs import incidents
from tests.tiny_runs import settings, trainer

STEPS = 8
ADAPTER = pytest.mark.parametrize("lora_r", [0, 2], ids=["on disk", "in memory"])
GUARD = {"snapshot_steps": 2, "patience": 3, "max_kl_ratio": 1.6}


def prints(tensors: snapshots.Tensors, state: dict[str, Any]) -> dict[str, str]:
    """SHA-256 of every tensor, and the rest of each part of a state as JSON."""
    found = {
        f"{group}.{name}": hashlib.sha256(tensor.detach().cpu().numpy().tobytes()).hexdigest()
        for group, named in tensors.items()
        for name, tensor in named.items()
    }
    return found | {name: json.dumps(part, sort_keys=True) for name, part in state["parts"].items() if part}


def captured(run: SAFETrainer) -> tuple[snapshots.Tensors, dict[str, Any]]:
    """The state of a run as it is now: its own tensors, and the rest."""
    return checkpoints_state.capture(run.parts, run.steps_done)


def guarded(output_dir: Path, lora_r: int = 0, guard: dict | None = None, **overrides: Any) -> Any:
    run = {"max_steps": STEPS, "save_steps": 0, "optim": {"learning_rate": 1e-3}, "model": {"lora_r": lora_r}}
    return settings(output_dir, guard={**GUARD, **(guard or {})}, **{**run, **overrides})


class Happens(TrainerCallback):
    """Calls ``what(run)`` at the end of the steps named, before anything of them is kept; watches every step."""

    def __init__(self, what: Callable[[SAFETrainer], None] = lambda run: None, *at: int) -> None:
        self.what, self.at = what, at
        self.run: Any = None
        self.seen: dict[int, dict[str, str]] = {}
        """Steps done -> prints of the state, before ``what``."""

    def on_step_end(self, args, state, control, **kwargs) -> None:
        self.seen[state.global_step] = prints(*captured(self.run))
        if state.global_step in self.at:
            self.what(self.run)


class StopAfter(TrainerCallback):
    def __init__(self, steps: int) -> None:
        self.steps = steps

    def on_step_end(self, args, state, control, **kwargs) -> None:
        control.should_training_stop = state.global_step == self.steps


def made(config: Any, tokenizer: PreTrainedTokenizerFast, happens: Happens, **arguments: Any) -> SAFETrainer:
    run = trainer(config, tokenizer, callbacks=[happens], **arguments)
    happens.run = run
    return run


def known(run: SAFETrainer) -> list[tuple[int, str, str]]:
    return [(found["step"], found["action"], found["rule"]) for found in incidents.read(run.run_dir)]


def multiply(parameters: Any) -> None:
    with torch.no_grad():
        for parameter in parameters:
            parameter.mul_(1e3)


def fill(parameters: Any, value: float) -> None:
    with torch.no_grad():
        for parameter in parameters:
            parameter.fill_(value)
