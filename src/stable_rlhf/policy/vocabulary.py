"""Token ids of the model: those that it has an embedding for, those that end a completion, and the one that pads."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from stable_rlhf.errors import ConfigError
from stable_rlhf.policy.transformer import causal_lm, eos_token_ids


def embedding_rows(model: Any) -> int:
    """The number of token ids that the model can read: ids from 0 to one below it."""
    return int(causal_lm(model).get_input_embeddings().weight.shape[0])


def pad_within(tokenizer: PreTrainedTokenizerBase, rows: int) -> str | None:
    """Sets the pad token to EOS where its id is beyond an embedding of ``rows`` rows, and returns a sentence on it.

    A pad token that was added to the tokenizer without resizing the model has no embedding. Padding is masked, so any
    id will do. None where nothing is changed.
    """
    pad, token = tokenizer.pad_token_id, tokenizer.pad_token
    if not isinstance(pad, int) or pad < rows:
        return None
    tokenizer.pad_token = tokenizer.eos_token
    return (
        f"The pad token {token!r} (id {pad}) is beyond the model's embedding of {rows} rows: {tokenizer.eos_token!r} "
        "pads instead. Padding is masked, so nothing else changes."
    )


def end_token_ids(model: Any, tokenizer: PreTrainedTokenizerBase, stop_tokens: Sequence[str | int] = ()) -> list[int]:
    """Every id that ends a completion, sorted: those of ``eos_token_ids`` and the ``rollout.stop_tokens``.

    Raises ConfigError for an EOS token, or a stop token, that the model cannot sample.
    """
    rows = embedding_rows(model)
    eos = int(tokenizer.eos_token_id)  # pyright: ignore[reportArgumentType]
    if eos >= rows:
        raise ConfigError(
            f"the tokenizer's EOS token {tokenizer.eos_token!r} (id {eos}) is beyond the model's embedding of {rows} "
            "rows, so no completion could end: use the model's own tokenizer, or call model.resize_token_embeddings"
        )
    chosen = {_id_of(tokenizer, token, rows) for token in stop_tokens}
    return sorted({*eos_token_ids(model, tokenizer), *chosen})


def _id_of(tokenizer: PreTrainedTokenizerBase, token: str | int, rows: int) -> int:
    if isinstance(token, int):
        found = [token]
    else:
        known = tokenizer.get_vocab().get(token)
        found = [known] if known is not None else tokenizer(token, add_special_tokens=False)["input_ids"]
    if len(found) != 1:
        raise ConfigError(
            f"rollout.stop_tokens: {token!r} is {len(found)} tokens under this tokenizer, not one; name a single "
            "token, or set rollout.stop_strings"
        )
    if not 0 <= found[0] < rows:
        raise ConfigError(
            f"rollout.stop_tokens: {token!r} (id {found[0]}) is not in the model's vocabulary of {rows} ids"
        )
    return int(found[0])
