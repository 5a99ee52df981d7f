"""The preview: steps within its bound are untouched, longer ones are taken in part, broken ones not at all."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from stable_rlhf.learner.passes import DirectPasses
from stable_rlhf.policy.actor_critic import ActorCritic
from tests.tiny_previews import (
    FULL_OR_LORA,
    HEALTHY,
    LIMIT,
    LOOSE,
    STEPS,
    TOO_HIGH,
    assert_identical,
    by_step,
    distributions,
    estimated,
    exact,
    of,
    updated,
)
from tests.tiny_updates import assert_same

# -- the bound ------------------------------------------------------------------------------------------------------


@FULL_OR_LORA
def test_at_a_learning_rate_100_times_too_high_every_step_stays_within_the_bound(tokenizer, adapter: bool) -> None:
    """On the probe's rows by the estimate; over the rollout and the vocabulary the exact KL is at most twice that."""
    seen = updated(tokenizer, LIMIT, TOO_HIGH, adapter=adapter)
    assert len(seen.states) == STEPS + 1
    assert 0 < min(by_step(seen, estimated)) < max(by_step(seen, estimated)) <= LIMIT
    assert max(by_step(seen, exact)) <= 2 * LIMIT
    assert seen.metrics["safe/scaled_steps"] == STEPS
    proposals = [estimated(seen, *pair) for pair in zip(seen.states, seen.proposed, strict=False)]
    assert seen.metrics["safe/preview_kl"] == pytest.approx(max(proposals), rel=1e-4)


@FULL_OR_LORA
def test_without_the_preview_the_same_learning_rate_goes_far_beyond_the_bound(tokenizer, adapter: bool) -> None:
    seen = updated(tokenizer, None, TOO_HIGH, adapter=adapter)
    assert max(by_step(seen, estimated)) > 20 * LIMIT
    assert min(by_step(seen, exact)) > 10 * LIMIT
    assert not any(name.startswith("safe/") for name in seen.metrics)


@FULL_OR_LORA
def test_a_scaled_step_is_that_share_of_the_proposed_one_for_the_policy_alone(tokenizer, adapter: bool) -> None:
    optim = {"num_iterations": 1, "num_mini_batches": 1, "weight_decay": 0.1}
    seen = updated(tokenizer, LIMIT, TOO_HIGH, adapter=adapter, optim=optim)
    whole = updated(tokenizer, None, TOO_HIGH, adapter=adapter, optim=optim)
    before, taken = seen.states
    assert_same(seen.proposed[0], whole.proposed[0], 0.0)
    share = seen.metrics["safe/step_scale"]
    assert share is not None
    assert 0 < share < 0.1
    moved = 0
    for name, tensor in of("policy.", taken).items():
        start, end = before[name].double(), seen.proposed[0][name].double()
        # Two roundings of a float32 of this size for each scaling, of which there were at most two.
        rounding = 4 * torch.finfo(torch.float32).eps * torch.maximum(start.abs(), end.abs())
        assert ((tensor - (start + share * (end - start))).abs() <= rounding).all(), name
        moved += int((tensor != before[name]).any())
    assert moved > 0
    assert_same(of("heads.", taken), of("heads.", whole.states[-1]), 0.0)
    assert_same(of("target_heads.", taken), of("target_heads.", whole.states[-1]), 0.0)
    for one, two in zip(seen.moments[-1], whole.moments[-1], strict=True):
        assert_same(one, two, 0.0)  # AdamW's are of the step that it proposed


@pytest.mark.parametrize(
    ("adapter", "limit", "times", "scalings"), [(False, 0.5, 100, 3), (False, 2.0, 300, 2), (True, 2.0, 300, 4)]
)
def test_a_step_that_is_scaled_again_is_the_product_of_its_shares_of_the_proposed_one(
    tokenizer, adapter: bool, limit: float, times: int, scalings: int
) -> None:
    """Each share is the bound over the KL measured last."""
    optim = {"num_iterations": 1, "num_mini_batches": 1}
    seen = updated(tokenizer, limit, times * HEALTHY, adapter=adapter, optim=optim)
    before, taken = seen.states

    def part(scale: float) -> dict[str, Tensor]:
        return {name: start + scale * (seen.proposed[0][name] - start) for name, start in before.items()}

    scale = 1.0
    for number in range(scalings + 1):
        kl = estimated(seen, before, part(scale))
        assert (kl <= limit) == (number == scalings)
        scale *= limit / kl if kl > limit else 1.0
    assert seen.metrics["safe/step_scale"] == pytest.approx(scale, rel=2e-3)
    assert seen.metrics["safe/scaled_steps"] == 1
    wanted = part(seen.metrics["safe/step_scale"])
    for name, tensor in of("policy.", taken).items():
        torch.testing.assert_close(tensor, wanted[name], atol=1e-6, rtol=1e-5)


VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "bfloat16": {"model": {"dtype": "bfloat16"}},
    "recomputed layers": {"model": {"gradient_checkpointing": True}},
    "a critic that reaches the transformer": {"critic": {"backbone_gradient": True}},
    "the exact KL in the loss": {"kl": {"in_reward": False, "in_loss": "exact"}},
    "passes of a few tokens": {"optim": {"microbatch_tokens": 20}},
}


@FULL_OR_LORA
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_step_within_the_bound_is_to_the_last_bit_the_step_without_the_preview(
    tokenizer, variant: str, adapter: bool
) -> None:
    on = updated(tokenizer, LOOSE, HEALTHY, adapter=adapter, **VARIANTS[variant])
    off = updated(tokenizer, None, HEALTHY, adapter=adapter, **VARIANTS[variant])
    assert_identical(on, off)
    own = {name: on.metrics[name] for name in on.metrics if name.startswith("safe/")}
    assert {name: figure for name, figure in on.metrics.items() if name not in own} == off.metrics
    kl = own.pop("safe/preview_kl")
    assert own == {"safe/step_scale": 1.0, "safe/scaled_steps": 0}
    assert kl is not None
    assert 0 < kl < LOOSE


def test_steps_that_are_looked_at_together_are_bounded_together(tokenizer) -> None:
    """A bound that the first step keeps, and that the three others together exceed three times."""
    whole = updated(tokenizer, 10.0, HEALTHY)
    first, others = (estimated(whole, whole.states[a], whole.states[b]) for a, b in ((0, 1), (1, STEPS)))
    limit = (first + others / 3) / 2
    assert first < limit < others / 3
    seen = updated(tokenizer, limit, HEALTHY)
    assert estimated(seen, seen.states[1], seen.states[STEPS]) <= 3 * limit * (1 + 1e-6)
    assert seen.metrics["safe/scaled_steps"] == STEPS - 1
    scale = (seen.metrics["safe/step_scale"] * STEPS - 1) / (STEPS - 1)
    for name, start in of("policy.", seen.states[1]).items():
        wanted = start + scale * (seen.proposed[-1][name] - start)
        torch.testing.assert_close(seen.states[STEPS][name], wanted, atol=1e-7, rtol=1e-6)


# -- steps that are not taken ---------------------------------------------------------------------------------------


def test_a_proposed_step_whose_logits_are_not_finite_is_not_taken(tokenizer) -> None:
    """A learning rate at which the weights themselves are finite and every product with them is not."""
    seen = updated(tokenizer, LIMIT, 1e38)
    assert not torch.isfinite(distributions(seen, seen.proposed[0], 0)).all()
    assert_same(of("policy.", seen.states[-1]), of("policy.", seen.states[0]), 0.0)
    assert not torch.equal(seen.states[-1]["heads.0.up.weight"], seen.states[0]["heads.0.up.weight"])
    safe = {name: figure for name, figure in seen.metrics.items() if name.startswith("safe/")}
    assert safe == {"safe/preview_kl": None, "safe/step_scale": 0.0, "safe/scaled_steps": STEPS}
    assert all(figure is None or math.isfinite(figure) for figure in seen.metrics.values())
    assert seen.metrics["val/ratio"] == pytest.approx(1.0, abs=1e-6)  # the policy is the one that sampled


def test_a_step_that_is_beyond_the_bound_after_every_scaling_is_not_taken(tokenizer) -> None:
    """10,000 times too high, a bound of 2 nats: the first KL stays near 2.2 as the step is scaled by 2 / 2.2."""
    seen = updated(tokenizer, 2.0, 1e4 * HEALTHY, adapter=True)
    before, after = seen.states[0], seen.states[1]
    assert 2.0 < estimated(seen, before, seen.proposed[0]) < 2.5
    assert_same(of("policy.", after), of("policy.", before), 0.0)
    assert not torch.equal(after["heads.0.up.weight"], before["heads.0.up.weight"])
    assert seen.metrics["safe/scaled_steps"] >= 1
    # The second is within the bound as it is, so the others wait.
    assert 0 < estimated(seen, seen.states[1], seen.states[2]) <= 2.0
    assert 0 < estimated(seen, seen.states[2], seen.states[STEPS]) <= 2 * 2.0


def test_a_step_is_looked_at_once_as_proposed_and_after_each_of_four_scalings(tokenizer) -> None:
    """The first step of the test above, which no scaling brings within the bound."""
    looks: list[int] = []
    steps: list[int] = []

    def prepare(model: ActorCritic, optimizer: torch.optim.Optimizer) -> None:
        def note(_: Any, inputs: Any) -> None:
            if not torch.is_grad_enabled():
                looks.append(len(steps))

        model.register_forward_pre_hook(note)
        optimizer.register_step_post_hook(lambda *_: steps.append(0))

    updated(tokenizer, 2.0, 1e4 * HEALTHY, adapter=True, prepare=prepare)
    assert looks.count(1) == 1 + 4


def test_a_policy_that_one_proposal_breaks_has_no_largest_kl(tokenizer) -> None:
    """The others are finite, and none of them is the largest."""

    def prepare(model: ActorCritic, optimizer: torch.optim.Optimizer) -> None:
        rates = iter([TOO_HIGH, 1e38, TOO_HIGH, TOO_HIGH])

        def turn(*_: Any) -> None:
            optimizer.param_groups[0]["lr"] = next(rates)

        optimizer.register_step_pre_hook(turn)

    seen = updated(tokenizer, LIMIT, TOO_HIGH, prepare=prepare)
    assert_same(of("policy.", seen.states[2]), of("policy.", seen.states[1]), 0.0)
    assert seen.metrics["safe/preview_kl"] is None
    assert seen.metrics["safe/scaled_steps"] == STEPS
    kls = [estimated(seen, seen.states[i], seen.states[i + 1]) for i in range(STEPS)]
    assert kls[1] == 0.0
    assert all(0 < kl <= LIMIT * (1 + 1e-6) for kl in (kls[0], kls[2], kls[3]))


def broken(part: str, *at: int) -> Callable[[ActorCritic, torch.optim.Optimizer], None]:
    """Makes a gradient of the policy or the critic infinite at these optimiser steps."""

    def prepare(model: ActorCritic, optimizer: torch.optim.Optimizer) -> None:
        done: list[Any] = []
        optimizer.register_step_post_hook(lambda *_: done.append(None))
        parameter = model.policy_parameters()[0] if part == "policy" else model.critic_parameters()[0]

        def spoil(gradient: Tensor) -> Tensor | None:
            if len(done) not in at:
                return None
            return gradient.index_fill(0, torch.tensor([0]), torch.inf)

        parameter.register_hook(spoil)

    return prepare


@pytest.mark.parametrize("limit", [None, LIMIT], ids=["no preview", "preview"])
@pytest.mark.parametrize("part", ["policy", "critic"])
def test_a_gradient_that_is_not_finite_costs_its_own_step_and_no_other(
    tokenizer, part: str, limit: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    shares: list[tuple[list[str], Tensor]] = []
    real = DirectPasses.learn

    def watched(self: DirectPasses, *arguments: Any) -> tuple[list[str], Tensor]:
        shares.append(real(self, *arguments))
        return shares[-1]

    monkeypatch.setattr(DirectPasses, "learn", watched)
    seen = updated(tokenizer, limit, TOO_HIGH, prepare=broken(part, 2))
    assert len(shares) == STEPS
    assert_same(seen.states[3], seen.states[2], 0.0)
    for one, two in zip(seen.moments[3], seen.moments[2], strict=True):
        assert_same(one, two, 0.0)
    for before, after in ((0, 1), (1, 2), (3, 4)):
        for name in ("policy.model.layers.0.mlp.up_proj.weight", "heads.0.up.weight", "target_heads.0.up.weight"):
            assert not torch.equal(seen.states[before][name], seen.states[after][name]), (before, name)
    assert seen.metrics["policy/skipped_steps"] == 1
    taken = [figures.double() for i, (_, figures) in enumerate(shares) if i != 2]
    means = dict(zip(shares[0][0], torch.stack(taken).mean(0).tolist(), strict=True))
    for name in ("val/ratio", "loss/value_avg", "loss/policy_avg", "policy/entropy_avg"):
        assert seen.metrics[name] == pytest.approx(means[name], rel=1e-5, abs=1e-6), name
    assert all(figure is not None and math.isfinite(figure) for figure in seen.metrics.values())
    if limit is not None:
        assert seen.metrics["safe/scaled_steps"] == STEPS - 1
        kls = [estimated(seen, seen.states[i], seen.proposed[i]) for i in range(STEPS)]
        assert kls[2] == 0
        assert seen.metrics["safe/preview_kl"] == pytest.approx(max(kls), rel=1e-4)


def test_a_step_that_was_not_taken_is_in_no_mean_of_the_shares(tokenizer) -> None:
    """Two steps scaled to almost nothing, two passed over: the mean is of the two."""
    seen = updated(tokenizer, 1e-9, TOO_HIGH, prepare=broken("policy", 0, 3))
    assert seen.metrics["policy/skipped_steps"] == seen.metrics["safe/scaled_steps"] == 2
    share = seen.metrics["safe/step_scale"]
    assert share is not None
    assert share < 1e-3


def test_steps_that_are_looked_at_together_are_bounded_by_as_many_as_were_taken(tokenizer) -> None:
    """Three wait for the last look, and one of them is passed over: the bound is that of two."""
    whole = updated(tokenizer, 10.0, HEALTHY, prepare=broken("policy", 2))
    first, others = (estimated(whole, whole.states[a], whole.states[b]) for a, b in ((0, 1), (1, STEPS)))
    assert whole.metrics["safe/preview_kl"] == pytest.approx(max(first, others), rel=1e-4)
    assert (whole.metrics["safe/step_scale"], whole.metrics["safe/scaled_steps"]) == (1.0, 0)
    limit = others / 2.5
    assert first < limit
    seen = updated(tokenizer, limit, HEALTHY, prepare=broken("policy", 2))
    assert 0 < estimated(seen, seen.states[1], seen.states[STEPS]) <= 2 * limit * (1 + 1e-6)
    assert seen.metrics["safe/scaled_steps"] == 2
    assert seen.metrics["policy/skipped_steps"] == 1
    share = 3 * seen.metrics["safe/step_scale"] - 1  # of the first step all, of the two others this
    for name, start in of("policy.", seen.states[1]).items():
        wanted = start + share / 2 * (seen.proposed[-1][name] - start)
        torch.testing.assert_close(seen.states[STEPS][name], wanted, atol=1e-7, rtol=1e-6)


@pytest.mark.parametrize("limit", [None, LIMIT], ids=["no preview", "preview"])
@pytest.mark.parametrize("part", ["policy", "critic"])
def test_where_no_gradient_is_finite_nothing_moves_and_no_mean_has_a_value(
    tokenizer, part: str, limit: float | None
) -> None:
    seen = updated(tokenizer, limit, TOO_HIGH, prepare=broken(part, *range(STEPS)))
    assert_same(seen.states[-1], seen.states[0], 0.0)
    for state in seen.moments[-1]:
        assert all(not kept.any() for kept in state.values())
    known = {name: figure for name, figure in seen.metrics.items() if figure is not None}
    assert known == {"policy/skipped_steps": STEPS} | ({} if limit is None else {"safe/scaled_steps": 0})
    own = {"safe/preview_kl", "safe/step_scale", "safe/scaled_steps"}
    assert own & seen.metrics.keys() == (set() if limit is None else own)
    assert {"val/ratio", "grad_norm/policy"} <= seen.metrics.keys()
