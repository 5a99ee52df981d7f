"""Reward models: sequence classification on prompt and completion."""

from __future__ import annotations

import copy
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from stable_rlhf.data import Text, plain_text
from stable_rlhf.errors import RewardError, RewardInputError
from stable_rlhf.hardware import exact_products, kernel
from stable_rlhf.rewards.checks import shown
from stable_rlhf.text import QUOTED, printable

# Tokenizers without a limit say 10^30; no model here reads a million tokens.
_NO_LENGTH_LIMIT = 1_000_000


class RewardModel:
    """A sequence-classification model with one output as a reward function.

    The score of a sample depends only on its text: batching and padding change nothing. The text is
    - for a text prompt: prompt + completion, with the special tokens that the tokenizer itself adds;
    - for a chat prompt: the messages and the answer through the tokenizer's chat template, no special token added;
    - for a chat prompt and a tokenizer without template: "\\n\\nHuman: ...\\n\\nAssistant: ..." as in HH-RLHF.
    A text of more than `max_length` tokens is cut on the left, so that the end of the answer is always read; a BOS
    token at its beginning stays. A second BOS, which a text that has its own would get from the tokenizer, is left out.

    Decoder classifiers read the last token that is not `config.pad_token_id`, so batches are padded on the right with
    that id, whatever the tokenizer's is. Where there is none, the tokenizer's pad or end token is written into the
    configuration. If pad is also the end token, end tokens at the end of a text are skipped, in a batch or not. An id
    that the model has no embedding for is replaced by one that ends no text of the batch.

    append_eos: every text ends with the tokenizer's end token, which is the last token that is read.
    """

    skip_special_tokens = True
    """Completions come without the policy's special tokens, which need not be the reward model's."""

    def __init__(
        self,
        model: Any,
        tokenizer: PreTrainedTokenizerBase,
        *,
        name: str = "reward model",
        batch_size: int = 16,
        max_length: int | None = None,
        append_eos: bool = False,
    ) -> None:
        if batch_size < 1 or (max_length is not None and max_length < 1):
            raise RewardInputError(
                f"{name}: batch_size ({batch_size}) and max_length ({max_length}) must be at least 1."
            )
        require_one_label(model.config, name)
        self.name, self.model = name, model
        self.tokenizer = copy.deepcopy(tokenizer)  # the caller's may be the policy's, whose side must not change
        self.tokenizer.truncation_side = "left"
        self._batch_size = batch_size
        self.max_length = max_length or _length_limit(model.config, tokenizer)
        self._eos = tokenizer.eos_token_id if append_eos else None
        if append_eos and self._eos is None:
            raise RewardInputError(f"{name}: reward.append_eos=true, but its tokenizer has no end token. Set it false.")
        self._rows = _embeddings(model)
        pad = _pad_token_id(model.config, tokenizer, name)
        self._pad = None if pad == self._eos or not 0 <= pad < self._rows else pad

    def encode(self, prompts: Sequence[Text], completions: Sequence[Text]) -> list[list[int]]:
        """Token ids of each sample exactly as the model reads it; a reward model must be trained on these."""
        encoded = []
        for number, (prompt, completion) in enumerate(zip(prompts, completions, strict=True), start=1):
            try:
                text, specials = _sample_text(self.tokenizer, prompt, completion)
            except RewardError:
                raise
            except Exception as error:  # templates raise errors of any kind
                why = printable(f"{type(error).__name__}: {error}", 2 * QUOTED)
                raise RewardError(
                    f"{self.name}: its chat template refuses sample {number} ({why}), whose prompt is {shown(prompt)}. "
                    "Give prompts that it accepts, or another chat_template."
                ) from error
            # The tokenizer cuts between the special tokens that it adds; a template's are cut by `_cut`.
            room = None if self.max_length is None else max(1, self.max_length - (self._eos is not None))
            cut = {"truncation": specials and room is not None, "max_length": room}
            ids: Any = self.tokenizer(text, add_special_tokens=specials, verbose=False, **cut)["input_ids"]
            if not ids:
                raise RewardError(f"{self.name}: sample {number} has no tokens, so there is nothing to score.")
            if (last := max(ids)) >= self._rows:
                token = shown(self.tokenizer.convert_ids_to_tokens(last))
                raise RewardError(
                    f"{self.name}: sample {number} has the token {token}, id {last}, but the model has {self._rows} "
                    "embeddings. Give the tokenizer that it was trained with."
                )
            encoded.append(self._cut(list(ids)))
        return encoded

    def _cut(self, ids: list[int]) -> list[int]:
        """One BOS at the beginning, the end token at the end where it is wanted, at most max_length tokens."""
        head = ids[:1] if ids[0] in (self.tokenizer.bos_token_id, self.tokenizer.cls_token_id) else []
        body = ids[len(head) :]
        while head and body[:1] == head:
            body = body[1:]
        if self._eos is not None and body[-1:] != [self._eos]:
            body = [*body, self._eos]
        if self.max_length is None or len(head) + len(body) <= self.max_length:
            return head + body
        room = self.max_length - len(head)
        return head + body[-room:] if room else body[-self.max_length :]

    @torch.no_grad()
    def __call__(self, prompts: Sequence[Text], completions: Sequence[Text], **columns: Any) -> list[float]:
        """Scores every sample, in order; a model ignores the other columns."""
        self.model.eval()  # a callback that shares the model may have set it to train
        encoded, device = self.encode(prompts, completions), next(self.model.parameters()).device
        order = sorted(range(len(encoded)), key=lambda index: -len(encoded[index]))  # like lengths share a batch
        scores = [0.0] * len(encoded)
        for start in range(0, len(order), self._batch_size):
            indexes = order[start : start + self._batch_size]
            rows = [encoded[index] for index in indexes]
            longest, pad = len(rows[0]), self._pad_of(rows)
            input_ids = torch.tensor([row + [pad] * (longest - len(row)) for row in rows], device=device)
            mask = torch.tensor([[i < len(row) for i in range(longest)] for row in rows], device=device)  # real tokens
            products, attention = exact_products(device), kernel(device, self.model.dtype, longest, longest)
            with products, attention, _padding(self.model.config, pad):
                logits = self.model(input_ids=input_ids, attention_mask=mask.long()).logits
            for index, value in zip(indexes, logits.float().flatten().tolist(), strict=True):
                scores[index] = value
        return scores

    def _pad_of(self, rows: list[list[int]]) -> int:
        """The id to pad these rows with: the model's, or one that ends none of them."""
        if self._pad is not None:
            return self._pad
        ends = {row[-1] for row in rows}
        return next(number for number in range(len(ends) + 1) if number not in ends)


@contextmanager
def _padding(config: Any, pad: int) -> Iterator[None]:
    """Sets the id by which a decoder classifier finds the last token of each row, inside the context."""
    text_config = config.get_text_config()
    before, text_config.pad_token_id = text_config.pad_token_id, pad
    try:
        yield
    finally:
        text_config.pad_token_id = before


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


def require_one_label(config: Any, name: str) -> None:
    if config.num_labels != 1:
        kind = ", ".join(getattr(config, "architectures", None) or [config.model_type])
        remedy = "A language model must first be trained as one (scripts/train_reward_model.py)."
        raise RewardInputError(
            f"reward model {name!r} ({kind}) has {config.num_labels} outputs, not num_labels=1. {remedy}"
        )


def _embeddings(model: Any) -> int:
    """The number of ids that the model has an embedding for."""
    try:
        return int(model.get_input_embeddings().weight.shape[0])
    except (AttributeError, NotImplementedError):  # its own code does not say
        return sys.maxsize


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
