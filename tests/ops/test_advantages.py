from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from stable_rlhf.ops import advantages
from tests.oracles import advantages as oracle


def prefix_mask(lengths: list[int], columns: int) -> Tensor:
    return torch.arange(columns)[None, :] < torch.tensor(lengths)[:, None]


def numbers(seed: int, rows: int, columns: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(rows, columns, generator=generator, dtype=torch.float64) for _ in range(3)]


batches = given(
    seed=st.integers(0, 10_000),
    lengths=st.lists(st.integers(0, 6), min_size=1, max_size=4),
    gamma=st.sampled_from([0.0, 0.9, 1.0]),
    lam=st.sampled_from([0.0, 0.5, 0.95, 1.0]),
)


@batches
def test_gae_is_the_discounted_sum_of_deltas(seed, lengths, gamma, lam):
    rewards, values, bootstrap = numbers(seed, len(lengths), 6)
    mask = prefix_mask(lengths, 6)
    expected = oracle.gae(rewards, values, bootstrap, mask, gamma, lam)
    result = advantages.gae(rewards, values, bootstrap, mask, gamma, lam)
    torch.testing.assert_close(result, expected, rtol=1e-12, atol=1e-12)


@batches
def test_nothing_outside_the_mask_reaches_the_advantages_and_the_returns_are_zero_there(seed, lengths, gamma, lam):
    mask = prefix_mask(lengths, 6)
    clean = numbers(seed, len(lengths), 6)
    poisoned = [torch.where(mask, x, torch.nan) for x in clean]
    expected = advantages.gae(*clean, mask, gamma, lam)
    result = advantages.gae(*poisoned, mask, gamma, lam)
    for tensor, clean_tensor in zip(result, expected, strict=True):
        assert torch.equal(tensor, clean_tensor)
        assert torch.equal(tensor[~mask], torch.zeros_like(tensor[~mask]))


def test_gae_of_literal_numbers_with_a_target_critic():
    rewards = torch.tensor([[0.0, 0.0, 1.0, 9.0]])
    values = torch.tensor([[0.5, 0.25, 0.5, 9.0]])
    bootstrap = torch.tensor([[7.0, 1.0, 2.0, 9.0]])
    mask = torch.tensor([[True, True, True, False]])
    result, returns = advantages.gae(rewards, values, bootstrap, mask, gamma=0.5, lam=0.5)
    # deltas: 0 + .5*1 - .5 = 0;  0 + .5*2 - .25 = .75;  1 - .5 = .5;  A_1 = .75 + .25*.5, A_0 = 0 + .25*A_1
    assert result.tolist() == [[0.21875, 0.875, 0.5, 0.0]]
    assert returns.tolist() == [[0.71875, 1.125, 1.0, 0.0]]


def test_with_lambda_1_and_one_critic_the_returns_are_the_monte_carlo_returns():
    rewards, values, _ = numbers(5, 2, 4)
    _, returns = advantages.gae(rewards, values, values, torch.ones(2, 4, dtype=torch.bool), 1.0, 1.0)
    torch.testing.assert_close(returns, rewards.flip(1).cumsum(1).flip(1), rtol=1e-12, atol=1e-12)


def test_a_hole_in_the_mask_ends_a_sequence():
    rewards, values, bootstrap = numbers(8, 1, 5)
    mask = torch.tensor([[True, True, False, True, True]])
    whole, _ = advantages.gae(rewards, values, bootstrap, mask, 0.9, 0.8)
    first, _ = advantages.gae(rewards[:, :2], values[:, :2], bootstrap[:, :2], mask[:, :2], 0.9, 0.8)
    second, _ = advantages.gae(rewards[:, 3:], values[:, 3:], bootstrap[:, 3:], mask[:, 3:], 0.9, 0.8)
    torch.testing.assert_close(whole, torch.cat([first, torch.zeros(1, 1), second], 1), rtol=1e-12, atol=1e-12)


@given(st.integers(0, 10_000), st.lists(st.integers(0, 5), min_size=1, max_size=4), st.sampled_from([0.0, 0.3]))
def test_every_token_pays_its_log_ratio_and_the_last_one_earns_the_score(seed, lengths, kl_coef):
    log_ratio, other, _ = numbers(seed, len(lengths), 5)
    mask = prefix_mask(lengths, 5)
    scores = torch.where(mask.any(1), other[:, 0], torch.nan)  # a skipped sample has no score
    result = advantages.token_rewards(scores, torch.where(mask, log_ratio, torch.nan), kl_coef, mask)
    expected = oracle.token_rewards(scores, log_ratio, kl_coef, mask)
    torch.testing.assert_close(result, expected, rtol=1e-14, atol=0)


def test_the_score_is_at_the_last_response_token_alone_where_the_mask_has_a_hole():
    mask = torch.tensor([[True, False, True, False], [False, True, False, False]])
    log_ratio = torch.tensor([[1.0, 9.0, -2.0, 9.0], [9.0, 0.5, 9.0, 9.0]])
    rewards = advantages.token_rewards(torch.tensor([3.0, -1.0]), log_ratio, 0.5, mask)
    assert rewards.tolist() == [[-0.5, 0.0, 4.0, 0.0], [0.0, -1.25, 0.0, 0.0]]


def test_targets_carry_no_gradient():
    x = torch.ones(1, 2, requires_grad=True)
    mask = torch.ones(1, 2, dtype=torch.bool)
    rewards = advantages.token_rewards(torch.ones(1, requires_grad=True), x, 0.1, mask)
    results = advantages.gae(x, x, x, mask, 1.0, 0.95)
    assert [tensor.requires_grad for tensor in (rewards, *results)] == [False, False, False]


def test_settings_and_shapes_that_make_no_sense_are_refused():
    x, mask = torch.zeros(2, 3), torch.ones(2, 3, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"gamma is 1\.5"):
        advantages.gae(x, x, x, mask, 1.5, 0.95)
    with pytest.raises(ValueError, match="lam is -1"):
        advantages.gae(x, x, x, mask, 1.0, -1)
    with pytest.raises(ValueError, match="bootstrap_values has shape"):
        advantages.gae(x, x, x[:, :2], mask, 1.0, 0.95)
    with pytest.raises(ValueError, match=r"scores has shape \(3,\): give one score a row, \(2,\)"):
        advantages.token_rewards(torch.zeros(3), x, 0.1, mask)


def test_each_row_may_have_a_lambda_of_its_own():
    mask = torch.tensor([[True, True, True], [True, True, False]])
    generator = torch.Generator().manual_seed(0)
    rewards, values, bootstrap = (torch.randn(2, 3, generator=generator) for _ in range(3))
    both = advantages.gae(rewards, values, bootstrap, mask, 0.9, torch.tensor([0.3, 1.0]))
    for row, lam in enumerate((0.3, 1.0)):
        alone = advantages.gae(rewards, values, bootstrap, mask, 0.9, lam)
        for one, all_rows in zip(alone, both, strict=True):
            torch.testing.assert_close(all_rows[row], one[row])
    with pytest.raises(ValueError, match=r"lam is \[0\.5, 1\.5\]"):
        advantages.gae(rewards, values, bootstrap, mask, 0.9, torch.tensor([0.5, 1.5]))


def test_the_length_adaptive_lambda_spreads_an_error_over_a_share_of_the_response():
    lengths = [0, 10, 20, 40, 1000]
    mask = torch.arange(1000) < torch.tensor(lengths)[:, None]
    lam = advantages.length_adaptive_lam(mask, 0.05)
    assert lam.tolist() == pytest.approx([0.0, 0.0, 0.0, 0.5, 0.98])
    for row, length in enumerate(lengths[3:], start=3):
        assert (lam[row].double() ** torch.arange(100_000)).sum().item() == pytest.approx(0.05 * length, rel=1e-4)
    with pytest.raises(ValueError, match="alpha is 0"):
        advantages.length_adaptive_lam(mask, 0.0)
