"""The device a run is on."""

from __future__ import annotations

import os

import torch

from stable_rlhf.errors import ConfigError


def refuse_many_processes() -> None:
    """Raises ConfigError under a launcher: the processes would train a policy each, in one run folder."""
    if (size := os.environ.get("WORLD_SIZE", "1")) != "1":
        raise ConfigError(f"WORLD_SIZE={size}: this release trains in one process; start it without a launcher")


def resolve_device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(name)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"model.device={name!r}: no CUDA device is available; set model.device=cpu or auto")
    return device


def replays_graphs(cuda_graphs: bool | None, device: torch.device) -> bool:
    """Whether passes and sampling are CUDA graphs: as ``cuda_graphs`` says, or else wherever they can be."""
    return device.type == "cuda" if cuda_graphs is None else cuda_graphs
