"""Advantages without a critic, against loops over the completions."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from stable_rlhf.ops import advantages
from tests.oracles import advantages as oracle

rollouts = given(
    seed=st.integers(0, 10_000),
    group=st.integers(2, 5),
    flags=st.lists(st.booleans(), min_size=3, max_size=3).flatmap(
        lambda _: st.lists(st.booleans(), min_size=15, max_size=15)
    ),
)


def some(seed: int, group: int, flags: list[bool]) -> tuple[Tensor, Tensor]:
    """(rewards of three groups, NaN where not valid; valid)."""
    rewards = torch.randn(3 * group, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    valid = torch.tensor(flags[: 3 * group])
    return torch.where(valid, rewards, torch.nan), valid


@rollouts
def test_each_is_its_definition_whatever_rows_have_no_reward(seed: int, group: int, flags: list[bool]) -> None:
    rewards, valid = some(seed, group, flags)
    close = {"rtol": 1e-12, "atol": 1e-12}
    torch.testing.assert_close(
        advantages.rloo(rewards, valid, group), oracle.rloo(rewards.nan_to_num(9.0), valid, group), **close
    )
    torch.testing.assert_close(
        advantages.grpo(rewards, valid, group, 0.01), oracle.grpo(rewards.nan_to_num(9.0), valid, group, 0.01), **close
    )
    torch.testing.assert_close(
        advantages.dr_grpo(rewards, valid, group), oracle.dr_grpo(rewards.nan_to_num(9.0), valid, group), **close
    )


@rollouts
def test_a_failed_reward_changes_nothing_for_the_others_of_its_group(seed: int, group: int, flags: list[bool]) -> None:
    """The advantages are those of the group without it."""
    rewards, valid = some(seed, group, flags)
    for function in (advantages.rloo, advantages.grpo, advantages.dr_grpo):
        found = function(rewards, valid, group)
        for first in range(0, 3 * group, group):
            of_group = slice(first, first + group)
            kept = rewards[of_group][valid[of_group]]
            if len(kept) > 1:
                alone = function(kept, torch.ones(len(kept), dtype=torch.bool), len(kept))
                torch.testing.assert_close(found[of_group][valid[of_group]], alone, rtol=1e-9, atol=1e-12)
        assert torch.equal(found[~valid], torch.zeros_like(found[~valid]))


def test_literal_numbers() -> None:
    rewards, valid = torch.tensor([1.0, 2.0, 6.0, 5.0, 5.0, 5.0]), torch.ones(6, dtype=torch.bool)
    assert advantages.rloo(rewards, valid, 3).tolist() == [-3.0, -1.5, 4.5, 0.0, 0.0, 0.0]
    assert advantages.dr_grpo(rewards, valid, 3).tolist() == [-2.0, -1.0, 3.0, 0.0, 0.0, 0.0]
    deviation = 7.0**0.5 + 1e-4  # (4 + 1 + 9) / 2
    expected = [-2 / deviation, -1 / deviation, 3 / deviation, 0.0, 0.0, 0.0]
    assert advantages.grpo(rewards, valid, 3).tolist() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("value", [0.1, 1e6, -3.3])
def test_equal_rewards_have_no_advantage_at_all(value: float) -> None:
    """Exactly 0: a number however small would move every weight by a whole step of AdamW."""
    rewards, valid = torch.full((6,), value), torch.tensor([True, True, True, True, False, True])
    for function in (advantages.rloo, advantages.grpo, advantages.dr_grpo):
        assert not function(rewards, valid, 3).any()
    mask = torch.arange(7) < torch.tensor([[3], [7], [5], [1], [0], [4]])
    at_the_end = advantages.token_rewards(rewards, torch.zeros(6, 7), 0.0, mask)
    assert not advantages.reinforce_pp(at_the_end, mask, 1.0).any()


@given(
    seed=st.integers(0, 10_000),
    lengths=st.lists(st.integers(0, 6), min_size=1, max_size=4),
    gamma=st.sampled_from([0.0, 0.9, 1.0]),
    floor=st.sampled_from([1e-4, 0.1, 10.0]),
)
def test_reinforce_pp_is_the_reward_to_go_normalised_over_the_batch(seed, lengths, gamma, floor) -> None:
    mask = torch.arange(6)[None, :] < torch.tensor(lengths)[:, None]
    generator = torch.Generator().manual_seed(seed)
    rewards = torch.randn(len(lengths), 6, generator=generator, dtype=torch.float64)
    found = advantages.reinforce_pp(torch.where(mask, rewards, torch.nan), mask, gamma, floor)
    torch.testing.assert_close(found, oracle.reinforce_pp(rewards, mask, gamma, floor), rtol=1e-9, atol=1e-9)


def test_groups_of_equal_rewards_are_told_from_those_that_differ() -> None:
    rewards = torch.tensor([1.0, 1.0, 1.0, 2.0, -5.0, torch.nan, torch.nan, torch.nan])
    valid = torch.tensor([True, True, True, True, True, False, False, False])
    found = advantages.zero_variance(rewards, valid, 2)
    assert found.tolist() == [True, True, False, False, True, True, True, True]


def test_arguments_that_make_no_sense_are_refused() -> None:
    rewards, valid = torch.zeros(6), torch.ones(6, dtype=torch.bool)
    for function in (advantages.rloo, advantages.grpo, advantages.dr_grpo, advantages.zero_variance):
        for group in (1, 4):
            with pytest.raises(
                ValueError, match=f"group is {group}: give 2 or more completions a prompt, a divisor of"
            ):
                function(rewards, valid, group)
        with pytest.raises(ValueError, match="give both the same shape"):
            function(rewards[:, None], valid, 2)
        with pytest.raises(TypeError, match="boolean mask"):
            function(rewards, rewards, 2)
    with pytest.raises(ValueError, match="epsilon is 0"):
        advantages.grpo(rewards, valid, 2, 0.0)


def test_they_are_targets_without_a_gradient() -> None:
    rewards, valid = torch.randn(4, requires_grad=True), torch.ones(4, dtype=torch.bool)
    for function in (advantages.rloo, advantages.grpo, advantages.dr_grpo):
        assert not function(rewards, valid, 2).requires_grad
    per_token = torch.randn(2, 2, requires_grad=True)
    assert not advantages.reinforce_pp(per_token, torch.ones(2, 2, dtype=torch.bool), 1.0).requires_grad
