"""CUDA graphs: work recorded once and replayed as a whole, reading and writing the same tensors."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any, Generic, TypeVar

import torch

from stable_rlhf.errors import ConfigError

Result = TypeVar("Result")

WARM_UPS = 2
"""Runs before a capture: the first compiles, chooses kernels and allocates, the second finds nothing left to do."""


@dataclass(frozen=True)
class Graph(Generic[Result]):
    """Recorded work. ``replay`` runs it on the present content of its inputs, and puts the outcome in ``result``."""

    result: Result
    replay: Callable[[], None]


def capture(work: Callable[[], Result], device: torch.device, pool: Any = None) -> Graph[Result]:
    """Records ``work``, which must neither wait for the device nor read anything but tensors that stay where they are.

    Recording runs nothing: ``result`` means something after the first replay. ``pool``: memory shared with graphs that
    are never replayed at the same time, whose results are read before another of them is replayed.
    """
    # Transformers makes device 0 the current one; streams and captures are of the current device.
    with torch.cuda.device(device):
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool, stream=_beside(torch.cuda.current_device())):
            result = work()
    return Graph(result, graph.replay)


def warm_up(work: Callable[[], Any], device: torch.device) -> None:
    """Runs ``work`` WARM_UPS times on the stream that it will be captured on, as a capture requires.

    Cached memory that is free is given back first: it may belong to another stream, and this one could not use it.
    """
    with torch.cuda.device(device):
        torch.cuda.empty_cache()
        beside, current = _beside(torch.cuda.current_device()), torch.cuda.current_stream()
        beside.wait_stream(current)
        with torch.cuda.stream(beside):
            for _ in range(WARM_UPS):
                work()
        current.wait_stream(beside)


@cache
def _beside(device: int) -> torch.cuda.Stream:
    """The one stream on which everything is recorded on a device, next to the current stream.

    There is only one because a stream keeps the memory that was allocated on it, and 34 MB of workspace for each thread
    that multiplies matrices: with a stream for every shape, each kept 34 to 337 MB on an H100 (docs/LOG.md,
    2026-11-26).
    """
    return torch.cuda.Stream(device)


def pool() -> Any:
    """Memory for graphs to share; see `capture`. Raises ConfigError without a CUDA device."""
    if not torch.cuda.is_available():
        raise ConfigError("model.cuda_graphs=true: needs a CUDA device, and there is none; leave it out")
    return torch.cuda.graph_pool_handle()
