"""none, fixed, adaptive, asymmetric, pid-lagrangian: literal numbers and finite differences."""

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


@pytest.mark.parametrize("name", ["none", "fixed", "adaptive", "asymmetric"])
def test_every_rule_reports_the_averages_after_its_own_step(name: str) -> None:
    controller = make_controller(name)
    decisions = [controller.observe(seen(step, kl)) for step, kl in enumerate((1.0, 2.0, -1.0))]
    assert [each.kl_short for each in decisions] == pytest.approx([0.1, 0.29, 0.161], rel=1e-12)
    assert [each.kl_long for each in decisions] == pytest.approx([0.01, 0.0299, 0.019601], rel=1e-12)


def test_adaptive_uses_a_beta_before_it_moves_it() -> None:
    """Horizon 10: each step multiplies by 1 + 0.2 / 10 at most, and by 1 - 0.2 / 10 at least."""
    controller = make_controller("adaptive", init_beta=1.0, target=0.2, horizon=10.0)
    decisions = [controller.observe(seen(step, kl)) for step, kl in enumerate((9.0, 0.0, 0.1))]
    assert [each.kl_coef for each in decisions] == pytest.approx([1.0, 1.02, 1.02 * 0.98], rel=1e-12)
    assert [each.excess for each in decisions] == pytest.approx([8.8, 0.0, 0.0], rel=1e-12)  # of the KL just seen
    assert [each.threshold for each in decisions] == [0.2] * 3


def test_the_asymmetric_rule_in_numbers() -> None:
    """Window 4. The fourth KL exceeds by 0.5 - 0.3 and grows by (0.5 - 0.1) / 4: 2 x 0.1 x 0.2 and 2 x 5 x 0.1 / 4.

    The fifth KL is no higher than the second, and the sixth, 0.3, is at the threshold and 0.2 above the third.
    """
    controller = make_controller("asymmetric", window=4)
    decisions = [controller.observe(seen(step, kl)) for step, kl in enumerate((0.1, 0.1, 0.1, 0.5, 0.1, 0.3))]
    assert [each.excess for each in decisions] == pytest.approx([0, 0, 0, 0.2, 0, 0], abs=1e-15)
    expected = [0, 0, 0, 0.04 + 0.25, 0, 2 * 5 * 0.2 / 4 / 4]
    assert [each.kl_coef for each in decisions] == pytest.approx(expected, rel=1e-12, abs=1e-15)
    assert {each.threshold for each in decisions} == {0.3}
    halved = make_controller("asymmetric", window=4, momentum_scale=2.5, penalty_scale=0.05, threshold=0.1)
    last = [halved.observe(seen(step, kl)) for step, kl in enumerate((0.1, 0.1, 0.1, 0.5))][-1]
    assert last.kl_coef == pytest.approx(2 * 0.05 * 0.4 + 2 * 2.5 * 0.1 / 4, rel=1e-12)


def test_a_falling_kl_costs_nothing_and_gives_nothing() -> None:
    """Above the threshold but lower than at the window's other end: the first term stands alone."""
    controller = make_controller("asymmetric", window=2)
    decisions = [controller.observe(seen(step, kl)) for step, kl in enumerate((0.9, 0.8))]
    assert decisions[-1].kl_coef == pytest.approx(2 * 0.1 * 0.5, rel=1e-12)
    assert sum(asymmetric_penalty(AsymmetricSettings(window=2), (0.9, 0.8))) == pytest.approx(0.1 * 0.25, rel=1e-12)


def test_the_penalty_is_two_squares() -> None:
    """0.1 x (0.7 - 0.3)^2 and 5 x ((0.7 - 0.2) / 2)^2."""
    found = asymmetric_penalty(AsymmetricSettings(window=2), (0.2, 0.7))
    assert found == pytest.approx((0.016, 0.3125), rel=1e-12)


def test_the_pid_lagrangian_is_the_papers_rule_in_numbers() -> None:
    """limit 0.2, Kp 1, Ki 0.1, Kd 2: errors -0.1, 0.2, 0.3, -0.4; integral kept at 0 or above; only rises count."""
    controller = make_controller("pid-lagrangian", limit=0.2, kp=1.0, ki=0.1, kd=2.0)
    decisions = [controller.observe(seen(step, kl)) for step, kl in enumerate([0.1, 0.4, 0.5, -0.2])]
    terms = [(-0.1, 0.0, 0.0), (0.2, 0.1 * 0.2, 2 * 0.3), (0.3, 0.1 * 0.5, 2 * 0.1), (-0.4, 0.1 * 0.1, 0.0)]
    for decision, expected in zip(decisions, terms, strict=True):
        assert (decision.pid_p, decision.pid_i, decision.pid_d) == pytest.approx(expected, abs=1e-12)
        assert decision.kl_coef == pytest.approx(max(0.0, sum(expected)), abs=1e-12)
        assert decision.threshold == 0.2
    assert [decision.excess for decision in decisions] == pytest.approx([0.0, 0.2, 0.3, 0.0])


def test_the_pid_lagrangian_ends_at_its_limit_on_a_plant_that_it_can_hold() -> None:
    """KL that falls with the coefficient, kl = 0.5 - beta: the integral takes the error to 0."""
    controller, kl = make_controller("pid-lagrangian", limit=0.3, kp=0.1, ki=0.1, kd=0.0), 0.5
    for step in range(200):
        kl += 0.3 * (0.5 - controller.observe(seen(step, kl)).kl_coef - kl)
    assert kl == pytest.approx(0.3, abs=1e-3)
