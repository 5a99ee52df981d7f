"""Models of known shapes with random weights, and a tokenizer and prompts for them: nothing is read from a hub.

What a step costs depends on the shapes of the tensors and not on what the weights say, so a benchmark needs no trained
model: it needs one of the right shape, whose logits are finite.
"""

from __future__ import annotations

import random
from typing import Any

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    LlamaConfig,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
)

DEVIATION = 0.02  # of the weights: what both families begin their own training with, so that no logit overflows
POSITIONS = 32_768  # of the Qwen2.5 models; SmolLM2 has 8,192, and takes the longest cell of a benchmark with more
PAD, EOS = "<pad>", "<eos>"

SHAPES: dict[str, tuple[type[PreTrainedConfig], dict[str, Any]]] = {
    "tiny": (
        Qwen2Config,
        {
            "vocab_size": 512,
            "hidden_size": 64,
            "intermediate_size": 160,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "tie_word_embeddings": True,
        },
    ),
    "135m": (
        LlamaConfig,
        {
            "vocab_size": 49_152,
            "hidden_size": 576,
            "intermediate_size": 1_536,
            "num_hidden_layers": 30,
            "num_attention_heads": 9,
            "num_key_value_heads": 3,
            "tie_word_embeddings": True,
        },
    ),
    "0.5b": (
        Qwen2Config,
        {
            "vocab_size": 151_936,
            "hidden_size": 896,
            "intermediate_size": 4_864,
            "num_hidden_layers": 24,
            "num_attention_heads": 14,
            "num_key_value_heads": 2,
            "tie_word_embeddings": True,
        },
    ),
    "3b": (
        Qwen2Config,
        {
            "vocab_size": 151_936,
            "hidden_size": 2_048,
            "intermediate_size": 11_008,
            "num_hidden_layers": 36,
            "num_attention_heads": 16,
            "num_key_value_heads": 2,
            "tie_word_embeddings": True,
        },
    ),
    "7b": (
        Qwen2Config,
        {
            "vocab_size": 152_064,
            "hidden_size": 3_584,
            "intermediate_size": 18_944,
            "num_hidden_layers": 28,
            "num_attention_heads": 28,
            "num_key_value_heads": 4,
            "tie_word_embeddings": False,
        },
    ),
}
"""`tiny` takes seconds on a CPU; `135m` is SmolLM2's shape, the others are Qwen2.5's."""


def shape_config(name: str, **changes: Any) -> PreTrainedConfig:
    """The shape's configuration, with pad and EOS as in ``build_tokenizer``. Raises ValueError for an unknown name."""
    if name not in SHAPES:
        raise ValueError(f"model {name!r}: choose one of {', '.join(SHAPES)}")
    kind, sizes = SHAPES[name]
    special = {"pad_token_id": 0, "bos_token_id": None, "eos_token_id": 1}
    own = {"max_position_embeddings": POSITIONS, "initializer_range": DEVIATION, **special}
    return kind(**{**sizes, **own, **changes})


def default_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 on a GPU; float32 on the CPU, where bfloat16 is emulated or slow."""
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def build_policy(config: PreTrainedConfig, device: torch.device, seed: int = 0, **options: Any) -> Any:
    """A causal language model whose weights are drawn on the device, in ``default_dtype``: seconds at 3B on a GPU."""
    return _build(AutoModelForCausalLM, config, device, seed, options)


def build_scorer(config: PreTrainedConfig, device: torch.device, seed: int = 1) -> Any:
    """A sequence-classification model, as a reward or value model; its config has num_labels=1."""
    return _build(AutoModelForSequenceClassification, config, device, seed, {})


def _build(kind: Any, config: PreTrainedConfig, device: torch.device, seed: int, options: dict[str, Any]) -> Any:
    torch.manual_seed(seed)
    with torch.device(device):
        return kind.from_config(config, dtype=default_dtype(device), **options).eval()


def build_tokenizer(vocabulary: int) -> PreTrainedTokenizerFast:
    """One token a word: `<pad>`, `<eos>`, `w2`, ..., w<vocabulary - 1>; encoding undoes decoding."""
    words = {PAD: 0, EOS: 1} | {f"w{i}": i for i in range(2, vocabulary)}
    made = Tokenizer(models.WordLevel(words, unk_token=PAD))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=made,
        pad_token=PAD,
        eos_token=EOS,
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )


def random_prompts(vocabulary: int, count: int, length: int, seed: int = 0) -> list[str]:
    """``count`` texts of exactly ``length`` tokens each, none of them special."""
    rng = random.Random(seed)
    return [" ".join(f"w{rng.randrange(2, vocabulary)}" for _ in range(length)) for _ in range(count)]


def trainer_arguments(name: str, device: torch.device, rows: int, prompt_length: int, seed: int = 0) -> dict[str, Any]:
    """``model``, ``train_dataset``, ``processing_class`` and ``reward_funcs`` of a SAFETrainer on this shape."""
    config = shape_config(name)
    return {
        "model": build_policy(config, device, seed),
        "reward_funcs": [even_words],
        "train_dataset": Dataset.from_dict({"prompt": random_prompts(config.vocab_size, rows, prompt_length, seed)}),
        "processing_class": build_tokenizer(config.vocab_size),
    }


def even_words(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
    """Reward: share of a completion's words that end in an even digit. It costs nothing, and rewards differ."""
    return [sum(word[-1] in "02468" for word in text.split()) / max(1, len(text.split())) for text in completions]
