"""The policy's losses and their denominators, the soft-min of two critics, KL estimators and the KL penalty.

Every loss is a sum over the response tokens divided by `denominator` (`loss_mean`). Give that of the whole minibatch,
over all microbatches and ranks (`loss_denominator`), and the gradients of the parts add up exactly to those of the
whole. A denominator that is a tensor is not looked at, which would make the host wait for the device: the caller checks
that it is positive (`masked.masked_mean`).
"""

from __future__ import annotations

from typing import Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor

from .masked import check_mask, masked_mean

Denominator: TypeAlias = Literal["token", "sequence", "length"]
Importance: TypeAlias = Literal["token", "sequence", "product"]

# e^20 = 4.9e8 nats: no policy that writes text comes near it, and float32 overflows only at e^88.
K3_CLAMP = 20.0


class PolicyLoss(NamedTuple):
    """loss: scalar, with a gradient. clipped, ratio: [B, T], detached, 0 outside the mask; clipped is 1 or 0."""

    loss: Tensor
    clipped: Tensor
    ratio: Tensor


def soft_min(v1: Tensor, v2: Tensor, temperature: float) -> Tensor:
    """V = -a (logsumexp(-v1/a, -v2/a) - log 2), a = temperature: between the minimum (a -> 0) and the mean (a -> inf).

    Computed as min - a log1p(expm1(-|v1 - v2| / a) / 2), the same thing without the cancellation that costs the first
    form all its digits when a is large compared with the values. Source: SAFE (arXiv 2602.04651), the double soft-min
    critic.

    Args:
        v1, v2: the values of the two heads, any shape, the same for both; the scorer's units.
        temperature: a, in the same units; positive.

    Returns:
        V with min(v1, v2) <= V <= (v1 + v2) / 2; its gradients to v1 and v2 are positive and add up to 1.

    Raises:
        ValueError: for a temperature that is not positive, or shapes that differ.
    """
    if not temperature > 0:
        raise ValueError(f"the soft-min's temperature is {temperature}: give a positive number, in units of the values")
    _check_same_shape(v1=v1, v2=v2)
    softness = torch.log1p(torch.expm1(-(v1 - v2).abs() / temperature) / 2)
    return torch.minimum(v1, v2) - temperature * softness


def kl_estimate(logp: Tensor, ref_logp: Tensor, kind: Literal["k1", "k2", "k3"]) -> Tensor:
    """Estimate of KL(pi || ref) from one sampled token each, in nats; l = logp - ref_logp.

    k1 = l                  unbiased, signed, high variance: to log, or to subtract from the reward
    k2 = l^2 / 2            biased value, right gradient on-policy: for the loss (`kl_penalty`)
    k3 = e^{-l} - 1 + l     unbiased, non-negative: to log. l is clamped at -20 first, in both terms, so that a token
                            which the policy has all but ruled out gives at most e^20 - 21 and never an infinity
    Source: Schulman 2020, "Approximating KL Divergence".

    Args:
        logp, ref_logp: log-probability of the sampled tokens under policy and reference, any shape, the same for both.

    Returns:
        Per token, the same shape. It is not masked: the entries outside a mask mean nothing.

    Raises:
        ValueError: for another kind, or shapes that differ.
    """
    _check_same_shape(logp=logp, ref_logp=ref_logp)
    log_ratio = logp - ref_logp
    if kind == "k1":
        return log_ratio
    if kind == "k2":
        return log_ratio.square() / 2
    if kind == "k3":
        clamped = log_ratio.clamp(min=-K3_CLAMP)
        return torch.expm1(-clamped) + clamped
    raise ValueError(f"the KL estimator is {kind!r}: give k1, k2 or k3")


def kl_penalty(
    logp: Tensor,
    ref_logp: Tensor,
    exact_kl: Tensor | None,
    kind: Literal["k2", "exact"],
    mask: Tensor,
    denominator: float | Tensor | None = None,
    mean: Denominator = "token",
) -> Tensor:
    """The KL term of the loss: the mean of k2 or of the exact KL per token, in nats, with a gradient to the policy.

    k2: sum m_t (logp - ref)^2 / 2 / denominator. Over tokens drawn from the policy its expected gradient is that of
    the exact KL; its value is not the KL. exact: sum m_t KL(pi(.|s_t) || ref(.|s_t)) / denominator, low variance. The
    caller multiplies it by the controller's coefficient. Both leave out the effect of a token on later states, which
    only a KL in the reward has (`advantages.token_rewards`).

    Args:
        logp, ref_logp: [B, T], log-probability of the sampled tokens; logp carries the gradient of k2.
        exact_kl: [B, T] (`logprobs.token_statistics`), carries the gradient of `exact`; None with k2.
        mask: bool [B, T], True on response tokens.
        denominator, mean: see `loss_mean`.

    Raises:
        ValueError: for k1 and k3, whose gradients are wrong in a loss, for another kind, and for `exact` without
            exact_kl. TypeError, ValueError: see `masked.check_mask` and `masked.masked_mean`.
    """
    if kind == "k2":
        check_mask(mask, logp=logp, ref_logp=ref_logp)
        return loss_mean(kl_estimate(_keep(logp, mask), _keep(ref_logp, mask), "k2"), mask, denominator, mean)
    if kind == "exact":
        if exact_kl is None:
            raise ValueError("the KL penalty is 'exact' and exact_kl is None: give token_statistics the reference")
        return loss_mean(exact_kl, mask, denominator, mean)
    if kind == "k1":
        raise ValueError("k1 has an expected gradient of zero in a loss, so it regularises nothing: give k2 or exact")
    if kind == "k3":
        raise ValueError("k3 has in a loss the gradient of KL(ref || pi), not of KL(pi || ref): give k2 or exact")
    raise ValueError(f"the KL penalty is {kind!r}: give k2 or exact")


def loss_denominator(kind: Denominator, tokens: int, completions: int, max_completion_length: int) -> int:
    """The denominator of a minibatch's loss, over all of its microbatches and ranks.

    token: ``tokens``, its response tokens (DAPO, Yu et al. 2025, arXiv 2503.14476); sequence: ``completions``, those
    with a response token (GRPO, Shao et al. 2024, arXiv 2402.03300, equation 3); length: completions x
    max_completion_length, a constant, so that no length changes a token's weight (Dr. GRPO, Liu et al. 2025, arXiv
    2503.20783).
    """
    return {"token": tokens, "sequence": completions, "length": completions * max_completion_length}[kind]


def loss_mean(
    x: Tensor, mask: Tensor, denominator: float | Tensor | None = None, kind: Denominator = "token"
) -> Tensor:
    """sum_bt m x / denominator; with `sequence` sum_b (sum_t m x / T_b) / denominator, T_b the row's True entries.

    Args:
        x: [B, T], a loss per token.
        mask: bool [B, T], True on response tokens.
        denominator: `loss_denominator` of the whole minibatch; None is that of these rows, for `length` T a row.
        kind: what each token is divided by, besides the denominator: `sequence` makes completions weigh the same.

    Raises:
        TypeError, ValueError: see `masked.check_mask` and `masked.masked_mean`.
    """
    if kind == "token":
        return masked_mean(x, mask, denominator)
    check_mask(mask, x=x)
    lengths = mask.sum(1, keepdim=True)
    if denominator is None:
        denominator = loss_denominator(kind, 0, int((lengths > 0).sum()), mask.shape[1])
    return masked_mean(x / lengths.clamp(min=1) if kind == "sequence" else x, mask, denominator)


def importance_ratio(logp: Tensor, old_logp: Tensor, mask: Tensor, level: Importance = "token") -> Tensor:
    """Probability ratio new / old of every token [B, T], or one of its completion, at all of its tokens.

    token: exp(l_t), l = logp - old_logp (PPO). sequence: exp(mean_t l_t), the geometric mean over the completion (GSPO,
    Zheng et al. 2025, arXiv 2507.18071). product: exp(sum_t l_t), the ratio of the completion itself, as in
    TRL's RLOO. Sums and means are over True entries of the mask; a row without any has 1.

    Raises:
        TypeError, ValueError: see `masked.check_mask`.
    """
    check_mask(mask, logp=logp, old_logp=old_logp)
    # Emptied before exp: a NaN or an overflow there would reach the gradient through 0 * inf.
    change = _keep(logp, mask) - _keep(old_logp, mask)
    if level == "token":
        return change.exp()
    change = change.sum(1, keepdim=True)
    if level == "sequence":
        change = change / mask.sum(1, keepdim=True).clamp(min=1)
    return change.exp().expand(mask.shape)


def ppo_clip_loss(
    logp: Tensor,
    old_logp: Tensor,
    advantages: Tensor,
    mask: Tensor,
    epsilon: float,
    denominator: float | Tensor | None = None,
    epsilon_high: float | None = None,
    importance: Importance = "token",
    mean: Denominator = "token",
) -> PolicyLoss:
    """Mean of max(-A_t rho_t, -A_t clip(rho_t, 1 - epsilon, 1 + epsilon)),  rho the `importance_ratio`.

    Source: Schulman et al. 2017, "Proximal Policy Optimization Algorithms", equation 7, negated; with epsilon_high,
    Yu et al. 2025, "DAPO" (arXiv 2503.14476), Clip-Higher.

    Args:
        logp: [B, T], log-probability of the sampled tokens now; carries the gradient.
        old_logp: [B, T], the same at the start of the update.
        advantages: A [B, T].
        mask: bool [B, T], True on response tokens.
        epsilon: half-width of the interval of ratios in which the policy is rewarded for moving; positive.
        denominator, mean: see `loss_mean`.
        epsilon_high: the upper bound is 1 + epsilon_high instead; positive. None is epsilon.
        importance: the level of the ratio.

    Returns:
        The loss; where the clip cuts a token's gradient off; the ratio.
        An infinite ratio is not hidden: it gives a non-finite loss, which the trainer refuses.

    Raises:
        ValueError: for an epsilon or epsilon_high that is not positive. TypeError, ValueError: see `masked.check_mask`
            and `masked.masked_mean`.
    """
    _check_bounds(epsilon=epsilon, epsilon_high=epsilon_high)
    check_mask(mask, advantages=advantages)
    ratio = importance_ratio(logp, old_logp, mask, importance)
    unclipped = -_keep(advantages, mask) * ratio
    clipped = -_keep(advantages, mask) * ratio.clamp(
        1 - epsilon, 1 + (epsilon if epsilon_high is None else epsilon_high)
    )
    loss = loss_mean(torch.maximum(unclipped, clipped), mask, denominator, mean)
    return PolicyLoss(loss, _keep((clipped > unclipped).to(logp.dtype), mask), _keep(ratio.detach(), mask))


def cispo_loss(
    logp: Tensor,
    old_logp: Tensor,
    advantages: Tensor,
    mask: Tensor,
    epsilon_high: float,
    denominator: float | Tensor | None = None,
    importance: Importance = "token",
    mean: Denominator = "token",
) -> PolicyLoss:
    """Mean of -A_t sg(min(rho_t, 1 + epsilon_high)) logp_t: a clipped weight cuts no token's gradient off.

    sg stops the gradient, rho is the `importance_ratio`. Source: MiniMax 2025, "MiniMax-M1" (arXiv 2506.13585),
    section 3, CISPO, without a lower bound, as they train and as TRL has it (whose epsilon_high is the bound
    itself, 1 + ours).

    Args:
        epsilon_high: the largest weight is 1 + epsilon_high; positive. The others: as in `ppo_clip_loss`.

    Returns:
        The loss; where the weight was clipped; the ratio.

    Raises:
        As `ppo_clip_loss`.
    """
    _check_bounds(epsilon_high=epsilon_high)
    check_mask(mask, advantages=advantages)
    ratio = importance_ratio(logp, old_logp, mask, importance).detach()
    weight = ratio.clamp(max=1 + epsilon_high)
    loss = loss_mean(-_keep(advantages, mask) * weight * _keep(logp, mask), mask, denominator, mean)
    return PolicyLoss(loss, _keep((ratio > weight).to(logp.dtype), mask), _keep(ratio, mask))


@torch.no_grad()
def approx_kl(logp: Tensor, old_logp: Tensor, mask: Tensor, denominator: float | Tensor | None = None) -> Tensor:
    """sum m_t (logp - old_logp)^2 / 2 / denominator: how far the update has moved the policy, in nats per token.

    Args:
        logp, old_logp: [B, T], log-probability of the sampled tokens now and at the start of the update.
        mask: bool [B, T], True on response tokens.
        denominator: see the module; None is the number of True entries.

    Raises:
        TypeError, ValueError: see `masked.check_mask` and `masked.masked_mean`.
    """
    return masked_mean(kl_estimate(logp, old_logp, "k2"), mask, denominator)


def _check_bounds(**bounds: float | None) -> None:
    for name, bound in bounds.items():
        if bound is not None and not bound > 0:
            raise ValueError(f"{name} is {bound}: give a positive number, 0.2 for instance")


def _keep(x: Tensor, mask: Tensor) -> Tensor:
    return torch.where(mask, x, 0)


def _check_same_shape(**tensors: Tensor) -> None:
    (name, first), (other_name, other) = tensors.items()
    if first.shape != other.shape:
        raise ValueError(
            f"{name} has shape {tuple(first.shape)} and {other_name} {tuple(other.shape)}: give both the same shape"
        )
