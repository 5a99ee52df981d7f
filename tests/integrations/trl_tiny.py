"""TRL trainers small enough for a test: the built-in policy, eight completions of eight tokens."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset

import stable_rlhf
from stable_rlhf.config import ModelConfig
from stable_rlhf.policy import load_policy, load_tokenizer

PROMPTS = json.loads((Path(stable_rlhf.__file__).parent / "assets" / "prompts.json").read_text())["train"][:64]
GENERATION = 4
"""Optimiser steps of a generation: two halves, twice."""


def vowels(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
    return [sum(letter in "aeiou" for letter in text) / (1 + len(text)) for text in completions]


def trainer(
    out: Path,
    kind: str = "grpo",
    steps: int = 6,
    reward: Callable[..., Any] = vowels,
    wrap: Any = None,
    peft_config: Any = None,
    **more: Any,
) -> Any:
    """A GRPOTrainer or RLOOTrainer for `steps` generations. `wrap`: makes another class of its class."""
    if kind == "grpo":
        from trl.trainer.grpo_config import GRPOConfig as Arguments
        from trl.trainer.grpo_trainer import GRPOTrainer as Trainer
    else:
        from trl.trainer.rloo_config import RLOOConfig as Arguments
        from trl.trainer.rloo_trainer import RLOOTrainer as Trainer
    torch.manual_seed(0)
    options = {
        "output_dir": str(out),
        "learning_rate": 1e-4,
        "lr_scheduler_type": "constant",
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 1,
        "steps_per_generation": 2,
        "num_iterations": 2,
        "num_generations": 4,
        "max_completion_length": 8,
        "max_steps": steps * GENERATION,
        "beta": 0.04,
        "logging_steps": 1,
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "bf16": False,
        "save_strategy": "no",
    }
    config = ModelConfig(device="cpu")
    tokenizer = load_tokenizer(config)
    tokenizer.padding_side = "left"
    made: Any = Trainer if wrap is None else wrap(Trainer)
    return made(
        model=load_policy(config)[0],
        reward_funcs=reward,
        args=Arguments(**{**options, **more}),
        train_dataset=Dataset.from_dict({"prompt": PROMPTS}),
        processing_class=tokenizer,
        peft_config=peft_config,
    )
