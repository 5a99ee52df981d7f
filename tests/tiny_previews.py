"""What the tests of the preview share: one update seen step by step, and the KL of its steps by oracles."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from stable_rlhf.learner import make_preview, update
from stable_rlhf.learner import step_preview as preview
from stable_rlhf.learner.measure import lengths
from stable_rlhf.policy.actor_critic import ActorCritic
from stable_rlhf.records import Tokens
from tests.tiny_updates import (
    assert_same,
    decide,
    make_config,
    make_model,
    make_optimizer,
    make_rollout,
    measured_batch,
    passes_of,
    weights,
)

LIMIT = 0.05
LOOSE = 0.2  # nats per token: also within it are all steps of a healthy update together, in bfloat16 too
HEALTHY = 1e-3
"""Learning rate at which the tiny policy's updates move it by some 0.02 nats per token."""
TOO_HIGH = 100 * HEALTHY
STEPS = 4  # 2 passes x 2 minibatches
FULL_OR_LORA = pytest.mark.parametrize("adapter", [False, True], ids=["full", "lora"])
Weights = dict[str, Tensor]


@dataclasses.dataclass
class Seen:
    """One update, step by step."""

    model: ActorCritic
    metrics: dict[str, float | None]
    tokens: Tokens
    optimizer: torch.optim.Optimizer
    states: list[Weights]
    """Weights before each optimiser step, and after the last."""
    moments: list[list[Weights]]
    """AdamW's state of every parameter, likewise."""
    proposed: list[Weights]
    """Weights as AdamW left them, before the preview's scaling."""
    probed: list[int]
    """Rows of the probe."""


def updated(
    tokenizer: PreTrainedTokenizerFast,
    limit: float | None,
    learning_rate: float,
    *,
    adapter: bool = False,
    prepare: Callable[[ActorCritic, torch.optim.Optimizer], Any] = lambda *_: None,
    optim: dict[str, Any] | None = None,
    **sections: Any,
) -> Seen:
    """One update of 2 x 2 optimiser steps; ``prepare`` may put hooks on the model and the optimiser before it."""
    sections.setdefault("critic", {"learning_rate": HEALTHY})
    optim = {"preview": limit is not None, "max_update_kl": limit, "learning_rate": learning_rate, **(optim or {})}
    config = make_config(optim=optim, **sections)
    model = make_model(tokenizer, config, adapter)
    made, optimizer = passes_of(model, config), make_optimizer(model, config)
    looks = make_preview(made)
    batch = measured_batch(made, make_rollout(len(tokenizer), skipped=(1,)), 0.3, preview=looks)
    probed = preview.probe(lengths(batch.tokens), config.optim, config.seed, 0, made.grain)
    states: list[Weights] = []
    moments: list[list[Weights]] = []
    proposed: list[Weights] = []

    def note(*_: Any) -> None:
        states.append(weights(model))
        moments.append([{name: kept.clone() for name, kept in own.items()} for own in optimizer.state.values()])

    optimizer.register_step_pre_hook(note)
    optimizer.register_step_post_hook(lambda *_: proposed.append(weights(model)))
    prepare(model, optimizer)
    stats = update(made, optimizer, batch, decide(0.3, limit), 0, looks)
    note()
    rows = [] if probed is None else probed.rows.tolist()
    return Seen(model, stats.metrics, batch.tokens, optimizer, states, moments, proposed, rows)


def of(part: str, state: Weights) -> Weights:
    return {name: tensor for name, tensor in state.items() if name.startswith(part)}


@torch.no_grad()
def distributions(seen: Seen, state: Weights, row: int) -> Tensor:
    """[t, V] float64 log-probs at each response token of a row, by the model's own forward of that row alone."""
    for name, parameter in seen.model.named_parameters():
        parameter.copy_(state[name])
    start, length = int(seen.tokens.start[row]), int(seen.tokens.mask[row].sum())
    logits = seen.model.policy(input_ids=seen.tokens.ids[row : row + 1, : start + length]).logits[0]
    return logits[start - 1 : start - 1 + length].double().log_softmax(-1)


def size(seen: Seen, after: Weights) -> float:
    """KL(before || after) of the update up to some weights, over the vocabulary at each response token of the probe."""
    terms = []
    for row in seen.probed:
        one, two = distributions(seen, seen.states[0], row), distributions(seen, after, row)
        terms += (one.exp() * (one - two)).sum(-1).tolist()
    return math.fsum(terms) / len(terms)


def assert_identical(first: Seen, second: Seen) -> None:
    assert_same(first.states[-1], second.states[-1], 0.0)
    for one, two in zip(first.moments[-1], second.moments[-1], strict=True):
        assert_same(one, two, 0.0)
