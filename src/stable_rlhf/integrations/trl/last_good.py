"""The last good state of a trainer, in the host's memory, to go back to."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from stable_rlhf.errors import ConfigError

SHARDED = ("DEEPSPEED", "FSDP", "MEGATRON_LM", "XLA")
"""Accelerate's kinds of processes that each hold a part of the weights."""


@dataclass(frozen=True, kw_only=True)
class State:
    """Trainable weights by name, the optimiser's state, and the monitor's; tensors on the CPU."""

    weights: Mapping[str, torch.Tensor]
    optimizer: Any
    monitor: dict[str, Any]


def check_whole(trainer: Any, what: str, remedy: str) -> None:
    """Raises ConfigError where a process does not hold whole weights, so that ``what`` cannot work."""
    kind = getattr(trainer.accelerator.distributed_type, "value", "NO")
    if any(isinstance(weight, DTensor) for _, weight in trainable(trainer)):
        kind = "FSDP"
    if kind in SHARDED:
        raise ConfigError(f"{what} needs whole weights in each process, and {kind} shards them: {remedy}")


class LastGood:
    """Keeps a candidate, which the next verdict makes the last good state, or drops."""

    def __init__(self, trainer: Any) -> None:
        check_whole(trainer, "a roll-back", "set roll_back=False")
        self._trainer = trainer
        self._good: State | None = None
        self._candidate: State | None = None

    def keep(self, monitor: dict[str, Any]) -> None:
        weights = {name: _on_cpu(weight.detach()) for name, weight in trainable(self._trainer)}
        optimizer = _on_cpu(self._trainer.optimizer.state_dict())
        self._candidate = State(weights=weights, optimizer=optimizer, monitor=monitor)

    def judge(self, suspect: bool) -> None:
        """Makes the candidate the last good state, or drops it where the step that it made is suspect."""
        if not suspect and self._candidate is not None:
            self._good = self._candidate
        self._candidate = None

    def restore(self, factor: float) -> dict[str, Any]:
        """Puts weights and optimiser back, multiplies every learning rate by ``factor``, returns the monitor's state.

        The schedule goes on from where it is.
        """
        assert self._good is not None
        with torch.no_grad():
            for name, weight in trainable(self._trainer):
                weight.copy_(self._good.weights[name])
        self._trainer.optimizer.load_state_dict(_on_cpu(self._good.optimizer))
        scheduler = getattr(self._trainer.lr_scheduler, "scheduler", self._trainer.lr_scheduler)
        rates = [rate * factor for rate in scheduler.get_last_lr()]
        if hasattr(scheduler, "base_lrs"):
            scheduler.base_lrs = [rate * factor for rate in scheduler.base_lrs]
        scheduler._last_lr = rates
        for group, rate in zip(self._trainer.optimizer.param_groups, rates, strict=True):
            group["lr"] = rate
        self._candidate = None
        return self._good.monitor


def trainable(trainer: Any) -> list[tuple[str, torch.Tensor]]:
    model = trainer.accelerator.unwrap_model(trainer.model)
    return [(name, weight) for name, weight in model.named_parameters() if weight.requires_grad]


def _on_cpu(value: Any) -> Any:
    """A copy with every tensor on the CPU."""
    if isinstance(value, torch.Tensor):
        return value.to("cpu", copy=True)
    if isinstance(value, dict):
        return {name: _on_cpu(inner) for name, inner in value.items()}
    return [_on_cpu(inner) for inner in value] if isinstance(value, list) else value
