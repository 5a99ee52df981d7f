"""Fingerprints of what a run is given as objects: tokenizer, chat template, data and rewards, by their content."""

from __future__ import annotations

import ast
import functools
import hashlib
import inspect
import json
import re
import textwrap
import tokenize
from array import array
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from stable_rlhf.console import tell
from stable_rlhf.data import EncodedPrompts
from stable_rlhf.errors import CheckpointError
from stable_rlhf.policy import weights_digest
from stable_rlhf.rewards import RewardModel, Scorer

BATCH = 1000
"""Rows of a data set that are read at once: few enough for long texts, and reading them takes no time of its own."""


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """Of its vocabulary and special tokens. How it cuts a text shows in the prompts' token ids."""
    special = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    return _digest([json.dumps([sorted(tokenizer.get_vocab().items()), special], sort_keys=True)])


def data_fingerprint(dataset: Any, encoded: EncodedPrompts) -> dict[str, Any]:
    """Number of rows, and digests of the prompts' token ids and of each column, in the order of the rows."""
    ids = hashlib.sha256()
    for row in encoded.input_ids:
        ids.update(array("q", [len(row), *row]).tobytes())
    columns = {name: hashlib.sha256() for name in sorted(dataset.column_names)}
    for table in dataset.with_format("arrow").iter(batch_size=BATCH):
        for name, digest in columns.items():
            digest.update(repr(table.column(name).to_pylist()).encode("utf-8", "surrogatepass"))
    return {
        "rows": len(encoded),
        "token ids": ids.hexdigest(),
        "columns": {name: digest.hexdigest() for name, digest in columns.items()},
    }


def row_digests(dataset: Any, encoded: EncodedPrompts) -> Iterator[str]:
    """A digest of each row: of its prompt's token ids and of its columns."""
    columns = sorted(dataset.column_names)
    tables = dataset.with_format("arrow").iter(batch_size=BATCH)
    rows = (row for table in tables for row in zip(*(table.column(name).to_pylist() for name in columns), strict=True))
    for ids, row in zip(encoded.input_ids, rows, strict=True):
        yield _digest([repr(list(ids)), repr(columns), repr(row)])


def reward_fingerprint(function: Any) -> str | None:
    """Of a reward model's weights, configuration and vocabulary, or of a function's source code without its comments.

    None where there is no source, as for a function of C. What a function calls or reads is not part of it, nor is a
    reward server behind its address.
    """
    if isinstance(function, RewardModel):
        parts = [weights_digest(function.model.named_parameters()), function.model.config.to_json_string()]
        return _digest([*parts, tokenizer_fingerprint(function.tokenizer)])
    if isinstance(function, functools.partial):
        return _digest([str(reward_fingerprint(function.func)), _shown((function.args, function.keywords))])
    if type(function).__module__.startswith("stable_rlhf."):  # the client of a reward server
        return None
    routine = inspect.isroutine(function) or inspect.isclass(function)
    try:
        source = textwrap.dedent(inspect.getsource(function if routine else type(function)))
    except (OSError, TypeError, SyntaxError, tokenize.TokenError):  # the last two: of a file that has changed since
        return None
    try:
        return _digest([ast.unparse(ast.parse(source))])
    except SyntaxError:  # a lambda's line can begin in the middle of a call
        return _digest([source])


def _shown(value: Any) -> str:
    """An argument as a text that is the same in every process: sets in order, functions by their code, no addresses."""
    if isinstance(value, Mapping):
        return f"{{{', '.join(sorted(f'{_shown(key)}: {_shown(item)}' for key, item in value.items()))}}}"
    if isinstance(value, set | frozenset):
        return f"set({', '.join(sorted(map(_shown, value)))})"
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_shown, value))}]"
    if callable(value):
        return f"{type(value).__name__} {reward_fingerprint(value)}"
    return re.sub(r" at 0x[0-9a-fA-F]+", "", repr(value))


class SameInputs:
    """A part that only checks: tokenizer, chat template, data and rewards are those that the checkpoint's run had."""

    def __init__(
        self,
        tokenizer: Any,
        data: Iterable[tuple[str, Any, EncodedPrompts | None]],
        rewards: Scorer,
        gold: Scorer | None,
        accept_changed: bool,
    ) -> None:
        """``data``: for each of SAFETrainer's data sets the argument's name, the rows or None, and their token ids."""
        self.tokenizer, self.data = tokenizer, list(data)
        self.rewards, self.gold, self.accept_changed = rewards, gold, accept_changed

    @functools.cached_property
    def _own(self) -> dict[str, Any]:
        return {
            "tokenizer": tokenizer_fingerprint(self.tokenizer),
            "chat template": _digest([json.dumps(self.tokenizer.chat_template)]),
            "data": {name: None if ids is None else data_fingerprint(rows, ids) for name, rows, ids in self.data},
            "rewards": _fingerprints(self.rewards),
            "gold": _fingerprints(self.gold),
        }

    def state_dict(self) -> dict[str, Any]:
        return self._own

    def digests(self) -> dict[str, str | None]:
        """One of the data as the policy reads it, one of the rewards; None for a stream, or where a reward has none.

        That of the data is of all rows, held-out ones too, in no order: which rows are held out, and the order of the
        others, depend on the seed, and runs of several seeds are of the same data.
        """
        rewards = self._own["rewards"]
        known = None not in rewards.values()
        return {
            "data": None
            if any(ids is None and rows is not None for _, rows, ids in self.data)
            else self._data_digest(),
            "reward": _digest([json.dumps(rewards, sort_keys=True)]) if known else None,
        }

    def _data_digest(self) -> str:
        rows = sorted(
            digest for _, dataset, ids in self.data if ids is not None for digest in row_digests(dataset, ids)
        )
        return _digest([self._own["tokenizer"], self._own["chat template"], *rows])

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Raises CheckpointError for the first of them that differs; the message names it and the remedy."""
        if saved["tokenizer"] != self._own["tokenizer"]:
            raise _other("the tokenizer", "its vocabulary or its special tokens differ", "tokenizer")
        if saved["chat template"] != self._own["chat template"]:
            raise _other("the tokenizer's chat template", "prompts would read differently", "chat template")
        for name, own in self._own["data"].items():
            if (fault := _data_fault(own, saved["data"][name])) is not None:
                raise _other(name if name == "train_dataset" else f"{name} (held-out prompts)", fault, "data")
        for kind, what in (("rewards", "reward"), ("gold", "gold reward")):
            for name, own in self._own[kind].items():
                if saved[kind].get(name) != own:
                    self._refuse_changed(f"the {what} {name!r}")

    def _refuse_changed(self, reward: str) -> None:
        fault = f"{reward} is not the one that the run began with: its code or its weights differ"
        if not self.accept_changed:
            raise CheckpointError(
                f"{fault}; resume with that one, or set reward.accept_changed=true if it was only repaired"
            )
        tell(f"{fault} (accepted: reward.accept_changed)")


def _fingerprints(scorer: Scorer | None) -> dict[str, str | None]:
    functions = [] if scorer is None else scorer.functions
    return {function.name: reward_fingerprint(function.function) for function in functions}


def _data_fault(own: dict[str, Any] | None, saved: dict[str, Any] | None) -> str | None:
    if own is None or saved is None:
        return None if own is saved else "one of both runs has none"
    if own["rows"] != saved["rows"]:
        return f"it has {own['rows']} rows, the run had {saved['rows']}"
    for name, digest in saved["columns"].items():
        if own["columns"].get(name) != digest:
            return f"its column {name!r} has other values, or another order, than the run had"
    return None if own["token ids"] == saved["token ids"] else "its prompts have other token ids than the run had"


def _other(what: str, fault: str, remedy: str) -> CheckpointError:
    return CheckpointError(
        f"{what}: {fault}: resume with the {remedy} that the run began with, or start a new run in another output_dir"
    )


def _digest(parts: Iterable[str]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(f"{len(part)}:".encode() + part.encode("utf-8", "surrogatepass"))
    return digest.hexdigest()
