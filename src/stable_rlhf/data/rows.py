"""Finds the prompt in a row: the conventions of data sets, by their columns, and the check of every prompt."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

from stable_rlhf.data.chat import Message, Prompt, hh_prompt, is_hh, plain_message
from stable_rlhf.errors import PromptError
from stable_rlhf.text import quoted

FORMATS = ("auto", "prompt", "messages", "preference", "hh")
_CHATS = ("messages", "conversations")  # the second is ShareGPT's name
_TAKEN = ("prompts", "completions", "completion_ids", "trainer_state", "log_metric", "log_extra")
"""Names of a reward function's own arguments, so a column cannot have them."""


@dataclass(frozen=True, kw_only=True)
class Convention:
    """Where the prompt of a row is.

    format: one of FORMATS, except "auto". columns: the columns that it is read from.
    """

    format: str
    columns: tuple[str, ...]


def convention(
    columns: Sequence[str], first: Mapping[str, Any], *, format: str, prompt_column: str | None, name: str
) -> Convention:
    """The convention of a data set, by its columns and first row.

    format: "auto" takes a `prompt` column; without one `messages` (or `conversations`); without these `chosen` and
        `rejected`, as dialogues of HH-RLHF where the first is one.
    prompt_column: the column that "prompt" or "messages" reads under another name.
    name: of the data set, for messages.

    Raises PromptError for a column that is not there, or that has the name of a reward function's argument.
    """
    if taken := [column for column in columns if column in _TAKEN]:
        raise PromptError(f"{name} has a column {taken[0]!r}, which is an argument of every reward. Rename the column.")
    if format == "auto":
        format = _detected(columns, first, prompt_column)
    if format == "preference" or format == "hh":
        needed = ("chosen", "rejected") if format == "preference" else ("chosen",)
    elif prompt_column is not None:
        needed = (prompt_column,)
    else:
        needed = ("prompt",) if format == "prompt" else (next((c for c in _CHATS if c in columns), "messages"),)
    if missing := [column for column in needed if column not in columns]:
        found = ", ".join(map(repr, columns)) or "none"
        remedy = "Set data.prompt_column to the column that holds the prompts, or choose another data format."
        raise PromptError(f"{name} has the columns {found}; the format {format!r} needs {missing[0]!r}. {remedy}")
    return Convention(format=format, columns=needed)


def _detected(columns: Sequence[str], first: Mapping[str, Any], prompt_column: str | None) -> str:
    if prompt_column is not None or "prompt" in columns:
        return "prompt"
    if any(column in columns for column in _CHATS):
        return "messages"
    if {"chosen", "rejected"} <= set(columns):
        return "hh" if is_hh(first.get("chosen")) else "preference"
    return "prompt"


def prompts_in(rows: Iterable[Mapping[str, Any]], how: Convention, name: str) -> Iterable[Prompt]:
    """Yields the checked prompt of each row, texts as they are and chats as plain messages.

    Raises PromptError for the first row without a usable prompt, with its number, and for texts among chats.
    """
    first: type | None = None
    for number, row in enumerate(rows, start=1):
        where = f"{name}, row {number}"
        prompt = prompt_in(row, how, where)
        first = same_kind(prompt, first, where)
        yield prompt


def same_kind(prompt: Prompt, first: type | None, where: str) -> type:
    """The type of a prompt. Raises PromptError where it is not ``first``, that of the first row."""
    if first not in (None, type(prompt)):
        kinds = ("text", "a chat") if isinstance(prompt, str) else ("a chat", "text")
        raise PromptError(
            f"{where}: the prompt is {kinds[0]}, but that of row 1 is {kinds[1]}. Write every prompt in one way: TEXT "
            "as the chat [{'role': 'user', 'content': TEXT}], or train on the two kinds in two runs."
        )
    return type(prompt)


def prompt_in(row: Mapping[str, Any], how: Convention, where: str) -> Prompt:
    """The checked prompt of one row; ``where`` names it. Raises PromptError."""
    if how.format == "hh":
        return _hh(row.get("chosen"), where)
    values = [_read_chat(row.get(column)) for column in how.columns]
    if how.format == "prompt":
        return checked(values[0], where)
    if how.format == "messages":
        return checked(_before_the_answer(values[0]), where)
    return checked(_common_beginning(*values, where=where), where)


def _read_chat(value: object) -> object:
    """The chat that a text is as JSON, as a table without lists (CSV) has to hold it; anything else as it is."""
    if not isinstance(value, str) or not value.lstrip().startswith("["):
        return value
    try:
        chat = json.loads(value)
    except (ValueError, RecursionError):
        return value
    return chat if _is_chat(chat) else value


def _is_chat(value: object) -> bool:
    """Whether it is a list of messages, by TRL's names of their parts or ShareGPT's."""
    kinds = ({"role", "content"}, {"from", "value"})
    return (
        isinstance(value, list)
        and bool(value)
        and all(isinstance(message, Mapping) and any(kind <= message.keys() for kind in kinds) for message in value)
    )


def checked(prompt: object, where: str) -> Prompt:
    """A prompt as it is used: a text unchanged, a chat as plain messages. Raises PromptError."""
    if isinstance(prompt, str):
        if not prompt.strip():
            raise _unusable(where, "is empty")
        return prompt
    if not isinstance(prompt, list) or not prompt:
        raise _unusable(where, f"is {quoted(prompt)}, not text or messages")
    messages: list[Message] = []
    for number, message in enumerate(prompt, start=1):
        try:
            messages.append(plain_message(message))
        except ValueError as fault:
            raise _unusable(where, f"has a message {number} {fault}") from fault
    if messages[-1]["role"] == "assistant":
        raise _unusable(
            where,
            "ends with an assistant message, so the answer is already there (data.format=messages leaves it out)",
        )
    return messages


def _unusable(where: str, problem: str) -> PromptError:
    valid = "a non-empty text, or a list of {'role', 'content'} messages that ends before the answer"
    return PromptError(f"{where}: the prompt {problem}. A prompt is {valid}.")


def _before_the_answer(messages: object) -> object:
    """The messages without a last one of the assistant."""
    if not isinstance(messages, list) or not messages:
        return messages
    last = messages[-1]
    role = (last.get("role") or last.get("from")) if isinstance(last, Mapping) else None
    return messages[:-1] if role in ("assistant", "gpt") else messages


def _common_beginning(chosen: object, rejected: object, *, where: str) -> object:
    """The beginning that both sides of a pair share, as TRL's extract_prompt has it; of chats, before the answer."""
    if isinstance(chosen, str) and isinstance(rejected, str):
        shared = "".join(a for a, _ in takewhile(lambda pair: pair[0] == pair[1], zip(chosen, rejected, strict=False)))
        shared = shared.removesuffix(" ")  # the space belongs to the answer's first word
    elif isinstance(chosen, list) and isinstance(rejected, list):
        pairs = takewhile(lambda pair: pair[0] == pair[1], zip(chosen, rejected, strict=False))
        shared = _before_the_answer([message for message, _ in pairs])
    else:
        raise PromptError(
            f"{where}: 'chosen' is {quoted(chosen)} and 'rejected' is {quoted(rejected)}; the format 'preference' "
            "needs two texts or two lists of messages."
        )
    if not shared:
        raise PromptError(
            f"{where}: 'chosen' {quoted(chosen)} and 'rejected' {quoted(rejected)} do not begin alike, so there is no "
            "prompt in them. Give the prompt in a column of its own."
        )
    return shared


def _hh(dialogue: object, where: str) -> list[Message]:
    if not isinstance(dialogue, str):
        raise PromptError(f"{where}: 'chosen' is {quoted(dialogue)}, but the format 'hh' needs the dialogue as text.")
    try:
        return hh_prompt(dialogue)
    except ValueError as error:
        raise PromptError(f"{where}: the dialogue {quoted(dialogue)} {error}. Repair or remove the row.") from error
