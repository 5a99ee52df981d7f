"""Settings of the update that act, rows without a reward that do not, and the metrics of a rollout against loops."""

from __future__ import annotations

import math

import pytest
import torch

from stable_rlhf.learner import figures, make_batch, measure, observe, optimizer_groups
from stable_rlhf.records import Rollout
from stable_rlhf.training.rows import completion_rows
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
    some_rows,
    weights,
)


def of(part: str, tensors: dict) -> dict:
    return {name: tensor for name, tensor in tensors.items() if name.startswith(part)}


# -- settings -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backbone_gradient", [False, True])
@pytest.mark.parametrize("adapter", [False, True])
def test_the_critics_warm_up_leaves_every_bit_of_the_policy_and_moves_the_heads(
    tokenizer, adapter, backbone_gradient
) -> None:
    critic = {"warmup_steps": 3, "backbone_gradient": backbone_gradient}
    config = make_config("paper", critic=critic, optim={"weight_decay": 0.1, "learning_rate": 1e-2})
    model = make_model(tokenizer, config, adapter)
    before = weights(model)
    learn(model, make_rollout(len(tokenizer)), config, kl_coef=1.0, step=2)
    warm = weights(model)
    assert_same(of("policy.", warm), of("policy.", before), 0.0)
    for name in of("heads.", before):
        assert not torch.equal(warm[name], before[name]), name
    learn(model, make_rollout(len(tokenizer)), config, kl_coef=1.0, step=3)
    assert any(not torch.equal(tensor, before[name]) for name, tensor in of("policy.", weights(model)).items())


def test_target_heads_are_the_polyak_average_of_the_heads_after_each_optimiser_step(tokenizer) -> None:
    config = make_config(optim=ONE_STEP | {"learning_rate": 1e-2}, critic={"target_tau": 0.2})
    model = make_model(tokenizer, config)
    before = weights(model)
    learn(model, make_rollout(len(tokenizer)), config)
    after = weights(model)
    for name, tensor in of("heads.", after).items():
        expected = 0.8 * before["target_" + name] + 0.2 * tensor
        torch.testing.assert_close(after["target_" + name], expected, atol=1e-6, rtol=0)


def test_weight_decay_takes_its_share_of_the_policys_weights_and_none_of_the_heads(tokenizer) -> None:
    after, lr, decay = [], 1e-3, 0.5
    for weight_decay in (0.0, decay):
        config = make_config(optim=ONE_STEP | {"learning_rate": lr, "weight_decay": weight_decay})
        model = make_model(tokenizer, config)
        before = weights(model)
        learn(model, make_rollout(len(tokenizer)), config)
        after.append(weights(model))
    for name in of("policy.", before):  # decoupled: w <- w - lr decay w beside Adam's step, which is the same in both
        torch.testing.assert_close(after[0][name] - after[1][name], lr * decay * before[name], atol=5e-7, rtol=0)
    assert_same(of("heads.", after[1]), of("heads.", after[0]), 0.0)


def test_epsilon_clips_from_the_second_pass_on(tokenizer) -> None:
    results = []
    for epsilon in (0.01, 10.0):
        config = make_config(optim={"num_mini_batches": 1, "epsilon": epsilon, "learning_rate": 1e-2})
        model = make_model(tokenizer, config)
        metrics, steps = learn(model, make_rollout(len(tokenizer)), config)
        results.append((metrics["policy/clipfrac_avg"], steps))
    (narrow, narrow_steps), (wide, wide_steps) = results
    assert narrow > 0.1
    assert wide == 0.0
    assert_same(narrow_steps[0], wide_steps[0], 0.0)
    name = "policy.model.embed_tokens.weight"
    assert (narrow_steps[1][name] - wide_steps[1][name]).norm() > 0.1 * wide_steps[1][name].norm()


def test_vf_coef_multiplies_the_heads_gradient_and_not_the_policys(tokenizer) -> None:
    one, three = (
        learn(make_model(tokenizer, config), make_rollout(len(tokenizer)), config)[1][0]
        for config in (make_config(optim=ONE_STEP, critic={"vf_coef": vf_coef}) for vf_coef in (1.0, 3.0))
    )
    assert_same(of("policy.", three), of("policy.", one), 0.0)
    assert_same(of("heads.", three), {name: 3 * g for name, g in of("heads.", one).items()}, 1e-6)


def test_the_critic_has_a_learning_rate_of_its_own_and_else_the_policys(tokenizer) -> None:
    for own, expected in ((None, 1e-3), (5e-2, 5e-2)):
        config = make_config(optim={"learning_rate": 1e-3}, critic={"learning_rate": own})
        policy, critic = optimizer_groups(make_model(tokenizer, config), config.optim, config.critic)
        assert (policy["lr"], critic["lr"]) == (1e-3, expected)


# -- rows without a reward ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("preset", ["safe", "paper", "ppo"])
@pytest.mark.parametrize("adapter", [False, True])
def test_the_gradient_is_that_of_the_rollout_without_the_rows_that_have_no_reward(
    tokenizer, preset: str, adapter: bool
) -> None:
    skipped = (2, 5)
    whole = make_rollout(len(tokenizer), skipped)
    fewer = some_rows(whole, [row for row in range(ROWS) if row not in skipped])
    gradients, metrics = [], []
    for rollout in (whole, fewer):
        config = make_config(preset, optim=ONE_STEP)
        found, steps = learn(make_model(tokenizer, config, adapter), rollout, config, kl_coef=0.5)
        gradients.append(steps[0])
        metrics.append(found)
    assert_same(gradients[0], gradients[1], 1e-6)
    assert metrics[0] == pytest.approx(metrics[1], abs=1e-6)
    all_rows = make_rollout(len(tokenizer))
    _, steps = learn(make_model(tokenizer, config, adapter), all_rows, config, kl_coef=0.5)
    name = next(name for name in steps[0] if name.startswith("policy."))
    assert (steps[0][name] - gradients[0][name]).abs().max() > 1e-3


def test_a_minibatch_without_any_reward_takes_no_step_and_is_in_no_mean(tokenizer) -> None:
    """8 minibatches of a row; 5 rows have no reward. AdamW's momentum alone would move the weights."""
    skipped = (0, 1, 3, 4, 7)
    config = make_config(optim={"num_iterations": 2, "num_mini_batches": 8, "weight_decay": 0.1})
    metrics, steps = learn(make_model(tokenizer, config), make_rollout(len(tokenizer), skipped), config, kl_coef=0.5)
    assert len(steps) == 2 * 3
    assert metrics["val/ratio"] == pytest.approx(1.0, abs=0.1)  # a mean over all 8 would be near 3/8
    assert all(math.isfinite(value) for value in metrics.values())


def test_the_controller_sees_the_rows_with_a_reward_alone(tokenizer) -> None:
    config = make_config()
    whole = make_rollout(len(tokenizer), skipped=(2, 5))
    fewer = some_rows(whole, [0, 1, 3, 4, 6, 7])
    model = make_model(tokenizer, config)
    seen, expected = (observe(7, given, measure(passes_of(model, config), given, 0)) for given in (whole, fewer))
    assert (seen.step, seen.reward) == (7, expected.reward)
    assert seen.reward == pytest.approx((1.0 - 0.5 + 2.0 + 0.0 + 0.7 + 0.1) / 6)
    assert (seen.kl, seen.entropy) == pytest.approx((expected.kl, expected.entropy), abs=1e-6)


# -- metrics ------------------------------------------------------------------------------------------------------


def token_rows(tensor: torch.Tensor, rollout: Rollout) -> list[list[float]]:
    """The entries of the response tokens of the rows with a reward."""
    mask = rollout.tokens.mask
    return [tensor[row, : mask.shape[1]][mask[row]].tolist() for row in range(ROWS) if rollout.valid[row]]


def test_a_rollouts_metrics_are_those_of_loops_over_its_tokens(tokenizer) -> None:
    config = make_config()
    rollout = make_rollout(len(tokenizer), skipped=(2,))
    model = make_model(tokenizer, config)
    measured = measure(passes_of(model, config), rollout, 0)
    found = figures.rollout_metrics(rollout, measured)
    sequences = token_rows(measured.logp - measured.ref_logp, rollout)
    ratios = [value for row in sequences for value in row]
    assert measured.kl is not None
    kls = token_rows(measured.kl, rollout)
    kl = sum(map(sum, kls)) / len(ratios)
    off = sum((sum(row) - kl * len(row)) ** 2 for row in kls if row)
    references = [value for row in token_rows(measured.ref_logp, rollout) for value in row]
    entropies = [value for row in token_rows(measured.entropy, rollout) for value in row]
    scores = [score for score, valid in zip(rollout.scores, rollout.valid, strict=True) if valid]
    mean = sum(scores) / 7
    bigrams = [
        (row[i], row[i + 1])
        for row in (r[m].tolist() for r, m in zip(rollout.tokens.response, rollout.tokens.mask, strict=True))
        for i in range(len(row) - 1)
    ]
    assert found == pytest.approx(
        {
            "objective/scores": mean,
            "objective/scores_std": math.sqrt(sum((score - mean) ** 2 for score in scores) / 7),
            "objective/kl": sum(ratios) / len(ratios),
            "objective/kl_exact": kl,
            "objective/kl_error": math.sqrt(off * 7 / 6) / len(ratios),
            "objective/kl_k3": sum(math.exp(-ratio) - 1 + ratio for ratio in ratios) / len(ratios),
            "objective/kl_per_sequence": sum(map(sum, sequences)) / 7,
            "objective/entropy": sum(entropies) / len(entropies),
            "objective/ref_nll": -sum(references) / len(references),
            "completions/mean_length": 31 / 8,
            "completions/min_length": 1,
            "completions/max_length": 6,
            "completions/clipped_ratio": 0.0,
            "completions/distinct_2": len(set(bigrams)) / len(bigrams),
            "completions/skipped": 1,
            "prompts/truncated": 0,
            "rewards/r/mean": mean,
        },
        abs=2e-6,
    )


def test_the_kl_part_of_the_reward_is_a_mean_over_the_rows_with_a_reward(tokenizer) -> None:
    config = make_config()
    rollout = make_rollout(len(tokenizer), skipped=(2,))
    model = make_model(tokenizer, config)
    measured = measure(passes_of(model, config), rollout, 0)
    _, found = make_batch(model, measured, rollout.scores, decide(0.4), learning(config))
    sequences = token_rows(measured.logp - measured.ref_logp, rollout)
    assert found["objective/non_score_reward"] == pytest.approx(-0.4 * sum(map(sum, sequences)) / 7, abs=2e-6)


def test_a_stored_completion_has_its_kl_per_token_and_no_score_where_there_is_none(tokenizer) -> None:
    config = make_config()
    rollout = make_rollout(len(tokenizer), skipped=(2,))
    measured = measure(passes_of(make_model(tokenizer, config), config), rollout, 0)
    stored = completion_rows(rollout, measured)
    assert (stored[2]["score"], stored[2]["kl"], stored[2]["length"]) == (None, None, 4)
    row = token_rows(measured.logp - measured.ref_logp, rollout)[0]
    assert stored[0] == {
        "prompt": "p",
        "completion": "c",
        "score": 1.0,
        "length": 6,
        "kl": pytest.approx(sum(row) / 6, abs=1e-6),
    }
