"""Chat messages and HH-RLHF dialogues, and prompts as plain text."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TypeAlias

Message: TypeAlias = dict[str, str]
Prompt: TypeAlias = str | list[Message]
Text: TypeAlias = str | list[Message]

ROLES = ("system", "user", "assistant", "tool")
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
