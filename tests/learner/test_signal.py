"""No signal, no step: what is learned from a rollout whose scores are all the same, and from a critic that is new."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from stable_rlhf.learner import make_batch, measure, update
from stable_rlhf.records import Batch
from tests.tiny_updates import (
    ROWS,
    decide,
    learning,
    make_config,
    make_model,
    make_optimizer,
    make_rollout,
    passes_of,
    weights,
)

SKIPPED = (2,)


def batch_of(tokenizer, scores: list[float], kl_coef: float, **optim) -> tuple[Batch, Tensor]:
    """(the batch of a rollout with these scores, [B, T] its log-ratios)."""
    config = make_config(optim=optim)
    model, rollout = make_model(tokenizer, config), make_rollout(len(tokenizer), SKIPPED)
    measured = measure(passes_of(model, config), rollout, 0)
    batch, _ = make_batch(model, measured, scores, decide(kl_coef), learning(config))
    return batch, measured.logp - measured.ref_logp


def test_equal_scores_teach_only_where_that_is_asked_for(tokenizer) -> None:
    """The advantages are those of the KL alone, sum_k lambda^k r_{t+k}, without the critic; rows without a score, which
    hold 0, are no difference."""
    equal = [0.7] * ROWS
    equal[SKIPPED[0]] = 0.0
    batch, log_ratio = batch_of(tokenizer, equal, kl_coef=0.4)
    mask, expected = batch.tokens.mask, []
    level = log_ratio[mask].mean().item()
    for row in range(ROWS):
        carried, column = 0.0, []
        for t in reversed(range(int(mask[row].sum()))):
            carried = -0.4 * (log_ratio[row, t].item() - level) + 0.95 * carried
            column.append(carried)
        expected.extend(reversed(column))
    advantages = torch.tensor(expected)
    whitened = (advantages - advantages.mean()) / max(advantages.std(correction=0).item(), 0.1)
    torch.testing.assert_close(batch.advantages[mask], whitened, atol=1e-5, rtol=0)
    assert not batch_of(tokenizer, equal, kl_coef=0.0)[0].advantages.any()
    learned, _ = batch_of(tokenizer, equal, kl_coef=0.0, skip_equal_scores=False)
    assert learned.advantages.std() > 0.3  # the errors of the critic, whitened


@pytest.mark.parametrize("other", [0.6999, 0.8, 5.0])
def test_one_score_that_differs_is_a_signal(tokenizer, other: float) -> None:
    scores = [0.7] * ROWS
    scores[5] = other
    assert torch.equal(
        batch_of(tokenizer, scores, 0.4)[0].advantages,
        batch_of(tokenizer, scores, 0.4, skip_equal_scores=False)[0].advantages,
    )


def test_the_critic_learns_the_returns_of_equal_scores(tokenizer) -> None:
    equal, skipping = [0.7] * ROWS, {"lam": 1.0}
    batch, _ = batch_of(tokenizer, equal, 0.0, **skipping)
    torch.testing.assert_close(batch.returns[batch.tokens.mask], torch.tensor(0.7).expand(int(batch.tokens.mask.sum())))


@pytest.mark.parametrize(
    ("moves", "kl_coef", "kl", "entropy_coef"),
    [
        (False, 0.0, {}, 0.0),
        (True, 0.4, {}, 0.0),
        (True, 0.4, {"in_reward": False, "in_loss": "k2"}, 0.0),
        (False, 0.0, {"in_reward": False, "in_loss": "k2"}, 0.0),
        (True, 0.0, {}, 0.1),
    ],
)
def test_the_policy_takes_no_step_where_nothing_is_said_and_the_critic_does(
    tokenizer, moves: bool, kl_coef: float, kl: dict, entropy_coef: float
) -> None:
    """Not even by the momentum of an update that said something."""
    config = make_config(optim={"entropy_coef": entropy_coef}, kl=kl)
    model, rollout = make_model(tokenizer, config), make_rollout(len(tokenizer))
    passes, optimizer = passes_of(model, config), make_optimizer(model, config)
    for step, scores in enumerate((rollout.scores, [0.7] * ROWS)):
        measured = measure(passes, dataclasses.replace(rollout, scores=scores), step)
        decision = decide(kl_coef)
        batch, _ = make_batch(model, measured, scores, decision, passes.learning)
        before = weights(model)
        update(passes, optimizer, batch, decision, step)
        changed = {name for name, weight in weights(model).items() if not torch.equal(weight, before[name])}
        assert any(name.startswith("policy.") for name in changed) == (moves or step == 0)
        assert any(name.startswith("heads.") for name in changed)


def test_a_new_critic_says_nothing_and_its_heads_come_to_differ(tokenizer) -> None:
    config = make_config(critic={"zero_init": True, "heads": 2}, optim={"num_iterations": 4})
    model, rollout = make_model(tokenizer, config), make_rollout(len(tokenizer))
    passes, optimizer = passes_of(model, config), make_optimizer(model, config)
    measured = measure(passes, rollout, 0)
    assert not measured.values.any()
    batch, _ = make_batch(model, measured, rollout.scores, decide(0.0), passes.learning)
    update(passes, optimizer, batch, decide(0.0), 0)
    after = measure(passes, rollout, 1).values[:, batch.tokens.mask]
    assert after.abs().max() > 1e-3
    assert (after[0] - after[1]).abs().max() > 1e-5
    assert make_model(tokenizer, make_config(critic={"zero_init": False})).heads[0].out.weight.any()  # pyright: ignore
