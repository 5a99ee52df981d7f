"""Snapshots for a roll-back: the last good state of a run and the candidate to replace it.

They are kept in memory where the policy has an adapter, whose state is small, otherwise in the run's folder. Every
checkpoint holds them too, so that a resumed run rolls back to where the uninterrupted one would.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stable_rlhf.checkpoints import store
from stable_rlhf.console import tell
from stable_rlhf.errors import CheckpointError

Tensors = dict[str, dict[str, Tensor]]

PREFIX = "snapshot-"
"""Prefix of the names of a snapshot's groups of tensors inside a checkpoint."""


@dataclass(frozen=True)
class _Kept:
    """A state that is kept. Of one on disk, only ``step``, the number of steps done in it, is held here."""

    step: int
    tensors: Tensors
    state: dict[str, Any]


class Snapshots:
    """The last good state of a run, and the candidate to be the next.

    ``folder``: where they are kept on disk; None keeps them in memory.

    A step's figures judge the policy that sampled, which is the one before that step's update. So the state after an
    update is a candidate until the next step's figures are known.
    """

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder
        self.good: _Kept | None = None
        self.candidate: _Kept | None = None
        self._spare: Tensors = {}
        """Memory of a state that is no longer kept, for the next one: a GPU writes to it directly."""

    def keep(self, tensors: Tensors, state: dict[str, Any]) -> None:
        """Keeps this state as the candidate. Raises SaveError where it cannot be written to disk."""
        self.drop()
        if self.good is not None and self.good.step == state["step"]:
            return  # it is the good one, in whose place on disk it would go
        state = {name: value for name, value in state.items() if name not in ("snapshot", "candidate")}
        if self.folder is None:
            self.candidate = _Kept(state["step"], _copied(tensors, self._spare), state)
            self._spare = {}
        else:
            store.save(self.folder, state["step"], tensors, state, keep=2)  # the good one and this
            self.candidate = _Kept(state["step"], {}, {})

    def confirm(self) -> None:
        """Makes the candidate, if there is one, the last good state."""
        if self.candidate is not None:
            self._release(self.good)
            self.good, self.candidate = self.candidate, None

    def drop(self) -> None:
        """Drops the candidate."""
        self._release(self.candidate)
        self.candidate = None

    def load(self) -> tuple[Tensors, dict[str, Any]]:
        """Returns the last good state. Raises CheckpointError where it can no longer be read, or there is none."""
        if self.good is None:
            raise CheckpointError("there is no snapshot to go back to")
        if self.folder is None:
            return self.good.tensors, self.good.state
        return store.load(self._path(self.good))

    def into(self, tensors: Tensors, state: dict[str, Any]) -> None:
        """Adds the last good state to a checkpoint's content, and whether the checkpoint's state is the candidate.

        Nothing is added where the checkpoint's state is the last good state.
        """
        if self.good is not None and self.good.step != state["step"]:
            try:
                own, state["snapshot"] = self.load()
            except CheckpointError as error:  # the state to be saved must not be lost with it
                tell(f"the last good state cannot be read and is not saved: {error}")
                self._release(self.good)
                self.good = None
                return
            state["candidate"] = self.candidate is not None and self.candidate.step == state["step"]
            tensors |= {PREFIX + group: named for group, named in own.items()}

    def out_of(self, tensors: Tensors, state: dict[str, Any]) -> None:
        """Keeps the last good state and the candidate that a checkpoint holds.

        Where it holds neither, its own state is the good one.
        """
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
        """Drops every state, on disk too."""
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
    """Copies tensors to the host, into the memory of ``spare`` where that has the same form."""
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
