"""Measures a rollout before the update: log-probs, reference log-probs, values and entropy."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping

import torch

from stable_rlhf.config import CriticConfig
from stable_rlhf.control import Observation
from stable_rlhf.errors import DivergenceError
from stable_rlhf.learner.microbatches import Lengths, plan
from stable_rlhf.learner.passes import Passes
from stable_rlhf.learner.step_preview import Preview
from stable_rlhf.ops.masked import masked_mean, ratio_error
from stable_rlhf.records import Measured, Rollout, Tokens, on


@torch.no_grad()
def measure(passes: Passes, rollout: Rollout, step: int, preview: Preview | None = None) -> Measured:
    """Runs the forward of the policy and of the reference over a rollout, in the microbatches of the first pass.

    The first update repeats the same computation on the same rows, so its ratio is exactly 1. The result is copied to
    the CPU at once: the work that follows is small, and on the device each figure would wait for it. ``preview``, if
    the update that follows has one, keeps the hidden states that it will compare with.
    """
    model, learning, device = passes.model, passes.learning, passes.model.device
    learns = learns_policy(learning.critic, step)
    tokens = dataclasses.replace(rollout.tokens, mask=rollout.tokens.mask & torch.tensor(rollout.valid)[:, None])
    tokens = tokens.padded(passes.grain.columns)
    shape, heads = tokens.response.shape, len(model.heads)
    exact = learning.kl.observe == "exact"
    names = ("logp", "ref_logp", "entropy", *(["kl"] if exact else []))
    figures = torch.zeros(len(names) + 2 * heads, *shape, device=device)
    there = on(tokens, device)
    of_rows = lengths(tokens)
    if preview is not None:
        preview.draw(of_rows, step)
    for minibatch in plan(of_rows, learning.optim, learning.seed, step, 0, device, passes.grain):
        for micro in minibatch:
            rows = micro.rows.to(device)
            part = there.rows(rows, micro.width, micro.length, micro.count)
            out, ref_logp = passes.measure(part, learns)
            grids = [out.logp, ref_logp, out.entropy, *([out.exact_kl] if exact else [])]
            parts = [torch.stack(grids), out.values, model.target_values(out.state)]
            figures[:, rows[: micro.count], : micro.length] = torch.cat(parts)[:, : micro.count]
            if preview is not None:
                preview.keep(micro, out.state)
    figures = figures.cpu()
    named = dict(zip(names, figures, strict=False))
    values, targets = figures[len(names) :].view(2, heads, *shape)
    return Measured(tokens=tokens, values=values, targets=targets, **named)


def lengths(tokens: Tokens) -> Lengths:
    """Lengths of every row's prompt and response. ``tokens`` are on the CPU, so reading them waits for no device."""
    return Lengths(prompt=tokens.start.tolist(), response=tokens.mask.sum(1).tolist())


def learns_policy(critic: CriticConfig, step: int) -> bool:
    """Whether the policy learns at this step: it does once the critic's warm-up is over."""
    return step >= critic.warmup_steps


def observe(step: int, rollout: Rollout, measured: Measured) -> Observation:
    """The controller's input: mean reward of the valid rows; over response tokens mean KL, with its standard error over
    the rows, and mean entropy, nats per token; mean length of a response.

    The KL is the exact one where it was measured, else k1 = logp - ref. Raises DivergenceError where a figure is not
    finite.
    """
    scores = [score for score, valid in zip(rollout.scores, rollout.valid, strict=True) if valid]
    mask = measured.tokens.mask
    kl = masked_mean(measured.observed_kl, mask).item()
    entropy = masked_mean(measured.entropy.double(), mask).item()
    sampled = masked_mean(measured.log_ratio, mask).item()
    check_finite(step, {"objective/kl": sampled, "objective/kl_exact": kl, "objective/entropy": entropy})
    return Observation(
        step=step,
        reward=sum(scores) / len(scores),
        kl=kl,
        entropy=entropy,
        kl_error=ratio_error(measured.observed_kl, mask),
        length=(mask.sum() / mask.any(1).sum()).item(),
    )


def check_finite(step: int, figures: Mapping[str, float | None]) -> None:
    """Raises DivergenceError for the first figure that is NaN or infinite.

    The message names the step, the figure and the remedy.
    """
    for name, figure in figures.items():
        if figure is not None and not math.isfinite(figure):
            raise DivergenceError(
                f"step {step}: {name} is {figure}, so the policy has diverged and the step is not recorded; resume "
                "from the last checkpoint, or start a new run with a lower optim.learning_rate",
                figures,
            )
