"""The held-out prompts: which they are, and what they show before and after training (evaluation.json)."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from torch import nn

from stable_rlhf.checkpoint import load_random_state, random_state
from stable_rlhf.config import Config, ConfigError
from stable_rlhf.display import clipped
from stable_rlhf.ops.masked import distinct_n
from stable_rlhf.optimize import Measured, measure, plain
from stable_rlhf.passes import Passes
from stable_rlhf.prompts import EncodedPrompts, load_prompts, prompt_text
from stable_rlhf.records import Rollout
from stable_rlhf.rollout import Sampler
from stable_rlhf.telemetry import replace_text

SEED = 12_345
"""Seed of the sampling in every evaluation, so that before and after differ by the policy alone."""
SAMPLES = 16
"""Completions kept in evaluation.json, before and after training: a page of the report."""
TEXT_LIMIT = 20_000
"""Characters kept of a sample's prompt and completion, which are there to be read: 16 prompts of 10 MB would be 160."""


def split_datasets(config: Config, train: Any, evaluation: Any) -> tuple[datasets.Dataset, datasets.Dataset | None]:
    """(training prompts, held-out prompts or None).

    ``train`` and ``evaluation`` are data sets or lists of rows; None takes what ``config.data`` names, where rows are
    held out of the training set if no other are named. Raises ConfigError when the training set is too small for that.
    """
    data, size = config.data, config.data.eval_size
    if train is not None:
        return _as_dataset(train), None if evaluation is None else _as_dataset(evaluation)
    train = load_prompts(data.train, format=data.format, split=data.split, limit=data.limit)
    if evaluation is not None:
        return train, _as_dataset(evaluation)
    if size == 0:
        return train, None
    if data.eval is not None or data.train == "builtin":
        source = "builtin" if data.eval is None else data.eval
        return train, load_prompts(source, format=data.format, split=data.eval_split, limit=size)
    if len(train) <= size:
        raise ConfigError(
            f"data.eval_size={size}: the training set has only {len(train)} rows; lower it or set data.eval"
        )
    held_out = train.train_test_split(test_size=size, seed=config.seed)["test"]
    # Data sets hold one conversation at several lengths, and prompts twice: none of a held-out one is trained on.
    begun = {_beginning(prompt) for prompt in held_out["prompt"]}
    kept = [row for row, prompt in enumerate(train["prompt"]) if _beginning(prompt) not in begun]
    if not kept:
        raise ConfigError(f"data.eval_size={size}: no training prompt begins otherwise than those held out; lower it")
    return train.select(kept), held_out


def _beginning(prompt: Any) -> str:
    """What tells conversations apart: the first thing that the user says."""
    if isinstance(prompt, str):
        return prompt
    return next((message["content"] for message in prompt if message["role"] == "user"), prompt[0]["content"])


def _as_dataset(rows: Any) -> datasets.Dataset:
    """A data set as it is; a list of rows with every column that any row has."""
    if isinstance(rows, datasets.Dataset):
        return rows
    rows = list(rows)
    columns = {name: None for row in rows for name in row}  # a dict keeps the order of first appearance
    return datasets.Dataset.from_dict({name: [row.get(name) for row in rows] for name in columns})


def evaluate(
    passes: Passes, sampler: Sampler, dataset: Any, encoded: EncodedPrompts, config: Config
) -> tuple[dict[str, float | None], list[dict[str, Any]]]:
    """(figures over all rows, the first SAMPLES completions). The run's own random draws stay as if it had not been."""
    size, parts = config.rollout.batch_size, []
    tensors, state = random_state()  # Python's and NumPy's too: a reward function may draw from them
    try:
        random.seed(SEED)
        np.random.seed(SEED)
        torch.manual_seed(SEED)
        for start in range(0, len(dataset), size):
            indices = range(start, min(start + size, len(dataset)))
            rollout, _ = sampler.collect(dataset, encoded, indices)
            parts.append((rollout, measure(passes, rollout, config, config.max_steps)))
    finally:
        load_random_state(tensors, state)
    samples = [
        {"prompt": prompt_text(prompt), "completion": completion, "reward": score if valid else None}
        for rollout, _ in parts
        for prompt, completion, score, valid in zip(
            rollout.prompts, rollout.completions, rollout.scores, rollout.valid, strict=True
        )
    ]
    return evaluation_metrics(parts), samples[:SAMPLES]


def record(run_dir: Path, side: str, figures: dict[str, float | None], samples: list[dict[str, Any]]) -> dict[str, Any]:
    """Enters one side (``before`` or ``after``) into run_dir/evaluation.json; returns the whole content.

    ``before`` begins the file anew: a run that stopped before its first step may have left one in the folder.
    """
    known = {} if side == "before" else read(run_dir)
    known[side] = figures
    kept = known.get("samples") or [{"prompt": clipped(sample["prompt"], TEXT_LIMIT)} for sample in samples]
    for sample, new in zip(kept, samples, strict=True):
        sample |= {side: clipped(new["completion"], TEXT_LIMIT), f"reward_{side}": new["reward"]}
    known["samples"] = kept
    replace_text(run_dir / "evaluation.json", json.dumps(known, indent=1))
    return known


def forget_after(run_dir: Path) -> None:
    """Takes ``after`` out of run_dir/evaluation.json: the run goes on, so its end is not measured yet."""
    known = read(run_dir)
    if known.pop("after", None) is not None:
        for sample in known["samples"]:
            del sample["after"], sample["reward_after"]
        replace_text(run_dir / "evaluation.json", json.dumps(known, indent=1))


def read(run_dir: Path) -> dict[str, Any]:
    """The content of run_dir/evaluation.json; empty where the run has no held-out prompts."""
    path = run_dir / "evaluation.json"
    return json.loads(path.read_text()) if path.exists() else {}


def evaluation_metrics(parts: list[tuple[Rollout, Measured]]) -> dict[str, float | None]:
    """One side of evaluation.json, over all rows of all parts; reward_se is the standard error of the mean reward."""
    scores = [s for rollout, _ in parts for s, v in zip(rollout.scores, rollout.valid, strict=True) if v]
    reward = torch.tensor(scores, dtype=torch.float64)
    tokens = sum(measured.tokens.mask.sum() for _, measured in parts)
    kl = sum(((m.logp - m.ref_logp).double() * m.tokens.mask).sum() for _, m in parts)
    entropy = sum((m.entropy.double() * m.tokens.mask).sum() for _, m in parts)
    width = max(rollout.tokens.mask.shape[1] for rollout, _ in parts)
    masks, responses = (
        torch.cat([nn.functional.pad(t, (0, width - t.shape[1])) for t in tensors])
        for tensors in zip(*((rollout.tokens.mask, rollout.tokens.response) for rollout, _ in parts), strict=True)
    )
    metrics = {
        "reward": reward.mean(),
        "reward_se": reward.std() / len(scores) ** 0.5 if len(scores) > 1 else torch.nan,
        "kl": kl / tokens,
        "entropy": entropy / tokens,
        "distinct_2": distinct_n(responses, masks, 2),
        "length": masks.sum(1).double().mean(),
        "prompts": len(masks),
    }
    return plain(metrics)
