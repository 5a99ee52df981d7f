"""Passes recorded as CUDA graphs and replayed (`ReplayedPasses`); `make_passes` chooses the passes of a run.

At the sizes that RLHF trains, a GPU waits for the host: 3B parameters and 1,800 tokens keep an H100 busy for 59 ms, and
launching those operations takes 200 ms (docs/LOG.md, 2026-11-25). A replay launches them all at once.

Each shape has a graph of the forward, one of loss and backward, and one of the reference. Measuring a rollout replays
the first and the last, learning the first two: both have the same forward, as with direct passes.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from stable_rlhf.config import ModelConfig
from stable_rlhf.hardware import cuda_graphs, replays_graphs
from stable_rlhf.learner.microbatches import Grain
from stable_rlhf.learner.objective import Scale
from stable_rlhf.learner.passes import DirectPasses, Passes
from stable_rlhf.learner.settings import Learning
from stable_rlhf.policy import ActorCritic, Output, detached
from stable_rlhf.records import Batch, Tokens

COLUMNS = 32
"""With graphs, columns are a multiple of this: fewer shapes, and tiles that a GPU's matrix product takes whole."""

ROWS = 8
"""Rows of a graph are a multiple of this, for the same reason; what is left over is under an all-False mask."""

GRAPHS = 64
"""Most shapes whose graphs are kept; the least recently used goes first. Each keeps its inputs; their working memory is
shared. 120 steps of 64 texts as long as HH-RLHF's (up to 512 + 64 tokens) had 35 shapes in 988 passes."""

SIGHTINGS = 2
"""A shape is recorded when it comes for the second time: recording takes two passes to warm up and one to record."""


class ReplayedPasses:
    """Passes over ``direct``'s operations, recorded once for each shape as CUDA graphs and replayed from then on.

    A shape that is not recorded yet runs directly. Rows and columns are rounded up alike in both cases, so both are the
    same computation.
    """

    def __init__(self, direct: DirectPasses) -> None:
        self.direct, self.model, self.learning = direct, direct.model, direct.learning
        self.pool = cuda_graphs.pool()
        self.grain = Grain(ROWS, COLUMNS, direct.grain.limit)
        self._gradients = [torch.zeros_like(p) for p in direct.parameters]
        self._captures: OrderedDict[tuple[Any, ...], Any] = OrderedDict()
        self._sightings: dict[tuple[Any, ...], int] = {}

    @contextlib.contextmanager
    def training(self) -> Iterator[None]:
        self.direct.zero_grad()
        with self._collecting():
            self.zero_grad()
            yield

    def zero_grad(self) -> None:
        torch._foreach_zero_(self._gradients)  # pyright: ignore[reportPrivateImportUsage]

    def measure(self, tokens: Tokens, learns_policy: bool) -> tuple[Output, Tensor]:
        captured = self._captured(_PassGraphs, tokens, learns_policy)
        return (captured or self.direct).measure(tokens, learns_policy)

    def learn(self, batch: Batch, scale: Scale, learns_policy: bool) -> tuple[list[str], Tensor]:
        captured = self._captured(_PassGraphs, batch.tokens, learns_policy)
        return (captured or self.direct).learn(batch, scale, learns_policy)

    def hidden(self, tokens: Tokens) -> Tensor:
        return (self._captured(_HiddenGraph, tokens) or self.direct).hidden(tokens)

    @contextlib.contextmanager
    def _collecting(self) -> Iterator[None]:
        """Makes the tensors that the graphs add to the parameters' gradients, inside the context."""
        parameters = self.direct.parameters
        before = [parameter.grad for parameter in parameters]
        for parameter, gradient in zip(parameters, self._gradients, strict=True):
            parameter.grad = gradient
        try:
            with self.model.checkpointing(self.direct.gradient_checkpointing):
                yield
        finally:
            for parameter, gradient in zip(parameters, before, strict=True):
                parameter.grad = gradient

    def _captured(self, kind: Callable[..., Any], tokens: Tokens, *details: bool) -> Any:
        """The graphs for these tokens, recorded now if their shape is due; None where they run directly."""
        key = (kind, *tokens.ids.shape, tokens.response.shape[1], *details)
        self._sightings[key] = self._sightings.get(key, 0) + 1
        if key not in self._captures:
            if self._sightings[key] < SIGHTINGS:
                return None
            if len(self._captures) == GRAPHS:
                self._captures.popitem(last=False)
            with self._collecting():
                self._captures[key] = kind(self.direct, self.pool, *key[1:])
        self._captures.move_to_end(key)
        return self._captures[key]


def make_passes(model: ActorCritic, settings: ModelConfig, learning: Learning) -> Passes:
    """The passes of a run: replayed where ``model.cuda_graphs`` is true, or None on CUDA; direct otherwise.

    ``settings`` are those of the section ``model``. Raises ConfigError for graphs on a device that is not CUDA.
    """
    direct = DirectPasses(model, settings, learning)
    return ReplayedPasses(direct) if replays_graphs(settings.cuda_graphs, model.device) else direct


class _PassGraphs:
    """The graphs of one shape that measure and learn, and the tensors that they read."""

    def __init__(
        self, passes: DirectPasses, pool: Any, rows: int, width: int, length: int, learns_policy: bool
    ) -> None:
        model, device = passes.model, passes.model.device

        def zeros(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        tokens = _no_tokens(rows, width, length, device)
        grids = {name: zeros(rows, length) for name in ("logp", "ref_logp", "entropy", "advantages", "returns")}
        counts = zeros(rows, length, dtype=torch.bool)
        self.batch = Batch(tokens=tokens, values=zeros(len(model.heads), rows, length), counts=counts, **grids)
        self.scale = Scale(kl_coef=zeros(), tokens=zeros() + 1, policy=zeros() + 1)
        self.names: list[str] = []
        last: dict[str, Output] = {}

        def forward() -> Output:
            last["out"] = passes.forward(tokens, learns_policy)
            last["detached"] = detached(last["out"])
            return last["detached"]

        def backward() -> Tensor:  # lets the activations go
            self.names, figures = passes.backward(last.pop("out"), self.batch, self.scale, learns_policy)
            return figures

        def reference() -> tuple[Output, Tensor]:  # reads what the forward left
            return passes.against_reference(tokens, last["detached"])

        with torch.enable_grad():  # also when it is a measurement that asks first
            # Under an empty mask: what this adds to the gradients is 0.
            cuda_graphs.warm_up(lambda: (forward(), backward(), reference()), device)
            # One pool for all: they are replayed one after another, and what one leaves is read before the next runs.
            self._forward = cuda_graphs.capture(forward, device, pool)
            self._backward = cuda_graphs.capture(backward, device, pool)
            self._reference = cuda_graphs.capture(reference, device, pool)

    def measure(self, tokens: Tokens, learns_policy: bool) -> tuple[Output, Tensor]:
        _copy(self.batch.tokens, tokens)
        self._forward.replay()
        self._reference.replay()
        return self._reference.result

    def learn(self, batch: Batch, scale: Scale, learns_policy: bool) -> tuple[list[str], Tensor]:
        _copy(self.batch, batch)
        _copy(self.scale, scale)
        self._forward.replay()
        self._backward.replay()
        return self.names, self._backward.result.clone()


class _HiddenGraph:
    """The graph of one shape that gives only the policy's hidden states."""

    def __init__(self, passes: DirectPasses, pool: Any, rows: int, width: int, length: int) -> None:
        device = passes.model.device
        self.tokens = tokens = _no_tokens(rows, width, length, device)

        def look() -> Tensor:
            return passes.hidden(tokens)

        with torch.set_grad_enabled(passes.compiled):
            cuda_graphs.warm_up(look, device)
            self._look = cuda_graphs.capture(look, device, pool)

    def hidden(self, tokens: Tokens) -> Tensor:
        _copy(self.tokens, tokens)
        self._look.replay()
        return self._look.result


def _no_tokens(rows: int, width: int, length: int, device: torch.device) -> Tokens:
    """Tokens for a graph to be recorded with, under an empty mask."""
    return Tokens(
        ids=torch.zeros(rows, width, dtype=torch.int64, device=device),
        start=torch.ones(rows, dtype=torch.int64, device=device),
        response=torch.zeros(rows, length, dtype=torch.int64, device=device),
        mask=torch.zeros(rows, length, dtype=torch.bool, device=device),
    )


def _copy(into: Any, given: Any) -> None:
    """Fills the tensors that a graph reads."""
    for field in dataclasses.fields(into):
        target, source = getattr(into, field.name), getattr(given, field.name)
        if isinstance(target, Tensor):
            target.copy_(source)
        else:
            _copy(target, source)
