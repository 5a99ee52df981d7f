"""Turns prompts into token ids of a length that fits the model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import datasets
from transformers import PreTrainedTokenizerBase

from stable_rlhf.data.rows import checked, convention, same_kind
from stable_rlhf.data.tokenized import PromptTokenizer
from stable_rlhf.errors import PromptError

_OF_THE_TEMPLATE = ("tools", "chat_template_kwargs")
"""Columns that a chat template reads."""


@dataclass(frozen=True, kw_only=True)
class EncodedPrompts:
    """Token ids of prompts, unpadded, in the order of the data set.

    input_ids: one list of token ids a prompt, 1 to `max_prompt_length` long.
    truncated: True where tokens were cut off the left end of that prompt.
    """

    input_ids: list[list[int]]
    truncated: list[bool]

    def __len__(self) -> int:
        return len(self.input_ids)


class PromptEncoder:
    """Turns a row's prompt into token ids, at most `max_prompt_length` of them (all lengths in tokens).

    `PromptTokenizer` says which special tokens are there. A longer prompt is cut on the left, so that the end, next to
    the response, stays; a leading BOS token is kept, because models that were trained with one degrade without it.

    context_length: positions that the model has for prompt and completion together; None is unlimited.
    vocabulary: rows of the model's embedding; None does not check that every id is below.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        max_prompt_length: int,
        context_length: int | None,
        max_completion_length: int,
        vocabulary: int | None = None,
    ) -> None:
        if min(max_prompt_length, max_completion_length) < 1:
            raise PromptError(
                f"data.max_prompt_length ({max_prompt_length}) and rollout.max_completion_length "
                f"({max_completion_length}) must each be at least 1."
            )
        self._tokenizer = PromptTokenizer(tokenizer, vocabulary)
        self._bos = cast(int | None, tokenizer.bos_token_id)
        self._longest, self._context, self._completion = max_prompt_length, context_length, max_completion_length

    def _remedy(self) -> str:
        room = (self._context or 0) - self._completion
        if room < 1:
            return "Lower rollout.max_completion_length."
        return f"Set data.max_prompt_length to {room} to cut it."

    def encode(self, row: Mapping[str, Any], where: str) -> tuple[list[int], bool]:
        """(token ids, whether they were cut). Raises PromptError for a prompt that cannot be used; ``where`` names the
        row."""
        ids = self._tokenizer.ids(row, where)
        is_long = len(ids) > self._longest
        kept = _cut_left(ids, self._longest, self._bos) if is_long else ids
        if self._context is not None and len(kept) + self._completion > self._context:
            raise PromptError(
                f"{where}: the prompt has {len(kept)} tokens, which with rollout.max_completion_length "
                f"({self._completion}) do not fit the model's context of {self._context}. {self._remedy()}"
            )
        return kept, is_long

    def encode_all(
        self, dataset: datasets.Dataset, numbers: Sequence[int] | None = None, name: str = "the data set"
    ) -> EncodedPrompts:
        """Encodes the `prompt` column of a data set. Raises PromptError for the first row that cannot be used.

        numbers: each row's number in the source called ``name``, counted from 1; None is 1, 2, ...
        """
        columns = dataset.column_names  # it need not come from load_prompts
        convention(columns, {}, format="prompt", prompt_column=None, name=name)
        used = [column for column in ("prompt", *_OF_THE_TEMPLATE) if column in columns]
        input_ids: list[list[int]] = []
        truncated: list[bool] = []
        kind: type | None = None
        numbers = range(1, len(dataset) + 1) if numbers is None else numbers
        for number, *values in zip(numbers, *(dataset[column][:] for column in used), strict=True):
            row, where = dict(zip(used, values, strict=True)), f"{name}, row {number}"
            row["prompt"] = checked(row["prompt"], where)
            kind = same_kind(row["prompt"], kind, where)
            ids, is_long = self.encode(row, where)
            input_ids.append(ids)
            truncated.append(is_long)
        return EncodedPrompts(input_ids=input_ids, truncated=truncated)


def encode_prompts(
    dataset: datasets.Dataset,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_prompt_length: int,
    context_length: int | None,
    max_completion_length: int,
    vocabulary: int | None = None,
) -> EncodedPrompts:
    """Turns the `prompt` column into token ids, as ``PromptEncoder`` says.

    Raises PromptError for the first row that does not fit the context with its completion, a malformed prompt, a chat
    that the tokenizer's chat template refuses, and a prompt of no tokens.
    """
    encoder = PromptEncoder(
        tokenizer,
        max_prompt_length=max_prompt_length,
        context_length=context_length,
        max_completion_length=max_completion_length,
        vocabulary=vocabulary,
    )
    return encoder.encode_all(dataset)


def _cut_left(ids: list[int], length: int, bos: int | None) -> list[int]:
    if bos is not None and ids[0] == bos and length > 1:
        return [bos, *ids[len(ids) - length + 1 :]]
    return ids[len(ids) - length :]
