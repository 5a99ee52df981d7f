"""The update against naive loops: ratio, advantages, gradients of every term, accumulation, padding."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from torch import Tensor

from stable_rlhf import Config
from stable_rlhf.learner import make_batch, measure, rollout_metrics
from stable_rlhf.learner.microbatches import permutation
from stable_rlhf.ops import objective
from stable_rlhf.policy.actor_critic import ActorCritic
from stable_rlhf.policy.transformer import causal_lm
from stable_rlhf.records import Batch, Tokens
from tests.oracles.update import in_float64
from tests.tiny_updates import (
    ONE_STEP,
    ROWS,
    assert_same,
    decide,
    learn,
    learning,
    make_config,
    make_model,
    make_rollout,
    passes_of,
    prepare,
    weights,
)

# -- the ratio ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("accumulation", [1, 4])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("adapter", [False, True])
def test_the_first_minibatch_has_ratio_one_at_every_token_and_the_second_has_not(
    tokenizer, monkeypatch: pytest.MonkeyPatch, adapter: bool, checkpointing: bool, accumulation: int, dtype: str
) -> None:
    seen: list[Tensor] = []
    real = objective.ppo_clip_loss

    def watched(logp, old_logp, advantages, mask, *rest):
        result = real(logp, old_logp, advantages, mask, *rest)
        seen.append(result.ratio[mask])
        return result

    monkeypatch.setattr("stable_rlhf.learner.objective.ppo_clip_loss", watched)
    config = make_config(
        optim={"microbatch_tokens": 1 if accumulation == 4 else 8192, "learning_rate": 1e-2},
        model={"gradient_checkpointing": checkpointing, "dtype": dtype},
    )
    learn(make_model(tokenizer, config, adapter), make_rollout(len(tokenizer)), config)
    assert len(seen) == 4 * accumulation  # 2 passes x 2 minibatches
    assert torch.equal(torch.cat(seen[:accumulation]), torch.ones(sum(map(len, seen[:accumulation]))))
    assert (torch.cat(seen[accumulation : 2 * accumulation]) - 1).abs().max() > 1e-3


def test_the_variance_of_the_ratio_is_over_tokens(tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Tensor] = []
    real = objective.ppo_clip_loss

    def watched(logp, old_logp, advantages, mask, *rest):
        result = real(logp, old_logp, advantages, mask, *rest)
        seen.append(result.ratio[mask].double())
        return result

    monkeypatch.setattr("stable_rlhf.learner.objective.ppo_clip_loss", watched)
    config = make_config(optim={"num_iterations": 3, "num_mini_batches": 1, "learning_rate": 1e-2})
    metrics, _ = learn(make_model(tokenizer, config), make_rollout(len(tokenizer)), config)
    ratios = torch.cat(seen)  # the same 31 tokens three times
    assert metrics["val/ratio"] == pytest.approx(ratios.mean().item(), abs=1e-6)
    assert metrics["val/ratio_var"] == pytest.approx(ratios.var(correction=0).item(), rel=1e-4)


# -- optimiser steps, accumulation, padding -----------------------------------------------------------------------


@pytest.mark.parametrize(("iterations", "mini_batches", "microbatch"), [(1, 1, 8192), (2, 4, 8192), (3, 2, 9)])
def test_an_update_takes_iterations_times_minibatches_optimiser_steps(
    tokenizer, iterations, mini_batches, microbatch
) -> None:
    optim = {
        "num_iterations": iterations,
        "num_mini_batches": mini_batches,
        "microbatch_tokens": microbatch,
    }
    config = make_config(optim=optim)
    _, steps = learn(make_model(tokenizer, config), make_rollout(len(tokenizer)), config)
    assert len(steps) == iterations * mini_batches


def test_every_pass_sees_each_row_once_in_another_order_given_by_seed_and_step() -> None:
    orders = [permutation(ROWS, seed, step, i).tolist() for seed in (0, 1) for step in (0, 1) for i in (0, 1)]
    assert all(sorted(order) == list(range(ROWS)) for order in orders)
    assert len({tuple(order) for order in orders}) == len(orders)
    assert permutation(ROWS, 1, 1, 1).tolist() == orders[-1]


def without_clipped_values(metrics: dict) -> dict:
    """All but one: a value within the clip range counts as clipped where rounding has moved its copy by a bit."""
    return {name: value for name, value in metrics.items() if name != "val/clipfrac_avg"}


@pytest.mark.parametrize("preset", ["safe", "paper"])
@pytest.mark.parametrize("adapter", [False, True])
def test_the_cut_into_microbatches_changes_no_weight_and_no_metric(tokenizer, preset: str, adapter: bool) -> None:
    results = []
    for microbatch in (8192, 18, 1):
        config = make_config(preset, optim={"microbatch_tokens": microbatch, "max_grad_norm": 1.0})
        model = make_model(tokenizer, config, adapter)
        before = weights(model)
        metrics, _ = learn(model, make_rollout(len(tokenizer)), config, kl_coef=0.3, sgd=0.05)
        results.append((metrics, weights(model)))
    moved = max((results[0][1][name] - before[name]).abs().max().item() for name in before)
    assert moved > 1e-2  # or the comparison would say nothing
    for metrics, after in results[1:]:
        assert_same(after, results[0][1], 1e-6)
        expected = without_clipped_values(results[0][0])
        assert without_clipped_values(metrics) == pytest.approx(expected, abs=2e-6, rel=1e-6)


def test_padding_columns_change_no_weight_and_no_metric(tokenizer) -> None:
    rollout = make_rollout(len(tokenizer))
    tokens = rollout.tokens
    junk = torch.full((ROWS, 3), 77)
    wide = Tokens(
        ids=torch.cat([tokens.ids, junk], 1),
        start=tokens.start,
        response=torch.cat([tokens.response, junk], 1),
        mask=torch.cat([tokens.mask, torch.zeros(ROWS, 3, dtype=torch.bool)], 1),
    )
    results = []
    for given in (rollout, dataclasses.replace(rollout, tokens=wide)):
        config = make_config()
        model = make_model(tokenizer, config)
        metrics, _ = learn(model, given, config, kl_coef=0.3, sgd=0.05)
        figures = rollout_metrics(given, measure(passes_of(model, config), given, 0))
        results.append((metrics | figures, weights(model)))
    assert_same(results[1][1], results[0][1], 1e-6)
    assert without_clipped_values(results[1][0]) == pytest.approx(without_clipped_values(results[0][0]), abs=2e-6)


def test_what_stands_under_the_mask_reaches_no_gradient(tokenizer) -> None:
    rollout = make_rollout(len(tokenizer))
    tokens = rollout.tokens
    ends = tokens.start + tokens.mask.sum(1)
    used = torch.arange(tokens.ids.shape[1]) < ends[:, None]
    other = dataclasses.replace(
        tokens,
        ids=torch.where(used, tokens.ids, 5),
        response=torch.where(tokens.mask, tokens.response, 9),
    )
    other = dataclasses.replace(rollout, tokens=other)
    config = make_config("paper", optim=ONE_STEP)
    gradients = [learn(make_model(tokenizer, config), given, config, kl_coef=1.0)[1][0] for given in (rollout, other)]
    assert_same(gradients[1], gradients[0], 0.0)


# -- advantages and returns ---------------------------------------------------------------------------------------


def naive_soft_min(values: list[float], alpha: float = 0.3) -> float:
    """Of one head its value."""
    if len(values) == 1:
        return values[0]
    v1, v2 = values
    return -alpha * (math.log(math.exp(-v1 / alpha) + math.exp(-v2 / alpha)) - math.log(2))


@pytest.mark.parametrize("heads", [1, 2])
@pytest.mark.parametrize("critic_lam", [None, 1.0])
@pytest.mark.parametrize("floor", [0.1, 10.0])
@pytest.mark.parametrize("bootstrap", ["online", "target", "mixed"])
@pytest.mark.parametrize("neutral", [False, True])
def test_advantages_and_returns_are_those_of_a_loop_over_tokens(
    tokenizer, neutral: bool, bootstrap: str, floor: float, critic_lam, heads: int
) -> None:
    """delta_t = r_t + gamma V''(s_{t+1}) - V'(s_t): V', V'' the values that critic.bootstrap names."""
    kl_coef, gamma, lam = 0.4, 0.9, 0.8
    config = make_config(
        optim={"gamma": gamma, "lam": lam, "whiten_floor": floor},
        critic={"heads": heads, "bootstrap": bootstrap, "lam": critic_lam},
        kl={"length_neutral": neutral},
    )
    model, rollout = make_model(tokenizer, config), make_rollout(len(tokenizer), skipped=(4,))
    measured = measure(passes_of(model, config), rollout, 0)
    batch, _ = make_batch(model, measured, rollout.scores, decide(kl_coef), learning(config))
    expected_advantages, expected_returns = [], []
    ratios = [
        (measured.logp[row, t] - measured.ref_logp[row, t]).item()
        for row in range(ROWS)
        for t in range(int(measured.tokens.mask[row].sum()))
    ]
    level = sum(ratios) / len(ratios) if neutral else 0.0
    for row in range(ROWS):
        length = int(measured.tokens.mask[row].sum())
        online, target = (
            [naive_soft_min(values[:, row, t].tolist()) for t in range(length)]
            for values in (measured.values, measured.targets)
        )
        here = {"online": online, "target": target, "mixed": online}[bootstrap]
        there = {"online": online, "target": target, "mixed": target}[bootstrap]
        for weight, out in ((lam, expected_advantages), (lam if critic_lam is None else critic_lam, expected_returns)):
            carried, column = 0.0, []
            for t in reversed(range(length)):
                reward = -kl_coef * ((measured.logp[row, t] - measured.ref_logp[row, t]).item() - level)
                last = t == length - 1
                delta = reward + (rollout.scores[row] if last else gamma * there[t + 1]) - here[t]
                carried = delta + gamma * weight * carried
                column.append(carried + (here[t] if out is expected_returns else 0.0))
            out.extend(reversed(column))
    advantages, mask = torch.tensor(expected_advantages, dtype=torch.float64), measured.tokens.mask
    whitened = (advantages - advantages.mean()) / max(advantages.std(correction=0).item(), floor)
    torch.testing.assert_close(batch.advantages[mask].double(), whitened, atol=1e-5, rtol=0)
    torch.testing.assert_close(batch.returns[mask].double(), torch.tensor(expected_returns).double(), atol=1e-5, rtol=0)
    assert not batch.advantages[~mask].any()
    assert not batch.returns[~mask].any()


def test_the_kl_coefficient_acts_on_the_advantages_only_when_the_kl_is_in_the_reward(tokenizer) -> None:
    rollout = make_rollout(len(tokenizer))
    for kl, acts in (({"in_reward": True}, True), ({"in_reward": False, "in_loss": "k2"}, False)):
        config = make_config(kl=kl)
        without, with_kl = (
            prepare(make_model(tokenizer, config), rollout, config, coef).advantages for coef in (0.0, 1.0)
        )
        assert ((without - with_kl).abs().max() > 0.05) == acts
        assert torch.equal(without, with_kl) != acts


def test_the_kl_in_the_reward_pays_for_no_length_of_its_own(tokenizer) -> None:
    """With every log-ratio the same, no completion is better for its length: the KL part of the reward is 0."""
    rollout = make_rollout(len(tokenizer))
    config = make_config(optim={"lam": 1.0, "whiten_floor": 1e3})
    model = make_model(tokenizer, config)
    measured = measure(passes_of(model, config), rollout, 0)
    measured = dataclasses.replace(measured, ref_logp=measured.logp - 0.5)
    without, with_kl = (
        make_batch(model, measured, rollout.scores, decide(coef), learning(config))[0].returns for coef in (0.0, 1.0)
    )
    torch.testing.assert_close(with_kl, without, atol=1e-6, rtol=0)
    paid = make_config(optim={"lam": 1.0, "whiten_floor": 1e3}, kl={"length_neutral": False})
    charged = make_batch(model, measured, rollout.scores, decide(1.0), learning(paid))[0].returns
    lengths = measured.tokens.mask.sum(1)
    torch.testing.assert_close((without - charged)[:, 0], 0.5 * lengths, atol=1e-5, rtol=0)


# -- gradients ----------------------------------------------------------------------------------------------------


def huber(error: Tensor, delta: float) -> Tensor:
    return error.square() / 2 if abs(error.item()) <= delta else delta * (error.abs() - delta / 2)


def naive_loss(model: ActorCritic, batch: Batch, config: Config, kl_coef: float) -> Tensor:
    """The loss of the first minibatch token by token, each row alone and unpadded, by the model's own logits.

    There rho = 1 and V = V_old, so that nothing is clipped and both terms of the value loss are the same.
    """
    count, alpha, total = batch.tokens.mask.sum(), config.critic.temperature, torch.zeros(())
    for row in range(len(batch.logp)):
        prompt = batch.tokens.ids[row, : batch.tokens.start[row]]
        response = batch.tokens.response[row][batch.tokens.mask[row]]
        ids = torch.cat([prompt, response])[None]
        out = causal_lm(model.policy)(input_ids=ids, output_hidden_states=True)
        with torch.no_grad(), model.reference() as reference:
            ref_logits = causal_lm(reference)(input_ids=ids).logits[0]
        for t, token in enumerate(response):
            at = len(prompt) - 1 + t
            log_p, log_ref = out.logits[0, at].log_softmax(-1), ref_logits[at].log_softmax(-1)
            total = total - batch.advantages[row, t] * (log_p[token] - batch.logp[row, t]).exp()
            total = total + config.optim.entropy_coef * (log_p.exp() * log_p).sum()
            if config.kl.in_loss == "k2":
                total = total + kl_coef * (log_p[token] - log_ref[token]).square() / 2
            if config.kl.in_loss == "exact":
                total = total + kl_coef * (log_p.exp() * (log_p - log_ref)).sum()
            hidden = out.hidden_states[-1][0, at]
            values = [head(hidden if config.critic.backbone_gradient else hidden.detach()) for head in model.heads]
            if config.critic.regress == "soft_min":
                values = [-alpha * (torch.logsumexp(-torch.stack(values) / alpha, 0) - math.log(2))]
            delta = config.critic.huber_delta if config.critic.loss == "huber" else math.inf
            errors = [huber(value - batch.returns[row, t], delta) for value in values]
            total = total + config.critic.vf_coef * sum(errors) / len(errors)
    return total / count


@pytest.mark.parametrize("adapter", [False, True])
@pytest.mark.parametrize(
    ("kl", "critic"),
    [
        ({"in_reward": False, "in_loss": "k2"}, {"heads": 2, "backbone_gradient": True, "vf_coef": 0.7}),
        ({"in_reward": False, "in_loss": "exact"}, {"heads": 2, "regress": "soft_min", "loss": "huber"}),
        ({"in_reward": True}, {"heads": 2, "regress": "soft_min", "backbone_gradient": True, "vf_coef": 2.0}),
        ({"in_reward": True}, {"heads": 1, "backbone_gradient": True, "vf_coef": 0.7}),
    ],
)
def test_gradients_are_those_of_the_loss_written_token_by_token(
    tokenizer, kl: dict, critic: dict, adapter: bool
) -> None:
    config = make_config(optim={**ONE_STEP, "entropy_coef": 0.3}, critic=critic, kl=kl)
    model, rollout = make_model(tokenizer, config, adapter), make_rollout(len(tokenizer))
    batch = prepare(model, rollout, config, kl_coef=0.8)
    wide = in_float64(model)
    naive_loss(wide, batch, config, kl_coef=0.8).backward()
    expected = {name: p.grad.float() for name, p in wide.named_parameters() if p.grad is not None}
    _, steps = learn(model, rollout, config, kl_coef=0.8)
    assert max(gradient.abs().max() for gradient in expected.values()) > 0.05
    assert_same(steps[0], expected, 5e-6)  # float32 rounds gradients of 1 and more


@pytest.mark.parametrize("in_loss", ["k2", "exact"])
def test_the_kl_in_the_loss_has_a_gradient_and_without_it_the_coefficient_has_none(tokenizer, in_loss: str) -> None:
    rollout = make_rollout(len(tokenizer))

    def gradient(kl: dict, coef: float) -> Tensor:
        config = make_config(optim=ONE_STEP, kl=kl)
        _, steps = learn(make_model(tokenizer, config), rollout, config, kl_coef=coef)
        return torch.cat([g.flatten() for name, g in steps[0].items() if name.startswith("policy.")])

    acting, idle = {"in_reward": False, "in_loss": in_loss}, {"controller": "none", "in_reward": False}
    assert torch.equal(gradient(idle, 0.0), gradient(idle, 1.0))
    # To rounding: with a KL to differentiate, the head adds up its terms in another order.
    torch.testing.assert_close(gradient(idle, 0.0), gradient(acting, 0.0), atol=1e-7, rtol=0)
    one, two = (gradient(acting, coef) - gradient(acting, 0.0) for coef in (1.0, 2.0))
    assert one.norm() > 0.1
    torch.testing.assert_close(two, 2 * one, atol=1e-5, rtol=0)


def test_each_group_is_clipped_to_its_own_norm_and_the_metrics_tell_the_norm_before(tokenizer) -> None:
    config = make_config(optim={**ONE_STEP, "max_grad_norm": 0.01}, critic={"max_grad_norm": 0.003})
    metrics, steps = learn(make_model(tokenizer, config), make_rollout(len(tokenizer)), config)
    free = make_config(optim=ONE_STEP)
    _, unclipped = learn(make_model(tokenizer, free), make_rollout(len(tokenizer)), free)
    for group, prefix, clip in (("policy", "policy.", 0.01), ("critic", "heads.", 0.003)):
        before, after = (
            math.sqrt(sum(g.double().square().sum().item() for name, g in step.items() if name.startswith(prefix)))
            for step in (unclipped[0], steps[0])
        )
        assert before > 2 * clip
        assert after == pytest.approx(clip, rel=1e-4)  # torch adds 1e-6 to the norm that it divides by
        assert metrics[f"grad_norm/{group}"] == pytest.approx(before, rel=1e-5)
