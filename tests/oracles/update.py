"""The update by its definition: every row alone and unpadded, token by token, in float64, by the model itself."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from stable_rlhf import Config
from stable_rlhf.policy.actor_critic import ActorCritic
from stable_rlhf.policy.transformer import causal_lm
from stable_rlhf.records import Batch, Tokens


def in_float64(model: ActorCritic) -> ActorCritic:
    """A copy of the model, of its heads and of its reference."""
    made = copy.deepcopy(model).double()
    for policy in made._reference:
        policy.double()
    return made


def row_of(policy: Any, tokens: Tokens, row: int, temperature: float) -> tuple[Tensor, Tensor]:
    """([t, V] log-probs at the temperature, [t, h] last hidden states) at s_0 .. s_{t-1} of one row."""
    start, length = int(tokens.start[row]), int(tokens.mask[row].sum())
    ids = torch.cat([tokens.ids[row, :start], tokens.response[row, :length]])[None]
    out = causal_lm(policy)(input_ids=ids, output_hidden_states=True)
    at = slice(start - 1, start - 1 + length)
    return (out.logits[0, at] / temperature).log_softmax(-1), out.hidden_states[-1][0, at]


@torch.no_grad()
def measured(model: ActorCritic, tokens: Tokens, temperature: float) -> Iterator[tuple[int, int, dict[str, Any]]]:
    """(row, t, figures) of every response token; ``model`` is of float64."""
    for row in range(len(tokens.start)):
        if not tokens.mask[row].any():
            continue
        log_p, hidden = row_of(model.policy, tokens, row, temperature)
        with model.reference() as reference:
            log_q, _ = row_of(reference, tokens, row, temperature)
        for t, token in enumerate(tokens.response[row][tokens.mask[row]].tolist()):
            yield (
                row,
                t,
                {
                    "logp": log_p[t, token].item(),
                    "ref_logp": log_q[t, token].item(),
                    "entropy": -(log_p[t].exp() * log_p[t]).sum().item(),
                    "exact_kl": (log_p[t].exp() * (log_p[t] - log_q[t])).sum().item(),
                    "values": [head(hidden[t]).item() for head in model.heads],
                    "targets": [head(hidden[t]).item() for head in model.target_heads],
                },
            )


def soft_min(values: list[Tensor], alpha: float) -> Tensor:
    """-a (logsumexp(-v1/a, -v2/a) - log 2); of a single value the value itself."""
    if len(values) == 1:
        return values[0]
    return -alpha * (torch.logsumexp(-torch.stack(values) / alpha, 0) - math.log(2))


def value_error(value: Tensor, target: float, config: Config) -> Tensor:
    error, delta = value - target, config.critic.huber_delta
    if config.critic.loss == "mse" or abs(error.item()) <= delta:
        return error.square() / 2
    return delta * (error.abs() - delta / 2)


def step(
    model: ActorCritic, batch: Batch, rows: list[int], config: Config, kl_coef: float
) -> tuple[Tensor, dict[str, float], list[float]]:
    """(loss of the minibatch, with a gradient; its figures by metric name; the ratio of each of its tokens).

    L = L_clip + vf_coef L_V + kl_coef KL - entropy_coef H, each a mean over the minibatch's response tokens.
    """
    critic, epsilon = config.critic, config.optim.epsilon
    clip = critic.cliprange_value
    policy, value, entropy, kl = ([] for _ in range(4))
    ratios, clipped, moved, values_clipped = ([] for _ in range(4))
    for row in rows:
        if not batch.tokens.mask[row].any():
            continue
        log_ps, hidden = row_of(model.policy, batch.tokens, row, config.rollout.temperature)
        with torch.no_grad(), model.reference() as reference:
            log_qs, _ = row_of(reference, batch.tokens, row, config.rollout.temperature)
        for t, token in enumerate(batch.tokens.response[row][batch.tokens.mask[row]].tolist()):
            log_p, log_q, advantage = log_ps[t], log_qs[t], batch.advantages[row, t].item()
            change = log_p[token] - batch.logp[row, t].item()
            ratio = change.exp()
            near = ratio.clamp(1 - epsilon, 1 + epsilon)
            policy.append(torch.maximum(-advantage * ratio, -advantage * near))
            clipped.append(float((-advantage * near > -advantage * ratio).item()))
            ratios.append(ratio.item())
            moved.append(change.item() ** 2 / 2)
            entropy.append(-(log_p.exp() * log_p).sum())
            if config.kl.in_loss == "k2":
                kl.append((log_p[token] - batch.ref_logp[row, t].item()).square() / 2)
            if config.kl.in_loss == "exact":
                kl.append((log_p.exp() * (log_p - log_q)).sum())
            state = hidden[t] if critic.backbone_gradient else hidden[t].detach()
            new = [head(state) for head in model.heads]
            old = list(batch.values[:, row, t].double())
            if critic.regress == "soft_min":
                new, old = [soft_min(new, critic.temperature)], [soft_min(old, critic.temperature)]
            for one, before in zip(new, old, strict=True):
                target = batch.returns[row, t].item()
                errors = [value_error(one, target, config)]
                if clip is not None:
                    errors.append(value_error(before + (one - before).clamp(-clip, clip), target, config))
                    values_clipped.append(float(abs((one - before).item()) > clip))
                worst = torch.maximum(errors[0], errors[-1])
                value.append(worst if critic.clip_reduction == "max" else sum(errors) / len(errors))
    means = {name: torch.stack(terms).mean() for name, terms in (("policy", policy), ("value", value))}
    means["entropy"] = torch.stack(entropy).mean()
    loss = means["policy"] + critic.vf_coef * means["value"] - config.optim.entropy_coef * means["entropy"]
    figures = {
        "loss/policy_avg": means["policy"].item(),
        "loss/value_avg": means["value"].item(),
        "policy/clipfrac_avg": sum(clipped) / len(clipped),
        "policy/approxkl_avg": math.fsum(moved) / len(moved),
        "policy/entropy_avg": means["entropy"].item(),
        "val/clipfrac_avg": sum(values_clipped) / max(1, len(values_clipped)),
        "val/ratio": math.fsum(ratios) / len(ratios),
    }
    if kl:
        term = kl_coef * torch.stack(kl).mean()
        loss = loss + term
        figures["loss/kl_avg"] = term.item()
    return loss, figures, ratios
