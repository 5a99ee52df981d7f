"""The cut of a rollout into passes: cheapest of all, nothing left out, nothing twice, the same after a resume."""

from __future__ import annotations

from itertools import combinations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stable_rlhf.config import OptimConfig
from stable_rlhf.learner.microbatches import PASS_COST, Grain, Lengths, cuts, filled, permutation, plan, up

CPU = torch.device("cpu")
reproducible = settings(deadline=None, derandomize=True, database=None)
widest_first = st.lists(st.integers(1, 40), max_size=9).map(lambda widths: sorted(widths, reverse=True))


def every_cut(count: int) -> list[list[tuple[int, int]]]:
    """All 2^(count - 1) partitions of 0 .. count - 1 into runs."""
    return [
        list(zip((0, *inner), (*inner, count), strict=True))
        for size in range(count)
        for inner in combinations(range(1, count), size)
    ]


def price(groups: list[tuple[int, int]], widths: list[int], cost: int) -> int:
    return sum((last - first) * max(widths[first:last]) + cost for first, last in groups)


def allowed(groups: list[tuple[int, int]], widths: list[int], budget: int) -> bool:
    return all(last - first == 1 or (last - first) * max(widths[first:last]) <= budget for first, last in groups)


@reproducible
@given(widths=widest_first, budget=st.integers(1, 200), cost=st.integers(0, 100))
def test_no_partition_within_the_budget_is_cheaper(widths: list[int], budget: int, cost: int) -> None:
    groups = cuts(widths, budget, cost)
    assert [row for first, last in groups for row in range(first, last)] == list(range(len(widths)))
    assert allowed(groups, widths, budget)
    if widths:
        rivals = [rival for rival in every_cut(len(widths)) if allowed(rival, widths, budget)]
        assert price(groups, widths, cost) == min(price(rival, widths, cost) for rival in rivals)


def test_literal_cuts() -> None:
    assert cuts([], 100, 10) == []
    assert cuts([7], 1, 10) == [(0, 1)]  # a row wider than the budget has a pass of its own
    assert cuts([9, 8, 2, 2], 10, 1) == [(0, 1), (1, 2), (2, 4)]
    # One pass has 4 x 10 tokens, two have 10 + 3 x 2 and one more cost: 24 tokens of padding.
    assert cuts([10, 2, 2, 2], 1000, 23) == [(0, 1), (1, 4)]
    assert cuts([10, 2, 2, 2], 1000, 25) == [(0, 4)]


@pytest.mark.parametrize(("number", "multiple", "least"), [(0, 8, 0), (1, 8, 8), (8, 8, 8), (9, 8, 16), (5, 1, 5)])
def test_up_is_the_least_multiple_that_is_no_less(number: int, multiple: int, least: int) -> None:
    assert up(number, multiple) == least


@st.composite
def rollouts(draw: st.DrawFn) -> tuple[Lengths, int]:
    """(lengths of the rows of a rollout, some of them without a reward; a number of minibatches that divides them)."""
    minibatches = draw(st.sampled_from([1, 2, 4]))
    rows = minibatches * draw(st.integers(1, 5))
    prompt = draw(st.lists(st.integers(1, 50), min_size=rows, max_size=rows))
    response = draw(st.lists(st.integers(0, 30), min_size=rows, max_size=rows))
    return Lengths(prompt=prompt, response=response), minibatches


def optim(minibatches: int, budget: int = 8192) -> OptimConfig:
    return OptimConfig(num_mini_batches=minibatches, microbatch_tokens=budget)


@reproducible
@given(
    rollout=rollouts(),
    budget=st.integers(1, 400),
    grain=st.sampled_from([Grain(), Grain(8, 32), Grain(3, 8), Grain(4, 32, 90)]),
    at=st.integers(0, 9),
)
def test_a_plan_holds_every_scored_row_once_and_no_other_within_the_budget(
    rollout: tuple[Lengths, int], budget: int, grain: Grain, at: int
) -> None:
    lengths, minibatches = rollout
    made = list(plan(lengths, optim(minibatches, budget), seed=at, step=at, iteration=at % 3, device=CPU, grain=grain))
    order = permutation(len(lengths.prompt), at, at, at % 3).chunk(minibatches)
    assert len(made) == len(order) == minibatches
    for minibatch, rows in zip(made, order, strict=True):
        scored = [row for row in rows.tolist() if lengths.response[row] > 0]
        taken = [row for micro in minibatch for row in micro.rows[: micro.count].tolist()]
        assert sorted(taken) == sorted(scored)
        assert (minibatch == []) == (scored == [])
        for micro in minibatch:
            assert micro.rows.dtype == torch.int64
            assert micro.rows.device == CPU
            here = micro.rows[: micro.count].tolist()
            more = up(len(here), grain.rows)
            assert len(micro.rows) == (more if more * micro.width <= budget else len(here))
            assert set(micro.rows[micro.count :].tolist()) <= set(here)
            widest = max(lengths.prompt[row] + lengths.response[row] - 1 for row in here)
            assert micro.width == min(up(widest, grain.columns), grain.limit)
            assert micro.length == up(max(lengths.response[row] for row in here), grain.columns)
            assert len(here) == 1 or len(micro.rows) * micro.width <= budget


@reproducible
@given(rollout=rollouts(), budget=st.integers(1, 400), columns=st.sampled_from([1, 32]))
def test_a_plan_is_the_cheapest_at_the_devices_cost_of_a_pass(
    rollout: tuple[Lengths, int], budget: int, columns: int
) -> None:
    lengths, minibatches = rollout
    for name, cost in PASS_COST.items():
        made = plan(lengths, optim(minibatches, budget), 0, 0, 0, torch.device(name), Grain(1, columns))
        for minibatch in made:
            rows = [row for micro in minibatch for row in micro.rows.tolist()]
            whole = [lengths.prompt[row] + lengths.response[row] - 1 for row in rows]
            assert whole == sorted(whole, reverse=True)
            widths = [up(width, columns) for width in whole]
            paid = sum(len(micro.rows) * micro.width + cost for micro in minibatch)
            assert paid == price(cuts(widths, budget, cost), widths, cost)


def test_a_gpu_pays_for_padding_where_a_cpu_pays_for_a_pass() -> None:
    lengths = Lengths(prompt=[200, 10, 10, 10], response=[10, 10, 10, 10])
    sizes = {
        name: [len(micro.rows) for micro in next(plan(lengths, optim(1), 0, 0, 0, torch.device(name)))]
        for name in ("cpu", "cuda")
    }
    assert sizes == {"cpu": [1, 3], "cuda": [4]}


def test_equally_long_rows_keep_the_order_of_the_permutation() -> None:
    lengths = Lengths(prompt=[3] * 8, response=[4] * 8)
    order = permutation(8, 0, 5, 1)
    assert [m.rows.tolist() for mini in plan(lengths, optim(2), 0, 5, 1, CPU) for m in mini] == [
        rows.tolist() for rows in order.chunk(2)
    ]


def test_a_minibatch_without_a_reward_is_empty_and_the_others_are_whole() -> None:
    rows = [half.tolist() for half in permutation(8, 0, 0, 0).chunk(2)]
    response = [0 if row in rows[0] else 5 for row in range(8)]
    first, second = plan(Lengths(prompt=[2] * 8, response=response), optim(2), 0, 0, 0, CPU)
    assert first == []
    assert [micro.rows.tolist() for micro in second] == [rows[1]]


def test_the_order_is_of_seed_step_and_iteration_alone() -> None:
    orders = {
        (seed, step, iteration): tuple(permutation(64, seed, step, iteration).tolist())
        for seed in (0, 1, 12_345)
        for step in (0, 1, 1000)
        for iteration in (0, 1, 2)
    }
    assert all(sorted(order) == list(range(64)) for order in orders.values())
    assert len(set(orders.values())) == len(orders)
    torch.manual_seed(99)
    state = torch.random.get_rng_state()
    assert all(tuple(permutation(64, *key).tolist()) == order for key, order in orders.items())
    assert torch.equal(torch.random.get_rng_state(), state)


def test_rows_fill_a_shape_up_to_the_very_last_token_of_the_budget() -> None:
    assert [filled(5, 10, budget, 8) for budget in (79, 80, 81)] == [5, 8, 8]
    assert filled(8, 10, 80, 8) == 8
    lengths = Lengths(prompt=[10] * 5, response=[1] * 5)
    sizes = [
        [len(micro.rows) for micro in next(plan(lengths, optim(1, budget), 0, 0, 0, CPU, Grain(8, 1)))]
        for budget in (80, 79)
    ]
    assert sizes == [[8], [5]]


def test_a_width_is_rounded_up_to_the_models_positions_and_never_below_its_rows() -> None:
    for longest, width in ((33, 64), (65, 90), (90, 90), (95, 95)):
        lengths = Lengths(prompt=[longest - 4, 3], response=[5, 5])
        (first, *_), *_ = plan(lengths, optim(1), 0, 0, 0, CPU, Grain(1, 32, 90))
        assert first.width == width


@pytest.mark.parametrize("width", [600, 1100, 2048, 8000, 9000])
def test_filling_a_shape_up_stays_within_the_budget(width: int) -> None:
    """The most tokens of a pass are a bound on memory: rows are added where there is room for them, and not beyond."""
    lengths = Lengths(prompt=[width] * 32, response=[1] * 32)
    made = next(plan(lengths, optim(1, 8192), 0, 0, 0, torch.device("cuda"), Grain(8, 1)))
    assert max(len(micro.rows) for micro in made) * width <= max(8192, width)
    assert sum(micro.count for micro in made) == 32
