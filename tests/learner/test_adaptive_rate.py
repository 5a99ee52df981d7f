"""Learning rates that follow the KL of the updates."""

from __future__ import annotations

import pytest

from stable_rlhf.learner import AdaptiveRate


def test_the_rate_changes_by_half_as_much_again_outside_the_band() -> None:
    rate = AdaptiveRate(0.01)
    factors = []
    for kl in (0.021, 0.019, 0.02, 0.0051, 0.0049, 0.0, None, 1.0):
        rate.observe(kl)
        factors.append(rate.factor)
    assert factors == pytest.approx([1 / 1.5] * 4 + [1.0] * 3 + [1 / 1.5])


@pytest.mark.parametrize(("kl", "end"), [(1.0, 0.01), (1e-9, 100.0)])
def test_the_rate_stays_within_two_orders_of_magnitude(kl: float, end: float) -> None:
    rate = AdaptiveRate(0.01)
    for _ in range(100):
        rate.observe(kl)
    assert rate.factor == pytest.approx(end)


def test_without_a_target_nothing_changes_and_a_loaded_rate_continues() -> None:
    off, rate, loaded = AdaptiveRate(None), AdaptiveRate(0.01), AdaptiveRate(0.01)
    for each in (off, rate):
        each.observe(1.0)
    assert off.factor == 1.0
    loaded.load_state_dict(rate.state_dict())
    for each in (rate, loaded):
        each.observe(1e-4)
        each.observe(1e-4)
    assert loaded.factor == rate.factor == pytest.approx(1.5)
