"""Splits prompts into those to train on and those held out."""

from __future__ import annotations

from typing import Any

import datasets

from stable_rlhf.config import DataConfig
from stable_rlhf.data.sources import load_prompts
from stable_rlhf.errors import ConfigError
from stable_rlhf.text import counted


def split_datasets(
    data: DataConfig, seed: int, train: Any, evaluation: Any
) -> tuple[datasets.Dataset, datasets.Dataset | None]:
    """(training prompts, held-out prompts or None).

    ``train`` and ``evaluation`` are data sets or lists of rows; None takes what ``data`` names. If ``data`` names no
    held-out prompts, rows are held out of the training set, drawn by ``seed``. Raises ConfigError when the training set
    is too small for that.
    """
    size = data.eval_size
    if train is not None:
        return _as_dataset(train), None if evaluation is None else _as_dataset(evaluation)
    train = load_prompts(data.train, format=data.format, split=data.split, limit=data.limit)
    if evaluation is not None:
        return train, _as_dataset(evaluation)
    if size == 0:
        return train, None
    if data.eval is not None or data.train == "builtin":
        source = "builtin" if data.eval is None else data.eval
        return train, load_prompts(source, format=data.format, split=data.eval_split, limit=size)
    if len(train) <= size:
        raise ConfigError(
            f"data.eval_size={size}: the training set has only {counted(len(train), 'row')}; lower it or set data.eval"
        )
    held_out = train.train_test_split(test_size=size, seed=seed)["test"]
    # Data sets hold one conversation at several lengths, and prompts twice: none of a held-out one is trained on.
    begun = {_beginning(prompt) for prompt in held_out["prompt"]}
    kept = [row for row, prompt in enumerate(train["prompt"]) if _beginning(prompt) not in begun]
    if not kept:
        raise ConfigError(f"data.eval_size={size}: every training prompt begins like a held-out one; lower it")
    return train.select(kept), held_out


def _beginning(prompt: Any) -> str:
    """The first text of the user, which tells conversations apart."""
    if isinstance(prompt, str):
        return prompt
    return next((message["content"] for message in prompt if message["role"] == "user"), prompt[0]["content"])


def _as_dataset(rows: Any) -> datasets.Dataset:
    """A data set unchanged; a list of rows as a data set with every column that any row has."""
    if isinstance(rows, datasets.Dataset):
        return rows
    rows = list(rows)
    columns = {name: None for row in rows for name in row}  # a dict keeps the order of first appearance
    return datasets.Dataset.from_dict({name: [row.get(name) for row in rows] for name in columns})
