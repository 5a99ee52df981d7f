"""Which KL terms pull the policy towards the reference: expectations over every token of a small vocabulary.

The oracle is the gradient of the exact KL, written out over the vocabulary (or over every sequence) in float64.
"""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from stable_rlhf.ops import advantages, logprobs, objective

VOCABULARY = 5
ONE = torch.ones(1, 1, dtype=torch.bool)


def tables(seed: int, *shape: int) -> tuple[Tensor, Tensor]:
    """Logits of a policy, which carries a gradient, and of a reference."""
    generator = torch.Generator().manual_seed(seed)
    policy, reference = torch.randn(2, *shape, VOCABULARY, generator=generator, dtype=torch.float64)
    return policy.requires_grad_(), reference


def exact_gradient(policy: Tensor, reference: Tensor) -> Tensor:
    log_p, log_q = policy.log_softmax(-1), reference.log_softmax(-1)
    return torch.autograd.grad((log_p.exp() * (log_p - log_q)).sum(), policy)[0]


def expected_gradient(term, policy: Tensor, reference: Tensor) -> Tensor:
    """sum_v pi(v) grad term(log pi(v), log ref(v)): the mean over tokens sampled from the policy."""
    log_p, log_q = policy.log_softmax(-1), reference.log_softmax(-1)
    losses = [term(log_p[v].view(1, 1), log_q[v].view(1, 1)).sum() for v in range(VOCABULARY)]
    return sum(
        (
            p * torch.autograd.grad(loss, policy, retain_graph=True)[0]
            for p, loss in zip(log_p.exp(), losses, strict=True)
        ),
        start=torch.zeros_like(policy),
    ).detach()


@pytest.mark.parametrize("seed", range(5))
def test_k2_in_the_loss_has_the_gradient_of_the_exact_kl_in_expectation(seed):
    policy, reference = tables(seed)
    found = expected_gradient(lambda logp, ref: objective.kl_penalty(logp, ref, None, "k2", ONE), policy, reference)
    expected = exact_gradient(policy, reference)
    assert expected.abs().max().item() > 0.01  # there is something to agree on
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("seed", range(5))
def test_the_exact_kl_in_the_loss_has_its_own_gradient_whatever_token_was_sampled(seed):
    policy, reference = tables(seed)
    one_hot = torch.ones(1, 1, 1, dtype=torch.float64)  # hidden 1, so the LM head's one column is the logits
    statistics = logprobs.token_statistics(
        one_hot, policy[:, None], torch.tensor([[seed]]), 1.0, one_hot, reference[:, None]
    )
    penalty = objective.kl_penalty(statistics.logp, statistics.logp.detach(), statistics.kl, "exact", ONE)
    found = torch.autograd.grad(penalty, policy)[0]
    torch.testing.assert_close(found, exact_gradient(policy, reference), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("seed", range(5))
def test_k1_in_a_loss_regularises_nothing_and_is_refused(seed):
    policy, reference = tables(seed)
    found = expected_gradient(lambda logp, ref: objective.kl_estimate(logp, ref, "k1"), policy, reference)
    assert found.abs().max().item() < 1e-15
    with pytest.raises(ValueError, match="expected gradient of zero"):
        objective.kl_penalty(ONE.double(), ONE.double(), None, "k1", ONE)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("seed", range(5))
def test_k3_in_a_loss_pulls_along_the_other_kl_and_is_refused(seed):
    policy, reference = tables(seed)
    found = expected_gradient(lambda logp, ref: objective.kl_estimate(logp, ref, "k3"), policy, reference)
    log_p, log_q = policy.log_softmax(-1), reference.log_softmax(-1)
    reverse = torch.autograd.grad((log_q.exp() * (log_q - log_p)).sum(), policy)[0]
    torch.testing.assert_close(found, reverse, rtol=1e-12, atol=1e-14)
    assert (found - exact_gradient(policy, reference)).abs().max().item() > 0.01
    with pytest.raises(ValueError, match=r"KL\(ref \|\| pi\)"):
        objective.kl_penalty(ONE.double(), ONE.double(), None, "k3", ONE)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("seed", range(3))
def test_k1_in_the_reward_has_the_gradient_of_the_kl_of_the_whole_sequence(seed):
    """Through token_rewards, gae (gamma 1, lambda 1, no critic) and the clipped loss at ratio 1, over all sequences.

    The policy is a table: logits of the first token, and of the second given the first (row 1 + first).
    """
    policy, reference = tables(seed, 1 + VOCABULARY)
    log_p, log_q = policy.log_softmax(-1), reference.log_softmax(-1)
    sequences = torch.tensor(list(itertools.product(range(VOCABULARY), repeat=2)))
    rows = torch.stack([torch.zeros(len(sequences), dtype=torch.long), 1 + sequences[:, 0]], 1)
    logp, ref = log_p[rows, sequences], log_q[rows, sequences]
    mask = torch.ones_like(sequences, dtype=torch.bool)
    zeros = torch.zeros_like(logp)

    kl_coef = 0.7
    rewards = advantages.token_rewards(zeros[:, 0], (logp - ref).detach(), kl_coef, mask)
    advantage, _ = advantages.gae(rewards, zeros, zeros, mask, 1.0, 1.0)
    probability = logp.sum(1).exp()
    per_sequence = [
        objective.ppo_clip_loss(logp[i : i + 1], logp[i : i + 1].detach(), advantage[i : i + 1], mask[:1], 0.2, 1).loss
        for i in range(len(sequences))
    ]
    expected_loss = (probability.detach() * torch.stack(per_sequence)).sum()
    found = torch.autograd.grad(expected_loss, policy, retain_graph=True)[0]

    sequence_kl = (probability * (logp - ref).sum(1)).sum()
    expected = kl_coef * torch.autograd.grad(sequence_kl, policy, retain_graph=True)[0]
    assert expected.abs().max().item() > 0.01
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-14)

    # k2 in the loss leaves out what the first token does to the second state, so it must differ on the first row.
    k2 = (probability.detach() * objective.kl_estimate(logp, ref, "k2").sum(1)).sum()
    local = kl_coef * torch.autograd.grad(k2, policy)[0]
    torch.testing.assert_close(local[1:], expected[1:], rtol=1e-11, atol=1e-14)
    assert (local[0] - expected[0]).abs().max().item() > 1e-3


def test_a_larger_coefficient_moves_the_gradient_and_a_penalty_without_its_figure_is_refused():
    policy, reference = tables(1)
    logp, ref = policy.log_softmax(-1)[:1, None], reference.log_softmax(-1)[:1, None]
    penalty = objective.kl_penalty(logp, ref, None, "k2", ONE)
    one = torch.autograd.grad(penalty, policy, retain_graph=True)[0]
    many = torch.autograd.grad(1e6 * penalty, policy)[0]
    assert one.abs().max().item() > 1e-3
    torch.testing.assert_close(many, 1e6 * one, rtol=1e-12, atol=0)
    with pytest.raises(ValueError, match="give token_statistics the reference"):
        objective.kl_penalty(logp, ref, None, "exact", ONE)
    with pytest.raises(ValueError, match="'k5'"):
        objective.kl_penalty(logp, ref, None, "k5", ONE)  # pyright: ignore[reportArgumentType]
