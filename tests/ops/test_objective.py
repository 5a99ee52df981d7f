from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from stable_rlhf.ops import critic, objective
from tests.oracles import objective as oracle
from tests.oracles import reductions

TRACES = Path(__file__).parents[2].parent / "shared" / "data" / "paper_traces.json"
real = st.floats(-20, 20)
temperatures = st.sampled_from([0.05, 0.3, 1.0, 10.0])


def f64(*entries) -> torch.Tensor:
    return torch.tensor(entries, dtype=torch.float64)


# soft-min ------------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not TRACES.exists(), reason="the authors' traces are not here")
def test_soft_min_reproduces_the_authors_values():
    rows = json.loads(TRACES.read_text(encoding="utf-8"))["soft_min"]
    assert len(rows) == 20
    for row in rows:
        value = objective.soft_min(f64(row["v1"]), f64(row["v2"]), row["alpha"]).item()
        assert value == pytest.approx(row["soft_min"], rel=0, abs=1e-9)


@given(real, real, temperatures)
def test_soft_min_is_the_formula_and_lies_between_the_minimum_and_the_mean(v1, v2, temperature):
    value = objective.soft_min(f64(v1), f64(v2), temperature).item()
    assert value == pytest.approx(oracle.soft_min(v1, v2, temperature), rel=0, abs=1e-12)
    assert min(v1, v2) <= value <= (v1 + v2) / 2 + 1e-14


@given(real, real)
def test_soft_min_goes_to_the_minimum_and_to_the_mean_at_the_ends_of_the_temperature(v1, v2):
    cold = objective.soft_min(f64(v1), f64(v2), 1e-12).item()
    hot = objective.soft_min(f64(v1), f64(v2), 1e12).item()
    assert cold == pytest.approx(min(v1, v2), rel=0, abs=1e-11)
    assert hot == pytest.approx((v1 + v2) / 2, rel=0, abs=1e-9)


@given(real, real, temperatures)
def test_the_gradient_of_soft_min_is_the_softmax_of_the_negated_values(v1, v2, temperature):
    heads = [f64(v1).requires_grad_(), f64(v2).requires_grad_()]
    gradients = torch.autograd.grad(objective.soft_min(heads[0], heads[1], temperature).sum(), heads)
    expected = torch.softmax(-f64(v1, v2) / temperature, 0)
    torch.testing.assert_close(torch.cat(gradients), expected, rtol=1e-9, atol=1e-12)


def test_soft_min_refuses_what_has_no_meaning():
    with pytest.raises(ValueError, match="temperature is 0"):
        objective.soft_min(f64(1.0), f64(2.0), 0)
    with pytest.raises(ValueError, match="give both the same shape"):
        objective.soft_min(f64(1.0), f64(2.0, 3.0), 0.3)


# KL estimators -------------------------------------------------------------------------------------------------------


@given(st.floats(-15, 15))
def test_the_estimators_are_their_formulas(log_ratio):
    logp, ref = f64(log_ratio - 3), f64(-3.0)
    exact = log_ratio - 3 + 3
    assert objective.kl_estimate(logp, ref, "k1").item() == exact
    assert objective.kl_estimate(logp, ref, "k2").item() == pytest.approx(exact**2 / 2, rel=1e-15)
    expected = math.exp(-exact) - 1 + exact
    assert objective.kl_estimate(logp, ref, "k3").item() == pytest.approx(expected, rel=1e-9, abs=1e-14)


@given(st.floats(-1e6, 1e6, width=32))
def test_k3_is_finite_and_never_negative_in_float32(log_ratio):
    value = objective.kl_estimate(torch.tensor([log_ratio]), torch.zeros(1), "k3").item()
    assert 0 <= value <= max(math.exp(20) - 21, abs(log_ratio)) * (1 + 1e-6)


def test_k3_stops_at_its_clamp_for_tokens_the_policy_has_ruled_out():
    logp = f64(-20.0, -100.0, -1e9)
    expected = math.exp(20) - 21
    assert objective.kl_estimate(logp, torch.zeros_like(logp), "k3").tolist() == pytest.approx(
        [expected] * 3, rel=1e-14
    )


def test_an_estimator_without_a_name_is_refused():
    with pytest.raises(ValueError, match="'k4'"):
        objective.kl_estimate(f64(0.0), f64(0.0), "k4")  # pyright: ignore[reportArgumentType]


# PPO's clipped loss --------------------------------------------------------------------------------------------------


def test_the_clipped_loss_of_literal_numbers():
    ratio = f64(1.5, 0.5, 1.5, 0.5, 1.1, 1.0).view(2, 3)
    advantages = f64(1.0, 1.0, -1.0, -1.0, 2.0, 3.0).view(2, 3)
    mask = torch.tensor([[True, True, True], [True, True, False]])
    result = objective.ppo_clip_loss(ratio.log(), torch.zeros(2, 3, dtype=torch.float64), advantages, mask, 0.2)
    # -1.2 (clipped), -0.5, 1.5, 0.8 (clipped), -2.2; the last is no response token
    assert result.loss.item() == pytest.approx((-1.2 - 0.5 + 1.5 + 0.8 - 2.2) / 5, rel=1e-14)
    assert result.clipped.tolist() == [[1.0, 0.0, 0.0], [1.0, 0.0, 0.0]]
    torch.testing.assert_close(result.ratio, f64(1.5, 0.5, 1.5, 0.5, 1.1, 0.0).view(2, 3), rtol=1e-14, atol=0)


def test_clipped_tokens_have_no_gradient_and_the_others_that_of_ratio_times_advantage():
    logp = f64(1.5, 0.5, 1.5, 0.5).log().requires_grad_()
    advantages, mask = f64(1.0, 1.0, -1.0, -1.0), torch.ones(4, dtype=torch.bool)
    loss = objective.ppo_clip_loss(logp, torch.zeros_like(logp), advantages, mask, 0.2).loss
    expected = f64(0.0, -0.5 / 4, 1.5 / 4, 0.0)
    torch.testing.assert_close(torch.autograd.grad(loss, logp)[0], expected, rtol=1e-14, atol=0)


@given(st.lists(st.tuples(st.floats(-2, 2), st.floats(-2, 2), real, st.booleans()), min_size=1, max_size=6))
def test_the_clipped_loss_is_the_sum_over_tokens_over_the_denominator(tokens):
    logp, old, advantages, flags = (list(column) for column in zip(*tokens, strict=True))
    mask = torch.tensor([flags])
    result = objective.ppo_clip_loss(f64(logp), f64(old), f64(advantages), mask, 0.2, denominator=7)
    expected = sum(oracle.ppo_token_loss(a, b, c, 0.2) for a, b, c, flag in tokens if flag) / 7
    assert result.loss.item() == pytest.approx(expected, rel=1e-12, abs=1e-13)


def test_the_losses_of_microbatches_add_up_to_the_loss_and_gradient_of_the_minibatch():
    generator = torch.Generator().manual_seed(4)
    x = torch.randn(6, 5, 3, generator=generator, dtype=torch.float64)
    mask = torch.arange(3).expand(5, 3) < torch.tensor([[3], [1], [0], [2], [3]])

    def loss(part: slice, logp: torch.Tensor) -> torch.Tensor:
        tokens = mask[part].sum() if part == slice(None) else mask.sum()
        policy = objective.ppo_clip_loss(logp[part], x[1, part], x[2, part], mask[part], 0.2, tokens).loss
        value = critic.value_loss(logp[part], x[3, part], x[4, part], mask[part], denominator=tokens).loss
        return policy + value + objective.kl_penalty(logp[part], x[5, part], None, "k2", mask[part], tokens)

    logp = x[0].clone().requires_grad_()
    whole = loss(slice(None), logp)
    parts = [loss(slice(i, i + 1), logp) for i in range(5)]
    torch.testing.assert_close(torch.stack(parts).sum(), whole, rtol=1e-13, atol=0)
    whole_gradient = torch.autograd.grad(whole, logp)
    torch.testing.assert_close(torch.autograd.grad(sum(parts), logp), whole_gradient, rtol=1e-13, atol=1e-15)


def test_what_stands_outside_the_mask_reaches_neither_the_losses_nor_their_gradients():
    mask = torch.tensor([[True, False, False]])
    logp = f64(-1.0, torch.nan, 1e6).view(1, 3).requires_grad_()
    other = f64(-1.5, -1e6, torch.nan).view(1, 3)
    losses = (
        objective.ppo_clip_loss(logp, other, other, mask, 0.2).loss,
        critic.value_loss(logp, other, other, mask).loss,
        objective.kl_penalty(logp, other, None, "k2", mask),
        objective.kl_penalty(logp, other, logp, "exact", mask),
    )
    for loss in losses:
        gradient = torch.autograd.grad(loss, logp)[0]
        assert math.isfinite(loss.item())
        assert gradient[0, 0].item() != 0.0
        assert gradient[0, 1:].tolist() == [0.0, 0.0]


def test_of_what_a_loss_returns_the_loss_alone_carries_a_gradient():
    logp = f64(-1.0, -2.0).view(1, 2).requires_grad_()
    other, mask = f64(-1.5, -1.0).view(1, 2), torch.ones(1, 2, dtype=torch.bool)
    policy = objective.ppo_clip_loss(logp, other, other, mask, 0.2)
    assert [x.requires_grad for x in policy] == [True, False, False]
    for cliprange in (None, 0.2):
        value = critic.value_loss(logp, other, other, mask, cliprange=cliprange)
        assert [x.requires_grad for x in value] == [True, False]


def test_an_infinite_ratio_is_seen_in_the_loss():
    mask = torch.ones(1, 1, dtype=torch.bool)
    result = objective.ppo_clip_loss(torch.zeros(1, 1), torch.full((1, 1), -200.0), -torch.ones(1, 1), mask, 0.2)
    assert result.loss.item() == math.inf


# the value loss ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "cliprange", "reduction", "expected"),
    [
        # V = 1, V_old = 0, G = 1.25: errors 0.25 and, clipped to V = 0.2, 1.05.  V = 3: 1.75 and 1.05.
        ("mse", None, "mean", (0.03125 + 1.53125) / 2),
        ("huber", None, "mean", (0.03125 + 0.75) / 2),
        ("mse", 0.2, "max", (0.55125 + 1.53125) / 2),
        ("huber", 0.2, "max", (0.4 + 0.75) / 2),
        ("huber", 0.2, "mean", ((0.03125 + 0.4) / 2 + (0.75 + 0.4) / 2) / 2),
        ("mse", 0.2, "mean", ((0.03125 + 0.55125) / 2 + (1.53125 + 0.55125) / 2) / 2),
    ],
)
def test_the_value_loss_of_literal_numbers(kind, cliprange, reduction, expected):
    mask = torch.tensor([[True, True, False]])
    values, returns = f64(1.0, 3.0, 50.0).view(1, 3), f64(1.25, 1.25, 0.0).view(1, 3)
    result = critic.value_loss(
        values, torch.zeros_like(values), returns, mask, kind, 0.5, cliprange=cliprange, reduction=reduction
    )
    assert result.loss.item() == pytest.approx(expected, rel=1e-14)
    assert result.clip_fraction.item() == (0.0 if cliprange is None else 1.0)


def test_values_inside_the_clip_range_count_as_unclipped_whatever_their_rounding():
    old = torch.linspace(0.1, 7.0, 1000).view(1, -1)
    values = old + torch.tensor([[0.1, 0.3]]).repeat(1, 500)  # every second one is outside 0.2
    mask = torch.ones_like(old, dtype=torch.bool)
    assert critic.value_loss(values, old, old, mask, cliprange=0.2).clip_fraction.item() == 0.5


def test_a_value_exactly_on_the_clip_range_is_not_clipped():
    old, mask = f64(0.0, 0.0, 0.0, 0.0).view(1, 4), torch.ones(1, 4, dtype=torch.bool)
    values = f64(0.25, -0.25, 0.2501, -0.2501).view(1, 4)
    assert critic.value_loss(values, old, old, mask, cliprange=0.25).clip_fraction.item() == 0.5


@given(
    tokens=st.lists(st.tuples(real, real, real), min_size=1, max_size=5),
    kind=st.sampled_from(["huber", "mse"]),
    delta=st.sampled_from([0.5, 2.0]),
    cliprange=st.sampled_from([None, 0.2, 3.0]),
    reduction=st.sampled_from(["mean", "max"]),
)
def test_the_value_loss_is_the_mean_over_tokens(tokens, kind, delta, cliprange, reduction):
    values, old_values, returns = (f64(column) for column in zip(*tokens, strict=True))
    mask = torch.ones(1, len(tokens), dtype=torch.bool)
    result = critic.value_loss(values, old_values, returns, mask, kind, delta, cliprange, reduction)
    expected = [oracle.value_token_loss(*token, kind, delta, cliprange, reduction) for token in tokens]
    assert result.loss.item() == pytest.approx(reductions.mean(expected), rel=1e-12, abs=1e-13)


# figures -------------------------------------------------------------------------------------------------------------


def test_approx_kl_is_half_the_mean_squared_log_ratio():
    logp, mask = torch.tensor([[-1.0, -2.0, torch.nan]]).requires_grad_(), torch.tensor([[True, True, False]])
    value = objective.approx_kl(logp, torch.tensor([[-1.5, -4.0, 0.0]]), mask)
    assert value.item() == (0.125 + 2.0) / 2
    assert not value.requires_grad


@given(st.lists(st.tuples(real, real), min_size=2, max_size=6))
def test_explained_variance_is_one_minus_the_share_of_the_residual(pairs):
    returns, values = (f64(column) for column in zip(*pairs, strict=True))
    mask = torch.ones_like(returns, dtype=torch.bool)
    result = critic.explained_variance(returns, values, mask).item()
    spread = reductions.variance(returns.flatten().tolist())
    if spread > 1e-9:
        residual = reductions.variance((returns - values).flatten().tolist())
        assert result == pytest.approx(1 - residual / spread, rel=1e-9, abs=1e-9)


def test_explained_variance_is_one_for_a_perfect_critic_zero_for_a_constant_and_undefined_for_constant_returns():
    returns, mask = torch.tensor([[1.0, 2.0, 4.0, torch.nan]]), torch.tensor([[True, True, True, False]])
    assert critic.explained_variance(returns, returns, mask).item() == 1.0
    assert critic.explained_variance(returns, torch.full((1, 4), 2.0), mask).item() == 0.0
    assert critic.explained_variance(returns, -returns, mask).item() == -3.0
    assert math.isnan(critic.explained_variance(torch.full((1, 4), 0.1), returns, mask).item())


def test_settings_that_have_no_meaning_are_refused():
    x, mask = torch.zeros(1, 2), torch.ones(1, 2, dtype=torch.bool)
    with pytest.raises(ValueError, match="epsilon is 0"):
        objective.ppo_clip_loss(x, x, x, mask, 0)
    with pytest.raises(ValueError, match="'l1'"):
        critic.value_loss(x, x, x, mask, "l1")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="'sum'"):
        critic.value_loss(x, x, x, mask, reduction="sum")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match=r"cliprange is -0\.2"):
        critic.value_loss(x, x, x, mask, cliprange=-0.2)
    with pytest.raises(ValueError, match="huber_delta is 0"):
        critic.value_loss(x, x, x, mask, huber_delta=0)


def test_the_upper_bound_of_the_ratio_may_be_wider_than_the_lower():
    """Ratios 1.25, 1.4 and 0.7 with advantages 1, 1 and -1, bounds 0.8 and 1.28: the second and the third are cut."""
    ratios, advantages = torch.tensor([[1.25, 1.4, 0.7]]), torch.tensor([[1.0, 1.0, -1.0]])
    mask = torch.ones_like(ratios, dtype=torch.bool)
    result = objective.ppo_clip_loss(ratios.log(), torch.zeros_like(ratios), advantages, mask, 0.2, None, 0.28)
    assert result.loss.item() == pytest.approx((-1.25 - 1.28 + 0.8) / 3, rel=1e-6)
    assert result.clipped.tolist() == [[0.0, 1.0, 1.0]]
    with pytest.raises(ValueError, match="epsilon_high is 0"):
        objective.ppo_clip_loss(ratios, ratios, advantages, mask, 0.2, None, 0.0)
