"""What the tests of the loop share: the tiny policy as a run's model, a reward without chance, a run's rows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from stable_rlhf import Config, SAFETrainer
from tests.conftest import tiny_llama

ENDS = list(range(2, 62))
"""Ids that end a completion: enough of the tiny policy's 259 tokens that about every fifth token does."""
PROMPTS = ["ab", "cde", "f g", "hello", "xyz", "w", "two words", "q?"]


def policy(tokenizer: PreTrainedTokenizerFast, seed: int = 0) -> LlamaForCausalLM:
    """The tiny policy; its completions differ in length."""
    made = tiny_llama(len(tokenizer), seed)
    made.generation_config.eos_token_id = ENDS
    return made


def lora(model: LlamaForCausalLM, seed: int = 0) -> Any:
    """The policy with an adapter that changes it (B is not zero), by the same numbers whatever was drawn before."""
    return moved(new_lora(model), seed)


def new_lora(model: LlamaForCausalLM) -> Any:
    """The policy with an adapter as PEFT makes it, which adds nothing yet."""
    return get_peft_model(model, LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM"))


def moved(adapted: Any, seed: int = 0) -> Any:
    """The policy, whose adapter has other weights now, as if it had learned."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            parameter.data.normal_(0, 0.2, generator=generator)
    return adapted


def letters(prompts: list[Any], completions: list[Any], **columns: Any) -> list[float]:
    """A reward in 0..2 that is a function of the text alone, in eighths, so that it has no rounding."""
    return [(sum(map(ord, completion)) % 17) / 8 for completion in completions]


def settings(output_dir: Path, preset: str = "safe", **overrides: Any) -> Config:
    """A run of 4 steps of 8 prompts, fast enough to learn that all of its rows differ."""
    run: dict[str, Any] = {
        "output_dir": str(output_dir),
        "max_steps": 4,
        "save_steps": 2,
        "rollout": {"batch_size": 8, "max_completion_length": 6},
        "optim": {"learning_rate": 1e-2},
        "log": {"progress": False},
    }
    for name, value in overrides.items():
        run[name] = {**run[name], **value} if name in run and isinstance(value, dict) else value
    return Config.from_preset(preset, **run)


def trainer(config: Config, tokenizer: PreTrainedTokenizerFast, reward: Any = letters, **arguments: Any) -> SAFETrainer:
    """A trainer on PROMPTS with a policy of its own; ``arguments`` replace or add to SAFETrainer's."""
    arguments = {
        "model": policy(tokenizer),
        "train_dataset": datasets.Dataset.from_dict({"prompt": PROMPTS}),
        "processing_class": tokenizer,
        **arguments,
    }
    return SAFETrainer(reward_funcs=reward, args=config, **arguments)


def finished(
    config: Config, tokenizer: PreTrainedTokenizerFast, reward: Any = letters, **arguments: Any
) -> SAFETrainer:
    """A trainer that has trained."""
    run = trainer(config, tokenizer, reward, **arguments)
    run.train()
    return run


def rows(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def broken(kind: str) -> Any:
    """``letters``, but its fourth call fails."""
    calls = 0

    def reward(prompts: list[Any], completions: list[Any], **columns: Any) -> list[float]:
        nonlocal calls
        calls += 1
        scores = letters(prompts, completions)
        if calls < 4:
            return scores
        if kind == "raises":
            raise TimeoutError("the server does not answer")
        return scores[:-1] if kind == "count" else [*scores[:-1], float("nan")]

    # In the metrics' names, and in what a resume compares: the settings and, by __wrapped__, the source code.
    reward.__wrapped__ = letters
    reward.__name__, reward.__qualname__, reward.__module__ = letters.__name__, "letters", letters.__module__
    return reward
