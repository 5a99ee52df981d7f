"""CUDA graphs without CUDA: what stands for `stable_rlhf.graphs` in tests on the CPU.

A replay runs the recorded work again and writes into the tensors of its first result, as a graph does: so everything is
tested here but the launch itself, above all that work reads the tensors that it was recorded with. As with a graph,
what recording itself computes is of no use: a result is NaN, or no token, until the first replay.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from stable_rlhf.hardware import cpu_matmul, cuda_graphs


def use(monkeypatch: pytest.MonkeyPatch) -> list[Callable[[], Any]]:
    """Replaces capture, warm-up and pool; returns the list of works captured from now on."""
    captured: list[Callable[[], Any]] = []

    def capture(work: Callable[[], Any], device: torch.device, pool: Any = None) -> cuda_graphs.Graph[Any]:
        captured.append(work)
        kept = _cloned(work())
        _spoiled(kept)

        def replay() -> None:
            _copied(kept, work())

        return cuda_graphs.Graph(kept, replay)

    monkeypatch.setattr(cuda_graphs, "capture", capture)
    monkeypatch.setattr(cuda_graphs, "warm_up", lambda work, device: [work() for _ in range(cuda_graphs.WARM_UPS)])
    monkeypatch.setattr(cuda_graphs, "pool", lambda: None)
    # A CPU's choice between two libraries, whose last digits differ: there is none on CUDA, where graphs are.
    monkeypatch.setattr(cpu_matmul, "exact_products", lambda device: contextlib.nullcontext())
    return captured


def _cloned(result: Any) -> Any:
    if isinstance(result, Tensor):
        return result.detach().clone()
    if dataclasses.is_dataclass(result) and not isinstance(result, type):
        return type(result)(**{f.name: _cloned(getattr(result, f.name)) for f in dataclasses.fields(result)})
    if isinstance(result, tuple):
        return tuple(_cloned(part) for part in result)
    return result


def _spoiled(kept: Any) -> None:
    """What stands in memory that nothing has been written to."""
    if isinstance(kept, Tensor):
        kept.fill_(torch.nan if kept.is_floating_point() else -1)
    elif dataclasses.is_dataclass(kept):
        for field in dataclasses.fields(kept):
            _spoiled(getattr(kept, field.name))
    elif isinstance(kept, tuple):
        for part in kept:
            _spoiled(part)


def _copied(kept: Any, result: Any) -> None:
    if isinstance(kept, Tensor):
        with torch.no_grad():
            kept.copy_(result)
    elif dataclasses.is_dataclass(kept):
        for field in dataclasses.fields(kept):
            _copied(getattr(kept, field.name), getattr(result, field.name))
    elif isinstance(kept, tuple):
        for part, found in zip(kept, result, strict=True):
            _copied(part, found)
