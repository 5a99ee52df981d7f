"""The state of a run as named parts, each with ``state_dict`` and ``load_state_dict``.

Capturing, keeping, saving and resuming a run are loops over ``{name: part}``: nothing here knows a trainer. The states
that are kept for a roll-back are in `snapshots`, checkpoints on disk in `store`.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from stable_rlhf.checkpoints.snapshots import Tensors
from stable_rlhf.errors import CheckpointError


class Part(Protocol):
    """A part of a run. Its state maps names to tensors or to JSON values; the tensors are the part's own."""

    def state_dict(self) -> Mapping[str, Any]: ...
    def load_state_dict(self, state: Any, /) -> Any: ...


def capture(parts: Mapping[str, Part], step: int) -> tuple[Tensors, dict[str, Any]]:
    """Takes the state of every part.

    Returns (tensors by part and name, ``{"step": steps done, "parts": {part: the rest of its state, as JSON}}``). The
    tensors are the run's own: copy them to keep them.
    """
    tensors: Tensors = {}
    state: dict[str, Any] = {"step": step, "parts": {}}
    for name, part in parts.items():
        own = part.state_dict()
        state["parts"][name] = {key: value for key, value in own.items() if not isinstance(value, Tensor)}
        if named := {key: value for key, value in own.items() if isinstance(value, Tensor)}:
            tensors[name] = named
    return tensors, state


def restore(parts: Mapping[str, Part], tensors: Tensors, state: Mapping[str, Any]) -> None:
    """Restores what ``capture`` took, byte for byte, in the order of ``parts``.

    Parts that only check (reference, settings) come first, so that a state of another run changes nothing. Raises what
    the parts raise, KeyError where the state lacks one.
    """
    for name, part in parts.items():
        part.load_state_dict({**state["parts"][name], **tensors.get(name, {})})


class OptimizerState:
    """An optimiser's moments, as tensors named ``<index>.<moment>``, and its parameter groups."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer

    def state_dict(self) -> dict[str, Any]:
        state = self.optimizer.state_dict()
        moments = {f"{i}.{name}": tensor for i, named in state["state"].items() for name, tensor in named.items()}
        return {"groups": state["param_groups"], **moments}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores the moments and drops gradients that an interrupted update left.

        Raises CheckpointError where the optimiser was made with other settings: the saved ones would silently replace
        them.
        """
        groups = state["groups"]
        for group, saved in zip(self.optimizer.param_groups, groups, strict=True):
            for name, setting in (("initial_lr", "learning_rate"), ("weight_decay", "weight_decay")):
                if group.get(name) != saved.get(name):
                    raise CheckpointError(
                        f"{setting} is {group.get(name)} here and {saved.get(name)} in the checkpoint: resume with the "
                        "run's own, or start a new run"
                    )
        moments: dict[int, dict[str, Tensor]] = {}
        for key, tensor in state.items():
            if key != "groups":
                index, name = key.split(".", 1)
                # A copy: the optimiser keeps and changes what it gets, which may be a snapshot's.
                moments.setdefault(int(index), {})[name] = tensor.clone()
        self.optimizer.zero_grad(set_to_none=True)
        self.optimizer.load_state_dict({"state": moments, "param_groups": groups})


class RandomState:
    """The states of torch's generators (tensors), Python's and NumPy's: reward functions may draw from any of them."""

    def state_dict(self) -> dict[str, Any]:
        cuda = {f"cuda{i}": torch.cuda.get_rng_state(i) for i in range(torch.cuda.device_count())}
        kind, keys, *rest = np.random.get_state()
        own = {"python": random.getstate(), "numpy": [kind, keys.tolist(), *rest]}  # pyright: ignore
        return {"cpu": torch.get_rng_state(), **cuda, **own}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        try:
            torch.set_rng_state(state["cpu"])
        except RuntimeError as error:
            raise CheckpointError(
                f"the saved state of torch's generator does not fit ({error}): start a new run"
            ) from error
        for i in range(torch.cuda.device_count()):
            if f"cuda{i}" in state:
                torch.cuda.set_rng_state(state[f"cuda{i}"], i)
        version, internal, gauss = state["python"]
        random.setstate((version, tuple(internal), gauss))
        kind, keys, *rest = state["numpy"]
        np.random.set_state((kind, np.array(keys, dtype=np.uint32), *rest))
