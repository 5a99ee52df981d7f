"""Reward models: sequence classification on prompt and completion."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer, PreTrainedTokenizerBase

from stable_rlhf.data import Text, plain_text
from stable_rlhf.errors import RewardError, RewardInputError
from stable_rlhf.files import ASSETS
from stable_rlhf.hardware import exact_products, kernel

BUILTIN_MODEL = ASSETS / "reward_model"

# Tokenizers without a limit say 10^30; no model here reads a million tokens.
_NO_LENGTH_LIMIT = 1_000_000


class RewardModel:
    """A sequence-classification model with one output as a reward function.

    The score of a sample depends only on its text: batching and padding change nothing. The text is
    - for a text prompt: prompt + completion, with the special tokens that the tokenizer itself adds;
    - for a chat prompt: the messages and the answer through the tokenizer's chat template, no special token added;
    - for a chat prompt and a tokenizer without template: "\\n\\nHuman: ...\\n\\nAssistant: ..." as in HH-RLHF.
    A text of more than `max_length` tokens is cut on the left, so that the end of the answer is always read.

    Decoder classifiers read the last token that is not `config.pad_token_id`, so batches are padded on the right with
    that id, whatever the tokenizer's is. Where there is none, the tokenizer's pad or end token is written into the
    configuration. If pad is also the end token, end tokens at the end of a text are skipped, in a batch or not.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: PreTrainedTokenizerBase,
        *,
        name: str = "reward model",
        batch_size: int = 16,
        max_length: int | None = None,
    ) -> None:
        if batch_size < 1 or (max_length is not None and max_length < 1):
            raise RewardInputError(
                f"{name}: batch_size ({batch_size}) and max_length ({max_length}) must be at least 1."
            )
        _require_one_label(model.config, name)
        self.name, self.model = name, model.eval()
        self.tokenizer = copy.deepcopy(tokenizer)  # the caller's may be the policy's, whose side must not change
        self.tokenizer.truncation_side = "left"
        self._batch_size = batch_size
        self.max_length = max_length or _length_limit(model.config, tokenizer)
        self._pad = _pad_token_id(model.config, tokenizer, name)

    def encode(self, prompts: Sequence[Text], completions: Sequence[Text]) -> list[list[int]]:
        """Token ids of each sample exactly as the model reads it; a reward model must be trained on these."""
        encoded = []
        for number, (prompt, completion) in enumerate(zip(prompts, completions, strict=True), start=1):
            text, specials = _sample_text(self.tokenizer, prompt, completion)
            cut = {"truncation": self.max_length is not None, "max_length": self.max_length}
            ids: Any = self.tokenizer(text, add_special_tokens=specials, **cut)["input_ids"]
            if not ids:
                raise RewardError(f"{self.name}: sample {number} has no tokens, so there is nothing to score.")
            encoded.append(list(ids))
        return encoded

    @torch.no_grad()
    def __call__(self, prompts: Sequence[Text], completions: Sequence[Text], **columns: Any) -> list[float]:
        """Scores every sample, in order; a model ignores the other columns."""
        encoded, device = self.encode(prompts, completions), next(self.model.parameters()).device
        order = sorted(range(len(encoded)), key=lambda index: -len(encoded[index]))  # like lengths share a batch
        scores = [0.0] * len(encoded)
        for start in range(0, len(order), self._batch_size):
            indexes = order[start : start + self._batch_size]
            rows = [encoded[index] for index in indexes]
            longest = len(rows[0])
            input_ids = torch.tensor([row + [self._pad] * (longest - len(row)) for row in rows], device=device)
            mask = torch.tensor([[i < len(row) for i in range(longest)] for row in rows], device=device)  # real tokens
            with exact_products(device), kernel(device, self.model.dtype, longest, longest):
                logits = self.model(input_ids=input_ids, attention_mask=mask.long()).logits
            for index, value in zip(indexes, logits.float().flatten().tolist(), strict=True):
                scores[index] = value
        return scores


def load_reward_model(
    path: str, spec: str, device: torch.device, dtype: torch.dtype, trust_remote_code: bool
) -> tuple[Any, Any]:
    """(model, its tokenizer) from safetensors.

    Raises RewardInputError where it cannot be loaded, has more than one output, or lacks a weight.
    """
    trust = {"trust_remote_code": trust_remote_code}
    # safetensors only: the older format can run code when it is read
    settings = {"dtype": dtype, "use_safetensors": True, "output_loading_info": True} | trust
    try:
        config = AutoConfig.from_pretrained(path, **trust)
        _require_one_label(config, spec)
        model, info = AutoModelForSequenceClassification.from_pretrained(path, config=config, **settings)
        tokenizer = AutoTokenizer.from_pretrained(path, **trust)
    except (OSError, ValueError) as error:
        kinds = "a sequence-classification model in safetensors (folder or hub name), 'builtin', or 'module:function'"
        raise RewardInputError(
            f"the reward model {spec!r} could not be loaded: {error} A reward is {kinds}."
        ) from error
    if missing := sorted(info["missing_keys"]):
        remedy = "Give a trained reward model (scripts/train_reward_model.py makes one)."
        lacks = f"lacks {len(missing)} weights ({', '.join(missing[:3])})"
        raise RewardInputError(f"the reward model {spec!r} {lacks}: they would be random, and so the reward. {remedy}")
    if isinstance(head := getattr(model, "score", None), torch.nn.Linear) and dtype != torch.float32:
        # bfloat16 has 8 bits: a reward of 3 would be rounded to steps of 1/64, and near answers would tie.
        head.float().register_forward_pre_hook(lambda _module, inputs: (inputs[0].float(),))
    return model.requires_grad_(False).to(device), tokenizer


def _sample_text(tokenizer: PreTrainedTokenizerBase, prompt: Text, completion: Text) -> tuple[str, bool]:
    """The text of a sample, and whether the tokenizer has still to add its special tokens."""
    if isinstance(prompt, str):
        if not isinstance(completion, str):
            raise RewardError("a text prompt came with a chat completion. Give both as text or both as messages.")
        return prompt + completion, True
    answer = [{"role": "assistant", "content": completion}] if isinstance(completion, str) else completion
    messages = [*prompt, *answer]
    if tokenizer.chat_template is not None:
        return str(tokenizer.apply_chat_template(messages, tokenize=False)), False
    return plain_text(messages), True


def _require_one_label(config: Any, name: str) -> None:
    if config.num_labels != 1:
        kind = ", ".join(getattr(config, "architectures", None) or [config.model_type])
        remedy = "A language model must first be trained as one (scripts/train_reward_model.py)."
        raise RewardInputError(
            f"reward model {name!r} ({kind}) has {config.num_labels} outputs, not num_labels=1. {remedy}"
        )


def _length_limit(config: Any, tokenizer: PreTrainedTokenizerBase) -> int | None:
    positions = getattr(config.get_text_config(), "max_position_embeddings", None) or _NO_LENGTH_LIMIT
    limit = min(positions, tokenizer.model_max_length)
    return int(limit) if limit < _NO_LENGTH_LIMIT else None


def _pad_token_id(config: Any, tokenizer: Any, name: str) -> int:
    text_config = config.get_text_config()
    candidates = (text_config.pad_token_id, tokenizer.pad_token_id, tokenizer.eos_token_id)
    pad = next((candidate for candidate in candidates if candidate is not None), None)
    if pad is None:
        raise RewardInputError(
            f"{name}: neither model nor tokenizer has a pad or end-of-sequence token. Set pad_token."
        )
    text_config.pad_token_id = pad
    return pad
