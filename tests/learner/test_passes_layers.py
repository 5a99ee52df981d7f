"""Layers of the policy in the passes: recomputed in the backward where that is set, compiled where that is set."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from stable_rlhf.learner.objective import Scale
from stable_rlhf.policy.transformer import layers
from tests.tiny_updates import make_config, make_model, passes_of, some_batch


def test_gradient_checkpointing_keeps_less_of_a_pass_that_is_learned_from(tokenizer) -> None:
    kept: dict[bool, int] = {}
    figures: dict[bool, Tensor] = {}
    for recomputed in (False, True):
        config = make_config(model={"gradient_checkpointing": recomputed})
        made = passes_of(make_model(tokenizer, config), config)
        sizes: list[int] = []

        def count(tensor: Tensor, sizes: list[int] = sizes) -> Tensor:
            sizes.append(tensor.numel())
            return tensor

        scale = Scale(kl_coef=torch.tensor(0.3), tokens=torch.tensor(9.0), policy=torch.tensor(9.0))
        with made.training(), torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            _, figures[recomputed] = made.learn(some_batch(4, 32, 8), scale, learns_policy=True)
        kept[recomputed] = sum(sizes)
    assert kept[True] < 0.8 * kept[False]
    assert torch.equal(figures[True], figures[False])


@pytest.mark.parametrize("adapter", [False, True], ids=["full", "lora"])
def test_the_layers_of_the_policy_and_of_its_reference_are_compiled_once_each(
    tokenizer, adapter: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With an adapter they are the same layers."""
    compiled: list[nn.Module] = []
    monkeypatch.setattr(nn.Module, "compile", lambda self, **_: compiled.append(self))
    config: Any = make_config(model={"torch_compile": True})
    model = make_model(tokenizer, config, adapter)
    passes_of(model, config)
    with model.reference() as reference:
        expected = {id(layer) for layer in [*layers(model.policy), *layers(reference)]}
    assert len(compiled) == len(expected) == (2 if adapter else 4)
    assert {id(layer) for layer in compiled} == expected
