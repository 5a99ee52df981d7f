"""Rows of tokens: packed from prompts padded on the left, widened, cut; literal grids."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from stable_rlhf.records import Batch, Tokens, on


def some_tokens() -> Tokens:
    return Tokens.pack(
        prompt=torch.tensor([[0, 0, 11], [21, 22, 23], [0, 31, 32]]),
        prompt_mask=torch.tensor([[False, False, True], [True, True, True], [False, True, True]]),
        response=torch.tensor([[14, 15], [24, 0], [34, 35]]),
        mask=torch.tensor([[True, True], [True, False], [True, True]]),
    )


def test_a_prompt_padded_on_the_left_is_followed_by_its_response_without_a_gap() -> None:
    tokens = some_tokens()
    assert tokens.start.tolist() == [1, 3, 2]
    ends = tokens.start + tokens.mask.sum(1)
    used = [row[:end].tolist() for row, end in zip(tokens.ids, ends, strict=True)]
    assert used == [[11, 14, 15], [21, 22, 23, 24], [31, 32, 34, 35]]
    assert tokens.ids.shape == (3, 5)


@pytest.mark.parametrize(("columns", "width", "length"), [(1, 5, 2), (2, 6, 2), (5, 5, 5), (8, 8, 8)])
def test_columns_are_added_up_to_the_next_multiple_and_none_where_it_is_one(columns, width, length) -> None:
    tokens = some_tokens()
    wide = tokens.padded(columns)
    assert (wide.ids.shape, wide.response.shape, wide.mask.shape) == ((3, width), (3, length), (3, length))
    assert torch.equal(wide.ids[:, :5], tokens.ids)
    assert torch.equal(wide.response[:, :2], tokens.response)
    assert torch.equal(wide.mask[:, :2], tokens.mask)
    assert not wide.mask[:, 2:].any()


def test_rows_are_cut_in_their_order_and_those_after_the_count_are_under_a_mask_of_false() -> None:
    tokens = some_tokens()
    cut = tokens.rows(torch.tensor([2, 0, 2]), width=4, length=1, count=2)
    assert cut.ids.tolist() == [[31, 32, 34, 35], tokens.ids[0, :4].tolist(), [31, 32, 34, 35]]
    assert cut.start.tolist() == [2, 1, 2]
    assert cut.response.tolist() == [[34], [14], [34]]
    assert cut.mask.tolist() == [[True], [True], [False]]
    assert tokens.rows(torch.tensor([1])).mask.tolist() == [[True, False]]


def test_a_batchs_grids_are_cut_like_its_tokens_and_the_values_of_every_head() -> None:
    grid = torch.arange(6.0).view(3, 2)
    names = ("logp", "ref_logp", "entropy", "advantages", "returns")
    grids = {name: grid + 10 * number for number, name in enumerate(names)}
    counts = torch.ones_like(grid, dtype=torch.bool)
    batch = Batch(tokens=some_tokens(), values=torch.stack([grid, grid + 100]), counts=counts, **grids)
    cut = on(batch.rows(torch.tensor([2, 1]), width=4, length=1, count=1), torch.device("cpu"))
    assert cut.tokens.mask.tolist() == [[True], [False]]
    for number, name in enumerate(names):
        assert getattr(cut, name).tolist() == [[4.0 + 10 * number], [2.0 + 10 * number]]
    assert cut.values.tolist() == [[[4.0], [2.0]], [[104.0], [102.0]]]
    assert [f.name for f in dataclasses.fields(cut)] == [f.name for f in dataclasses.fields(batch)]
