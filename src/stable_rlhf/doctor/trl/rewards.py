"""The rewards of a TRL script, called and added up as TRL's trainers do."""

from __future__ import annotations

import functools
import importlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import TrainerState

from stable_rlhf.data import Text
from stable_rlhf.doctor.trl.arguments import KNOWN_REWARDS, TRLArguments
from stable_rlhf.rewards import RewardFunction, RewardModel, Scorer, resolve_reward
from stable_rlhf.rewards.load_model import BUILTIN_MODEL, load_reward_model
from stable_rlhf.rewards.parameters import OF_RUN, accepts

NOTHING = 1e-8
"""A standard deviation of a group's rewards that is zero to TRL (torch.isclose)."""


class _TRLRewardModel(RewardModel):
    """A reward model that reads a text prompt without the tokenizer's special tokens, as TRL's trainers have it."""

    def encode(self, prompts: Sequence[Text], completions: Sequence[Text]) -> list[list[int]]:
        if not isinstance(prompts[0], str):
            return super().encode(prompts, completions)
        texts = [f"{prompt}{completion}" for prompt, completion in zip(prompts, completions, strict=True)]
        ids: Any = self.tokenizer(
            texts, add_special_tokens=False, truncation=self.max_length is not None, max_length=self.max_length
        )
        return list(ids["input_ids"])


@dataclass(frozen=True, kw_only=True)
class TRLRewards:
    """Reward functions with their weights."""

    scorer: Scorer
    weights: list[float]
    by_function: bool
    """Whether each function's scores are normalised in their group before they are added up."""
    advice: list[str]
    """Sentences about names that doctor understands and TRL does not."""

    def score(
        self, prompts: list[Any], completions: list[str], columns: dict[str, list[Any]], ids: list[list[int]]
    ) -> dict[str, list[float | None]]:
        """The scores of each function by its name; None for none. Raises RewardError."""
        return self.scorer.answers(prompts, completions, columns, ids)

    def totals(self, scores: dict[str, list[float | None]]) -> list[float | None]:
        """The weighted sum for each completion over the functions that gave a score; None where none did."""
        rows = zip(*scores.values(), strict=True)
        return [_sum(row, self.weights) for row in rows]

    def is_flat(self, scores: dict[str, list[float | None]]) -> bool:
        """Whether a group's scores give every completion the advantage 0."""
        counted = [values for values, weight in zip(scores.values(), self.weights, strict=True) if weight != 0]
        return all(map(_flat, counted)) if self.by_function else _flat(self.totals(scores))

    def unaccepted(self, columns: Sequence[str]) -> dict[str, str]:
        """An argument by each function that does not take it. TRL passes each of them, and then fails."""
        found = {}
        for function in self.scorer.functions:
            if isinstance(function.function, RewardModel):
                continue
            lacking = [name for name in (*columns, *OF_RUN) if not accepts(function.function, name)]
            if lacking:
                found[function.name] = lacking[0]
        return found


def _sum(scores: Sequence[float | None], weights: Sequence[float]) -> float | None:
    known = [weight * score for weight, score in zip(weights, scores, strict=True) if score is not None]
    return math.fsum(known) if known else None


def _flat(values: Sequence[float | None]) -> bool:
    known = torch.tensor([value for value in values if value is not None], dtype=torch.float32)
    return len(known) < 2 or bool(known.std() <= NOTHING)


def make_rewards(given: TRLArguments, device: torch.device) -> TRLRewards:
    """Loads the rewards that the script would. Raises RewardInputError."""
    script, training = given.script, given.training
    functions, advice = [], []
    if script.reward_model_name_or_path:
        functions.append(_model(given, script.reward_model_name_or_path, device))
    for name in script.reward_funcs or []:
        function, said = _function(str(name))
        functions.append(function)
        advice += [said] if said else []
    state = TrainerState(max_steps=max(training.max_steps, 0))
    weights = [1.0] * len(functions) if training.reward_weights is None else list(map(float, training.reward_weights))
    aggregation = getattr(training, "multi_objective_aggregation", "sum_then_normalize")
    return TRLRewards(
        scorer=Scorer(functions, weights, trainer_state=lambda: state),
        weights=weights,
        by_function=aggregation == "normalize_then_sum",
        advice=advice,
    )


def _model(given: TRLArguments, name: str, device: torch.device) -> RewardFunction:
    path = str(BUILTIN_MODEL) if name == "builtin" else name
    model, tokenizer = load_reward_model(path, name, device, torch.float32, given.training.trust_remote_code)
    title = name.rstrip("/").rpartition("/")[2]
    return RewardFunction(name=title, function=_TRLRewardModel(model, tokenizer, name=title))


def _function(name: str) -> tuple[RewardFunction, str | None]:
    """A function by the name that the file gives it, and a sentence where TRL would not find it."""
    if name in KNOWN_REWARDS:
        function = getattr(importlib.import_module("trl.rewards"), name)
        if name == "get_soft_overlong_punishment":  # with the lengths that TRL's script gives it
            function = function(max_completion_len=1280, soft_punish_cache=256)
        return resolve_reward(functools.partial(function), name=name), None
    if ":" in name:
        dotted = name.replace(":", ".")
        return resolve_reward(
            name
        ), f"reward_funcs: doctor reads {name!r}, but TRL's script only {dotted!r}: write that"
    module, _, attribute = name.rpartition(".")
    return resolve_reward(f"{module}:{attribute}", name=attribute), None
