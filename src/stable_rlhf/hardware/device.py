"""The device of a run."""

from __future__ import annotations

import os
import platform
from pathlib import Path

import torch

from stable_rlhf.errors import ConfigError


def refuse_many_processes() -> None:
    """Raises ConfigError under a launcher, whose processes would each train a policy in the same run folder."""
    if (size := os.environ.get("WORLD_SIZE", "1")) != "1":
        raise ConfigError(f"WORLD_SIZE={size}: this release trains in one process; start it without a launcher")


def resolve_device(name: str, setting: str = "model.device") -> torch.device:
    """The device that ``setting`` names; ``auto`` is CUDA where there is one.

    Raises ConfigError for a device that this machine does not have.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigError(f"{setting}={name!r}: give auto, cpu, cuda or cuda:NUMBER") from error
    count = torch.cuda.device_count()
    if device.type == "cuda" and (device.index or 0) >= count:
        raise ConfigError(f"{setting}={name!r}: this machine has {count} CUDA devices; give auto")
    return device


def described(device: torch.device) -> str:
    """The device in words: `cuda:0, NVIDIA H100 80GB HBM3`; `cpu, AMD EPYC 7763, 2 threads`."""
    if device.type == "cuda":
        return f"{device}, {torch.cuda.get_device_name(device)}"
    threads = torch.get_num_threads()
    parts = [str(device), _cpu_model(), f"{threads} thread{'' if threads == 1 else 's'}"]
    return ", ".join(part for part in parts if part)


def _cpu_model(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """The processor's name; on systems other than Linux its architecture."""
    if cpuinfo.is_file():
        for line in cpuinfo.read_text(errors="replace").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.machine()


def replays_graphs(cuda_graphs: bool | None, device: torch.device) -> bool:
    """Whether passes and sampling use CUDA graphs: as ``cuda_graphs`` says; None means on every CUDA device."""
    return device.type == "cuda" if cuda_graphs is None else cuda_graphs
