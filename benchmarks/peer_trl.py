"""A step of TRL's PPO (trl.experimental.ppo, 1.12.0) at the sizes of step.py, which runs this beside our own.

    python benchmarks/peer_trl.py --critic same     value and reward models of the policy's shape, as it comes
    python benchmarks/peer_trl.py --critic tiny     tiny ones with the policy's vocabulary: the work is then like ours

How it is kept fair: the policy has the same shape, weights and adapter, and TRL's reference is the policy without it;
the prompts and lengths are the same; one backward pass is one optimiser step (gradient_accumulation_steps=1, a whole
minibatch at once), as many as ours; nothing is saved, evaluated or reported. All else is TRL's default. Its value and
reward models cannot be left out.

What follows from those defaults: `bf16` and `gradient_checkpointing`, both on, are never handed to the Accelerator or
the model, so weights are bfloat16 as loaded and the adapter is multiplied in float32, as PEFT holds it. The launcher
can ask for autocast (`accelerate launch --mixed_precision bf16`), which acts in the update: --mixed-precision bf16.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from typing import Any

import floors
import shapes
import torch
from datasets import Dataset
from measuring import add_sizes, check_sizes, memory, out_of_memory, provenance, spread
from peft import LoraConfig
from transformers import TrainerCallback
from transformers.utils import logging
from trl.experimental.ppo import PPOConfig, PPOTrainer


class StepClock(TrainerCallback):
    """Seconds of each step, from an idle device to an idle device: PPOTrainer calls on_step_end after its update."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.seconds = device, []

    def on_train_begin(self, *arguments: Any, **others: Any) -> None:
        floors.synchronize(self.device)
        self.last = time.perf_counter()

    def on_step_end(self, *arguments: Any, **others: Any) -> None:
        floors.synchronize(self.device)
        now = time.perf_counter()
        self.seconds.append(now - self.last)
        self.last = now


def make_config(arguments: argparse.Namespace, folder: str) -> PPOConfig:
    """batch_size = per_device_train_batch_size x gradient_accumulation_steps, cut into num_mini_batches."""
    return PPOConfig(
        output_dir=folder,
        per_device_train_batch_size=arguments.batch_size,
        gradient_accumulation_steps=1,
        num_mini_batches=arguments.num_mini_batches,
        num_ppo_epochs=arguments.num_iterations,
        total_episodes=arguments.batch_size * (arguments.warmup + arguments.steps),
        response_length=arguments.response_length,
        stop_token=None,
        missing_eos_penalty=None,
        kl_coef=0.05,
        num_sample_generations=0,
        bf16=True,
        seed=arguments.seed,
        use_cpu=arguments.device == "cpu",
        eval_strategy="no",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )


def make_trainer(arguments: argparse.Namespace, folder: str, clock: StepClock) -> tuple[PPOTrainer, dict[str, float]]:
    """(trainer, seconds of building the models and the trainer)."""
    device, started = torch.device(arguments.device), time.perf_counter()
    shape = shapes.shape_config(arguments.model)
    size = arguments.model if arguments.critic == "same" else "tiny"
    critic = shapes.shape_config(size, vocab_size=shape.vocab_size, num_labels=1)
    policy = shapes.build_policy(shape, device, arguments.seed)
    value, reward = (shapes.build_scorer(critic, device, arguments.seed + i) for i in (1, 2))
    floors.synchronize(device)
    built = time.perf_counter()
    tokenizer = shapes.build_tokenizer(shape.vocab_size)
    prompts = shapes.random_prompts(shape.vocab_size, 4 * arguments.batch_size, arguments.prompt_length, arguments.seed)
    trainer = PPOTrainer(
        args=make_config(arguments, folder),
        processing_class=tokenizer,
        model=policy,
        ref_model=None,
        reward_model=reward,
        value_model=value,
        train_dataset=Dataset.from_dict({"input_ids": tokenizer(prompts)["input_ids"]}),
        callbacks=[clock],
        peft_config=LoraConfig(
            r=arguments.lora_r,
            lora_alpha=2 * arguments.lora_r,
            lora_dropout=0.0,
            target_modules="all-linear",
            task_type="CAUSAL_LM",
        ),
    )
    floors.synchronize(device)
    return trainer, {"model_s": built - started, "construction_s": time.perf_counter() - built}


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """The figures as step.py has its own; ``out_of_memory`` alone where the device has too little."""
    device = torch.device(arguments.device)
    clock = StepClock(device)
    with tempfile.TemporaryDirectory() as folder:
        try:
            trainer, once = make_trainer(arguments, folder, clock)
            trainer.train()
        except RuntimeError as error:
            return out_of_memory(error)
    counted = clock.seconds[arguments.warmup :]
    if len(counted) != arguments.steps:
        raise RuntimeError(f"TRL took {len(clock.seconds)} steps, not {arguments.warmup} + {arguments.steps}")
    return {
        **once,
        **memory(device),
        "first_step_s": clock.seconds[0],
        "steps": [{"total": seconds} for seconds in counted],
        "optimizer_steps": optimizer_steps(trainer),
    }


def optimizer_steps(trainer: PPOTrainer) -> int:
    """Steps that AdamW has taken: the largest count in its state."""
    return max(int(state["step"]) for state in trainer.optimizer.state.values())


def parse(given: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add_sizes(parser)
    parser.add_argument("--critic", choices=["same", "tiny"], default="same", help="shape of value and reward models")
    parser.add_argument("--mixed-precision", choices=["no", "bf16"], default="no", help="as accelerate launch has it")
    return check_sizes(parser, parser.parse_args(given))


def main(given: Sequence[str]) -> None:
    arguments = parse(given)
    logging.disable_progress_bar()
    os.environ["ACCELERATE_MIXED_PRECISION"] = arguments.mixed_precision  # what the launcher does
    result = measure(arguments)
    if arguments.json:
        arguments.json.write_text(json.dumps(result) + "\n")
    print(
        f"{provenance(torch.device(arguments.device))}; TRL's PPO, {arguments.model} shape, critic {arguments.critic}"
    )
    if "out_of_memory" in result:
        print(f"out of memory: {result['out_of_memory']}")
        return
    seconds = [step["total"] for step in result["steps"]]
    print(
        f"{statistics.median(seconds):.4f} ({spread(seconds):.4f}) s a step; first {result['first_step_s']:.3f} s; "
        f"peak {result['peak_mib']:.0f} MiB"
    )


if __name__ == "__main__":
    main(sys.argv[1:])
