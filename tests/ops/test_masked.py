from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from stable_rlhf.ops import masked
from tests.oracles import reductions


def draw(seed: int, rows: int, columns: int) -> tuple[Tensor, Tensor]:
    """Random float64 entries and a random mask with at least one True entry; NaN outside the mask."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, columns, generator=generator, dtype=torch.float64) * 3 + 1
    mask = torch.rand(rows, columns, generator=generator) < 0.6
    mask[0, 0] = True
    return torch.where(mask, x, torch.nan), mask


shapes = given(st.integers(0, 10_000), st.integers(1, 4), st.integers(1, 6))


@shapes
def test_sum_mean_and_variance_are_those_of_the_true_entries(seed, rows, columns):
    x, mask = draw(seed, rows, columns)
    entries = reductions.kept(x, mask)
    assert masked.masked_sum(x, mask).item() == pytest.approx(math.fsum(entries), rel=1e-12, abs=1e-12)
    assert masked.masked_mean(x, mask).item() == pytest.approx(reductions.mean(entries), rel=1e-12, abs=1e-12)
    assert masked.masked_var(x, mask).item() == pytest.approx(reductions.variance(entries), rel=1e-11, abs=1e-12)
    for row, total in enumerate(masked.masked_sum(x, mask, dim=1).tolist()):
        assert total == pytest.approx(math.fsum(reductions.kept(x[row], mask[row])), rel=1e-12, abs=1e-12)


@shapes
def test_the_error_of_a_mean_over_rows_is_the_loop_over_its_rows(seed, rows, columns):
    x, mask = draw(seed, rows, columns)
    by_row = [reductions.kept(x[row], mask[row]) for row in range(rows) if mask[row].any()]
    assert masked.ratio_error(x, mask) == pytest.approx(reductions.ratio_error(by_row), rel=1e-9, abs=1e-12)


def test_the_error_of_a_mean_over_rows_of_literal_numbers():
    """Means of 2 and 4 over two entries each are 1 off their mean; a row of half the length counts for half."""
    x = torch.tensor([[1.0, 3.0], [4.0, 4.0], [7.0, 7.0]])
    two = torch.tensor([[True, True], [True, True], [False, False]])
    assert masked.ratio_error(x, two) == pytest.approx(math.sqrt((2**2 + 2**2) * 2 / 1) / 4)
    three = torch.tensor([[True, True], [True, True], [True, False]])  # 19 / 5 in the mean
    off = (4 - 7.6) ** 2 + (8 - 7.6) ** 2 + (7 - 3.8) ** 2
    assert masked.ratio_error(x, three) == pytest.approx(math.sqrt(off * 3 / 2) / 5)
    assert masked.ratio_error(x, two & torch.tensor([[True], [False], [False]])) == 0.0  # one row shows no error
    with pytest.raises(ValueError, match="and the mask"):
        masked.ratio_error(x, two[:2])


def test_the_means_of_microbatches_over_the_whole_denominator_add_up_to_the_mean_of_the_batch():
    x, mask = draw(3, 6, 5)
    mask[4] = False  # a microbatch without any response token adds 0
    parts = [masked.masked_mean(x[i : i + 1], mask[i : i + 1], denominator=mask.sum()) for i in range(6)]
    assert sum(parts).item() == pytest.approx(masked.masked_mean(x, mask).item(), rel=1e-14)
    assert parts[4].item() == 0.0


def test_a_tensor_denominator_is_never_looked_at_so_the_host_waits_for_no_device():
    # A tensor on the meta device has no value: looking at it raises.
    x, mask = torch.ones(2, 3, device="meta"), torch.ones(2, 3, dtype=torch.bool, device="meta")
    with pytest.raises(RuntimeError, match="meta"):
        bool(mask.sum() > 0)
    assert masked.masked_mean(x, mask, mask.sum()).shape == ()
    ones, everywhere = torch.ones(2, 3), torch.ones(2, 3, dtype=torch.bool)
    assert masked.masked_mean(ones, everywhere, torch.tensor(12)).item() == 0.5
    assert masked.masked_mean(ones, everywhere, torch.tensor(0)).item() == math.inf


def test_the_gradient_of_a_masked_mean_is_zero_outside_the_mask_whatever_stands_there():
    x = torch.tensor([[1.0, torch.nan], [torch.inf, 4.0]], requires_grad=True)
    masked.masked_mean(x, torch.tensor([[True, False], [False, True]])).backward()
    assert x.grad is not None
    assert x.grad.tolist() == [[0.5, 0.0], [0.0, 0.5]]


@shapes
def test_whitened_entries_have_mean_zero_and_variance_one_and_the_rest_are_zero(seed, rows, columns):
    x, mask = draw(seed, rows, columns)
    whitened = masked.whiten(x, mask, floor=1e-9)
    entries = reductions.kept(whitened, mask)
    assert reductions.mean(entries) == pytest.approx(0.0, abs=1e-12)
    assert reductions.variance(entries) == pytest.approx(1.0 if len(entries) > 1 else 0.0, abs=1e-12)
    assert reductions.kept(whitened, ~mask) == [0.0] * int((~mask).sum())
    assert whitened.dtype == x.dtype


@given(st.integers(0, 10_000), st.integers(1, 9))
def test_whitening_does_not_change_with_padding(seed, padding):
    x, mask = draw(seed, 3, 4)
    x32 = x.float()
    wider = torch.nn.functional.pad(x32, (0, padding), value=torch.nan)
    wider_mask = torch.nn.functional.pad(mask, (0, padding), value=False)
    whitened = masked.whiten(wider, wider_mask)
    torch.testing.assert_close(whitened[:, :4], masked.whiten(x32, mask), rtol=1e-6, atol=1e-7)
    assert whitened[:, 4:].abs().sum().item() == 0.0


def test_a_saturated_batch_is_centred_but_not_blown_up():
    x = torch.tensor([[0.98, 1.02, 0.98, 1.02]], dtype=torch.float64)  # deviation 0.02
    whitened = masked.whiten(x, torch.ones(1, 4, dtype=torch.bool))
    expected = torch.tensor([[-0.2, 0.2, -0.2, 0.2]], dtype=torch.float64)  # 0.02 / the floor of 0.1
    torch.testing.assert_close(whitened, expected, rtol=1e-12, atol=1e-12)


def test_a_constant_batch_whitens_to_zero_and_so_does_an_empty_mask():
    assert masked.whiten(torch.full((2, 3), 7.3), torch.ones(2, 3, dtype=torch.bool)).tolist() == [[0.0] * 3] * 2
    assert masked.whiten(torch.full((2, 3), torch.nan), torch.zeros(2, 3, dtype=torch.bool)).tolist() == [[0.0] * 3] * 2


@given(st.integers(0, 10_000), st.permutations(range(5)))
def test_ranks_whiten_with_merged_totals_as_one_process_whitens_the_whole_batch(seed, order):
    x, mask = draw(seed, 5, 4)
    mask[2] = False  # a rank may have no response token at all
    merged = masked.merge(masked.totals(x[i : i + 1], mask[i : i + 1]) for i in order)
    by_rank = [masked.whiten(x[i : i + 1], mask[i : i + 1], floor=1e-3, totals=merged) for i in range(5)]
    torch.testing.assert_close(torch.cat(by_rank), masked.whiten(x, mask, floor=1e-3), rtol=1e-12, atol=1e-12)
    assert merged.count.item() == mask.sum().item()


def test_totals_keep_the_variance_of_entries_that_are_large_beside_their_deviation():
    x = torch.tensor([[1e9, 1e9 + 1, 1e9 + 2, 1e9 + 3]], dtype=torch.float64)
    mask = torch.ones(1, 4, dtype=torch.bool)
    halves = masked.merge([masked.totals(x[:, :1], mask[:, :1]), masked.totals(x[:, 1:], mask[:, 1:])])
    assert halves.variance.item() == 1.25  # a sum of squares in float64 gives 0 or 128 here
    assert halves.mean.item() == 1e9 + 1.5


@given(st.integers(0, 10_000), st.integers(1, 4), st.integers(1, 6), st.integers(1, 4))
def test_distinct_n_counts_the_n_grams_inside_the_responses(seed, rows, columns, n):
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(3, (rows, columns), generator=generator)
    mask = torch.rand(rows, columns, generator=generator) < 0.8
    result = masked.distinct_n(tokens, mask, n).item()
    assert result == pytest.approx(reductions.distinct_n(tokens, mask, n), rel=1e-15, nan_ok=True)


def test_distinct_2_of_literal_rows():
    tokens = torch.tensor([[5, 6, 5, 6], [5, 6, 9, 9]])
    mask = torch.tensor([[True, True, True, True], [True, True, False, False]])
    assert masked.distinct_n(tokens, mask, 2).item() == 2 / 4  # 56 65 56 | 56
    assert math.isnan(masked.distinct_n(tokens, mask, 5).item())


def test_what_has_no_meaning_is_refused_with_a_remedy():
    x, none = torch.ones(2, 2), torch.zeros(2, 2, dtype=torch.bool)
    with pytest.raises(ValueError, match="give a denominator"):
        masked.masked_mean(x, none)
    for bad in (0, -1.5, math.nan):
        with pytest.raises(ValueError, match=f"denominator is {bad}: give the positive number"):
            masked.masked_mean(x, ~none, denominator=bad)
    with pytest.raises(ValueError, match="no True entry"):
        masked.masked_var(x, none)
    with pytest.raises(ValueError, match="floor is 0"):
        masked.whiten(x, ~none, floor=0)
    with pytest.raises(ValueError, match="at least one part"):
        masked.merge([])
    with pytest.raises(ValueError, match="n is 0"):
        masked.distinct_n(x.long(), ~none, 0)
    with pytest.raises(TypeError, match="boolean mask"):
        masked.masked_sum(x, torch.ones(2, 2))
    with pytest.raises(ValueError, match=r"x has shape \(2,\) and the mask \(2, 2\)"):
        masked.masked_sum(torch.ones(2), ~none)
