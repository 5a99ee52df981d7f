"""none, fixed, adaptive, asymmetric: literal numbers and finite differences."""

from __future__ import annotations

import pytest

from stable_rlhf.control import Observation, make_controller
from stable_rlhf.control.baselines import AsymmetricSettings, asymmetric_penalty
from stable_rlhf.control.paper import MULTIPLIER
from stable_rlhf.control.phase import Phase


def seen(step: int, kl: float) -> Observation:
    return Observation(step, 0.5, kl, 3.0)


def test_none_never_has_a_coefficient_and_fixed_always_has_its_own() -> None:
    none, fixed = make_controller("none"), make_controller("fixed", beta=0.2)
    for step, kl in enumerate((-1.0, 0.0, 50.0)):
        assert none.observe(seen(step, kl)).kl_coef == 0.0
        assert fixed.observe(seen(step, kl)).kl_coef == 0.2


def test_the_reported_averages_are_the_published_ones_from_zero() -> None:
    controller = make_controller("fixed")
    controller.observe(seen(0, 1.0))
    decision = controller.observe(seen(1, 2.0))
    assert decision.kl_short == pytest.approx(0.9 * 0.1 + 0.1 * 2.0, rel=1e-15)
    assert decision.kl_long == pytest.approx(0.99 * 0.01 + 0.01 * 2.0, rel=1e-15)


def test_adaptive_follows_the_published_update_with_its_clip() -> None:
    controller = make_controller("adaptive", init_beta=0.1, target=0.2, horizon=10.0)
    kls = [0.2, 0.21, 4.0, -3.0, 0.0]
    betas = [controller.observe(seen(step, kl)).kl_coef for step, kl in enumerate(kls)]
    expected, beta = [], 0.1
    for error in (0.0, 0.05, 0.2, -0.2, -0.2):  # kl / target - 1, clipped to +-0.2
        expected.append(beta)
        beta *= 1.0 + error * 0.1
    assert betas == pytest.approx(expected, rel=1e-12)


def test_adaptive_reports_its_target_as_threshold() -> None:
    decision = make_controller("adaptive", target=0.2).observe(seen(0, 0.5))
    assert (decision.threshold, decision.excess) == (0.2, pytest.approx(0.3))


def test_adaptive_neither_overflows_nor_dies_at_the_ends() -> None:
    controller = make_controller("adaptive", horizon=0.2001)
    high = [controller.observe(seen(step, 9.0)).kl_coef for step in range(200)][-1]
    low = [controller.observe(seen(step, -9.0)).kl_coef for step in range(200, 400)][-1]
    back = [controller.observe(seen(step, 9.0)).kl_coef for step in range(400, 402)][-1]
    assert (high, low) == (1e6, 1e-9)
    assert back > low


def test_adaptive_refuses_a_horizon_that_one_step_would_cross() -> None:
    with pytest.raises(ValueError, match=r"horizon=0\.2 is out of range: give a finite number > 0\.2"):
        make_controller("adaptive", horizon=0.2)


@pytest.mark.parametrize("newest", [0.1, 0.35, 0.9])
def test_the_asymmetric_coefficient_is_the_slope_of_its_penalty_in_the_newest_kl(newest: float) -> None:
    settings = AsymmetricSettings(window=10)
    kls = (*(0.01 * step for step in range(9)), newest)
    controller = make_controller("asymmetric", window=10)
    decision = [controller.observe(seen(step, kl)) for step, kl in enumerate(kls)][-1]
    h = 1e-4
    above = sum(asymmetric_penalty(settings, (*kls[:-1], newest + h)))
    below = sum(asymmetric_penalty(settings, (*kls[:-1], newest - h)))
    assert decision.kl_coef == pytest.approx((above - below) / (2 * h), rel=1e-8)
    assert decision.kl_coef > 0.0


def test_momentum_acts_only_on_a_full_window_and_only_upwards() -> None:
    rising = make_controller("asymmetric", window=5)
    coefs = [rising.observe(seen(step, 0.05 * step)).kl_coef for step in range(6)]
    assert coefs[:4] == [0.0] * 4
    assert coefs[4:] == pytest.approx([2 * 5.0 * (0.2 / 5) / 5] * 2)
    falling = make_controller("asymmetric", window=5)
    assert [falling.observe(seen(step, -0.05 * step)).kl_coef for step in range(6)] == [0.0] * 6


def test_rules_without_phases_say_so() -> None:
    for name in ("none", "fixed", "adaptive", "asymmetric"):
        decision = make_controller(name).observe(seen(0, 0.1))
        assert (decision.phase, decision.gate, decision.entropy_floor) == ("NONE", 1.0, None)
    assert Phase.NONE not in MULTIPLIER
