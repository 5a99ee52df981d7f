"""The update without a critic, against the loss token by token; rows without a reward, and groups of equal rewards."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

from stable_rlhf import Config
from stable_rlhf.learner import make_batch, measure, update
from stable_rlhf.policy.actor_critic import ActorCritic
from stable_rlhf.records import Batch, Rollout
from tests.oracles import advantages as oracle
from tests.oracles.update import in_float64, row_of
from tests.tiny_updates import (
    ROWS,
    assert_same,
    decide,
    learn,
    learning,
    make_model,
    make_optimizer,
    make_rollout,
    passes_of,
    prepare,
    weights,
)

GROUP = 4
MOST = 9
ADVANTAGES = ("rloo", "grpo", "dr_grpo", "reinforce_pp")


def config_of(advantage: str = "grpo", preset: str = "safe", kl: dict | None = None, **optim: Any) -> Config:
    return Config.from_preset(
        preset,
        rollout={"batch_size": ROWS, "num_generations": GROUP, "max_completion_length": MOST},
        critic={"heads": 0},
        optim={"preview": False, "advantage": advantage, "max_grad_norm": 1e9, **optim},
        kl={"in_reward": False, "in_loss": "k2", **(kl or {})},
    )


def with_scores(rollout: Rollout, scores: list[float]) -> Rollout:
    return dataclasses.replace(rollout, scores=scores)


def naive_loss(model: ActorCritic, batch: Batch, config: Config, kl_coef: float, rows: list[int]) -> Tensor:
    """The first minibatch's loss, where every ratio is 1, row by row and unpadded, by the model's logits."""
    kind, losses = config.optim.denominator, []
    for row in rows:
        log_ps, _ = row_of(model.policy, batch.tokens, row, config.rollout.temperature)
        tokens = []
        chosen = [log_ps[t, token] for t, token in enumerate(batch.tokens.response[row][batch.tokens.mask[row]])]
        change = torch.stack(chosen) - batch.logp[row][batch.tokens.mask[row]].double()
        level = config.optim.importance
        whole = change.sum() if level == "product" else change.mean()
        for t, logp in enumerate(chosen):
            ratio = (change[t] if level == "token" else whole).exp()
            weight = ratio.detach() * logp if config.optim.loss == "cispo" else ratio
            kl = (logp - batch.ref_logp[row, t].double()).square() / 2
            tokens.append(-batch.advantages[row, t].double() * weight + kl_coef * kl)
        losses.append(torch.stack(tokens))
    if kind == "sequence":
        return torch.stack([loss.mean() for loss in losses]).mean()
    return torch.cat(losses).sum() / (len(losses) * MOST if kind == "length" else sum(map(len, losses)))


ONE_STEP = {"num_iterations": 1, "num_mini_batches": 1}


@pytest.mark.parametrize("denominator", ["token", "sequence", "length"])
@pytest.mark.parametrize(("loss", "importance"), [("clip", "token"), ("clip", "product"), ("cispo", "sequence")])
def test_gradients_are_those_of_the_loss_token_by_token(
    tokenizer, loss: str, importance: str, denominator: str
) -> None:
    config = config_of(loss=loss, importance=importance, denominator=denominator, **ONE_STEP)
    model, rollout = make_model(tokenizer, config), make_rollout(len(tokenizer), (2,))
    batch = prepare(model, rollout, config)
    wide = in_float64(model)
    naive_loss(wide, batch, config, 0.4, [row for row in range(ROWS) if row != 2]).backward()
    expected = {name: p.grad.float() for name, p in wide.named_parameters() if p.grad is not None}
    for microbatch_tokens in (8192, 1):
        split = dataclasses.replace(
            config, optim=dataclasses.replace(config.optim, microbatch_tokens=microbatch_tokens)
        )
        metrics, steps = learn(model_again(tokenizer, split), rollout, split, kl_coef=0.4)
        assert_same(steps[0], expected, 5e-6)
        assert metrics["val/ratio"] == 1.0
    assert max(gradient.abs().max() for gradient in expected.values()) > 0.01


def model_again(tokenizer, config: Config) -> ActorCritic:
    return make_model(tokenizer, config)


@pytest.mark.parametrize("in_reward", [False, True])
@pytest.mark.parametrize("advantage", ADVANTAGES)
def test_a_batchs_advantages_are_those_of_loops(tokenizer, advantage: str, in_reward: bool) -> None:
    if in_reward and advantage == "grpo":
        pytest.skip("Config refuses it: its deviation would divide the coefficient too")
    kl = {"in_reward": True, "in_loss": "none", "length_neutral": False} if in_reward else {}
    config = config_of(advantage, kl=kl)
    model, rollout = make_model(tokenizer, config), make_rollout(len(tokenizer), (2,))
    measured = measure(passes_of(model, config), rollout, 0)
    batch, metrics = make_batch(model, measured, rollout.scores, decide(0.7), learning(config))
    mask, log_ratio = batch.tokens.mask, (measured.logp - measured.ref_logp).double()
    scores = torch.tensor(rollout.scores, dtype=torch.float64)
    rewards = oracle.token_rewards(scores, log_ratio, 0.7 if in_reward else 0.0, mask)
    if advantage == "reinforce_pp":
        expected = oracle.reinforce_pp(rewards, mask, config.optim.gamma, config.optim.whiten_floor)
    else:
        whole = torch.where(mask, rewards, 0).sum(1)
        more = (1e-4,) if advantage == "grpo" else ()
        expected = torch.where(mask, getattr(oracle, advantage)(whole, mask.any(1), GROUP, *more)[:, None], 0)
    torch.testing.assert_close(batch.advantages.double(), expected, rtol=1e-4, atol=1e-5)
    assert batch.advantages.abs().max() > 0.5
    assert not batch.returns.any()
    assert batch.counts.all()
    assert metrics == {"objective/non_score_reward": metrics["objective/non_score_reward"], "frac_reward_zero_std": 0.0}


def test_a_reward_that_failed_leaves_the_others_of_its_group_as_they_are(tokenizer) -> None:
    """What stands in its place reaches nothing."""
    config, found = config_of(), []
    for instead in (0.0, 1e6):
        rollout = make_rollout(len(tokenizer), (1,))
        scores = [instead if row == 1 else score for row, score in enumerate(rollout.scores)]
        found.append(learn(make_model(tokenizer, config), with_scores(rollout, scores), config, kl_coef=0.1))
    assert found[0][0] == found[1][0]
    assert_same(found[0][1][-1], found[1][1][-1], 0.0)


def test_there_is_no_critic_and_nothing_of_it_is_measured(tokenizer) -> None:
    config = config_of()
    model = make_model(tokenizer, config)
    assert model.critic_parameters() == []
    assert len(make_optimizer(model, config).param_groups) == 1
    metrics, steps = learn(model, make_rollout(len(tokenizer)), config, kl_coef=0.1)
    assert sorted(metrics) == [
        *("grad_norm/policy", "loss/kl_avg", "loss/policy_avg", "policy/approxkl_avg", "policy/clipfrac_avg"),
        *("policy/entropy_avg", "policy/skipped_steps", "val/ratio", "val/ratio_var"),
    ]
    assert all(name.startswith("policy.") for name in steps[0])


# -- groups of equal rewards --------------------------------------------------------------------------------------

EQUAL = [0.5, 0.5, 0.5, 0.5, 1.0, -1.0, 0.25, 0.75]


def batch_of(tokenizer, config: Config, scores: list[float], skipped: tuple[int, ...] = ()) -> tuple[Batch, dict]:
    model, rollout = make_model(tokenizer, config), make_rollout(len(tokenizer), skipped)
    measured = measure(passes_of(model, config), rollout, 0)
    return make_batch(model, measured, scores, decide(0.1), learning(config))


def test_groups_of_equal_rewards_are_counted(tokenizer) -> None:
    config = config_of()
    assert batch_of(tokenizer, config, EQUAL)[1]["frac_reward_zero_std"] == 0.5
    assert batch_of(tokenizer, config, [1.0] * ROWS)[1]["frac_reward_zero_std"] == 1.0
    # The one that differs has no reward: the group's others are equal, three of the seven that are counted.
    odd = [*EQUAL[:3], 9.0, *EQUAL[4:]]
    assert batch_of(tokenizer, config, odd, skipped=(3,))[1]["frac_reward_zero_std"] == pytest.approx(3 / 7)


@pytest.mark.parametrize("denominator", ["token", "sequence", "length"])
def test_they_are_left_out_of_loss_and_denominator_where_that_is_asked_for(tokenizer, denominator: str) -> None:
    config = config_of(skip_zero_variance_groups=True, denominator=denominator, **ONE_STEP)
    model = make_model(tokenizer, config)
    rollout = with_scores(make_rollout(len(tokenizer)), EQUAL)
    batch = prepare(model, rollout, config)
    assert batch.counts.any(1).tolist() == [False] * 4 + [True] * 4
    wide = in_float64(model)
    naive_loss(wide, batch, config, 0.4, [4, 5, 6, 7]).backward()
    expected = {name: p.grad.float() for name, p in wide.named_parameters() if p.grad is not None}
    metrics, steps = learn(model, rollout, config, kl_coef=0.4)
    assert_same(steps[0], expected, 5e-6)
    assert metrics["val/ratio"] == 1.0  # of the rows that count, to the bit
    whole = dataclasses.replace(config, optim=dataclasses.replace(config.optim, skip_zero_variance_groups=False))
    _, others = learn(make_model(tokenizer, whole), rollout, whole, kl_coef=0.4)
    name = next(iter(steps[0]))
    assert (others[0][name] - steps[0][name]).abs().max() > 1e-4


def test_a_minibatch_of_such_groups_alone_takes_no_step(tokenizer) -> None:
    config = config_of(skip_zero_variance_groups=True, num_iterations=2, num_mini_batches=8)
    rollout = with_scores(make_rollout(len(tokenizer)), EQUAL)
    metrics, steps = learn(make_model(tokenizer, config), rollout, config, kl_coef=0.4)
    assert len(steps) == 2 * 4
    assert metrics["val/ratio"] == pytest.approx(1.0, abs=0.1)


@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("advantage", ADVANTAGES)
def test_a_constant_reward_leaves_the_policy_to_the_bit(tokenizer, advantage: str, skip: bool) -> None:
    if skip and advantage == "reinforce_pp":
        pytest.skip("Config refuses it: its advantages are relative to the batch")
    config = config_of(advantage, skip_zero_variance_groups=skip)
    model = make_model(tokenizer, config)
    rollout = with_scores(make_rollout(len(tokenizer)), [0.3] * ROWS)
    passes, optimizer = passes_of(model, config), make_optimizer(model, config)
    update(passes, optimizer, prepare(model, make_rollout(len(tokenizer)), config), decide(0.0), 0)  # some momentum
    before = weights(model)
    metrics = update(passes, optimizer, prepare(model, rollout, config, step=1), decide(0.0), 1).metrics
    assert_same(weights(model), before, 0.0)
    assert metrics["policy/skipped_steps"] == 0
    known = update(passes, optimizer, prepare(model, make_rollout(len(tokenizer)), config), decide(0.0), 2).metrics
    assert metrics.keys() <= known.keys() <= {*metrics, "loss/kl_avg"}
    assert (metrics["val/ratio"] is None) == skip  # no step, no mean


def test_a_floor_of_nearly_nothing_leaves_advantages_as_they_are(tokenizer) -> None:
    batches = [
        make_batch(model, measured, [float(row) for row in range(ROWS)], decide(0.0), learning(config))[0].advantages
        for config in (config_of("reinforce_pp", whiten_floor=floor) for floor in (1e-8, 0.1))
        for model in [make_model(tokenizer, config)]
        for measured in [measure(passes_of(model, config), make_rollout(len(tokenizer)), 0)]
    ]
    assert batches[0].any()
    assert torch.equal(*batches)


@pytest.mark.parametrize("advantage", [name for name in ADVANTAGES if name != "grpo"])
def test_what_rounding_leaves_of_the_kl_in_the_reward_is_nothing(tokenizer, advantage: str) -> None:
    """Log-ratios that should be 0 are 1e-7; a group's deviation would make advantages of any size of them."""
    config = config_of(advantage, kl={"in_reward": True, "in_loss": "none"})
    model, rollout = make_model(tokenizer, config), make_rollout(len(tokenizer))
    measured = measure(passes_of(model, config), rollout, 0)
    noise = torch.randn(measured.logp.shape, generator=torch.Generator().manual_seed(0))
    for size, nothing in ((2e-8, True), (1e-2, False)):
        near = dataclasses.replace(measured, logp=measured.ref_logp + size * noise)
        batch, _ = make_batch(model, near, [0.3] * ROWS, decide(1.0), learning(config))
        assert bool(batch.advantages.any()) != nothing
