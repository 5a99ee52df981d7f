"""Free memory, memory that was taken, and errors that mean there was too little."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import torch

from stable_rlhf.errors import OutOfMemoryError, StableRLHFError

LESS = "set model.lora_r, lower optim.microbatch_tokens or rollout.batch_size, or set model.gradient_checkpointing"
"""The remedy where a run needs too much memory."""

SHORT_OF = ("out of memory", "allocate memory", "_STATUS_ALLOC_FAILED")
"""Words in the errors of CUDA, the CPU's allocator, and cuBLAS and its kin; the last two raise plain RuntimeErrors."""

CGROUP = Path("/sys/fs/cgroup")
"""Where a container reads its own memory limit (cgroup version 2)."""


def shortage(error: BaseException) -> str | None:
    """The first two sentences of an error that means memory ran out; None for any other error."""
    lines = str(error).splitlines()
    found = [line for line in lines if any(words in line for words in SHORT_OF)]  # torch.compile's begin with others
    if not found and isinstance(error, torch.OutOfMemoryError):
        found = lines or [type(error).__name__]
    return ". ".join(found[0].split(". ")[:2]).rstrip(".") if found else None


@contextmanager
def shortage_named(doing: str, remedy: str = LESS) -> Iterator[None]:
    """Turns a lack of memory into OutOfMemoryError, whose message says what was being done and what takes less."""
    try:
        yield
    except StableRLHFError:
        raise
    except RuntimeError as error:
        if (said := shortage(error)) is None:
            raise
        raise OutOfMemoryError(f"{doing}: {said}; {remedy}") from error


def free(device: torch.device, cgroup: Path = CGROUP) -> int:
    """Bytes that are free on the device; on the CPU, the memory that this process may still take.

    A container's files that nobody reads (`inactive_file`) count as free: they are in its `memory.current`, but the
    kernel drops them where memory is needed.
    """
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    limit, used, parts = (cgroup / f"memory.{name}" for name in ("max", "current", "stat"))
    left = psutil.virtual_memory().available
    if limit.is_file() and used.is_file() and limit.read_text().strip() != "max":  # a container's own bound
        told = dict(line.split() for line in parts.read_text().splitlines()) if parts.is_file() else {}
        dropped = int(told.get("inactive_file", 0))  # where nothing tells, all used memory counts as taken
        left = min(left, int(limit.read_text()) - int(used.read_text()) + dropped)
    return left


def taken(device: torch.device) -> int:
    """Bytes that this process holds on the device: what PyTorch reserves there; on the CPU the process's memory."""
    return torch.cuda.memory_reserved(device) if device.type == "cuda" else psutil.Process().memory_info().rss


class Peak:
    """The most memory, in bytes, that was taken inside `measured` on top of that before; None where not known."""

    taken: int | None = None


@contextmanager
def measured(device: torch.device) -> Iterator[Peak]:
    """Measures the memory that a block takes.

    On CUDA it is the memory that PyTorch reserves, CUDA graphs included; on a CPU the process's memory, which only
    Linux reports.
    """
    peak, process = Peak(), Path("/proc/self")
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_reserved(device)
    elif linux := (process / "clear_refs").exists():
        (process / "clear_refs").write_text("5")  # the peak begins anew
        before = psutil.Process().memory_info().rss
    yield peak
    if device.type == "cuda":
        peak.taken = torch.cuda.max_memory_reserved(device) - before
    elif linux:
        lines = dict(line.split(":", 1) for line in (process / "status").read_text().splitlines())
        peak.taken = 1024 * int(lines["VmHWM"].split()[0]) - before
