"""A prompt's token ids: the chat template, and the special tokens that belong to a prompt."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from stable_rlhf.console import tell
from stable_rlhf.data.chat import Message, Prompt, without_none
from stable_rlhf.data.sources import said
from stable_rlhf.errors import PromptError
from stable_rlhf.text import quoted

_TEMPLATE = (TemplateError, ArithmeticError, AttributeError, LookupError, TypeError, ValueError)
"""Errors of a chat template: Jinja's, of its own raise_exception too, and those of the Python in it."""

_NAMED = 5
"""Most end tokens that a sentence names."""
_ANSWER = "stable rlhf 7391"
"""An answer that a chat template is tried with: a text that no template holds, without white space at its ends."""


class PromptTokenizer:
    """Turns prompts into token ids that begin with one BOS where the tokenizer adds one, and that end open.

    A text gets the special tokens that the tokenizer adds in front, once: not where the text begins with them already,
    as a text rendered by a chat template does. What the tokenizer adds at the end (EOS, SEP) is left out, since the
    completion follows. A chat goes through the chat template with the generation prompt; after it nothing is added.

    vocabulary: rows of the model's embedding, which every id must be below; None does not check.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, vocabulary: int | None = None) -> None:
        self.tokenizer = tokenizer
        self._vocabulary = vocabulary
        self._added: tuple[list[int], list[int]] | None = None
        self._template_tried = False

    def ids(self, row: Mapping[str, Any], where: str) -> list[int]:
        """The token ids of a row's `prompt`; of a chat, with the row's `tools`. Raises PromptError; ``where`` names the
        row."""
        prompt: Prompt = row["prompt"]
        ids = self._of_text(prompt, where) if isinstance(prompt, str) else self._of_chat(prompt, row, where)
        if not ids:
            raise PromptError(f"{where}: the prompt has no tokens under this tokenizer. Remove the row.")
        if self._vocabulary is not None and max(ids) >= self._vocabulary:
            token = self.tokenizer.convert_ids_to_tokens(max(ids))
            raise PromptError(
                f"{where}: the prompt's token {quoted(token)} (id {max(ids)}) is beyond the model's embedding of "
                f"{self._vocabulary} rows. Use the model's own tokenizer, or call model.resize_token_embeddings."
            )
        return ids

    # -- texts --------------------------------------------------------------------------------------------------------

    def _tokens(self, text: str, where: str, *, special: bool) -> list[int]:
        try:
            # verbose=False: "longer than the maximum length" is handled here, by cutting or refusing.
            encoding = self.tokenizer(text, add_special_tokens=special, verbose=False)
        except Exception as error:  # of the tokenizers library, or of a tokenizer's own code
            raise PromptError(f"{where}: the tokenizer cannot read {quoted(text)}: {said(error)}.") from error
        return list(encoding["input_ids"])  # type: ignore[arg-type]

    def _of_text(self, text: str, where: str) -> list[int]:
        if self._added is None:
            self._added = self._affixes(text, where)
        ids = self._tokens(text, where, special=True)
        before, after = self._added
        if after and ids[-len(after) :] == after:
            ids = ids[: -len(after)]
        if before and ids[len(before) : 2 * len(before)] == before:
            ids = ids[len(before) :]
        ends = (self.tokenizer.eos_token_id, self.tokenizer.sep_token_id)
        if ids and ids[-1] in ends and self._tokens(text, where, special=False)[-1:] != ids[-1:]:
            token = self.tokenizer.convert_ids_to_tokens(ids[-1])
            raise PromptError(
                f"{where}: the tokenizer adds {quoted(token)} after the prompt, so the policy would answer after the "
                "end. Set tokenizer.add_eos_token=False, or take the token out of its post-processor."
            )
        return ids

    def _affixes(self, text: str, where: str) -> tuple[list[int], list[int]]:
        """(ids that the tokenizer adds before a text, and after it)."""
        for probe in (text, "a", "the", "1"):
            bare, whole = (self._tokens(probe, where, special=special) for special in (False, True))
            places = range(len(whole) - len(bare) + 1) if bare else ()
            for place in places:
                if whole[place : place + len(bare)] == bare:
                    return whole[:place], whole[place + len(bare) :]
        return [], []

    # -- chats --------------------------------------------------------------------------------------------------------

    def _of_chat(self, chat: Sequence[Message], row: Mapping[str, Any], where: str) -> list[int]:
        if self.tokenizer.chat_template is None:
            remedy = "Set tokenizer.chat_template, use an instruction-tuned model, or give prompts as text."
            raise PromptError(f"{where}: the prompt is a chat, but the tokenizer has no chat template. {remedy}")
        arguments = {"tools": _tools(row.get("tools"), where), **_template_arguments(row, where)}
        try:
            text = self._rendered(chat, arguments, add_generation_prompt=True)
        except _TEMPLATE as error:
            roles = ", ".join(str(message["role"]) for message in chat)
            raise PromptError(
                f"{where}: the chat template refuses the chat (roles: {roles}): {said(error)}. Change the row, such as "
                "by moving a system message's text into the first user message, or set another tokenizer.chat_template."
            ) from error
        if not isinstance(text, str) or not text.strip():
            raise PromptError(
                f"{where}: the chat template gives {quoted(text)}, no text. Set another tokenizer.chat_template."
            )
        if not self._template_tried:
            self._check_generation_prompt(chat, arguments, text, where)
            self._template_tried = True
        return self._tokens(text, where, special=False)

    def _rendered(self, chat: Sequence[Message], arguments: Mapping[str, Any], **more: Any) -> Any:
        return self.tokenizer.apply_chat_template(list(chat), tokenize=False, **{**arguments, **more})

    def _check_generation_prompt(
        self, chat: Sequence[Message], arguments: Mapping[str, Any], prompt: str, where: str
    ) -> None:
        """Says where the template writes a heading before an answer, but not as a generation prompt."""
        bare = self._rendered(chat, arguments, add_generation_prompt=False)
        around = answer_in(self.tokenizer, chat, arguments)
        if bare == prompt and around is not None and around[0].startswith(bare):
            heading = around[0].removeprefix(bare)
            if heading.strip():
                tell(
                    f"{where}: the chat template ignores add_generation_prompt, so the prompt ends before "
                    f"{quoted(heading)} and the policy has to write that itself. Unless it was trained so, add {{% if "
                    "add_generation_prompt %}...{% endif %} with it at the template's end"
                )


def answer_in(
    tokenizer: PreTrainedTokenizerBase, chat: Sequence[Message], arguments: Mapping[str, Any] | None = None
) -> tuple[str, str] | None:
    """(text before, text after) an answer to the chat, as the chat template writes it; None where it cannot."""
    answered = [*chat, {"role": "assistant", "content": _ANSWER}]
    try:
        text = tokenizer.apply_chat_template(answered, tokenize=False, **(arguments or {}))
    except _TEMPLATE:  # a template may refuse an answer here; there is nothing to learn from it then
        return None
    before, found, after = str(text).rpartition(_ANSWER)
    return (before, after) if found else None


def turn_end_missing(tokenizer: PreTrainedTokenizerBase, prompt: Prompt, end_ids: Sequence[int]) -> str | None:
    """A sentence where the chat template ends an answer with a token that does not end a completion, else None.

    end_ids: the ids that end a completion. A policy that ends its turn as the template does would be sampled on.
    """
    around = None if isinstance(prompt, str) else answer_in(tokenizer, prompt)
    after = "" if around is None else around[1].strip()
    ids = list(tokenizer(after, add_special_tokens=False)["input_ids"]) if after else []  # type: ignore[arg-type]
    if not ids or set(ids) & set(end_ids):
        return None
    token = str(tokenizer.convert_ids_to_tokens(ids[0]))
    is_token = len(ids) == 1 or ids[0] in tokenizer.added_tokens_decoder
    remedy = f"rollout.stop_tokens={[token]!r}" if is_token else f"rollout.stop_strings={[after]!r}"
    known = ", ".join(repr(tokenizer.convert_ids_to_tokens(id)) for id in list(end_ids)[:_NAMED])
    return (
        f"The chat template ends an answer with {quoted(token if is_token else after)}, which does not end a "
        f"completion here (what does: {known}). Set {remedy}, unless answers are to go on after it."
    )


def _tools(tools: Any, where: str) -> list[Any] | None:
    """A row's tools as JSON schemas: a list, or JSON text of one. None where there are none."""
    if isinstance(tools, str):
        try:
            tools = json.loads(tools) if tools.strip() else None
        except (ValueError, RecursionError) as error:
            raise PromptError(f"{where}: 'tools' is {quoted(tools)}, which is not JSON: {error}.") from error
    if tools is None or (isinstance(tools, list) and not tools):
        return None  # some templates write the heading of an empty list
    if not isinstance(tools, list) or not all(isinstance(tool, Mapping) for tool in tools):
        raise PromptError(f"{where}: 'tools' is {quoted(tools)}, not a list of JSON schemas, or JSON text of one.")
    return without_none(tools)


def _template_arguments(row: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The row's own arguments of the chat template, such as {"enable_thinking": false}."""
    given = row.get("chat_template_kwargs")
    if given is None:
        return {}
    if not isinstance(given, Mapping):
        raise PromptError(f"{where}: 'chat_template_kwargs' is {quoted(given)}, not a mapping of names to values.")
    own = {"tools", "tokenize", "add_generation_prompt", "continue_final_message"} & set(given)
    if own:
        raise PromptError(f"{where}: 'chat_template_kwargs' has {min(own)!r}, which is set here. Leave it out.")
    return without_none(given)
