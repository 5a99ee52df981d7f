"""Everything that a run's future depends on, taken out of the trainer and put back: what checkpoints and snapshots
hold.

A snapshot is the last good state, for a roll-back: kept in memory where the policy has an adapter, whose state is
small, and in the run's folder otherwise. A checkpoint of another step than the snapshot's holds the snapshot too, so
that a resumed run rolls back to where the uninterrupted one would.
"""

from __future__ import annotations

import dataclasses
import os
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers.trainer_callback import ExportableState

from stable_rlhf import checkpoint
from stable_rlhf.config import SECTIONS
from stable_rlhf.control.base import from_dict
from stable_rlhf.control.guard import GuardState

Tensors = dict[str, dict[str, Tensor]]
PREFIX = "snapshot-"
"""Begins the names of a snapshot's groups of tensors inside a checkpoint."""
MAY_CHANGE = {
    "preset", "output_dir", "max_steps", "save_steps", "save_total_limit", "log", "guard",
    "model.name", "model.revision", "model.gguf_file", "model.trust_remote_code",  # its weights are compared
    "model.device", "model.gradient_checkpointing", "model.cuda_graphs", "model.torch_compile",
    "data.eval", "data.eval_split", "data.eval_size", "optim.microbatch_tokens",
    "reward.batch_size", "reward.trust_remote_code", "reward.url", "reward.timeout", "reward.retries",
    "reward.max_wait", "reward.token_env",
}  # fmt: skip
"""Settings that a resume may be given anew: they say where and how a run goes on, not which run it is."""


def capture(trainer: Any) -> tuple[Tensors, dict[str, Any]]:
    """(tensors by group, the rest as JSON). The tensors are the run's own: whoever keeps them copies them."""
    moments, groups = checkpoint.optimizer_state(trainer.optimizer)
    generators, rng = checkpoint.random_state()
    callbacks = {
        type(callback).__name__: callback.state()
        for callback in trainer.handler.callbacks
        if isinstance(callback, ExportableState)
    }
    state = {
        "step": trainer.step,
        "episode": trainer.episode,
        "optimizer": groups,
        "scheduler": trainer.scheduler.state_dict(),
        "controller": trainer.controller.state_dict(),
        "normaliser": trainer.normaliser.state_dict(),
        "guard": dataclasses.asdict(trainer.recovery.guard),
        "prompts": trainer.stream.state_dict(),
        "random": rng,
        "reference": trainer.fingerprint,
        "config": trainer.settings,
        "callbacks": callbacks,
    }
    return {"model": trainer.model.trained_state(), "optimizer": moments, "random": generators}, state


def restore(trainer: Any, tensors: Tensors, state: Mapping[str, Any], callbacks: bool = True) -> None:
    """Puts back what ``capture`` took, every byte. Raises CheckpointError or ValueError where it is another run's.

    ``callbacks`` False leaves theirs, which count what has happened.
    """
    if state["reference"] != trainer.fingerprint:
        raise checkpoint.CheckpointError(
            f"the checkpoint of step {state['step']}: its reference model is another one; give the model it began with"
        )
    _refuse_changes(trainer.settings, state["config"])
    trainer.model.load_trained_state(tensors["model"])
    trainer.optimizer.zero_grad(set_to_none=True)  # an interrupted update may have left some
    moments = {
        name: tensor.clone() for name, tensor in tensors["optimizer"].items()
    }  # the optimiser keeps what it gets
    checkpoint.load_optimizer_state(trainer.optimizer, moments, state["optimizer"])
    trainer.scheduler.load_state_dict(state["scheduler"])
    trainer.controller.load_state_dict(state["controller"])
    trainer.normaliser.load_state_dict(state["normaliser"])
    guard = from_dict(GuardState, state["guard"], "guard state")
    trainer.recovery.guard = replace(guard, streaks=tuple(int(count) for count in guard.streaks))
    trainer.stream.load_state_dict(state["prompts"])
    for callback in trainer.handler.callbacks if callbacks else []:
        for name, value in state["callbacks"].get(type(callback).__name__, {}).get("attributes", {}).items():
            setattr(callback, name, value)
    trainer.step, trainer.episode = state["step"], state["episode"]
    checkpoint.load_random_state(tensors["random"], state["random"])


def _refuse_changes(settings: Mapping[str, Any], saved: Mapping[str, Any]) -> None:
    """Raises CheckpointError for the first setting that is another one than the run's, unless it may change."""

    def flat(settings: Mapping[str, Any]) -> dict[str, Any]:
        sections = {name: value for name, value in settings.items() if name in SECTIONS}
        plain = {name: value for name, value in settings.items() if name not in SECTIONS}
        return plain | {
            f"{name}.{field}": value for name, section in sections.items() for field, value in section.items()
        }

    here, there = flat(settings), flat(saved)
    for name in sorted(here.keys() | there.keys()):
        if name in MAY_CHANGE or name.split(".")[0] in MAY_CHANGE or here.get(name) == there.get(name):
            continue
        raise checkpoint.CheckpointError(
            f"{name} is {here.get(name)!r} here and {there.get(name)!r} in the checkpoint: resume with the run's own, "
            "or start a new run"
        )


class Snapshots:
    """The last good state of a run. ``folder``: where it is kept on disk; None keeps it in memory."""

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder
        self.step: int | None = None
        """Steps done in the state that is kept; None while there is none."""
        self._tensors: Tensors = {}
        self._state: dict[str, Any] = {}

    def keep(self, tensors: Tensors, state: dict[str, Any], saved: Path | None = None) -> None:
        """Keeps this state instead of the last. ``saved``: a checkpoint that holds the same, whose files are shared."""
        state = {name: value for name, value in state.items() if name != "snapshot"}
        if self.folder is None:
            self._tensors, self._state = self._copied(tensors), state
        elif saved is None:
            checkpoint.save(self.folder, state["step"], tensors, state, keep=1)
        else:
            self._share(saved)
        self.step = state["step"]

    def load(self) -> tuple[Tensors, dict[str, Any]]:
        """What is kept. Raises CheckpointError where it can no longer be read, or there is none."""
        if self.step is None:
            raise checkpoint.CheckpointError("there is no snapshot to go back to")
        if self.folder is None:
            return self._tensors, self._state
        return checkpoint.load(checkpoint.newest(self.folder)[0])

    def into(self, tensors: Tensors, state: dict[str, Any]) -> None:
        """Adds what is kept to a checkpoint's content, if it is of another step."""
        if self.step is not None and self.step != state["step"]:
            own, state["snapshot"] = self.load()
            tensors |= {PREFIX + group: named for group, named in own.items()}

    def out_of(self, tensors: Tensors, state: dict[str, Any]) -> None:
        """Keeps what a checkpoint brought: its snapshot, or else its own state."""
        own = {group.removeprefix(PREFIX): named for group, named in tensors.items() if group.startswith(PREFIX)}
        self.forget()
        if "snapshot" in state:
            self.keep(own, state["snapshot"])
        else:
            self.keep(tensors, state)

    def forget(self) -> None:
        self.step, self._tensors, self._state = None, {}, {}
        if self.folder is not None:
            shutil.rmtree(self.folder, ignore_errors=True)

    def _copied(self, tensors: Tensors) -> Tensors:
        """On the host; in the memory of the last one, which a GPU writes to directly, where that has the same form."""
        copies: Tensors = {}
        for group, named in tensors.items():
            copies[group] = {}
            for name, tensor in named.items():
                last = self._tensors.get(group, {}).get(name)
                if last is None or last.shape != tensor.shape or last.dtype != tensor.dtype:
                    last = torch.empty_like(tensor, device="cpu", pin_memory=tensor.is_cuda)
                copies[group][name] = last.copy_(tensor.detach(), non_blocking=tensor.is_cuda)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return copies

    def _share(self, saved: Path) -> None:
        """Another name for a checkpoint's files, or copies where the disk has no such names."""

        def link(source: str, target: str) -> None:
            try:
                os.link(source, target)
            except OSError:
                shutil.copy2(source, target)

        folder = self.folder or saved.parent
        aside = folder / f".sharing-{saved.name}"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(saved, aside, copy_function=link)
        aside.rename(folder / saved.name)
