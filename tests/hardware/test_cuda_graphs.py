"""Warm-up and capture, with a stand-in for CUDA's streams: which stream work runs on, and when memory is given back."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import pytest
import torch

from stable_rlhf.hardware import cuda_graphs

FIRST, SECOND = torch.device("cuda:0"), torch.device("cuda:1")


class Streams:
    """Stands for torch.cuda: the current stream, and what happened in which order."""

    def __init__(self) -> None:
        self.current, self.device, self.made, self.events = self, 0, [], []

    def make(self, device: int) -> Streams:
        self.made.append(device)
        beside = Streams()
        beside.wait_stream = lambda other: self.events.append("beside waits")
        return beside

    def wait_stream(self, other: Streams) -> None:
        self.events.append("current waits")

    @contextlib.contextmanager
    def of(self, device: torch.device) -> Iterator[None]:
        self.device, before = device.index, self.device
        yield
        self.device = before

    @contextlib.contextmanager
    def on(self, stream: Streams) -> Iterator[None]:
        self.current, before = stream, self.current
        yield
        self.current = before


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> Iterator[Streams]:
    streams = Streams()
    cuda_graphs._beside.cache_clear()
    for name, stand_in in {
        "Stream": streams.make,
        "stream": streams.on,
        "graph": lambda graph, pool, stream: streams.on(stream),
        "device": streams.of,
        "current_device": lambda: streams.device,
        "current_stream": lambda: streams.current,
        "empty_cache": lambda: streams.events.append("gives back"),
        "CUDAGraph": lambda: type("Recorded", (), {"replay": None}),
    }.items():
        monkeypatch.setattr(torch.cuda, name, stand_in)
    yield streams
    cuda_graphs._beside.cache_clear()


def test_every_shape_is_warmed_up_and_recorded_on_one_stream_beside_the_current(cuda: Streams) -> None:
    """A stream of its own for each would keep to itself what was allocated on it."""
    seen: list[Streams] = []
    for _ in range(3):
        cuda_graphs.warm_up(lambda: seen.append(cuda.current), FIRST)
        cuda_graphs.capture(lambda: seen.append(cuda.current), FIRST)
    assert len(seen) == 3 * (cuda_graphs.WARM_UPS + 1)
    assert set(map(id, seen)) == {id(seen[0])} != {id(cuda)}
    assert cuda.made == [0]


def test_a_warm_up_waits_for_what_is_under_way_and_is_waited_for(cuda: Streams) -> None:
    """And what lies free on other streams is given back before."""
    cuda_graphs.warm_up(lambda: cuda.events.append("works"), FIRST)
    assert cuda.events == ["gives back", "beside waits", *["works"] * cuda_graphs.WARM_UPS, "current waits"]


def test_a_model_on_another_device_than_the_current_one_is_recorded_on_its_own(cuda: Streams) -> None:
    """Transformers' TrainingArguments make device 0 the current one, whatever the model is on."""
    seen: list[int] = []
    cuda_graphs.warm_up(lambda: seen.append(cuda.device), SECOND)
    cuda_graphs.capture(lambda: seen.append(cuda.device), SECOND)
    assert (set(seen), cuda.made, cuda.device) == ({1}, [1], 0)
