"""One step of training on one page: rollout, measurement, decision, batch, update."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch

from stable_rlhf.config import RolloutConfig
from stable_rlhf.control import Controller, Decision, GuardConfig, RewardNormaliser
from stable_rlhf.data import EncodedPrompts, PromptStream, StreamedPrompts
from stable_rlhf.learner import Passes, Preview, check_finite, make_batch, measure, observe, update
from stable_rlhf.records import Measured, Rollout, StepStats
from stable_rlhf.rollout import Sampler
from stable_rlhf.training.resume import Counters
from stable_rlhf.training.stopwatch import Stopwatch


@dataclass(kw_only=True)
class Loop:
    """The parts of a run that a step reads and changes."""

    rollout: RolloutConfig
    guard: GuardConfig
    dataset: Any
    """Training rows; columns other than ``prompt`` reach the reward functions."""
    prompts: EncodedPrompts | StreamedPrompts
    stream: PromptStream | StreamedPrompts
    sampler: Sampler
    passes: Passes
    controller: Controller[Any, Any]
    normaliser: RewardNormaliser
    optimizer: torch.optim.Optimizer
    preview: Preview | None
    counters: Counters
    factor: float
    """What the roll-backs so far leave of the steps' size: of how far the decision lets an update move the policy. The
    optimiser has its learning rates already."""


@dataclass(frozen=True, kw_only=True)
class Step:
    """The results of a step."""

    rollout: Rollout
    measured: Measured
    decision: Decision
    batch_metrics: dict[str, float | None]
    stats: StepStats
    learning_rates: list[float]
    """Of the policy and, where there is one, of the critic, in this step."""


def bounded(decision: Decision, given: float | None, factor: float) -> Decision:
    """The decision with the bound on the update's movement that is in force; what the KL may be stays as it is.

    It is ``given`` (`optim.max_update_kl`), or where that is None the controller's, times the roll-backs' ``factor``.
    """
    limit = decision.update_kl if given is None else given
    return decision if limit is None else dataclasses.replace(decision, update_kl=limit * factor)


def take_step(loop: Loop, watch: Stopwatch) -> Step:
    """Samples completions, scores them, takes the controller's decision, and learns from them.

    The decision comes before the update and rests on figures of the policy that sampled. Raises RewardError where no
    reward can be had, before anything is learned; DivergenceError for a figure that is not finite.
    """
    step = loop.counters.step
    indices = loop.stream.take(loop.rollout.prompts)
    rollout, seconds = loop.sampler.collect(
        loop.dataset, loop.prompts, indices, generations=loop.rollout.num_generations
    )
    watch.add(seconds)
    measured = measure(loop.passes, rollout, step, loop.preview)
    watch.lap("logprobs_s")
    loop.counters.episode += len(rollout.indices)
    decided = loop.controller.observe(observe(step, rollout, measured))
    decision = bounded(decided, loop.passes.learning.optim.max_update_kl, loop.factor)
    loop.normaliser.update([score for score, valid in zip(rollout.scores, rollout.valid, strict=True) if valid])
    scores = loop.normaliser.normalise(rollout.scores)
    batch, batch_metrics = make_batch(loop.passes.model, measured, scores, decision, loop.passes.learning)
    check_finite(step, batch_metrics)
    learning_rates = [group["lr"] for group in loop.optimizer.param_groups]
    watch.lap("control_s")
    stats = update(loop.passes, loop.optimizer, batch, decision, step, loop.preview)
    watch.lap("update_s")
    check_finite(step, stats.metrics | {"the norm of the weights": loop.passes.model.norm()})
    if stats.metrics["policy/skipped_steps"] and not loop.guard.enabled:
        check_finite(step, {"the gradient's norm": float("nan")})
    return Step(
        rollout=rollout,
        measured=measured,
        decision=decision,
        batch_metrics=batch_metrics,
        stats=stats,
        learning_rates=learning_rates,
    )
