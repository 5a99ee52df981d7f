"""Chat messages and HH-RLHF dialogues, and prompts as plain text."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

from stable_rlhf.text import quoted

Message: TypeAlias = dict[str, Any]
Prompt: TypeAlias = str | list[Message]
Text: TypeAlias = str | list[Message]

ROLES = ("system", "developer", "user", "assistant", "tool")
_SHAREGPT_ROLES = {"human": "user", "gpt": "assistant"}
"""Speakers' names of ShareGPT's files, whose messages have `from` and `value`."""
_HH_TURN = re.compile(r"\n\n(Human|Assistant):")
_HH_ROLES = {"Human": "user", "Assistant": "assistant"}
# The speakers' names in HH-RLHF (Bai et al. 2022); other roles are written capitalised.
_PLAIN_SPEAKERS = {"user": "Human", "assistant": "Assistant"}


def plain_text(messages: Sequence[Message]) -> str:
    """A chat without a template: "\\n\\nHuman: ...\\n\\nAssistant: ..." as in HH-RLHF."""
    turns = ((_PLAIN_SPEAKERS.get(m["role"], m["role"].capitalize()), m["content"]) for m in messages)
    return "".join(f"\n\n{speaker}: {content}" for speaker, content in turns)


def prompt_text(prompt: Prompt) -> str:
    """Show a prompt to a person: a text as it is, a chat as "role: content" paragraphs. Not escaped for HTML."""
    return (
        prompt
        if isinstance(prompt, str)
        else "\n\n".join(f"{message['role']}: {message['content']}" for message in prompt)
    )


def plain_message(message: object) -> Message:
    """A message with a role and a text, as chat templates take it.

    A content of text parts ``{"type": "text", "text": ...}`` becomes one text. ShareGPT's `from` and `value` become
    `role` and `content`. Keys whose value is None are left out, at any depth: Arrow gives every message of a column the
    keys of all others. A message that only calls tools has the content "".

    Raises ValueError with the end of a sentence "the prompt has a message ...".
    """
    if not isinstance(message, Mapping):
        raise ValueError(f"without 'role' and 'content': {quoted(message)}")
    known: Message = without_none(message)
    if "from" in known and "value" in known and "role" not in known:
        speaker = known.pop("from")
        known = {"role": _SHAREGPT_ROLES.get(speaker, speaker), "content": known.pop("value"), **known}
    if known.get("tool_calls"):
        known.setdefault("content", "")
    if not {"role", "content"} <= set(message if "content" in message else known):
        raise ValueError(f"without 'role' and 'content': {quoted(message)}")
    if known.get("role") not in ROLES:
        raise ValueError(f"with the role {quoted(known.get('role'))}, not one of {', '.join(ROLES)}")
    content = known.get("content")
    if isinstance(content, Sequence) and not isinstance(content, str):
        content = known["content"] = "".join(map(_text_of, content))
    empty = known["role"] == "tool" or bool(known.get("tool_calls"))  # a tool may return nothing
    if not isinstance(content, str) or not (content.strip() or empty):
        raise ValueError(f"whose content is {quoted(content)}, not a non-empty text")
    return known


def without_none(value: Any) -> Any:
    """The value without the keys of dictionaries that are None, at any depth."""
    if isinstance(value, Mapping):
        return {key: without_none(item) for key, item in value.items() if item is not None}
    return [without_none(item) for item in value] if isinstance(value, list | tuple) else value


def _text_of(part: object) -> str:
    if isinstance(part, str):
        return part
    if not isinstance(part, Mapping) or part.get("type", "text") != "text" or not isinstance(part.get("text"), str):
        raise ValueError(f"with the part {quoted(part)}: only parts of text are read")
    return part["text"]


def is_hh(text: object) -> bool:
    """Whether a text begins like a dialogue of HH-RLHF."""
    return isinstance(text, str) and _HH_TURN.match(f"\n\n{text.lstrip()}") is not None


def parse_hh(dialogue: str) -> list[Message]:
    """Parse "\\n\\nHuman: ...\\n\\nAssistant: ..." into chat messages with the roles user and assistant.

    The format has no escapes, so white space around a turn belongs to the markers and is stripped. About one dialogue
    in 350 of HH-RLHF repeats a marker: turns of one speaker in a row become one message, joined by a blank line, since
    chat templates want alternating roles. Empty turns are dropped, but an empty last answer stays an empty message.

    Raises ValueError for text before the first marker, or without a marker.
    """
    before, *parts = _HH_TURN.split(dialogue)
    if before.strip() or not parts:
        raise ValueError(r'is not a dialogue of "\n\nHuman: ..." and "\n\nAssistant: ..." turns')
    turns = [(_HH_ROLES[speaker], text.strip()) for speaker, text in zip(parts[::2], parts[1::2], strict=True)]
    messages: list[Message] = []
    for position, (role, content) in enumerate(turns, start=1):
        is_last = position == len(turns)
        if messages and messages[-1]["role"] == role:
            messages[-1]["content"] = "\n\n".join(filter(None, (messages[-1]["content"], content)))
        elif content or is_last:
            messages.append({"role": role, "content": content})
    return messages


def hh_prompt(dialogue: str) -> list[Message]:
    """The turns of an HH dialogue before its last answer: the prompt that a policy is asked to answer.

    Raises ValueError if there is no answer, or nothing before it.
    """
    messages = parse_hh(dialogue)
    answers = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
    if not answers or answers[-1] == 0:
        raise ValueError("has no Assistant turn after a Human turn, so there is nothing to answer")
    return messages[: answers[-1]]
