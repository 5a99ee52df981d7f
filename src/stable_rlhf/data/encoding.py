"""Turns prompts into token ids."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import cast

import datasets
from transformers import PreTrainedTokenizerBase

from stable_rlhf.data.chat import Prompt
from stable_rlhf.data.sources import check_prompts, resolve_format
from stable_rlhf.errors import PromptError


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


def encode_prompts(
    dataset: datasets.Dataset,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_prompt_length: int,
    context_length: int | None,
    max_completion_length: int,
) -> EncodedPrompts:
    """Turn the `prompt` column into token ids, each at most `max_prompt_length` long (all lengths in tokens).

    A text is tokenised with the special tokens that the tokenizer itself adds; a chat goes through its chat template
    with the generation prompt, after which no special token is added a second time. A longer prompt is cut on the left,
    so that the end, next to the response, stays; a leading BOS token is kept, because models that were trained with one
    degrade without it.

    context_length: positions that the model has for prompt and completion together; None is unlimited.

    Raises PromptError for the first row that does not fit the context with its completion, a malformed prompt, chats
    without a chat template, and a prompt of no tokens.
    """
    if min(max_prompt_length, max_completion_length) < 1:
        raise PromptError(
            f"data.max_prompt_length ({max_prompt_length}) and rollout.max_completion_length ({max_completion_length}) "
            "must each be at least 1."
        )
    resolve_format(dataset.column_names, "prompt", "the data set")  # it need not come from load_prompts
    check_prompts(dataset["prompt"], "the data set")
    input_ids: list[list[int]] = []
    truncated: list[bool] = []
    bos = cast(int | None, tokenizer.bos_token_id)
    for row, ids in enumerate(_token_ids(dataset["prompt"], tokenizer), start=1):
        if not ids:
            raise PromptError(f"prompt in row {row} has no tokens under this tokenizer. Remove the row.")
        is_long = len(ids) > max_prompt_length
        kept = _cut_left(ids, max_prompt_length, bos) if is_long else ids
        if context_length is not None and len(kept) + max_completion_length > context_length:
            raise PromptError(
                f"prompt in row {row} has {len(kept)} tokens, which with rollout.max_completion_length "
                f"({max_completion_length}) do not fit the model's context of {context_length}. Set "
                f"data.max_prompt_length to {max(1, context_length - max_completion_length)} to cut it."
            )
        input_ids.append(kept)
        truncated.append(is_long)
    return EncodedPrompts(input_ids=input_ids, truncated=truncated)


def _cut_left(ids: list[int], length: int, bos: int | None) -> list[int]:
    if bos is not None and ids[0] == bos and length > 1:
        return [bos, *ids[len(ids) - length + 1 :]]
    return ids[len(ids) - length :]


def _token_ids(prompts: Iterable[Prompt], tokenizer: PreTrainedTokenizerBase) -> Iterable[list[int]]:
    for row, prompt in enumerate(prompts, start=1):
        is_text = isinstance(prompt, str)
        if not is_text and tokenizer.chat_template is None:
            remedy = "Set tokenizer.chat_template, use an instruction-tuned model, or give prompts as text."
            raise PromptError(f"prompt in row {row} is a chat, but the tokenizer has no chat template. {remedy}")
        text = prompt if is_text else tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
        # verbose=False: "longer than the maximum length" is handled here, by cutting or refusing.
        yield list(tokenizer(text, add_special_tokens=is_text, verbose=False)["input_ids"])  # type: ignore[arg-type]
