"""Reward normalisation: the published updates to 1e-9, and one that knows no scale."""

from __future__ import annotations

import json
import math
import random
import statistics
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stable_rlhf.control import RewardNormaliser

BATCHES = st.lists(st.lists(st.floats(-50, 50), min_size=1, max_size=8), min_size=1, max_size=6)


def test_the_paper_normaliser_repeats_every_published_update(shared_data: Path) -> None:
    rows = json.loads((shared_data / "paper_traces.json").read_text())["reward_normaliser"]
    normaliser = RewardNormaliser("paper")
    assert len(rows) == 12
    for row in rows:
        normaliser.update(row["batch"])
        moments = normaliser.moments
        ours = [moments.mean, moments.variance, moments.count, normaliser.normalise(row["batch"])[0]]
        theirs = [row[key] for key in ("mean", "var", "count", "first_normalised")]
        assert ours == pytest.approx(theirs, rel=0, abs=1e-9)


@given(BATCHES)
def test_running_moments_are_those_of_all_rewards_together_at_first(batches: list[list[float]]) -> None:
    normaliser = RewardNormaliser("running")
    for batch in batches:
        normaliser.update(batch)
    everything = [reward for batch in batches for reward in batch]
    assert normaliser.moments.count == len(everything)
    assert normaliser.moments.mean == pytest.approx(statistics.fmean(everything), abs=1e-9)
    assert normaliser.moments.variance == pytest.approx(statistics.pvariance(everything), rel=1e-9, abs=1e-9)


def test_after_its_memory_a_rollout_counts_for_a_50th_less_with_each_that_follows() -> None:
    rng = random.Random(3)
    rollouts = [[rng.gauss(1.0, 0.5 + step / 50) for _ in range(rng.randint(1, 5))] for step in range(120)]
    normaliser = RewardNormaliser("running")
    for rollout in rollouts:
        normaliser.update(rollout)
    weighed = [  # the 50th rollout is the last that takes nothing from those before it
        (0.98 ** (len(rollouts) - max(50, step + 1)), reward)
        for step, rollout in enumerate(rollouts)
        for reward in rollout
    ]
    total = math.fsum(weight for weight, _ in weighed)
    mean = math.fsum(weight * reward for weight, reward in weighed) / total
    variance = math.fsum(weight * (reward - mean) ** 2 for weight, reward in weighed) / total
    moments = normaliser.moments
    assert (moments.count, moments.mean, moments.variance) == pytest.approx((total, mean, variance), rel=1e-12)


@pytest.mark.parametrize("factor", [100.0, 0.01])
def test_a_reward_whose_scale_drifts_is_followed(factor: float) -> None:
    rng = random.Random(0)
    normaliser = RewardNormaliser("running")
    drift = 500
    for step in range(2 * drift):
        scale = factor ** min(1.0, step / drift)
        rewards = [scale * (3.0 + rng.gauss(0.0, 1.0)) for _ in range(64)]
        normaliser.update(rewards)
        if step >= 50:
            assert 0.1 < statistics.pstdev(normaliser.normalise(rewards)) < 3.0
    assert normaliser.moments.deviation == pytest.approx(factor, rel=0.1)
    assert normaliser.moments.mean == pytest.approx(3.0 * factor, rel=0.1)


@pytest.mark.parametrize("kind", ["none", "paper"])
def test_only_the_running_kind_forgets(kind: str) -> None:
    normaliser = RewardNormaliser(kind)
    for _ in range(200):
        normaliser.update([0.0, 2.0])
    assert normaliser.moments.count == pytest.approx(400, abs=1e-3)


@given(st.integers(0, 10_000), st.sampled_from([(10.0, 0.0), (1.0, 5.0), (1e-3, 100.0)]))
def test_scale_and_shift_of_the_rewards_change_nothing(seed: int, change: tuple[float, float]) -> None:
    rng = random.Random(seed)
    plain, changed = RewardNormaliser("running"), RewardNormaliser("running")
    for _ in range(60):
        batch = [rng.gauss(0.3, 0.4) for _ in range(8)]
        other = [change[0] * reward + change[1] for reward in batch]
        plain.update(batch)
        changed.update(other)
        assert changed.normalise(other) == pytest.approx(plain.normalise(batch), rel=1e-9, abs=1e-9)


def test_normalised_rewards_have_mean_zero_and_unit_deviation() -> None:
    normaliser = RewardNormaliser("running")
    normaliser.update([1.0, 2.0, 6.0])
    normalised = normaliser.normalise([1.0, 2.0, 6.0])
    assert sum(normalised) == pytest.approx(0.0, abs=1e-12)
    assert statistics.pstdev(normalised) == pytest.approx(1.0, rel=1e-12)


@pytest.mark.parametrize("value", [0.0, 0.1, 1e6 + 0.1])
def test_equal_rewards_normalise_to_zero(value: float) -> None:
    normaliser = RewardNormaliser("running")
    for _ in range(7):
        normaliser.update([value] * 3)
    assert normaliser.normalise([value, value]) == [0.0, 0.0]


def test_none_changes_nothing_but_still_reports_the_moments() -> None:
    normaliser = RewardNormaliser("none")
    normaliser.update([1.0, 3.0])
    assert normaliser.normalise([1.0, 30.0]) == [1.0, 30.0]
    assert (normaliser.moments.mean, normaliser.moments.deviation) == (2.0, 1.0)


def test_an_empty_rollout_changes_nothing() -> None:
    normaliser = RewardNormaliser("running")
    normaliser.update([1.0, 3.0])
    before = normaliser.moments
    normaliser.update([])
    assert normaliser.moments == before


@pytest.mark.parametrize("kind", ["none", "paper", "running"])
def test_a_loaded_normaliser_continues_bit_for_bit(kind: str) -> None:
    normaliser = RewardNormaliser(kind)
    normaliser.update([0.1, 0.7])
    loaded = RewardNormaliser(kind)
    loaded.load_state_dict(json.loads(json.dumps(normaliser.state_dict())))
    for each in (normaliser, loaded):
        for _ in range(60):  # beyond the memory, whose length counts from the first rollout
            each.update([0.3, 0.9, 1.7])
    assert loaded.normalise([0.2]) == normaliser.normalise([0.2])
    assert loaded.moments == normaliser.moments


def test_what_cannot_be_normalised_is_refused_with_its_remedy() -> None:
    with pytest.raises(
        ValueError, match=r"kind='zscore' is not a reward normaliser: choose one of none, paper, running"
    ):
        RewardNormaliser("zscore")
    with pytest.raises(ValueError, match=r"reward 1 is nan.*return None for a completion"):
        RewardNormaliser("running").update([0.0, math.nan])
    with pytest.raises(ValueError, match=r"'paper' was given 1 reward.*batch of 2 or more"):
        RewardNormaliser("paper").update([0.5])


def test_a_state_that_does_not_fit_is_refused_and_changes_nothing() -> None:
    normaliser = RewardNormaliser("running")
    normaliser.update([1.0, 2.0])
    before, good = normaliser.moments, normaliser.state_dict()
    for bad, message in (
        ({**good, "kind": "paper"}, "is of kind 'paper'"),
        ({**good, "version": 99}, "version 99"),
        ({**good, "more": 1}, "expected kind, moments, rollouts, version"),
        ({**good, "moments": {"mean": 0.0, "variance": 1.0}}, r"lacks \['count'\]"),
        ({**good, "rollouts": -1}, "rollouts=-1: expected a whole number"),
        ({**good, "rollouts": 1.0}, "rollouts=1.0: expected a whole number"),
    ):
        with pytest.raises(ValueError, match=message):
            normaliser.load_state_dict(bad)
    assert normaliser.moments == before


def test_the_published_rule_in_numbers() -> None:
    """From mean 0, variance 1 and count 1/10,000: a batch of 1 and 3 has mean 2 and variance 2 (denominator 1)."""
    normaliser = RewardNormaliser("paper")
    normaliser.update([1.0, 3.0])
    count = 2.0001
    mean = 2 * 2 / count
    variance = (1 * 0.0001 + 2 * 2 + 2**2 * 0.0001 * 2 / count) / count
    moments = normaliser.moments
    assert (moments.count, moments.mean, moments.variance) == pytest.approx((count, mean, variance), rel=1e-14)
    unit = math.sqrt(variance) + 1e-8
    assert normaliser.normalise([5.0, 0.0]) == pytest.approx([(5 - mean) / unit, -mean / unit], rel=1e-14)
    assert normaliser.unit == pytest.approx(unit, rel=1e-14)


def test_the_unit_is_what_a_normalised_reward_is_counted_in() -> None:
    none, running = RewardNormaliser("none"), RewardNormaliser("running")
    for normaliser in (none, running):
        normaliser.update([1.0, 7.0])
    assert (none.unit, running.unit) == (1.0, 3.0)
    assert RewardNormaliser("running").unit == 0.0
    # where all rewards are nearly alike the constant is all that is left of the published unit
    paper = RewardNormaliser("paper")
    alike = {"mean": 0.0, "variance": 0.0, "count": 4.0}
    paper.load_state_dict({**paper.state_dict(), "moments": alike})
    assert paper.unit == 1e-8
    assert paper.normalise([1.0]) == pytest.approx([1e8], rel=1e-14)


def test_two_batches_are_merged_by_their_counts() -> None:
    """1, 3 and then 5, 5, 5, 9: mean 28 / 6, squares 166 / 6 less the mean's."""
    normaliser = RewardNormaliser("running")
    normaliser.update([1.0, 3.0])
    normaliser.update([5.0, 5.0, 5.0, 9.0])
    assert normaliser.moments.mean == pytest.approx(28 / 6, rel=1e-14)
    assert normaliser.moments.variance == pytest.approx(166 / 6 - (28 / 6) ** 2, rel=1e-13)


@pytest.mark.parametrize("value", [-0.1, -1e6 - 0.1])
def test_equal_negative_rewards_normalise_to_zero_too(value: float) -> None:
    normaliser = RewardNormaliser("running")
    for size in (3, 7, 4):
        normaliser.update([value] * size)
    assert normaliser.normalise([value, value - 1.0]) == [0.0, 0.0]
    assert normaliser.unit == 0.0
