"""The prompts of a run: rows, token ids and order, of a data set or of a stream."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from stable_rlhf.console import tell
from stable_rlhf.data import (
    EncodedPrompts,
    PromptEncoder,
    Prompts,
    PromptStream,
    StreamedPrompts,
    StreamedRows,
    turn_end_missing,
)


@dataclass(frozen=True, kw_only=True)
class RunPrompts:
    """What a run samples from. Of a stream the first three are one object."""

    train: Any
    """Rows to train on: ``train[numbers]`` gives columns, ``prompt`` among them."""
    train_prompts: EncodedPrompts | StreamedPrompts
    stream: PromptStream | StreamedPrompts
    """The order of the training rows."""
    held_out: Any
    held_out_prompts: EncodedPrompts | None

    @property
    def whole(self) -> list[tuple[str, Any, EncodedPrompts | None]]:
        """SAFETrainer's name, rows and token ids of each data set. None for the ids of one that is not there, or is a
        stream, which compares what it has read itself."""
        ids = None if isinstance(self.train_prompts, StreamedPrompts) else self.train_prompts
        return [("train_dataset", self.train, ids), ("eval_dataset", self.held_out, self.held_out_prompts)]

    @property
    def rows(self) -> float:
        """Training rows; infinite for a stream, whose length nobody knows."""
        return math.inf if isinstance(self.train, StreamedPrompts) else len(self.train)

    def say_turn_end(self, tokenizer: PreTrainedTokenizerBase, end_ids: Sequence[int]) -> None:
        """Says where the chat template ends an answer with a token that ends no completion."""
        first = self.train[[0]]["prompt"][0]
        if (sentence := turn_end_missing(tokenizer, first, end_ids)) is not None:
            tell(sentence)


def encoded(
    train: Prompts | StreamedRows, held_out: Prompts | None, encoder: PromptEncoder, *, ahead: int, seed: int
) -> RunPrompts:
    """Encodes the prompts; of a stream the first ``ahead``, and the rest as it is needed. Raises PromptError.

    A line on the console says what held-out rows cost that were taken from the training set.
    """
    if held_out is not None and held_out.cost is not None:
        tell(str(held_out.cost))
    kept: dict[str, Any] = {
        "held_out": None if held_out is None else held_out.dataset,
        "held_out_prompts": None
        if held_out is None
        else encoder.encode_all(held_out.dataset, held_out.numbers, held_out.name),
    }
    if isinstance(train, StreamedRows):
        arriving = StreamedPrompts(train, encoder, ahead=ahead)
        return RunPrompts(train=arriving, train_prompts=arriving, stream=arriving, **kept)
    return RunPrompts(
        train=train.dataset,
        train_prompts=encoder.encode_all(train.dataset, train.numbers, train.name),
        stream=PromptStream(len(train.dataset), seed),
        **kept,
    )
