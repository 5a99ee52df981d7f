"""Checkpoints: everything that affects the future, saved at rollout boundaries. safetensors and JSON only.

A checkpoint is a folder ``step-000040`` (40 steps done) with ``model.safetensors``, ``optimizer.safetensors``,
``random.safetensors``, ``state.json`` and ``manifest.json``, the SHA-256 of each. It is written aside and then renamed,
so a folder of that name is whole.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

VERSION = 1
_NAME = re.compile(r"step-(\d{6,})")


class CheckpointError(RuntimeError):
    """A checkpoint is missing, damaged, or of another run."""


def save(
    folder: Path, step: int, tensors: Mapping[str, Mapping[str, Tensor]], state: dict[str, Any], keep: int
) -> Path:
    """Writes ``folder/step-<step>``; then removes the oldest until ``keep`` are left. Returns its path."""
    final = folder / f"step-{step:06d}"
    aside = folder / f".writing-{final.name}"
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    for name, group in tensors.items():
        own = {key: tensor.detach().cpu().contiguous().clone() for key, tensor in group.items()}
        save_file(own, aside / f"{name}.safetensors")
    (aside / "state.json").write_text(json.dumps({"version": VERSION, "step": step, **state}, indent=1))
    files = sorted(aside.iterdir())
    (aside / "manifest.json").write_text(json.dumps({file.name: _sha256(file) for file in files}, indent=1))
    for file in aside.iterdir():
        with file.open("rb") as opened:
            os.fsync(opened.fileno())
    replaced = folder / f".replaced-{final.name}"
    shutil.rmtree(replaced, ignore_errors=True)
    if final.exists():  # the same step again: the old one goes only when the new one is in its place
        final.rename(replaced)
    aside.rename(final)
    shutil.rmtree(replaced, ignore_errors=True)
    for old in found(folder)[:-keep]:
        shutil.rmtree(old)
    return final


def found(folder: Path) -> list[Path]:
    """The checkpoints in a folder, oldest first."""
    if not folder.is_dir():
        return []
    named = [(int(match[1]), path) for path in folder.iterdir() if (match := _NAME.fullmatch(path.name))]
    return [path for _, path in sorted(named)]


def forget_after(folder: Path, step: int) -> None:
    """Removes the checkpoints of more than ``step`` steps: a run that goes on from there takes another course.

    Left there, the next resume would take one of them for the newest, and the rotation would keep it for a new one.
    """
    for path in found(folder):
        if int(path.name.removeprefix("step-")) > step:
            shutil.rmtree(path)


def load(path: Path) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
    """(tensors by group, state) of a checkpoint. Raises CheckpointError where a file is missing or has changed."""
    remedy = "choose an older checkpoint of the run with --checkpoint"
    try:
        manifest: dict[str, str] = json.loads((path / "manifest.json").read_text())
        for name, digest in manifest.items():
            if _sha256(path / name) != digest:
                raise CheckpointError(f"{path / name} has changed since it was saved: {remedy}")
        state = json.loads((path / "state.json").read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} is not a whole checkpoint ({error}): {remedy}") from error
    if state.get("version") != VERSION:
        raise CheckpointError(
            f"{path} has format {state.get('version')}, this release reads {VERSION}: start a new run"
        )
    tensors = {Path(name).stem: load_file(path / name) for name in manifest if name.endswith(".safetensors")}
    return tensors, state


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
    torch.set_rng_state(tensors["cpu"])
    for i in range(torch.cuda.device_count()):
        if f"cuda{i}" in tensors:
            torch.cuda.set_rng_state(tensors[f"cuda{i}"], i)
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, np.array(keys, dtype=np.uint32), *rest))


def _sha256(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()
