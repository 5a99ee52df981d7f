"""Splits prompts into those to train on and those held out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import datasets

from stable_rlhf.config import DataConfig
from stable_rlhf.data.given import as_dataset
from stable_rlhf.data.sources import load_prompts, open_stream, with_prompts
from stable_rlhf.data.streamed import StreamedRows
from stable_rlhf.errors import ConfigError
from stable_rlhf.text import counted


@dataclass(frozen=True, kw_only=True)
class Cost:
    """The number of training rows that are lost by holding rows out; ``str`` gives it as a sentence."""

    rows: int
    """Of the whole set."""
    held_out: int
    kept: int
    """Rows that are trained on. Those that are neither begin like a held-out one."""

    @property
    def is_half(self) -> bool:
        """Whether half of the rows or more are lost to training, which nobody expects of an evaluation."""
        return 2 * self.kept <= self.rows

    def __str__(self) -> str:
        alike = self.rows - self.held_out - self.kept
        text = f"data.eval_size={self.held_out}: {self.held_out:,} of {self.rows:,} rows are held out to evaluate on"
        if alike:
            text += f", and {alike:,} more are left out since they begin like one of these (the same conversation)"
        text += f"; {self.kept:,} are trained on"
        if self.is_half:
            text += ". That is half of the rows or less: lower data.eval_size, or name held-out prompts in data.eval"
        return text


@dataclass(frozen=True, kw_only=True)
class Prompts:
    """Rows of a data set with a `prompt` column, and where they come from."""

    dataset: datasets.Dataset
    name: str
    """Of the source, for messages."""
    numbers: Sequence[int]
    """Each row's number in the source, counted from 1."""
    cost: Cost | None = None
    """Of held-out rows: what it cost to take them from the training set; None where they have their own source."""

    @classmethod
    def whole(cls, dataset: datasets.Dataset, name: str) -> Prompts:
        return cls(dataset=dataset, name=name, numbers=range(1, len(dataset) + 1))

    def rows(self, chosen: Sequence[int]) -> Prompts:
        """The rows at the positions ``chosen``, counted from 0."""
        numbers = [self.numbers[row] for row in chosen]
        return Prompts(dataset=self.dataset.select(chosen), name=self.name, numbers=numbers)


def split_datasets(
    data: DataConfig, seed: int, train: Any, evaluation: Any
) -> tuple[Prompts | StreamedRows, Prompts | None]:
    """(training prompts, held-out prompts or None).

    ``train`` and ``evaluation`` are data sets or lists of rows (``as_dataset`` says which); None takes what ``data``
    names. If ``data`` names no held-out prompts, rows are held out of the training set, drawn by ``seed``. Raises
    ConfigError when the training set is too small for that.
    """
    size = data.eval_size
    held_out = None if evaluation is None else _given_evaluation(evaluation, data)
    if train is not None:
        return _given_training(train, data), held_out
    if held_out is not None or size == 0:
        return _training(data), held_out
    if data.eval is not None or data.train == "builtin":
        source = "builtin" if data.eval is None else data.eval
        return _training(data), _held_out(data, source)
    if data.streaming:
        raise ConfigError(
            f"data.streaming=true: data.eval_size={size} rows cannot be held out of rows that are read as they are "
            "needed; name held-out prompts in data.eval, or set data.eval_size=0 to evaluate nothing"
        )
    return hold_out(_named(data), size, seed)


def hold_out(train: Prompts, size: int, seed: int) -> tuple[Prompts, Prompts]:
    """(the rows to train on, ``size`` rows held out, drawn by ``seed``)."""
    count, texts = len(train.numbers), train.dataset["prompt"][:]
    if count <= size:
        raise ConfigError(
            f"data.eval_size={size}: the training set has only {counted(count, 'row')}; lower it or set data.eval"
        )
    rows = datasets.Dataset.from_dict({"row": range(count)})
    chosen = rows.train_test_split(test_size=size, seed=seed)["test"]["row"][:]
    # Data sets hold one conversation at several lengths, and prompts twice: none of a held-out one is trained on.
    begun = {_beginning(texts[row]) for row in chosen}
    kept = [row for row, prompt in enumerate(texts) if _beginning(prompt) not in begun]
    if not kept:
        raise ConfigError(f"data.eval_size={size}: every training prompt begins like a held-out one; lower it")
    cost = Cost(rows=count, held_out=size, kept=len(kept))
    return train.rows(kept), replace(train.rows(chosen), cost=cost)


def _training(data: DataConfig) -> Prompts | StreamedRows:
    return _stream(data, data.train, data.split, data.limit) if data.streaming else _named(data)


def _held_out(data: DataConfig, source: str) -> Prompts:
    """The first ``data.eval_size`` rows of a source."""
    if data.streaming and source != "builtin":
        rows = _stream(data, source, data.eval_split, data.eval_size)
        return Prompts.whole(rows.first(data.eval_size), source)
    return _named(data, source, split=data.eval_split, limit=data.eval_size)


def _named(data: DataConfig, source: str | None = None, **chosen: Any) -> Prompts:
    """The training prompts that ``data`` names, or those of another source with another split and limit."""
    name = data.train if source is None else source
    how = {"format": data.format, "prompt_column": data.prompt_column, **_of_hub(data, name)}
    dataset = load_prompts(name, **{**how, "split": data.split, "limit": data.limit, **chosen})
    return Prompts.whole(dataset, name)


def _stream(data: DataConfig, source: str, split: str, limit: int | None) -> StreamedRows:
    rows = open_stream(source, split=split, **_of_hub(data, source))
    return StreamedRows(rows, format=data.format, prompt_column=data.prompt_column, limit=limit, name=source)


def _of_hub(data: DataConfig, name: str) -> dict[str, Any]:
    """Configuration and commit of a hub data set: another data set than the training set has others."""
    known = {"config_name": data.config_name, "revision": data.revision}
    return known if name == data.train else dict.fromkeys(known)


def _given_training(train: Any, data: DataConfig) -> Prompts | StreamedRows:
    name, how = "train_dataset", {"format": data.format, "prompt_column": data.prompt_column, "limit": data.limit}
    rows = as_dataset(train, data.split, name)
    if isinstance(rows, datasets.Dataset):
        return Prompts.whole(with_prompts(rows, **how, name=name), name)
    return StreamedRows(rows, **how, name=name)


def _given_evaluation(evaluation: Any, data: DataConfig) -> Prompts:
    """The held-out rows given as an object; of a stream, which may be endless, the first ``data.eval_size``."""
    name, how = "eval_dataset", {"format": data.format, "prompt_column": data.prompt_column, "limit": None}
    rows = as_dataset(evaluation, data.eval_split, name)
    if not isinstance(rows, datasets.Dataset):
        if data.eval_size == 0:
            raise ConfigError("data.eval_size=0: that many rows of eval_dataset, a stream, are read; raise it")
        return Prompts.whole(StreamedRows(rows, **how, name=name).first(data.eval_size), name)
    return Prompts.whole(with_prompts(rows, **how, name=name), name)


def _beginning(prompt: Any) -> str:
    """The first text of the user, which tells conversations apart."""
    if isinstance(prompt, str):
        return prompt
    return next((message["content"] for message in prompt if message["role"] == "user"), prompt[0]["content"])
