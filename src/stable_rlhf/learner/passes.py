"""Forward and backward of one microbatch: run directly, or replayed as CUDA graphs.

At the sizes that RLHF trains, a GPU waits for the host: 3B parameters and 1,800 tokens keep an H100 busy for 59 ms, and
launching those operations takes 200 ms (docs/LOG.md, 2026-11-25). A replay launches them all at once.

A shape's graphs are two, forward and loss with backward. Measuring a rollout replays the first, an update both, so what
the ratio divides is one computation: on the first minibatch it is exactly 1.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Protocol

import torch
from torch import Tensor

from stable_rlhf.config import Config
from stable_rlhf.hardware import cpu_matmul
from stable_rlhf.learner.microbatches import Grain
from stable_rlhf.learner.objective import Scale, objective
from stable_rlhf.policy import ActorCritic, Output, compile_layers, context_length, detached
from stable_rlhf.records import Batch, Tokens

DIRECT_COLUMNS = 8
"""Without graphs: oneDNN makes a kernel for every shape. On two CPU cores, by turns, a step took 1.23 s at 8 and 1.32
at 1."""


class Passes(Protocol):
    """The passes over a model's microbatches, the same from the first step of a run to its last.

    What they return is valid until the next pass: a graph writes where it wrote before.
    """

    model: ActorCritic
    grain: Grain
    """What the numbers of rows and of columns are multiples of."""

    def training(self) -> contextlib.AbstractContextManager[None]:
        """Inside, gradients are collected; on leaving, none is left."""
        ...

    def zero_grad(self) -> None: ...

    def measure(self, tokens: Tokens, learns_policy: bool) -> tuple[Output, Tensor]:
        """(the policy's output, the reference's log-probs [n, T])."""
        ...

    def learn(self, batch: Batch, scale: Scale, learns_policy: bool) -> tuple[list[str], Tensor]:
        """Adds a microbatch's gradient to the parameters'; (names of its metrics, its share of each [K])."""
        ...

    def logp(self, tokens: Tokens) -> Tensor:
        """[n, T]: the policy's log-probs alone, nats."""
        ...


class DirectPasses:
    """Passes that launch every operation."""

    def __init__(self, model: ActorCritic, config: Config) -> None:
        self.model, self.config = model, config
        self.compiled = config.model.torch_compile
        if self.compiled:
            compile_layers(model)
        self.parameters = [*model.policy_parameters(), *model.critic_parameters()]
        self.grain = Grain(1, DIRECT_COLUMNS, context_length(model.policy) or Grain().limit)

    @contextlib.contextmanager
    def training(self) -> Iterator[None]:
        self.zero_grad()
        try:
            with self.model.checkpointing(self.config.model.gradient_checkpointing):
                yield
        finally:
            self.zero_grad()

    def zero_grad(self) -> None:
        for parameter in self.parameters:
            parameter.grad = None

    def measure(self, tokens: Tokens, learns_policy: bool) -> tuple[Output, Tensor]:
        with cpu_matmul.exact_products(self.model.device):
            # A compiled forward that keeps what its backward needs rounds otherwise than one that does not.
            with torch.set_grad_enabled(self.compiled):
                out = detached(self.model(tokens, temperature=self.config.rollout.temperature))
            return out, self.reference(tokens)

    def learn(self, batch: Batch, scale: Scale, learns_policy: bool) -> tuple[list[str], Tensor]:
        with cpu_matmul.exact_products(self.model.device):
            return self.backward(self.forward(batch.tokens, learns_policy), batch, scale, learns_policy)

    def logp(self, tokens: Tokens) -> Tensor:
        with cpu_matmul.exact_products(self.model.device), torch.set_grad_enabled(self.compiled):
            return self.forward(tokens, False).logp.detach()

    def forward(self, tokens: Tokens, learns_policy: bool) -> Output:
        exact_kl = self.config.kl.in_loss == "exact" and learns_policy
        return self.model(tokens, temperature=self.config.rollout.temperature, exact_kl=exact_kl)

    def reference(self, tokens: Tokens) -> Tensor:
        return self.model.reference_logp(tokens, temperature=self.config.rollout.temperature)

    def backward(self, out: Output, batch: Batch, scale: Scale, learns_policy: bool) -> tuple[list[str], Tensor]:
        loss, metrics = objective(out, batch, self.model, scale, self.config, learns_policy)
        loss.backward()
        return list(metrics), torch.stack(list(metrics.values()))
