"""Train a reward model from preference pairs, so that `stable-rlhf` can score with it.

    python scripts/train_reward_model.py --output reward-model                      # HH-RLHF harmless, SmolLM2-135M
    python scripts/train_reward_model.py --data pairs.jsonl --format pairs --model MODEL --output reward-model

The model is trained by TRL's RewardTrainer on the Bradley-Terry loss -log sigmoid(r(x, y+) - r(x, y-)), on exactly the
token ids that `stable_rlhf.RewardModel` reads when it scores. Some prompts are held out; the table says how
often the chosen answer scores higher, before and after. The output folder holds the model in safetensors, its tokenizer
and `reward_model.json` with the settings and figures. It needs `pip install 'stable-rlhf[reward]'`.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import statistics
import tempfile
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, load_dataset
from peft import LoraConfig
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, set_seed
from trl.trainer.reward_config import RewardConfig
from trl.trainer.reward_trainer import RewardTrainer

from stable_rlhf.data.chat import Prompt, hh_prompt, parse_hh
from stable_rlhf.rewards.functions import resolve_reward
from stable_rlhf.rewards.model import RewardModel

# The loader of the `datasets` library for each file ending.
LOADERS = {".jsonl": "json", ".jsonl.gz": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}
# Pairs of the training part that the table's figures rest on: a standard error of at most 1.6 points.
MEASURED_TRAINING_PAIRS = 1000
# Keeps the mean reward near 0 at no cost in accuracy: Eisenstein et al. 2023, arXiv 2312.09244, equation 2.
CENTER_REWARDS_COEFFICIENT = 0.01
# TRL's default, which is meant for adapters, and a fifth of it for all weights, as is usual; neither is tuned here.
LORA_LEARNING_RATE, FULL_LEARNING_RATE = 1e-4, 2e-5


@dataclass(frozen=True, kw_only=True)
class Pair:
    """One preference: `chosen` was preferred to `rejected` as the answer to `prompt`."""

    prompt: Prompt
    chosen: str
    rejected: str

    @property
    def group(self) -> str:
        """What must not be on both sides of the split: the first message, as HH has several lengths of one dialogue."""
        return self.prompt if isinstance(self.prompt, str) else self.prompt[0]["content"]


def load_pairs(source: str, *, format: str, data_dir: str | None, split: str, limit: int | None) -> list[Pair]:
    """Read preference pairs from a file or the hub.

    "hh": whole dialogues in `chosen` and `rejected`. "pairs": a `prompt` (text or messages), and `chosen` and
    `rejected` answers as text. Pairs that are not two different answers to one prompt are left out, and counted aloud.
    """
    loader = next((kind for suffix, kind in LOADERS.items() if source.endswith(suffix)), None)
    if loader is not None:
        rows: Any = load_dataset(loader, data_files=source, split="train")
    else:
        rows = load_dataset(source, data_dir=data_dir, split=split)
    columns = {"chosen", "rejected"} | ({"prompt"} if format == "pairs" else set())
    if not columns <= set(rows.column_names):
        raise SystemExit(f"{source} has the columns {rows.column_names}; format {format!r} needs {sorted(columns)}.")
    rows = rows.select(range(min(limit or len(rows), len(rows))))
    read = _hh_pair if format == "hh" else _plain_pair
    pairs = [read(row, number) for number, row in enumerate(rows, start=1)]
    usable = [pair for pair in pairs if pair is not None and pair.chosen != pair.rejected]
    if len(usable) < 2:
        raise SystemExit(f"{source} gave {len(usable)} usable pairs of {len(pairs)}; at least 2 are needed.")
    if len(usable) < len(pairs):
        print(f"left out {len(pairs) - len(usable)} of {len(pairs)} pairs: different prompts, or equal answers")
    return usable


def _plain_pair(row: Any, number: int) -> Pair:
    texts = [row["chosen"], row["rejected"]]
    if not all(isinstance(text, str) for text in texts) or not isinstance(row["prompt"], str | list):
        raise SystemExit(
            f"row {number}: prompt must be text or messages, chosen and rejected text. Repair or remove it."
        )
    return Pair(prompt=row["prompt"], chosen=row["chosen"], rejected=row["rejected"])


def _hh_pair(row: Any, number: int) -> Pair | None:
    try:
        prompt, other_prompt = hh_prompt(row["chosen"]), hh_prompt(row["rejected"])
    except ValueError as error:
        raise SystemExit(f"row {number} {error}. Repair or remove it.") from error
    if prompt != other_prompt:
        return None
    chosen, rejected = (parse_hh(row[key])[len(prompt)]["content"] for key in ("chosen", "rejected"))
    return Pair(prompt=prompt, chosen=chosen, rejected=rejected)


def split_pairs(pairs: Sequence[Pair], eval_fraction: float, seed: int) -> tuple[list[Pair], list[Pair]]:
    """Hold out whole groups of pairs, about `eval_fraction` of all pairs, and at least one group on each side."""
    groups: dict[str, list[Pair]] = defaultdict(list)
    for pair in pairs:
        groups[pair.group].append(pair)
    if len(groups) < 2:
        raise SystemExit("all pairs share one prompt: none can be held out without leaking it. Add other prompts.")
    order = list(groups.values())
    random.Random(seed).shuffle(order)
    held_out = order.pop(0)
    while len(order) > 1 and len(held_out) + len(order[0]) <= eval_fraction * len(pairs):
        held_out = held_out + order.pop(0)
    return [pair for group in order for pair in group], held_out


def load_classifier(name: str, gguf_file: str | None) -> tuple[Any, Any]:
    """A sequence-classification model with one new output on the weights of `name`, in float32, and its tokenizer."""
    if gguf_file is None:
        tokenizer = AutoTokenizer.from_pretrained(name)
        model, info = AutoModelForSequenceClassification.from_pretrained(
            name, num_labels=1, dtype=torch.float32, use_safetensors=True, output_loading_info=True
        )
        if lost := [key for key in info["missing_keys"] if key.startswith(f"{model.base_model_prefix}.")]:
            raise SystemExit(f"{name} has no weights for {len(lost)} parameters of the backbone, such as {lost[0]}.")
    else:
        tokenizer = AutoTokenizer.from_pretrained(name, gguf_file=gguf_file)
        causal = AutoModelForCausalLM.from_pretrained(name, gguf_file=gguf_file, dtype=torch.float32)
        config: Any = causal.config
        if hasattr(config, "quantization_config"):  # the weights are plain float32 now, and are to be saved so
            del config.quantization_config
        config.num_labels = 1
        model = AutoModelForSequenceClassification.from_config(config, dtype=torch.float32)
        model.base_model.load_state_dict(causal.base_model.state_dict())
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    # Library versions read different ids out of one file, and the position that is scored depends on the pad id.
    model.config.pad_token_id, model.config.eos_token_id = tokenizer.pad_token_id, tokenizer.eos_token_id
    return model, tokenizer


def train(model: Any, tokenizer: Any, pairs: Sequence[Pair], options: argparse.Namespace) -> Any:
    """Run TRL's RewardTrainer; returns the model with any LoRA weights merged into it."""
    reader = RewardModel(model, tokenizer, max_length=options.max_length)
    prompts = [pair.prompt for pair in pairs]
    columns = {
        "chosen_ids": reader.encode(prompts, [pair.chosen for pair in pairs]),
        "rejected_ids": reader.encode(prompts, [pair.rejected for pair in pairs]),
    }
    lora = None
    if options.lora_r:
        lora = LoraConfig(
            r=options.lora_r,
            lora_alpha=2 * options.lora_r,  # the usual ratio: the adapter's scale is then 2 whatever the rank
            target_modules="all-linear",
            modules_to_save=["score"],  # the head is new, so it is trained whole
            task_type="SEQ_CLS",
        )
    on_gpu = torch.cuda.is_available()
    with tempfile.TemporaryDirectory() as folder:  # checkpoints are off; the trainer wants a folder all the same
        arguments = RewardConfig(
            output_dir=folder,
            num_train_epochs=options.epochs,
            learning_rate=options.learning_rate or (LORA_LEARNING_RATE if options.lora_r else FULL_LEARNING_RATE),
            lr_scheduler_type="cosine",
            per_device_train_batch_size=options.batch_size,
            center_rewards_coefficient=CENTER_REWARDS_COEFFICIENT,
            max_length=None,  # the ids are cut already, as they are when scoring
            gradient_checkpointing=False,
            use_cpu=not on_gpu,
            bf16=on_gpu,
            seed=options.seed,
            save_strategy="no",
            report_to="none",
        )
        trainer = RewardTrainer(
            model=model,
            args=arguments,
            train_dataset=Dataset.from_dict(columns),
            processing_class=tokenizer,
            peft_config=lora,
        )
        trainer.train()
    trained: Any = trainer.model
    return trained.merge_and_unload() if options.lora_r else trained


def measure(reward: Any, pairs: Sequence[Pair]) -> dict[str, float]:
    """Pair accuracy: share of pairs with r(chosen) > r(rejected), ties counting half; its standard error; scores."""
    prompts = [pair.prompt for pair in pairs]
    chosen = reward(prompts, [pair.chosen for pair in pairs])
    rejected = reward(prompts, [pair.rejected for pair in pairs])
    accuracy = statistics.fmean((c > r) + 0.5 * (c == r) for c, r in zip(chosen, rejected, strict=True))
    return {
        "pairs": len(pairs),
        "accuracy": accuracy,
        "accuracy_se": math.sqrt(accuracy * (1 - accuracy) / len(pairs)),
        "score_mean": statistics.fmean(chosen + rejected),
        "score_std": statistics.pstdev(chosen + rejected),
    }


def show(figures: dict[str, dict[str, dict[str, float]]]) -> None:
    table = Table("pairs", "number", "accuracy before", "accuracy after", "score after", title="Reward model")
    for part in ("train", "held out"):
        before, after = figures["before"][part], figures["after"][part]
        shares = [f"{row['accuracy']:.3f} ± {row['accuracy_se']:.3f}" for row in (before, after)]
        table.add_row(part, str(after["pairs"]), *shares, f"{after['score_mean']:.2f} ± {after['score_std']:.2f}")
    Console().print(table)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0], allow_abbrev=False)
    add = parser.add_argument
    add("--data", default="Anthropic/hh-rlhf", help="file (.jsonl, .jsonl.gz, .json, .csv, .parquet) or hub data set")
    add("--data-dir", default=None, help="part of a hub data set, such as harmless-base")
    add("--split", default="train", help="split of a hub data set; a file is one split")
    add("--format", choices=["hh", "pairs"], default="hh", help="hh: whole dialogues; pairs: prompt, chosen, rejected")
    add("--model", default="HuggingFaceTB/SmolLM2-135M-Instruct", help="language model: hub name or folder")
    add("--gguf-file", default=None, help="name of a GGUF file in the model's folder, instead of safetensors")
    add("--output", required=True, type=Path, help="new folder for the reward model")
    add("--epochs", type=float, default=1.0, help="passes over the training pairs (more than 1 or 2 overfits HH)")
    add("--learning-rate", type=float, default=None, help=f"{FULL_LEARNING_RATE}, with LoRA {LORA_LEARNING_RATE}")
    add("--max-length", type=int, default=512, help="tokens of prompt and answer; longer ones are cut on the left")
    add("--limit", type=int, default=None, help="read at most so many pairs")
    add("--eval-fraction", type=float, default=0.1, help="share of the pairs to hold out, by prompt")
    add("--seed", type=int, default=0)
    add("--batch-size", type=int, default=32, help="pairs a step")
    add("--lora-r", type=int, default=0, help="rank of LoRA adapters; 0 trains all weights")
    options = parser.parse_args(arguments)
    if not 0 < options.eval_fraction < 1:
        parser.error(f"--eval-fraction is {options.eval_fraction}; it must be between 0 and 1")
    if options.limit is not None and options.limit < 2:
        parser.error(f"--limit is {options.limit}; it must be at least 2")
    if options.output.exists() and any(options.output.iterdir()):
        parser.error(f"--output {options.output} is not empty; name a new folder")
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments)
    pairs = load_pairs(
        options.data, format=options.format, data_dir=options.data_dir, split=options.split, limit=options.limit
    )
    training, held_out = split_pairs(pairs, options.eval_fraction, options.seed)
    parts = {"train": training[:MEASURED_TRAINING_PAIRS], "held out": held_out}

    set_seed(options.seed)  # the new head is random
    model, tokenizer = load_classifier(options.model, options.gguf_file)
    tokenizer.model_max_length = options.max_length  # saved with the tokenizer, so scoring cuts at the same place
    device = "cuda" if torch.cuda.is_available() else "cpu"
    untrained = RewardModel(model.to(device), tokenizer, max_length=options.max_length)
    before = {part: measure(untrained, sample) for part, sample in parts.items()}

    model = train(model, tokenizer, training, options)
    model.save_pretrained(options.output)
    tokenizer.save_pretrained(options.output)

    reward = resolve_reward(options.output, device=device).function  # what was saved is what is measured
    figures = {"before": before, "after": {part: measure(reward, sample) for part, sample in parts.items()}}
    settings = {key: str(value) if isinstance(value, Path) else value for key, value in vars(options).items()}
    record = {"settings": settings, "training_pairs": len(training), "figures": figures}
    (options.output / "reward_model.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    show(figures)
    print(f"saved to {options.output}: name that folder in reward.functions")


if __name__ == "__main__":
    main()
