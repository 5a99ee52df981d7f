"""PPO's clipped loss, the value loss, the soft-min of two critics, KL estimators and the KL penalty.

Every loss is a sum over the response tokens divided by `denominator`. Give the number of response tokens of the whole
minibatch, over all microbatches and ranks, and the gradients of the parts add up exactly to those of the whole.
A denominator that is a tensor is not looked at, which would make the host wait for the device: the caller checks that
it is positive (`masked.masked_mean`).
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from .masked import check_mask, masked_mean, masked_var

# e^20 = 4.9e8 nats: no policy that writes text comes near it, and float32 overflows only at e^88.
K3_CLAMP = 20.0


class PolicyLoss(NamedTuple):
    """loss: scalar, with a gradient. clip_fraction: scalar, detached. ratio: [B, T], detached, 0 outside the mask."""

    loss: Tensor
    clip_fraction: Tensor
    ratio: Tensor


class ValueLoss(NamedTuple):
    """loss: scalar, with a gradient. clip_fraction: scalar, detached."""

    loss: Tensor
    clip_fraction: Tensor


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
        denominator: see the module; None is the number of True entries.

    Raises:
        ValueError: for k1 and k3, whose gradients are wrong in a loss, for another kind, and for `exact` without
            exact_kl. TypeError, ValueError: see `masked.check_mask` and `masked.masked_mean`.
    """
    if kind == "k2":
        check_mask(mask, logp=logp, ref_logp=ref_logp)
        return masked_mean(kl_estimate(_keep(logp, mask), _keep(ref_logp, mask), "k2"), mask, denominator)
    if kind == "exact":
        if exact_kl is None:
            raise ValueError("the KL penalty is 'exact' and exact_kl is None: give token_statistics the reference")
        return masked_mean(exact_kl, mask, denominator)
    if kind == "k1":
        raise ValueError("k1 has an expected gradient of zero in a loss, so it regularises nothing: give k2 or exact")
    if kind == "k3":
        raise ValueError("k3 has in a loss the gradient of KL(ref || pi), not of KL(pi || ref): give k2 or exact")
    raise ValueError(f"the KL penalty is {kind!r}: give k2 or exact")


def ppo_clip_loss(
    logp: Tensor,
    old_logp: Tensor,
    advantages: Tensor,
    mask: Tensor,
    epsilon: float,
    denominator: float | Tensor | None = None,
    epsilon_high: float | None = None,
) -> PolicyLoss:
    """sum m_t max(-A_t rho_t, -A_t clip(rho_t, 1 - epsilon, 1 + epsilon)) / denominator,  rho_t = exp(logp - old_logp).

    Source: Schulman et al. 2017, "Proximal Policy Optimization Algorithms", equation 7, negated; with epsilon_high,
    Yu et al. 2025, "DAPO" (arXiv 2503.14476), Clip-Higher.

    Args:
        logp: [B, T], log-probability of the sampled tokens now; carries the gradient.
        old_logp: [B, T], the same at the start of the update.
        advantages: A [B, T].
        mask: bool [B, T], True on response tokens.
        epsilon: half-width of the interval of ratios in which the policy is rewarded for moving; positive.
        denominator: see the module; None is the number of True entries.
        epsilon_high: the upper bound is 1 + epsilon_high instead; positive. None is epsilon.

    Returns:
        The loss; the fraction (same denominator) of tokens whose gradient the clip cuts off; the ratio per token.
        An infinite ratio is not hidden: it gives a non-finite loss, which the trainer refuses.

    Raises:
        ValueError: for an epsilon or epsilon_high that is not positive. TypeError, ValueError: see `masked.check_mask`
            and `masked.masked_mean`.
    """
    if not epsilon > 0:
        raise ValueError(f"epsilon is {epsilon}: give a positive number, 0.2 for instance")
    if epsilon_high is not None and not epsilon_high > 0:
        raise ValueError(f"epsilon_high is {epsilon_high}: give a positive number, or None for epsilon")
    check_mask(mask, logp=logp, old_logp=old_logp, advantages=advantages)
    # Emptied before exp: a NaN or an overflow there would reach the gradient through 0 * inf.
    ratio = (_keep(logp, mask) - _keep(old_logp, mask)).exp()
    unclipped = -_keep(advantages, mask) * ratio
    clipped = -_keep(advantages, mask) * ratio.clamp(
        1 - epsilon, 1 + (epsilon if epsilon_high is None else epsilon_high)
    )
    loss = masked_mean(torch.maximum(unclipped, clipped), mask, denominator)
    clip_fraction = masked_mean((clipped > unclipped).to(logp.dtype), mask, denominator)
    return PolicyLoss(loss, clip_fraction, _keep(ratio.detach(), mask))


def value_loss(
    values: Tensor,
    old_values: Tensor,
    returns: Tensor,
    mask: Tensor,
    kind: Literal["huber", "mse"] = "huber",
    huber_delta: float = 0.5,  # SAFE, published code
    cliprange: float | None = 0.2,  # SAFE, published code; PPO's usual figure
    reduction: Literal["mean", "max"] = "mean",  # SAFE, published code; PPO: max
    denominator: float | Tensor | None = None,
) -> ValueLoss:
    """sum m_t R(f(V_t - G_t), f(V'_t - G_t)) / denominator,  V' = V_old + clip(V - V_old, -cliprange, cliprange).

    huber: f(e) = e^2 / 2 for |e| <= delta, delta (|e| - delta / 2) beyond (the convention of torch's huber_loss).
    mse: f(e) = e^2 / 2, which is huber with an infinite delta, so that the kinds agree on small errors.
    R is the mean or the maximum of its two arguments; with cliprange None it is the first of them.
    Source: SAFE (arXiv 2602.04651), published code; the maximum is that of PPO (Schulman et al. 2017, reference code).

    Args:
        values: V [B, T], of one head or of their soft-min; carries the gradient.
        old_values: V_old [B, T], the same at the start of the update.
        returns: G [B, T] (`advantages.gae`).
        mask: bool [B, T], True on response tokens.
        huber_delta: delta, in the scorer's units, positive; read by huber only.
        cliprange: in the scorer's units, positive; None does not clip.
        denominator: see the module; None is the number of True entries.

    Returns:
        The loss; the fraction (same denominator) of tokens with |V - V_old| > cliprange, 0 without clip.

    Raises:
        ValueError: for an unknown kind or reduction, a delta or a cliprange that is not positive. TypeError,
            ValueError: see `masked.check_mask` and `masked.masked_mean`.
    """
    if kind not in ("huber", "mse"):
        raise ValueError(f"the value loss is {kind!r}: give huber or mse")
    if reduction not in ("mean", "max"):
        raise ValueError(f"the value loss's reduction is {reduction!r}: give mean or max")
    if not huber_delta > 0:
        raise ValueError(f"huber_delta is {huber_delta}: give a positive number, in the scorer's units")
    if cliprange is not None and not cliprange > 0:
        raise ValueError(f"the value loss's cliprange is {cliprange}: give a positive number, or null for no clip")
    check_mask(mask, values=values, old_values=old_values, returns=returns)
    values, old_values, returns = _keep(values, mask), _keep(old_values, mask), _keep(returns, mask)

    def error(predicted: Tensor) -> Tensor:
        if kind == "mse":
            return (predicted - returns).square() / 2
        return torch.nn.functional.huber_loss(predicted, returns, reduction="none", delta=huber_delta)

    unclipped = error(values)
    if cliprange is None:
        return ValueLoss(masked_mean(unclipped, mask, denominator), torch.zeros_like(unclipped).sum().detach())
    clipped = error(old_values + (values - old_values).clamp(-cliprange, cliprange))
    both = torch.maximum(unclipped, clipped) if reduction == "max" else (unclipped + clipped) / 2
    clip_fraction = masked_mean(((values - old_values).abs() > cliprange).to(values.dtype), mask, denominator)
    return ValueLoss(masked_mean(both, mask, denominator), clip_fraction)


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


def explained_variance(returns: Tensor, values: Tensor, mask: Tensor) -> Tensor:
    """1 - Var(G - V) / Var(G) over the True entries: 1 is a perfect critic, 0 one that knows only the mean.

    For the batch of all ranks: 1 - a.variance / b.variance of the merged `masked.totals` of G - V (a) and of G (b).

    Args:
        returns, values: G and V [B, T], the scorer's units.
        mask: bool [B, T], True on response tokens.

    Returns:
        A scalar, at most 1; NaN when the returns do not vary (the figure is then undefined).

    Raises:
        TypeError, ValueError: see `masked.check_mask` and `masked.masked_var`.
    """
    check_mask(mask, returns=returns, values=values)
    spread = masked_var(returns, mask)
    return torch.where(spread > 0, 1 - masked_var(returns - values, mask) / spread, torch.nan)


def _keep(x: Tensor, mask: Tensor) -> Tensor:
    return torch.where(mask, x, 0)


def _check_same_shape(**tensors: Tensor) -> None:
    (name, first), (other_name, other) = tensors.items()
    if first.shape != other.shape:
        raise ValueError(
            f"{name} has shape {tuple(first.shape)} and {other_name} {tuple(other.shape)}: give both the same shape"
        )
