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
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers.trainer_callback import ExportableState

from stable_rlhf import checkpoint, incidents
from stable_rlhf.config import SECTIONS, ConfigError
from stable_rlhf.control.base import from_dict
from stable_rlhf.control.guard import GuardState
from stable_rlhf.telemetry import tell
from stable_rlhf.validation import is_url

Tensors = dict[str, dict[str, Tensor]]
PREFIX = "snapshot-"
"""Begins the names of a snapshot's groups of tensors inside a checkpoint."""
MAY_CHANGE = {
    "preset", "output_dir", "max_steps", "save_steps", "save_total_limit", "log", "guard",
    "model.name", "model.revision", "model.gguf_file", "model.trust_remote_code",  # its weights are compared
    "model.device", "model.gradient_checkpointing", "model.cuda_graphs", "model.torch_compile",
    "optim.microbatch_tokens",
    "reward.batch_size", "reward.trust_remote_code", "reward.timeout", "reward.retries",
    "reward.max_wait", "reward.token_env",
}  # fmt: skip
"""Settings that a resume may be given anew: they say where and how a run goes on, not which run it is."""


def capture(trainer: Any) -> tuple[Tensors, dict[str, Any]]:
    """(tensors by group, the rest as JSON). The tensors are the run's own: whoever keeps them copies them."""
    moments, groups = checkpoint.optimizer_state(trainer.optimizer)
    generators, rng = checkpoint.random_state()
    state = {
        "step": trainer.step,
        "episode": trainer.episode,
        "quiet": trainer.quiet,
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
        raise checkpoint.CheckpointError(
            f"the checkpoint of step {state['step']}: its reference model is another one; give the model it began with"
        )
    _refuse_changes(trainer.settings, state["config"])
    trainer.model.load_trained_state(tensors["model"])
    trainer.optimizer.zero_grad(set_to_none=True)  # an interrupted update may have left some
    # The optimiser keeps and changes what it gets, which may be a snapshot's.
    moments = {name: tensor.clone() for name, tensor in tensors["optimizer"].items()}
    checkpoint.load_optimizer_state(trainer.optimizer, moments, state["optimizer"])
    trainer.scheduler.load_state_dict(state["scheduler"])
    trainer.controller.load_state_dict(state["controller"])
    trainer.normaliser.load_state_dict(state["normaliser"])
    trainer.recovery.guard = from_dict(GuardState, state["guard"], "guard state")
    trainer.stream.load_state_dict(state["prompts"])
    if callbacks:
        put_callbacks(trainer, state["callbacks"])
    trainer.step, trainer.episode, trainer.quiet = state["step"], state["episode"], state["quiet"]
    checkpoint.load_random_state(tensors["random"], state["random"])


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


def forget_after(trainer: Any) -> None:
    """Removes what the run folder has of the steps that a resumed run is about to repeat: checkpoints, rows, incidents.

    Raises ConfigError for a line of theirs that cannot be read, before anything is removed.
    """
    try:
        incidents.read(trainer.run_dir)
        trainer.writer.check()
    except ValueError as error:
        raise ConfigError(str(error)) from error
    # Checkpoints first: were the rows gone and not they, the next resume would go on from one that has no rows.
    folder = trainer.run_dir / "checkpoints"
    later = [path.name for path in checkpoint.found(folder) if checkpoint.steps_of(path) > trainer.step]
    for kept in checkpoint.forget_after(folder, trainer.step):
        tell(f"{kept}: a damaged checkpoint of a later step has this name now; remove it if you like")
        later = [name for name in later if not kept.name.startswith(f"damaged-{name}")]
    if later:
        tell(
            f"what there was of the steps after {trainer.step} is removed, {', '.join(later)} too: they are done again"
        )
    trainer.writer.truncate(trainer.step)
    incidents.truncate(trainer.run_dir, trainer.step)


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
        if name == "reward.functions" and _moved(here[name], there[name]):
            continue
        raise checkpoint.CheckpointError(
            f"{name} is {here.get(name)!r} here and {there.get(name)!r} in the checkpoint: resume with the run's own, "
            "or start a new run"
        )


def _moved(here: list[str], there: list[str]) -> bool:
    """Whether two lists of rewards are the same but for the addresses of servers."""
    return len(here) == len(there) and all(
        a == b or (is_url(a) and is_url(b)) for a, b in zip(here, there, strict=True)
    )


@dataclass(frozen=True)
class _Kept:
    """A state that is kept; on disk only its ``step``, the number of steps done in it, is here."""

    step: int
    tensors: Tensors
    state: dict[str, Any]


class Snapshots:
    """The last good state of a run, and the candidate to be the next. ``folder``: where they are kept on disk; None
    keeps them in memory.

    What a step's figures call good is the policy that sampled it, which is the one before that step's update. So the
    state after an update is a candidate until the next step's figures are known.
    """

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder
        self.good: _Kept | None = None
        self.candidate: _Kept | None = None
        self._spare: Tensors = {}
        """Memory of a state that is kept no more, for the next one: a GPU writes to it directly."""

    def keep(self, tensors: Tensors, state: dict[str, Any]) -> None:
        """Keeps this state as the candidate. Raises SaveError where it goes to a disk that does not take it."""
        self.drop()
        if self.good is not None and self.good.step == state["step"]:
            return  # it is the good one, in whose place on disk it would go
        state = {name: value for name, value in state.items() if name not in ("snapshot", "candidate")}
        if self.folder is None:
            self.candidate = _Kept(state["step"], _copied(tensors, self._spare), state)
            self._spare = {}
        else:
            checkpoint.save(self.folder, state["step"], tensors, state, keep=2)  # the good one and this
            self.candidate = _Kept(state["step"], {}, {})

    def confirm(self) -> None:
        """The candidate, if there is one, is the last good state from now on."""
        if self.candidate is not None:
            self._release(self.good)
            self.good, self.candidate = self.candidate, None

    def drop(self) -> None:
        """There is no candidate any more."""
        self._release(self.candidate)
        self.candidate = None

    def load(self) -> tuple[Tensors, dict[str, Any]]:
        """The last good state. Raises CheckpointError where it can no longer be read, or there is none."""
        if self.good is None:
            raise checkpoint.CheckpointError("there is no snapshot to go back to")
        if self.folder is None:
            return self.good.tensors, self.good.state
        return checkpoint.load(self._path(self.good))

    def into(self, tensors: Tensors, state: dict[str, Any]) -> None:
        """Adds the last good state to a checkpoint's content, and whether that is the candidate, unless it is the last
        good state itself."""
        if self.good is not None and self.good.step != state["step"]:
            try:
                own, state["snapshot"] = self.load()
            except checkpoint.CheckpointError as error:  # the state that is to be saved is not to be lost with it
                tell(f"the last good state cannot be read and is not saved: {error}")
                self._release(self.good)
                self.good = None
                return
            state["candidate"] = self.candidate is not None and self.candidate.step == state["step"]
            tensors |= {PREFIX + group: named for group, named in own.items()}

    def out_of(self, tensors: Tensors, state: dict[str, Any]) -> None:
        """Keeps what a checkpoint brought: the last good state and the candidate; where it has neither, its own state
        is the good one."""
        own = {group: named for group, named in tensors.items() if not group.startswith(PREFIX)}
        good = {group.removeprefix(PREFIX): named for group, named in tensors.items() if group.startswith(PREFIX)}
        self.forget()
        if "snapshot" in state:
            self.keep(good, state["snapshot"])
            self.confirm()
        if "snapshot" not in state or state["candidate"]:
            self.keep(own, state)
        if "snapshot" not in state:
            self.confirm()

    def forget(self) -> None:
        self.good, self.candidate, self._spare = None, None, {}
        if self.folder is not None:
            shutil.rmtree(self.folder, ignore_errors=True)  # what is left there is never read again

    def _path(self, kept: _Kept) -> Path:
        return (self.folder or Path()) / f"step-{kept.step:06d}"

    def _release(self, kept: _Kept | None) -> None:
        if kept is None:
            return
        if self.folder is None:
            self._spare = kept.tensors
        else:
            shutil.rmtree(self._path(kept), ignore_errors=True)  # as above; the next save of a third one removes it


def _copied(tensors: Tensors, spare: Tensors) -> Tensors:
    """On the host, in the memory of ``spare`` where that has the same form."""
    copies: Tensors = {}
    for group, named in tensors.items():
        copies[group] = {}
        for name, tensor in named.items():
            memory = spare.get(group, {}).get(name)
            if memory is None or memory.shape != tensor.shape or memory.dtype != tensor.dtype:
                memory = torch.empty_like(tensor, device="cpu", pin_memory=tensor.is_cuda)
            copies[group][name] = memory.copy_(tensor.detach(), non_blocking=tensor.is_cuda)
    for device in {tensor.device for named in tensors.values() for tensor in named.values() if tensor.is_cuda}:
        torch.cuda.synchronize(device)  # which need not be the current one
    return copies
