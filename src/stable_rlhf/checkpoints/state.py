"""Everything that a run's future depends on, taken out of the trainer and put back: what checkpoints and snapshots
hold.

A snapshot is the last good state, for a roll-back: kept in memory where the policy has an adapter, whose state is
small, and in the run's folder otherwise. Every checkpoint holds it too, so that a resumed run rolls back to where the
uninterrupted one would.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import random
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers.trainer_callback import ExportableState

from stable_rlhf.checkpoints.snapshots import Tensors
from stable_rlhf.config import refuse_changes
from stable_rlhf.control.base import from_dict
from stable_rlhf.control.guard import GuardState
from stable_rlhf.errors import CheckpointError, ConfigError


def optimizer_state(optimizer: torch.optim.Optimizer) -> tuple[dict[str, Tensor], list[dict[str, Any]]]:
    """(moments as named tensors, parameter groups as JSON)."""
    state = optimizer.state_dict()
    tensors = {f"{i}.{name}": tensor for i, moments in state["state"].items() for name, tensor in moments.items()}
    return tensors, state["param_groups"]


def load_optimizer_state(
    optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor], groups: list[dict[str, Any]]
) -> None:
    """Raises CheckpointError where the optimiser was made with other settings: the saved ones would win in silence."""
    for group, saved in zip(optimizer.param_groups, groups, strict=True):
        for name, setting in (("initial_lr", "learning_rate"), ("weight_decay", "weight_decay")):
            if group.get(name) != saved.get(name):
                raise CheckpointError(
                    f"{setting} is {group.get(name)} here and {saved.get(name)} in the checkpoint: resume with the "
                    "run's own, or start a new run"
                )
    state: dict[int, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        index, name = key.split(".", 1)
        state.setdefault(int(index), {})[name] = tensor
    optimizer.load_state_dict({"state": state, "param_groups": groups})


def random_state() -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(torch's generators, Python's and NumPy's as JSON): reward functions may draw from any of them."""
    tensors = {"cpu": torch.get_rng_state()}
    for i in range(torch.cuda.device_count()):
        tensors[f"cuda{i}"] = torch.cuda.get_rng_state(i)
    kind, keys, *rest = np.random.get_state()
    return tensors, {"python": random.getstate(), "numpy": [kind, keys.tolist(), *rest]}  # pyright: ignore


def load_random_state(tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
    try:
        torch.set_rng_state(tensors["cpu"])
    except RuntimeError as error:
        raise CheckpointError(
            f"the saved state of torch's generator does not fit ({error}): start a new run"
        ) from error
    for i in range(torch.cuda.device_count()):
        if f"cuda{i}" in tensors:
            torch.cuda.set_rng_state(tensors[f"cuda{i}"], i)
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, np.array(keys, dtype=np.uint32), *rest))


def capture(trainer: Any) -> tuple[Tensors, dict[str, Any]]:
    """(tensors by group, the rest as JSON). The tensors are the run's own: whoever keeps them copies them."""
    moments, groups = optimizer_state(trainer.optimizer)
    generators, rng = random_state()
    state = {
        "step": trainer.step,
        "episode": trainer.episode,
        "preview": None if trainer.preview is None else trainer.preview.state_dict(),
        "optimizer": groups,
        "scheduler": trainer.scheduler.state_dict(),
        "controller": trainer.controller.state_dict(),
        "normaliser": trainer.normaliser.state_dict(),
        "guard": dataclasses.asdict(trainer.recovery.guard),
        "prompts": trainer.stream.state_dict(),
        "random": rng,
        "reference": trainer.fingerprint,
        "config": trainer.settings,
        "callbacks": callbacks_of(trainer),
    }
    return {"model": trainer.model.trained_state(), "optimizer": moments, "random": generators}, state


def restore(trainer: Any, tensors: Tensors, state: Mapping[str, Any], callbacks: bool = True) -> None:
    """Puts back what ``capture`` took, every byte. Raises CheckpointError or ValueError where it is another run's.

    ``callbacks`` False leaves theirs, which count what has happened.
    """
    if state["reference"] != trainer.fingerprint:
        raise CheckpointError(
            f"the checkpoint of step {state['step']}: its reference model is another one; give the model it began with"
        )
    refuse_changes(trainer.settings, state["config"])
    trainer.model.load_trained_state(tensors["model"])
    trainer.optimizer.zero_grad(set_to_none=True)  # an interrupted update may have left some
    # The optimiser keeps and changes what it gets, which may be a snapshot's.
    moments = {name: tensor.clone() for name, tensor in tensors["optimizer"].items()}
    load_optimizer_state(trainer.optimizer, moments, state["optimizer"])
    trainer.scheduler.load_state_dict(state["scheduler"])
    trainer.controller.load_state_dict(state["controller"])
    trainer.normaliser.load_state_dict(state["normaliser"])
    trainer.recovery.guard = from_dict(GuardState, state["guard"], "guard state")
    trainer.stream.load_state_dict(state["prompts"])
    if callbacks:
        put_callbacks(trainer, state["callbacks"])
    if trainer.preview is not None:
        trainer.preview.load_state_dict(state["preview"])
    trainer.step, trainer.episode = state["step"], state["episode"]
    load_random_state(tensors["random"], state["random"])


def callbacks_of(trainer: Any) -> dict[str, Any]:
    """What the callbacks that have a state say of it, by their names."""
    return {name: copy.deepcopy(callback.state()) for name, callback in _stateful(trainer).items()}


def check_callbacks(trainer: Any) -> None:
    """Raises ConfigError where a callback's state cannot be saved as JSON."""
    for name, state in callbacks_of(trainer).items():
        try:
            json.dumps(state, allow_nan=False)
        except (TypeError, ValueError, RecursionError) as error:
            raise ConfigError(
                f"callbacks: the state() of {name} cannot be saved as JSON ({error}); give it finite numbers, texts, "
                "lists and mappings alone"
            ) from error


def _stateful(trainer: Any) -> dict[str, Any]:
    """The callbacks that have a state, by the name of their class; a second one of a name is "Name 2"."""
    named: dict[str, Any] = {}
    for callback in trainer.handler.callbacks:
        if isinstance(callback, ExportableState):
            name = type(callback).__name__
            before = sum(type(other).__name__ == name for other in named.values())
            named[f"{name} {before + 1}" if before else name] = callback
    return named


def put_callbacks(trainer: Any, states: Mapping[str, Any]) -> None:
    for name, callback in _stateful(trainer).items():
        for attribute, value in states.get(name, {}).get("attributes", {}).items():
            setattr(callback, attribute, value)
