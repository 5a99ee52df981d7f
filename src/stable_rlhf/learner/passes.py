"""Forward and backward of one microbatch: the interface (`Passes`), and the passes run directly (`DirectPasses`).

Measuring a rollout and learning from it run the same forward on the same rows, so the two log-probs that the ratio
divides come from one computation: on the first minibatch the ratio is exactly 1.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Protocol

import torch
from torch import Tensor

from stable_rlhf.config import ModelConfig
from stable_rlhf.hardware import cpu_matmul
from stable_rlhf.learner.microbatches import Grain
from stable_rlhf.learner.objective import Scale, objective
from stable_rlhf.learner.settings import Learning
from stable_rlhf.policy import ActorCritic, Output, compile_layers, context_length, detached
from stable_rlhf.records import Batch, Tokens

DIRECT_COLUMNS = 8
"""Columns are rounded up to a multiple of this without graphs, because oneDNN makes a kernel for every shape. On two
CPU cores a step took 1.23 s at 8 and 1.32 at 1, timed alternately."""


class Passes(Protocol):
    """Forward and backward passes over a model's microbatches; one object serves a whole run.

    A result is valid until the next pass, because a graph writes to the same memory again.
    """

    model: ActorCritic
    learning: Learning
    grain: Grain
    """How the numbers of rows and columns are rounded up."""

    def training(self) -> contextlib.AbstractContextManager[None]:
        """Collects gradients inside the context, and drops them on leaving."""
        ...

    def zero_grad(self) -> None:
        """Sets the gradients back to zero, for the next optimiser step."""
        ...

    def measure(self, tokens: Tokens, learns_policy: bool) -> tuple[Output, Tensor]:
        """The policy's output and the reference's log-probs [n, T], nats, without gradients.

        The output has the exact KL where ``kl.observe`` is ``exact``.

        ``learns_policy`` must be as in the pass that will learn from these tokens, so that both run the same forward.
        """
        ...

    def learn(self, batch: Batch, scale: Scale, learns_policy: bool) -> tuple[list[str], Tensor]:
        """Adds a microbatch's gradient to the parameters; returns (names of its metrics, its share of each [K])."""
        ...

    def hidden(self, tokens: Tokens) -> Tensor:
        """The policy's last hidden states [n, T, h] at the response tokens' states, without gradients, nothing else."""
        ...


class DirectPasses:
    """Passes that launch every operation one by one; ``model.torch_compile`` compiles them layer by layer."""

    def __init__(self, model: ActorCritic, settings: ModelConfig, learning: Learning) -> None:
        self.model, self.learning = model, learning
        self.gradient_checkpointing, self.compiled = settings.gradient_checkpointing, settings.torch_compile
        if self.compiled:
            compile_layers(model)
        self.parameters = [*model.policy_parameters(), *model.critic_parameters()]
        self.grain = Grain(1, DIRECT_COLUMNS, context_length(model.policy) or Grain().limit)

    @contextlib.contextmanager
    def training(self) -> Iterator[None]:
        self.zero_grad()
        try:
            with self.model.checkpointing(self.gradient_checkpointing):
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
                out = detached(self.model(tokens, temperature=self.learning.temperature))
            return self.against_reference(tokens, out)

    def learn(self, batch: Batch, scale: Scale, learns_policy: bool) -> tuple[list[str], Tensor]:
        with cpu_matmul.exact_products(self.model.device):
            return self.backward(self.forward(batch.tokens, learns_policy), batch, scale, learns_policy)

    def hidden(self, tokens: Tokens) -> Tensor:
        with cpu_matmul.exact_products(self.model.device), torch.set_grad_enabled(self.compiled):
            return self.model.hidden(tokens).detach()

    def forward(self, tokens: Tokens, learns_policy: bool) -> Output:
        """The policy and the heads, with gradients; the exact KL too where the loss needs it."""
        exact_kl = self.learning.kl.in_loss == "exact" and learns_policy
        return self.model(tokens, temperature=self.learning.temperature, exact_kl=exact_kl)

    def against_reference(self, tokens: Tokens, out: Output) -> tuple[Output, Tensor]:
        """(the policy's detached output, now with the exact KL if it is observed; the reference's log-probs, nats)."""
        temperature = self.learning.temperature
        if self.learning.kl.observe == "k1":
            return out, self.model.reference_logp(tokens, temperature=temperature)
        ref_logp, kl = self.model.reference_kl(tokens, out.state, temperature=temperature)
        return dataclasses.replace(out, exact_kl=kl), ref_logp

    def backward(self, out: Output, batch: Batch, scale: Scale, learns_policy: bool) -> tuple[list[str], Tensor]:
        """Computes the loss of a forward and its gradients; returns the same as `learn`."""
        loss, metrics = objective(out, batch, self.model, scale, self.learning, learns_policy)
        loss.backward()
        return list(metrics), torch.stack(list(metrics.values()))
