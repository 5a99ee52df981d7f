"""TRL's GRPO, RLOO or PPO on our task: our prompts, our reward, as many completions and optimiser steps as ours.

    python benchmarks/peers/trl_run.py --algorithm grpo --steps 60 --seed 0 --out runs/grpo-seed0
    stable-rlhf sweep --preset safe,ppo --seeds 5 --out SWEEP --max_steps 60
    stable-rlhf compare SWEEP runs/grpo-seed*

                        ours            grpo, rloo                   ppo (trl.experimental.ppo)
    completions a step  64              64 (8 prompts x 8)           64
    tokens of each      at most 32      at most 32                   at most 32
    optimiser steps     2 x 2 = 4       2 iterations x 2 parts = 4   2 epochs x 2 minibatches = 4
    epochs over them    2               2                            2
    rows of the log     1 a step        1 an optimiser step          1 a step

Both counts are taken from the run (completions that the reward saw, steps in AdamW's state) and must equal ours, or
the script fails. Equal too: the policy's weights, adapter, temperature, constant learning rate, AdamW without weight
decay, gradient norm, clip range. Not equal, since it is what the algorithms differ in: the number of prompts (a group
of completions to each), the critic (PPO's is a model of its own, trained in full), what the KL coefficient weighs (loss
per token in GRPO, reward of the sequence in RLOO and PPO), and the preview and guard, which only we have. GRPO and
RLOO run with TRL 1.16 and 1.12, PPO with 1.12: later versions have none. settings.json says which version ran.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.metadata
import json
import math
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from datasets import Dataset
from transformers import (
    AutoModelForSequenceClassification,
    DataCollatorWithPadding,
    PreTrainedTokenizerBase,
    TrainerCallback,
    TrainerState,
    TrainingArguments,
)
from transformers.utils import logging

from stable_rlhf import SAFETrainer
from stable_rlhf.config import Config
from stable_rlhf.hardware import resolve_device
from stable_rlhf.integrations.trl import SAFECallback
from stable_rlhf.ops.masked import distinct_n
from stable_rlhf.policy import load_policy, load_tokenizer
from stable_rlhf.policy.loading import policy_source
from stable_rlhf.rewards.functions import resolve_reward

GENERATIONS = 8
"""Completions of a group: TRL's default."""
CHECKPOINTING = next(
    field.name
    for field in dataclasses.fields(TrainingArguments)
    if field.name in ("activation_checkpointing", "gradient_checkpointing")
)
"""The setting that computes layers twice to save memory; older versions of Transformers have the second name."""


class CountedReward:
    """Our reward function with TRL's signature. It counts completions, keeps distinct-2 and length of the last, and
    logs the gold rewards' means as gold/0 and so on."""

    __name__ = "reward"

    def __init__(self, config: Config) -> None:
        device = resolve_device(config.model.device)
        self.function = resolve_reward(config.reward.functions[0], device=device).function
        self.gold = [resolve_reward(name, device=device).function for name in config.reward.gold]
        self.completions = 0
        self.last: dict[str, float] = {}

    def __call__(
        self, prompts: list[Any], completions: list[Any], completion_ids: list[Any], log_metric: Any = None, **more: Any
    ) -> list[float]:
        answers = [given if isinstance(given, str) else given[-1]["content"] for given in completions]
        ids = [torch.as_tensor(row) for row in completion_ids]
        tokens = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True)
        mask = torch.arange(tokens.shape[1]) < torch.tensor([len(row) for row in ids])[:, None]
        self.completions += len(ids)
        self.last = {
            "completions/distinct_2": distinct_n(tokens, mask, 2).item(),
            "completions/mean_length": mask.sum().item() / len(ids),
        }
        if log_metric is not None:  # GRPO and RLOO log the length themselves
            log_metric("completions/distinct_2", self.last["completions/distinct_2"])
            for at, gold in enumerate(self.gold):
                log_metric(f"gold/{at}", math.fsum(gold(prompts, answers)) / len(answers))
        return self.function(prompts, answers)


class RewardAsModel(torch.nn.Module):
    """A reward function as the sequence-classification model that TRL's PPO wants: texts in, one number at every token.

    Prompts are padded to `context` tokens, so that the answer begins there.
    """

    base_model_prefix = "backbone"

    def __init__(self, reward: CountedReward, tokenizer: PreTrainedTokenizerBase, context: int) -> None:
        super().__init__()
        self.reward, self.tokenizer, self.context = reward, tokenizer, context
        self.score = torch.nn.Identity()

    def backbone(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, **others: Any) -> Any:
        rows = list(zip(input_ids.cpu(), attention_mask.bool().cpu(), strict=True))
        prompts, answers = (
            [ids[part][mask[part]] for ids, mask in rows]
            for part in (slice(None, self.context), slice(self.context, None))
        )
        texts = [self.tokenizer.batch_decode(side, skip_special_tokens=True) for side in (prompts, answers)]
        values = torch.tensor(self.reward(*texts, completion_ids=answers), device=input_ids.device)
        return SimpleNamespace(hidden_states=[values[:, None, None].expand(*input_ids.shape, 1)])


def our_inputs(config: Config) -> tuple[list[Any], dict[str, str | None]]:
    """The prompts (texts or chats) that a run of ours with these settings trains on, and the digests that it records of
    data, reward and model: `compare` then knows that they are the same. Chats that are too long are left out."""
    run = SAFETrainer(config.model.name, args=config)
    prompts = run.train_dataset["prompt"][:]
    if not isinstance(prompts[0], str):
        tokenizer, most = load_tokenizer(config.model), config.data.max_prompt_length
        whole = [tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False) for chat in prompts]
        ids = tokenizer(whole, add_special_tokens=False)["input_ids"]
        fits = [chat for chat, own in zip(prompts, ids, strict=True) if len(own) <= most]
        print(f"{len(prompts) - len(fits)} of {len(prompts)} chats have more than {most} tokens and are left out")
        prompts = fits
    return prompts, {**run.inputs.digests(), "model": run.reference.fingerprint}


def groups(
    config: Config, prompts: list[Any], algorithm: str, beta: float, common: dict[str, Any], reward: CountedReward
) -> Any:
    """GRPO's or RLOO's trainer. A generation serves num_iterations passes of num_mini_batches optimiser steps."""
    if algorithm == "grpo":
        from trl.trainer.grpo_config import GRPOConfig as Arguments
        from trl.trainer.grpo_trainer import GRPOTrainer as Trainer
    else:
        from trl.trainer.rloo_config import RLOOConfig as Arguments
        from trl.trainer.rloo_trainer import RLOOTrainer as Trainer

    parts, passes = config.optim.num_mini_batches, config.optim.num_iterations
    arguments: Any = Arguments(
        **common,
        per_device_train_batch_size=config.rollout.batch_size // parts,
        gradient_accumulation_steps=1,
        steps_per_generation=parts,
        num_iterations=passes,
        max_steps=config.max_steps * parts * passes,
        num_generations=GENERATIONS,
        max_completion_length=config.rollout.max_completion_length,
        temperature=config.rollout.temperature,
        epsilon=config.optim.epsilon,
        beta=beta,
        logging_steps=1,
    )
    return Trainer(
        model=load_policy(config.model)[0],
        reward_funcs=reward,
        args=arguments,
        train_dataset=Dataset.from_dict({"prompt": prompts}),
        processing_class=padded_left(config),
    )


def ppo(config: Config, prompts: list[str], beta: float, common: dict[str, Any], reward: CountedReward) -> Any:
    """PPO's trainer, which logs the length, distinct-2 and seconds of a step besides its own figures."""
    from trl.experimental.ppo import PPOConfig, PPOTrainer

    class Measured(PPOTrainer):
        began = time.perf_counter()

        def log(self, logs: dict[str, float], *others: Any, **more: Any) -> None:
            now = time.perf_counter()
            super().log({**logs, **reward.last, "step_time": now - self.began}, *others, **more)
            self.began = now

    arguments = PPOConfig(
        **common,
        per_device_train_batch_size=config.rollout.batch_size,
        gradient_accumulation_steps=1,  # a whole minibatch at once: one backward pass is one optimiser step
        num_mini_batches=config.optim.num_mini_batches,
        num_ppo_epochs=config.optim.num_iterations,
        total_episodes=config.max_steps * config.rollout.batch_size,
        local_rollout_forward_batch_size=config.rollout.batch_size,
        response_length=config.rollout.max_completion_length,
        temperature=config.rollout.temperature,
        cliprange=config.optim.epsilon,
        kl_coef=beta,
        stop_token="eos",
        num_sample_generations=0,
        logging_steps=1,
    )
    tokenizer = padded_left(config)
    rows = [tokenizer(prompt)["input_ids"] for prompt in prompts]
    context = max(map(len, rows))
    name, loading = policy_source(config.model)
    adapter = config.model.lora_r > 0
    scorer: Any = RewardAsModel(reward, tokenizer, context)
    trainer = Measured(
        args=arguments,
        processing_class=tokenizer,
        model=load_policy(config.model)[0],
        ref_model=None if adapter else load_policy(config.model)[0],
        reward_model=scorer,
        value_model=AutoModelForSequenceClassification.from_pretrained(name, num_labels=1, **loading),
        train_dataset=Dataset.from_dict({"input_ids": rows}),
        data_collator=DataCollatorWithPadding(tokenizer, padding="max_length", max_length=context),
    )
    trainer.began = time.perf_counter()
    return trainer


def padded_left(config: Config) -> PreTrainedTokenizerBase:
    tokenizer = load_tokenizer(config.model)
    tokenizer.padding_side = "left"
    return tokenizer


def optimizer_steps(trainer: Any) -> int:
    """Steps that AdamW has taken: the largest count in its state."""
    return max(int(state["step"]) for state in trainer.optimizer.state.values())


def settings(config: Config, arguments: argparse.Namespace, inputs: dict[str, str | None]) -> dict[str, Any]:
    """settings.json: what `compare` cannot know from trainer_state.json."""
    each = config.optim.num_iterations * config.optim.num_mini_batches
    return {
        "framework": f"TRL {arguments.algorithm.upper()}" + (" with SAFE" if arguments.budget else ""),
        "trl": importlib.metadata.version("trl"),
        "seed": config.seed,
        "model.name": config.model.name,
        "model.lora_r": config.model.lora_r,
        "data.train": config.data.train,
        "data.format": config.data.format,
        "data.max_prompt_length": config.data.max_prompt_length,
        "reward.functions": config.reward.functions,
        "reward.gold": config.reward.gold,
        "rollout.batch_size": config.rollout.batch_size,
        "rollout.max_completion_length": config.rollout.max_completion_length,
        "optim.learning_rate": config.optim.learning_rate,
        "optim.num_iterations": config.optim.num_iterations,
        "optim.num_mini_batches": config.optim.num_mini_batches,
        "optimizer_steps_per_rollout": each,
        **({"kl.settings.budget": arguments.budget} if arguments.budget else {"kl.settings.beta": arguments.beta}),
        "inputs": {name: digest for name, digest in inputs.items() if digest is not None},
    }


def parse(given: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--algorithm", choices=["grpo", "rloo", "ppo"], required=True)
    parser.add_argument("--model", default="builtin", help="builtin, or a folder or hub name of a policy")
    parser.add_argument("--gguf-file", help="name of a GGUF file in it")
    parser.add_argument("--lora-r", type=int, default=0, help="rank of the adapter; 0 trains every weight")
    parser.add_argument("--data", default="builtin", help="as data.train")
    parser.add_argument("--data-format", default="auto", help="as data.format; grpo and rloo take chats too")
    parser.add_argument("--max-prompt-length", type=int, default=512)
    parser.add_argument("--reward", default="builtin", help="as reward.functions, one of them")
    parser.add_argument("--gold", action="append", default=[], help="as reward.gold, one of them; grpo and rloo")
    parser.add_argument("--steps", type=int, default=60, help="rollouts")
    parser.add_argument("--batch-size", type=int, default=64, help="completions of a rollout")
    parser.add_argument("--max-completion-length", type=int, default=32)
    parser.add_argument("--learning-rate", type=float, default=1e-4)
    parser.add_argument("--beta", type=float, default=0.05, help="coefficient of the KL")
    parser.add_argument("--budget", type=float, help="put SAFECallback into grpo or rloo, with this KL budget")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--out", type=Path, required=True, help="folder of trainer_state.json and settings.json")
    arguments = parser.parse_args(given)
    if arguments.algorithm != "ppo" and arguments.batch_size % (2 * GENERATIONS):
        parser.error(f"--batch-size {arguments.batch_size}: give a multiple of {2 * GENERATIONS}, whole groups a part")
    if arguments.algorithm == "ppo" and (
        arguments.budget or arguments.gold or arguments.data_format not in ("auto", "prompt")
    ):
        parser.error("--budget, --gold and chats (--data-format) need --algorithm grpo or rloo")
    return arguments


class KeepsState(TrainerCallback):
    """Writes trainer_state.json every now and then, so that `compare` can read a run that was stopped."""

    EVERY = 40  # optimiser steps: writing the log of all steps so far takes milliseconds

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_step_end(self, args: Any, state: TrainerState, control: Any, **_: Any) -> None:
        if state.global_step % self.EVERY == 0:
            state.save_to_json(str(self.folder / "trainer_state.json"))


def main(given: Sequence[str]) -> None:
    arguments = parse(given)
    logging.disable_progress_bar()
    sections: dict[str, Any] = {
        "model": {
            "name": arguments.model,
            "gguf_file": arguments.gguf_file,
            "lora_r": arguments.lora_r,
            "device": arguments.device,
        },
        "data": {
            "train": arguments.data,
            "format": arguments.data_format,
            "max_prompt_length": arguments.max_prompt_length,
        },
        "reward": {"functions": [arguments.reward], "gold": arguments.gold},
        "rollout": {"batch_size": arguments.batch_size, "max_completion_length": arguments.max_completion_length},
        "optim": {"learning_rate": arguments.learning_rate},
    }
    config = Config(output_dir=str(arguments.out), max_steps=arguments.steps, seed=arguments.seed, **sections)
    on_cpu = resolve_device(config.model.device).type == "cpu"
    common: dict[str, Any] = {
        "output_dir": str(arguments.out),
        "seed": config.seed,
        "learning_rate": config.optim.learning_rate,
        "lr_scheduler_type": config.optim.lr_scheduler_type,
        "weight_decay": config.optim.weight_decay,
        "max_grad_norm": config.optim.max_grad_norm,
        CHECKPOINTING: False,
        "bf16": not on_cpu,
        "use_cpu": on_cpu,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }
    prompts, inputs = our_inputs(config)
    reward = CountedReward(config)
    if arguments.algorithm == "ppo":
        trainer = ppo(config, prompts, arguments.beta, common, reward)
    else:
        trainer = groups(config, prompts, arguments.algorithm, arguments.beta, common, reward)
    (arguments.out / "settings.json").write_text(json.dumps(settings(config, arguments, inputs), indent=1) + "\n")
    trainer.add_callback(KeepsState(arguments.out))
    if arguments.budget:
        trainer.add_callback(SAFECallback(trainer, arguments.budget))
    trainer.train()
    trainer.save_state()
    ours = (
        config.max_steps * config.rollout.batch_size,
        config.max_steps * config.optim.num_iterations * config.optim.num_mini_batches,
    )
    theirs = (reward.completions, optimizer_steps(trainer))
    print(f"completions: TRL {theirs[0]}, ours {ours[0]}; optimiser steps: TRL {theirs[1]}, ours {ours[1]}")
    if theirs != ours:
        raise SystemExit("the counts differ: these runs do not compare")


if __name__ == "__main__":
    main(sys.argv[1:])
