"""Drawing a token: the distribution function of the softmax, inverted."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from stable_rlhf.ops.sampling import BLOCK, draw

LAST = 1 - 2.0**-53
"""The largest float64 below 1, which `torch.rand` can give."""
SIZES = [1, 2, 3, 97, BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK - 1, 2 * BLOCK, 2 * BLOCK + 1, 5 * BLOCK, 5 * BLOCK + 7]


def naive(p: list[float], u: float) -> tuple[int, float]:
    """(the token, how far the threshold is from the sums on either side of it), by one running sum."""
    threshold, passed = u * math.fsum(p), 0.0
    for token, share in enumerate(p):
        before, passed = passed, passed + share
        if passed > threshold:
            return token, min(passed - threshold, threshold - before) if u > 0 else passed
    return max(token for token, share in enumerate(p) if share > 0), 0.0


def random_logits(rows: int, vocabulary: int, spread: float, seed: int) -> Tensor:
    return spread * torch.randn(rows, vocabulary, generator=torch.Generator().manual_seed(seed))


def uniform(*numbers: float) -> Tensor:
    return torch.tensor(numbers, dtype=torch.float64)


cases = given(
    vocabulary=st.sampled_from(SIZES),
    spread=st.sampled_from([0.0, 0.3, 3.0, 10.0]),
    temperature=st.sampled_from([0.3, 1.0, 2.5]),
    u=st.lists(st.floats(0, LAST), min_size=1, max_size=4),
    seed=st.integers(0, 10_000),
)


@cases
def test_the_token_is_the_first_at_which_a_running_sum_passes_u(
    vocabulary: int, spread: float, temperature: float, u: list[float], seed: int
) -> None:
    logits = random_logits(len(u), vocabulary, spread, seed)
    drawn = draw(logits, uniform(*u), temperature)
    assert drawn.dtype == torch.int64
    for row, p in enumerate((logits / temperature).softmax(1).tolist()):
        expected, margin = naive(p, u[row])
        assert drawn[row] == expected or margin < 1e-14  # nearer than the rounding of float64 sums


@cases
def test_u_lies_between_the_sums_before_and_with_the_token_in_float64(
    vocabulary: int, spread: float, temperature: float, u: list[float], seed: int
) -> None:
    logits = random_logits(len(u), vocabulary, spread, seed)
    drawn = draw(logits, uniform(*u), temperature)
    for row, token in enumerate(drawn.tolist()):
        sums = (logits[row].double() / temperature).softmax(0).cumsum(0)
        before = sums[token - 1] if token else 0.0
        assert before - 1e-6 <= u[row] <= sums[token] + 1e-6  # the rounding of a float32 softmax


def test_literal_quarters_are_passed_where_they_end() -> None:
    logits = torch.tensor([[0.25, 0.5, 0.25]]).log().expand(7, 3)
    drawn = draw(logits, uniform(0.0, 0.2499, 0.2501, 0.5, 0.7499, 0.7501, LAST))
    assert drawn.tolist() == [0, 0, 1, 1, 1, 2, 2]


@pytest.mark.parametrize("vocabulary", SIZES)
def test_equal_logits_are_drawn_in_equal_steps_of_u_across_every_block(vocabulary: int) -> None:
    """Every token of the vocabulary once, and the first and last number of each step of u still in it."""
    tokens = torch.arange(vocabulary)
    for offset in (1e-4, 0.5, 1 - 1e-4):
        u = (tokens.double() + offset) / vocabulary
        assert torch.equal(draw(torch.zeros(vocabulary, vocabulary), u), tokens)


@pytest.mark.parametrize("vocabulary", SIZES)
def test_u_of_0_is_the_first_token_and_the_largest_u_the_last(vocabulary: int) -> None:
    logits = random_logits(2, vocabulary, 1.0, seed=1)
    assert draw(logits, uniform(0.0, LAST)).tolist() == [0, vocabulary - 1]


@pytest.mark.parametrize("vocabulary", [5, BLOCK, 2 * BLOCK + 1])
@pytest.mark.parametrize("barred", [1, 3])
def test_a_token_of_probability_0_is_never_drawn_at_either_end(vocabulary: int, barred: int) -> None:
    logits = random_logits(1, vocabulary, 1.0, seed=2).repeat(1001, 1)
    logits[:, :barred] = -math.inf
    logits[:, -1] = -math.inf
    drawn = draw(logits, torch.cat([torch.arange(1000) / 1000, uniform(LAST)]).double())
    assert drawn.min() == barred
    assert drawn.max() == vocabulary - 2


def test_rounding_at_the_end_draws_no_token_of_probability_0() -> None:
    """The sum of a block, added up pairwise, may exceed its running sum, and u lie between: 12 of these rows' do."""
    logits = random_logits(3000, 2 * BLOCK, 3.0, seed=7)
    logits[:, -3:] = -math.inf
    drawn = draw(logits, torch.full((3000,), LAST, dtype=torch.float64))
    assert drawn.max() < 2 * BLOCK - 3


@pytest.mark.parametrize("at", [0, 1, BLOCK - 1, BLOCK, 3 * BLOCK + 4])
def test_a_token_with_all_of_the_mass_is_drawn_for_every_u(at: int) -> None:
    """Logits 1e4 apart: all others have probability 0 in float32, also those of whole blocks before and after."""
    logits = torch.zeros(4, 3 * BLOCK + 5)
    logits[:, at] = 1e4
    assert draw(logits, uniform(0.0, 1e-300, 0.5, LAST)).tolist() == [at] * 4


def test_blocks_without_mass_on_both_sides_are_passed_over() -> None:
    """Two tokens in two blocks, with empty blocks before, between and after them."""
    logits = torch.full((4, 7 * BLOCK), -math.inf)
    logits[:, [BLOCK + 3, 4 * BLOCK]] = 0.0
    assert draw(logits, uniform(0.0, 0.49999, 0.5, LAST)).tolist() == [BLOCK + 3] * 2 + [4 * BLOCK] * 2


def test_a_rare_token_at_the_end_of_a_large_vocabulary_keeps_its_share() -> None:
    """The last of 150,000 tokens has 1e-9 of the mass: a running sum in float32 (steps of 6e-8) would lose it."""
    vocabulary = 150_000
    p = torch.full((vocabulary,), (1 - 1e-9) / (vocabulary - 1), dtype=torch.float64)
    p[-1] = 1e-9
    logits = p.log().float()[None].expand(2, -1)
    assert draw(logits, uniform(1 - 0.5e-9, 1 - 2e-6)).tolist() == [vocabulary - 1, vocabulary - 2]


@pytest.mark.parametrize("vocabulary", [300, BLOCK + 100])
def test_draws_follow_the_softmax_at_the_temperature(vocabulary: int) -> None:
    """Chi-squared over 100,000 draws."""
    count, logits = 100_000, random_logits(1, vocabulary, 1.5, seed=3)
    u = torch.rand(count, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    drawn = torch.cat([draw(logits.expand(len(part), -1), part, 1.5) for part in u.split(10_000)])
    expected = count * (logits[0].double() / 1.5).softmax(0)
    common = expected > 20
    counts = torch.bincount(drawn, minlength=vocabulary).double()
    chi = ((counts - expected).square() / expected)[common].sum().item()
    degrees = int(common.sum())
    assert degrees > 200
    assert chi < degrees + 4 * (2 * degrees) ** 0.5  # 4 standard deviations of the chi-squared distribution


def test_a_rows_draw_depends_on_no_other_row() -> None:
    logits = random_logits(16, 2 * BLOCK + 9, 2.0, seed=5)
    u = torch.rand(16, dtype=torch.float64, generator=torch.Generator().manual_seed(6))
    together = draw(logits, u)
    alone = [draw(logits[row : row + 1], u[row : row + 1]).item() for row in range(16)]
    assert together.tolist() == alone
    assert len(set(alone)) > 8


def test_bfloat16_logits_are_drawn_from_as_well() -> None:
    logits = torch.tensor([[0.0, 4.0, 0.0]], dtype=torch.bfloat16).expand(3, 3)
    edge = 1 / (2 + math.exp(4))
    assert draw(logits, uniform(0.9 * edge, 0.5, 1 - 0.9 * edge)).tolist() == [0, 1, 2]


@pytest.mark.parametrize("vocabulary", [3, BLOCK + 5])
def test_logits_that_are_not_numbers_draw_a_token_of_the_vocabulary(vocabulary: int) -> None:
    """One that means nothing, and that an embedding can still look up: the figures tell that the policy is broken."""
    drawn = draw(torch.full((3, vocabulary), math.nan), uniform(0.0, 0.5, LAST))
    assert all(0 <= token < vocabulary for token in drawn.tolist())


@pytest.mark.parametrize("temperature", [0.0, -1.0, math.nan])
def test_a_temperature_that_is_not_positive_is_refused_by_its_value(temperature: float) -> None:
    with pytest.raises(ValueError, match=f"temperature is {temperature}: give a positive number"):
        draw(torch.zeros(2, 3), uniform(0.1, 0.2), temperature)


@pytest.mark.parametrize(
    ("logits", "u"), [((2, 3), (3,)), ((2, 3), (2, 1)), ((2, 3), ()), ((3,), (3,)), ((2, 3, 4), (2,))]
)
def test_shapes_that_do_not_match_are_refused_by_name(logits: tuple[int, ...], u: tuple[int, ...]) -> None:
    message = f"logits {logits} and uniform {u}: give [B, V] and [B]"
    with pytest.raises(ValueError, match="give") as raised:
        draw(torch.zeros(logits), torch.zeros(u, dtype=torch.float64))
    assert str(raised.value) == message
