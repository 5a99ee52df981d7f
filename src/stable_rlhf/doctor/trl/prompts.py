"""The prompts of a TRL script: its rows, and their tokens as TRL makes them."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
from transformers import PreTrainedTokenizerBase

from stable_rlhf.config import DataConfig
from stable_rlhf.data import PromptEncoder, Prompts, PromptStream, StreamedRows, split_datasets
from stable_rlhf.doctor.trl.arguments import TRLArguments
from stable_rlhf.text import ends

LOOKED_AT = 1000
"""Prompts whose tokens are counted: more would take minutes on a large data set, and tell little more."""


@dataclass(frozen=True, kw_only=True)
class TRLPrompts:
    """Some of the prompts, drawn by the seed; of a stream its first ones."""

    rows: datasets.Dataset
    ids: list[list[int]]
    """Token ids of each row's prompt, as TRL makes them."""
    total: int | None
    """Prompts of the whole set; None for a stream."""
    other: int
    """Rows whose token ids are not those that this package would take: two BOS tokens, or an EOS after the prompt."""


def load_rows(given: TRLArguments) -> Prompts | StreamedRows:
    """The training rows, as the script takes them. Raises ConfigError or PromptError."""
    script, seed = given.script, given.training.seed
    settings: dict[str, Any] = {"format": "prompt", "eval_size": 0}
    if given.mixture.datasets:
        return split_datasets(DataConfig(**settings), seed, _mixture(given), None)[0]
    settings |= {"train": script.dataset_name, "streaming": script.dataset_streaming}
    if not Path(script.dataset_name).is_file():
        settings |= {"split": script.dataset_train_split, "config_name": script.dataset_config}
    return split_datasets(DataConfig(**settings), seed, None, None)[0]


def _mixture(given: TRLArguments) -> Any:
    """The split of what the key `datasets` names, put together by TRL."""
    trl: Any = importlib.import_module("trl")  # only this command needs it
    split = given.script.dataset_train_split
    try:
        found = trl.get_dataset(given.mixture)
    except Exception as error:  # of datasets, Arrow, the hub's client and the network: each has errors of its own
        raise given.error(f"datasets could not be loaded: {type(error).__name__}: {ends(str(error), 500)}") from error
    if split not in found:
        raise given.error(f"dataset_train_split={split!r}: datasets gives {', '.join(map(repr, found))}; name one")
    return found[split]


def not_read_by_trl(given: TRLArguments) -> str | None:
    """A sentence where doctor reads the data set, and TRL's script does not; None where both do."""
    name = given.script.dataset_name
    if given.mixture.datasets or not name:
        return None
    if name == "builtin":
        return "dataset_name='builtin': the prompts of this package, which TRL's script does not know"
    if Path(name).is_file():
        kind = {"jsonl": "json"}.get(suffix := name.removesuffix(".gz").rpartition(".")[2], suffix)
        return (
            f"dataset_name={name!r}: doctor reads this file, but TRL's script looks for a folder or a hub name; write "
            f"datasets: [{{path: {kind}, data_files: {name}}}]"
        )
    if any((Path(name) / mark).is_file() for mark in ("state.json", "dataset_dict.json")):
        return f"dataset_name={name!r}: doctor reads a set of save_to_disk, TRL's script does not; save it as Parquet"
    return None


def encode(
    given: TRLArguments, found: Prompts | StreamedRows, tokenizer: PreTrainedTokenizerBase, vocabulary: int
) -> TRLPrompts:
    """Counts the tokens of some prompts. Raises PromptError for one that cannot be used."""
    if isinstance(found, StreamedRows):
        found, total = Prompts.whole(found.first(LOOKED_AT), found.name), None
    else:
        total = len(found.dataset)
        if total > LOOKED_AT:
            found = found.rows(sorted(PromptStream(total, given.training.seed).take(LOOKED_AT)))
    encoder = PromptEncoder(
        tokenizer,
        max_prompt_length=10**9,  # TRL cuts no prompt
        context_length=None,
        max_completion_length=given.limit,
        vocabulary=vocabulary,
    )
    ours = encoder.encode_all(found.dataset, found.numbers, found.name).input_ids
    theirs = [_ids(given, prompt, tokenizer) for prompt in found.dataset["prompt"]]
    if given.training.chat_template_kwargs:  # which change a chat's tokens
        ours = theirs
    other = sum(a != b for a, b in zip(ours, theirs, strict=True))
    return TRLPrompts(rows=found.dataset, ids=theirs, total=total, other=other)


def _ids(given: TRLArguments, prompt: Any, tokenizer: Any) -> list[int]:
    """A prompt's token ids as TRL's trainers make them."""
    if isinstance(prompt, str):
        return list(tokenizer(text=prompt, verbose=False)["input_ids"])
    more = given.training.chat_template_kwargs or {}
    found = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, tokenize=True, return_dict=True, **more)
    return list(found["input_ids"])
