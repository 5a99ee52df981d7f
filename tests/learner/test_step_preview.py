"""The preview: an update within its bound is untouched, a longer one is taken in part, a broken one not at all."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from stable_rlhf.learner import step_preview as preview
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
    distributions,
    of,
    size,
    updated,
)
from tests.tiny_updates import assert_same

ONE_STEP = {"num_iterations": 1, "num_mini_batches": 1}

# -- the bound ------------------------------------------------------------------------------------------------------


@FULL_OR_LORA
def test_at_a_learning_rate_100_times_too_high_the_update_fills_its_bound_and_no_more(tokenizer, adapter: bool) -> None:
    """On the probe's rows, by whole forwards of one row each; after the k-th step k/n of the bound holds."""
    seen = updated(tokenizer, LIMIT, TOO_HIGH, adapter=adapter)
    assert len(seen.states) == STEPS + 1
    for k in range(1, STEPS + 1):
        assert size(seen, seen.states[k]) <= LIMIT * k / STEPS * (1 + 1e-4)
    taken = size(seen, seen.states[-1])
    assert taken >= preview.SHORT * LIMIT
    assert seen.metrics["safe/moved_kl"] == pytest.approx(taken, rel=1e-3)
    assert seen.metrics["safe/update_kl"] == LIMIT
    assert 0 < seen.metrics["safe/step_scale"] < 0.1


@FULL_OR_LORA
def test_without_the_preview_the_same_learning_rate_goes_far_beyond_the_bound(tokenizer, adapter: bool) -> None:
    seen = updated(tokenizer, None, TOO_HIGH, adapter=adapter)
    assert size(seen, seen.states[-1]) > 20 * LIMIT
    assert not any(name.startswith("safe/") for name in seen.metrics)


def test_a_longer_proposed_step_never_ends_as_a_shorter_one(tokenizer) -> None:
    """From rates far below the bound to rates 10,000 times higher: the size grows to the bound and stays there."""
    sizes = [
        updated(tokenizer, LIMIT, times * HEALTHY).metrics["safe/moved_kl"] for times in (0.1, 0.3, 1, 10, 100, 1000)
    ]
    assert sizes[0] < sizes[1] < sizes[2] < sizes[3]  # pyright: ignore[reportOperatorIssue]
    assert min(sizes[3:]) >= 0.9 * max(sizes[3:])  # pyright: ignore[reportOperatorIssue, reportArgumentType]
    assert max(sizes[3:]) <= LIMIT  # pyright: ignore[reportOperatorIssue, reportArgumentType]


@FULL_OR_LORA
def test_a_shortened_step_is_that_share_of_the_proposed_one_for_the_policy_alone(tokenizer, adapter: bool) -> None:
    optim = {**ONE_STEP, "weight_decay": 0.1}
    seen = updated(tokenizer, LIMIT, TOO_HIGH, adapter=adapter, optim=optim)
    whole = updated(tokenizer, None, TOO_HIGH, adapter=adapter, optim=optim)
    before, taken = seen.states
    assert_same(seen.proposed[0], whole.proposed[0], 0.0)
    share = seen.metrics["safe/step_scale"]
    assert share is not None
    assert 0 < share < 0.2
    moved = 0
    for name, tensor in of("policy.", taken).items():
        start, end = before[name].double(), seen.proposed[0][name].double()
        # Two roundings of a float32 of this size for each correction, of which there were at most six.
        rounding = 12 * torch.finfo(torch.float32).eps * torch.maximum(start.abs(), end.abs())
        assert ((tensor - (start + share * (end - start))).abs() <= rounding).all(), name
        moved += int((tensor != before[name]).any())
    assert moved > 0
    assert_same(of("heads.", taken), of("heads.", whole.states[-1]), 0.0)
    assert_same(of("target_heads.", taken), of("target_heads.", whole.states[-1]), 0.0)
    for one, two in zip(seen.moments[-1], whole.moments[-1], strict=True):
        assert_same(one, two, 0.0)  # AdamW's are of the step that it proposed


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
def test_an_update_within_the_bound_is_to_the_last_bit_the_update_without_the_preview(
    tokenizer, variant: str, adapter: bool
) -> None:
    on = updated(tokenizer, 20 * LOOSE, HEALTHY, adapter=adapter, **VARIANTS[variant])
    off = updated(tokenizer, None, HEALTHY, adapter=adapter, **VARIANTS[variant])
    assert_identical(on, off)
    own = {name: on.metrics[name] for name in on.metrics if name.startswith("safe/")}
    assert {name: figure for name, figure in on.metrics.items() if name not in own} == off.metrics
    kl = own.pop("safe/moved_kl")
    assert own == {"safe/step_scale": 1.0, "safe/looks": 1 + STEPS, "safe/update_kl": 20 * LOOSE}
    assert kl is not None
    assert 0 < kl < LOOSE


@FULL_OR_LORA
def test_in_bfloat16_an_update_is_within_a_bound_far_below_what_rounding_does(tokenizer, adapter: bool) -> None:
    """By float32 forwards. Rounding alone is 4e-5 nats here, which a look at the update itself would take for its
    size."""
    limit = 1e-6
    seen = updated(tokenizer, limit, TOO_HIGH, adapter=adapter, model={"dtype": "bfloat16"})
    assert 0.2 * limit < size(seen, seen.states[-1]) <= limit


# -- updates that are not taken --------------------------------------------------------------------------------------


def test_an_update_whose_logits_are_not_finite_is_not_taken(tokenizer) -> None:
    """A learning rate at which the weights themselves are finite and every product with them is not."""
    seen = updated(tokenizer, LIMIT, 1e38)
    assert not torch.isfinite(distributions(seen, seen.proposed[0], 0)).all()
    assert_same(of("policy.", seen.states[-1]), of("policy.", seen.states[0]), 0.0)
    assert not torch.equal(seen.states[-1]["heads.0.up.weight"], seen.states[0]["heads.0.up.weight"])
    assert (seen.metrics["safe/moved_kl"], seen.metrics["safe/step_scale"]) == (0.0, 0.0)
    assert all(figure is None or math.isfinite(figure) for figure in seen.metrics.values())
    assert seen.metrics["val/ratio"] == pytest.approx(1.0, abs=1e-6)  # the policy is the one that sampled


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
    seen = updated(tokenizer, limit, HEALTHY, prepare=broken(part, 2))
    assert len(shares) == STEPS
    assert_same(seen.proposed[2], seen.states[2], 0.0)
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
    assert limit is None or 0 < size(seen, seen.states[-1]) == pytest.approx(seen.metrics["safe/moved_kl"], rel=1e-3)


@pytest.mark.parametrize("limit", [None, LIMIT], ids=["no preview", "preview"])
@pytest.mark.parametrize("part", ["policy", "critic"])
def test_where_no_gradient_is_finite_nothing_moves_and_no_mean_has_a_value(
    tokenizer, part: str, limit: float | None
) -> None:
    seen = updated(tokenizer, limit, TOO_HIGH, prepare=broken(part, *range(STEPS)))
    assert_same(seen.states[-1], seen.states[0], 0.0)
    for state in seen.moments[-1]:
        assert all(not kept.any() for kept in state.values())
    own = {"safe/update_kl", "safe/moved_kl", "safe/step_scale", "safe/looks"}
    known = {name: figure for name, figure in seen.metrics.items() if figure is not None and name not in own}
    assert known == {"policy/skipped_steps": STEPS}
    assert own & seen.metrics.keys() == (set() if limit is None else own)
    assert {"val/ratio", "grad_norm/policy"} <= seen.metrics.keys()
