"""The places at which a sweep's cells run: GPUs of this machine, or its cores. Found without torch."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

PATIENCE = 30.0
"""Seconds that nvidia-smi may take: it waits for the driver, some seconds where persistence is off."""


@dataclass(frozen=True)
class Place:
    """Where one cell runs at a time."""

    gpu: str | None
    """The GPU, as CUDA_VISIBLE_DEVICES names it; None on a CPU."""
    threads: int | None
    """Threads of a cell; None leaves them to torch, which takes every core."""

    @property
    def environment(self) -> dict[str, str]:
        gpu = {} if self.gpu is None else {"CUDA_VISIBLE_DEVICES": self.gpu}
        return gpu | ({} if self.threads is None else {"OMP_NUM_THREADS": str(self.threads)})


def places(jobs: int, gpus: list[str], environment: Mapping[str, str] = os.environ) -> list[Place]:
    """``jobs`` places on each GPU, or on the CPU where there is none; the GPUs take turns, so that a short sweep is
    spread. Places share the cores: together their cells have as many threads as there are cores.

    OMP_NUM_THREADS of the sweep's own environment is each cell's.
    """
    count = jobs * max(1, len(gpus))
    alone = count == 1 or "OMP_NUM_THREADS" in environment
    threads = None if alone else max(1, len(os.sched_getaffinity(0)) // count)
    return [Place(gpu, threads) for _ in range(jobs) for gpu in gpus or [None]]


def visible_gpus(environment: Mapping[str, str] = os.environ) -> list[str]:
    """The GPUs that cells may use, as CUDA_VISIBLE_DEVICES names them; that variable is respected."""
    given = environment.get("CUDA_VISIBLE_DEVICES")
    if given is None:
        return [str(number) for number in range(_gpus())]
    found: list[str] = []
    for name in (part.strip() for part in given.split(",")):
        if not re.fullmatch(r"\d+|(GPU|MIG)-[\w/-]+", name):  # as CUDA does: what follows is not visible
            break
        found.append(name)
    return found


def _gpus() -> int:
    """The number of NVIDIA GPUs of this machine."""
    try:
        listed = subprocess.run(
            ["nvidia-smi", "--query-gpu=index", "--format=csv,noheader"],
            capture_output=True,
            text=True,
            timeout=PATIENCE,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):  # some containers have GPUs and not this program
        return sum(1 for path in Path("/dev").glob("nvidia*") if re.fullmatch(r"nvidia\d+", path.name))
    return len(listed.stdout.split())
