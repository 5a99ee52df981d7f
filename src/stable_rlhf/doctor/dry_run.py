"""A few real steps in a temporary folder, and the forecast of the run's time."""

from __future__ import annotations

import dataclasses
import json
import math
import statistics
import tempfile
from datetime import timedelta
from pathlib import Path
from typing import Any

import datasets
import torch

from stable_rlhf.config import Config, DataConfig, RewardConfig
from stable_rlhf.control import GuardConfig
from stable_rlhf.data import EncodedPrompts, PromptStream
from stable_rlhf.doctor.findings import Findings
from stable_rlhf.errors import DivergenceError, OutOfMemoryError, RewardError
from stable_rlhf.hardware import memory, resolve_device
from stable_rlhf.rewards import RewardModel
from stable_rlhf.text import readable_size
from stable_rlhf.training import GracefulStop, SAFETrainer

STEPS, CUDA_STEPS = 2, 8
"""Dry steps: the first is on the longest prompts. CUDA takes more, because the usual shapes are first compiled and
captured. The forecast uses the median of the second half: on an H100 the first steps of configs/smollm2-hh.yaml took
3.6, 0.9, 1.2, 1.7, 1.4, 0.8 and then mostly 0.7 s (docs/LOG.md, 2026-11-26)."""

PARTS = {"rollout": "rollout_s", "scoring": "scoring_s", "log-probs": "logprobs_s", "update": "update_s"}


CUT_OFF = 0.1
"""Share of cut completions without a warning: a few long answers are cut in most runs."""

OUTSIDE = (
    "eval_steps",
    "metric_for_best_model",
    "greater_is_better",
    "load_best_model_at_end",
    "push_to_hub",
    "hub_model_id",
    "hub_private",
)
"""Settings that act around the steps: the dry steps have their defaults."""


def field_default(name: str) -> Any:
    return next(field.default for field in dataclasses.fields(Config) if field.name == name)


class _DryRun(SAFETrainer):
    """A trainer that saves no checkpoints, since nobody resumes a dry run."""

    def save_checkpoint(self) -> Path:
        return self.run_dir


class _Order(PromptStream):
    """The stream of the dry steps' prompts: the first ``size`` rows first, then the others again and again."""

    def __init__(self, size: int) -> None:
        super().__init__(2 * size, seed=0)
        self._left, self._then = [list(range(size))], list(range(size, 2 * size))

    def take(self, k: int) -> list[int]:
        return self._left.pop() if self._left else self._then


def dry_steps(
    found: Findings,
    config: Config,
    functions: list[Any],
    train: datasets.Dataset,
    encoded: EncodedPrompts,
    held_out: int,
    checkpoint: int,
) -> None:
    """Trains for a few steps: first on the longest prompts, then on the run's first batch, which is timed."""
    device, size = resolve_device(config.model.device), config.rollout.prompts
    by_length = sorted(range(len(encoded)), key=lambda row: -len(encoded.input_ids[row]))
    longest = [by_length[i % len(by_length)] for i in range(size)]
    usual = PromptStream(len(train), config.seed).take(size)
    # Without a function of the user's the setting is about gold rewards, which these steps do not have.
    own = any(not isinstance(function, RewardModel) and not _skips(function) for function in functions)
    with tempfile.TemporaryDirectory(prefix="stable-rlhf-doctor-") as folder:
        dry = dataclasses.replace(
            config,
            output_dir=str(Path(folder) / "run"),
            max_steps=number_of_steps(device, config.max_steps),
            save_steps=0,
            **{name: field_default(name) for name in OUTSIDE},
            data=DataConfig(max_prompt_length=config.data.max_prompt_length),  # the rows are chosen already
            critic=dataclasses.replace(config.critic, warmup_steps=0),  # longer than these steps; without, all learns
            reward=RewardConfig(  # the rewards are loaded already and given as objects
                weights=config.reward.weights,
                missing_eos_penalty=config.reward.missing_eos_penalty,
                normalise=config.reward.normalise,
                skip_special_tokens=config.reward.skip_special_tokens or not own,
            ),
            guard=GuardConfig(enabled=False),  # a figure that is not finite is to be named, not rolled back
            log=dataclasses.replace(config.log, report_to=[], run_name=None, completions_steps=0, progress=False),
        )
        try:
            with memory.measured(device) as peak:
                rows = train.select([*longest, *usual])
                trainer = _DryRun(config.model.name, functions, args=dry, train_dataset=rows)
                trainer.stream = _Order(size)
                if config.model.self_check:
                    found.ok("model: a few tokens have the same log-probs alone, side by side and as they are sampled")
                with GracefulStop(), memory.shortage_named("step"):
                    figures = [row for _ in range(dry.max_steps) if (row := trainer.step()) is not None]
                trainer.end()
        except (RewardError, DivergenceError) as error:
            found.fail(f"step: {error}")
            return
        except OutOfMemoryError as error:
            found.fail(str(error))
            return
        lines = (Path(folder) / "run" / "timings.jsonl").read_text().splitlines()
    judge_samples(found, config, figures)
    timing = usual_step([json.loads(line) for line in lines])
    taken = "" if peak.taken is None else f"; the steps took {readable_size(peak.taken)} at most"
    parts = ", ".join(f"{name} {timing[key]:.3g} s" for name, key in PARTS.items())
    found.ok(f"step: {timing['total_s']:.3g} s ({parts}), {timing['tokens_per_s']:.0f} tokens/s{taken}")
    found.ok(forecast(config, timing, held_out, checkpoint))


def judge_samples(found: Findings, config: Config, rows: list[dict[str, Any]]) -> None:
    """Says how many of the dry steps' completions were cut off, and whether the rewards told them apart.

    ``rows``: of metrics.jsonl, one a step.
    """
    cut = statistics.fmean(row["completions/clipped_ratio"] for row in rows)
    limit = config.rollout.max_completion_length
    text = f"completions: {cut:.0%} of those of the dry steps are cut off by rollout.max_completion_length={limit}"
    if cut > CUT_OFF:
        found.warning(
            f"{text}; a cut answer is scored without its end: raise it, or see whether the policy ends at all"
        )
    else:
        found.ok(text)
    if all(row["objective/scores_std"] == 0 for row in rows):
        found.warning(
            "scores: the completions of each dry step all have the same score, so there is nothing to learn from: give "
            "a reward with steps in between, or a better policy to begin with"
        )
    else:
        found.ok("scores: the completions of a dry step have different scores")


def _skips(function: Any) -> bool:
    """Whether a function says itself that it gets no special tokens."""
    return bool(getattr(function, "skip_special_tokens", False))


def number_of_steps(device: torch.device, most: int) -> int:
    """The number of dry steps; on CUDA at most the run's ``most`` steps, but at least STEPS."""
    return max(STEPS, min(CUDA_STEPS, most)) if device.type == "cuda" else STEPS


def usual_step(rows: list[dict[str, Any]]) -> dict[str, float]:
    """The median of each figure over the second half of the steps."""
    timed, names = rows[len(rows) // 2 :], (*PARTS.values(), "total_s", "tokens_per_s")
    return {name: statistics.median(row[name] for row in timed) for name in names}


def forecast(config: Config, timing: dict[str, float], held_out: int, checkpoint: int) -> str:
    """The run's time and its checkpoints, as a line. ``timing``: seconds of a step by part; ``held_out``: number of
    prompts."""
    evaluating = sum(timing[part] for part in ("rollout_s", "scoring_s", "logprobs_s"))
    times = 2 + ((config.max_steps - 1) // config.eval_steps if config.eval_steps else 0)  # before, after, and between
    evaluating *= times * math.ceil(held_out / config.rollout.batch_size)
    seconds = config.max_steps * timing["total_s"] + evaluating
    every = config.save_steps
    when = f"every {every} steps and at the end" if 0 < every < config.max_steps else "at the end"
    return (
        f"forecast: {config.max_steps} steps x {timing['total_s']:.3g} s and {evaluating:.3g} s of evaluation = "
        f"{timedelta(seconds=round(seconds))}; checkpoints of {readable_size(checkpoint)} {when}"
    )
