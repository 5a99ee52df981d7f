"""Joined layers: each part's output is that of its own layer, whatever is called, and one product serves them all."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from stable_rlhf.rollout.merged_weights import Joined, Part, join

NAMES = ("q_proj", "k_proj", "v_proj")
SIZES = (5, 3, 2)


class Attention(nn.Module):
    """Three layers of different widths on one input, with numbers that no rounding touches."""

    def __init__(self, biases: tuple[bool, bool, bool]) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        for name, size, bias in zip(NAMES, SIZES, biases, strict=True):
            layer = nn.Linear(4, size, bias=bias)
            for parameter in layer.parameters():
                parameter.data = torch.randint(-8, 9, parameter.shape, generator=generator).float()
            setattr(self, name, layer)


def layers(module: nn.Module) -> list[Any]:
    return [getattr(module, name) for name in NAMES]


def by_hand(layer: nn.Linear, x: Tensor) -> list[list[float]]:
    bias = [0.0] * layer.out_features if layer.bias is None else layer.bias.tolist()
    return [
        [
            sum(w * v for w, v in zip(line, row, strict=True)) + b
            for line, b in zip(layer.weight.tolist(), bias, strict=True)
        ]
        for row in x.tolist()
    ]


def inputs(seed: int) -> Tensor:
    return torch.randint(-8, 9, (3, 4), generator=torch.Generator().manual_seed(seed)).float()


@torch.no_grad()
@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
def test_parts_are_those_of_their_layers_in_any_order_and_cost_one_product(
    order: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    own = layers(Attention((True, True, True)))
    joined, products = Joined(own), []
    linear = nn.functional.linear
    monkeypatch.setattr(nn.functional, "linear", lambda *given: products.append(1) or linear(*given))
    for seed in (1, 2):
        x = inputs(seed)
        for index in order:
            assert Part(joined, index)(x).tolist() == by_hand(own[index], x)
    assert len(products) == 2


@torch.no_grad()
def test_a_part_is_of_the_input_that_it_is_given_also_when_the_others_were_not_called() -> None:
    own = layers(Attention((False, False, False)))
    joined, first, second = Joined(own), inputs(1), inputs(2)
    for index, x in ((0, first), (1, second), (1, first), (2, first), (0, second)):
        assert Part(joined, index)(x).tolist() == by_hand(own[index], x)


@torch.no_grad()
def test_after_the_last_part_the_same_input_is_multiplied_by_the_weights_as_they_are_then() -> None:
    own = layers(Attention((False, False, False)))
    joined, x = Joined(own), inputs(1)
    for _ in range(2):
        for index, layer in enumerate(own):
            assert joined.part(x, index).tolist() == by_hand(layer, x)
        for layer, weight in zip(own, joined.weight.split(SIZES), strict=True):
            layer.weight += 1
            weight += 1


@torch.no_grad()
def test_layers_of_which_some_have_a_bias_stay_apart() -> None:
    module = Attention((True, False, True))
    expected = [by_hand(layer, inputs(1)) for layer in layers(module)]
    join(module, [(layer.weight, None) for layer in layers(module)])
    assert [layer(inputs(1)).tolist() for layer in layers(module)] == expected


@torch.no_grad()
def test_layers_of_which_one_is_shared_with_the_policy_stay_as_they_are() -> None:
    module = Attention((False, False, False))
    own = layers(module)
    refreshed = [(layer.weight, "source") for layer in own[:2]]
    join(module, refreshed)
    assert layers(module) == own
    assert [weight.data_ptr() for weight, _ in refreshed] == [layer.weight.data_ptr() for layer in own[:2]]


@torch.no_grad()
def test_refreshed_weights_become_the_parts_of_the_joined_one() -> None:
    module = Attention((True, True, True))
    own = layers(module)
    own[2].bias.requires_grad_(False)  # it stays as it is, so there is nothing to refresh
    refreshed: list[tuple[Tensor, Any]] = [(layer.weight, name) for layer, name in zip(own, NAMES, strict=True)]
    join(module, refreshed)
    sources = [*NAMES, own[0].bias, own[1].bias]
    assert all(source is other for (_, source), other in zip(refreshed, sources, strict=True))
    values = [layer.weight.tolist() for layer in own] + [layer.bias.tolist() for layer in own[:2]]
    assert [tensor.tolist() for tensor, _ in refreshed] == values
    for number, (tensor, _) in enumerate(refreshed, start=1):
        tensor.fill_(number)
    x = inputs(1)
    bias = own[2].bias.tolist()
    total = [sum(row) for row in x.tolist()]
    assert module.q_proj(x).tolist() == [[1 * s + 4] * 5 for s in total]
    assert module.k_proj(x).tolist() == [[2 * s + 5] * 3 for s in total]
    assert module.v_proj(x).tolist() == [[3 * s + b for b in bias] for s in total]
