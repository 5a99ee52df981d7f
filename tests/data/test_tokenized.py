"""What the tokenizer and the chat template make of a prompt: one BOS, an open end, ids of the model, or a sentence."""

from __future__ import annotations

import json
from typing import Any

import pytest

from stable_rlhf.data.tokenized import PromptTokenizer, turn_end_missing
from stable_rlhf.errors import PromptError
from tests.data.words import TEMPLATE, WORDS, ids, words

CHAT = [{"role": "user", "content": "a b"}]


def encoded(tokenizer: Any, prompt: Any, vocabulary: int | None = None, **columns: Any) -> list[int]:
    return PromptTokenizer(tokenizer, vocabulary).ids({"prompt": prompt, **columns}, "the data set, row 7")


@pytest.mark.parametrize(
    ("adds", "text", "expected"),
    [
        ("$A", "a b", "a b"),
        ("<s> $A", "a b", "<s> a b"),
        ("<s> $A", "<s> a b", "<s> a b"),  # rendered by a template already
        ("<s> $A", "<s> <s> a", "<s> <s> a"),  # the writer's own second one
        ("$A </s>", "a b", "a b"),
        ("$A </s>", "a b </s>", "a b </s>"),  # the writer's own: a separator of turns
        ("<s> $A </s>", "a", "<s> a"),
        ("<s> $A </s>", "<s> a", "<s> a"),
        ("<s> user $A <end> </s>", "a", "<s> user a"),
        ("<s> user $A <end> </s>", "<s> user a", "<s> user a"),
    ],
)
def test_a_text_begins_with_what_the_tokenizer_adds_once_and_ends_open(adds: str, text: str, expected: str) -> None:
    assert encoded(words(adds), text) == ids(expected)


def test_what_a_tokenizer_adds_is_found_whichever_prompt_comes_first() -> None:
    tokenizer = PromptTokenizer(words("<s> $A </s>"))
    texts = ["<s> a", "b c", "<s> d"]
    assert [tokenizer.ids({"prompt": text}, "row") for text in texts] == [ids("<s> a"), ids("<s> b c"), ids("<s> d")]


@pytest.mark.parametrize("adds", ["$A", "<s> $A", "<s> $A </s>"])
def test_a_rendered_text_and_its_chat_become_the_same_ids(adds: str) -> None:
    tokenizer = words(adds, "<s> " + TEMPLATE)
    text = tokenizer.apply_chat_template(CHAT, tokenize=False, add_generation_prompt=True)
    assert encoded(tokenizer, text) == encoded(tokenizer, CHAT) == ids("<s> user a b <end> assistant")


def test_an_id_beyond_the_embedding_is_refused_with_the_token() -> None:
    assert encoded(words(), "a d", vocabulary=len(WORDS) - 1) == ids("a d")
    message = r"row 7: the prompt's token 'e' \(id 12\) is beyond the model's embedding of 12 rows\. .*resize_token_emb"
    with pytest.raises(PromptError, match=message):
        encoded(words(), "a e", vocabulary=len(WORDS) - 1)


REFUSED = {
    "{{ raise_exception('no system role') }}": r"refuses the chat \(roles: user\): no system role\. Change the row",
    "{{ messages[0].content.missing.more }}": r"refuses the chat .* has no attribute 'missing'",
    "{% for m in %}": r"refuses the chat",
    "{{ messages[0]['content'] + 1 }}": r"refuses the chat .*str",
    "{{ 1 // 0 }}": r"refuses the chat .* by zero",
    "": r"gives '', no text",
    "{% if false %}a{% endif %} \n": r"gives ' ', no text",
}


@pytest.mark.parametrize("template", REFUSED)
def test_a_template_that_fails_costs_a_sentence_with_the_row(template: str) -> None:
    with pytest.raises(PromptError, match=r"the data set, row 7: the chat template " + REFUSED[template]):
        encoded(words(template=template), CHAT)


def test_a_template_without_a_generation_prompt_is_said_once_since_the_policy_may_have_been_trained_so(
    capsys: pytest.CaptureFixture[str],
) -> None:
    tokenizer = words(template="{% for m in messages %}{{ m.role }} {{ m.content }} {% endfor %}")
    text = tokenizer.apply_chat_template(CHAT, tokenize=False)
    assert encoded(tokenizer, CHAT) == tokenizer(text, add_special_tokens=False)["input_ids"]
    said = (
        "the data set, row 7: the chat template ignores add_generation_prompt, so the prompt ends before 'assistant '"
    )
    assert capsys.readouterr().err.count(said) == 1


@pytest.mark.parametrize(
    "template",
    [
        "{% for m in messages %}{% if m.role == 'user' %}a {{ m.content }} b {% endif %}{{ m.content }}{% endfor %}",
        "{% for m in messages %} {{ m.content }}{% endfor %}",  # a space is no heading
        "{% for m in messages %}{{ m.content }} </s> {% endfor %}",  # EOS between turns, nothing before an answer
        TEMPLATE + "{% if messages[-1].role == 'assistant' %}{{ raise_exception('no') }}{% endif %}",
    ],
)
def test_a_template_that_writes_nothing_before_an_answer_needs_no_generation_prompt(
    template: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert encoded(words(template=template), CHAT)
    assert capsys.readouterr().err == ""


def test_a_template_with_a_generation_prompt_is_not_told_to_have_one(capsys: pytest.CaptureFixture[str]) -> None:
    assert encoded(words(template=TEMPLATE), CHAT)
    assert capsys.readouterr().err == ""


def test_tools_and_arguments_of_a_row_reach_the_template() -> None:
    template = (
        "{% if tools is not none %}{{ tools[0].name }} {% endif %}"
        "{% if thinking is defined %}{{ thinking }} {% endif %}" + TEMPLATE
    )
    plain, tool = "user a b <end> assistant", {"name": "c", "strict": None}
    for tools in ([tool], json.dumps([tool])):
        assert encoded(words(template=template), CHAT, tools=tools) == ids(f"c {plain}")
    for tools in (None, [], "[]", "", "null"):
        assert encoded(words(template=template), CHAT, tools=tools) == ids(plain)
    assert encoded(words(template=template), CHAT, chat_template_kwargs={"thinking": "e"}) == ids(f"e {plain}")


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"tools": "{bad"}, "'tools' is '{bad', which is not JSON"),
        ({"tools": 5}, "'tools' is 5, not a list of JSON schemas"),
        ({"tools": ["get_weather"]}, "not a list of JSON schemas"),
        ({"chat_template_kwargs": "x"}, "'chat_template_kwargs' is 'x', not a mapping"),
        ({"chat_template_kwargs": {"tokenize": True}}, "has 'tokenize', which is set here"),
    ],
)
def test_tools_and_arguments_that_are_none_are_refused_with_the_row(columns: dict[str, Any], message: str) -> None:
    with pytest.raises(PromptError, match=f"row 7: .*{message}"):
        encoded(words(template=TEMPLATE), CHAT, **columns)


def test_a_text_that_the_tokenizer_cannot_read_costs_a_sentence() -> None:
    with pytest.raises(PromptError, match=r"row 7: the tokenizer cannot read 'a \\ud800'"):
        encoded(words(), "a \ud800")


def test_a_turn_end_that_ends_no_completion_is_said_with_the_setting() -> None:
    tokenizer = words(template=TEMPLATE)
    said = turn_end_missing(tokenizer, CHAT, ids("</s>"))
    assert said is not None
    assert "'<end>', which does not end a completion here (what does: '</s>')" in said
    assert "rollout.stop_tokens=['<end>']" in said
    assert turn_end_missing(tokenizer, CHAT, ids("</s> <end>")) is None
    assert turn_end_missing(tokenizer, "a b", ids("</s>")) is None  # a text has no turns
    tokenizer.chat_template = TEMPLATE.replace("<end>", "c d")
    said = turn_end_missing(tokenizer, CHAT, ids("</s>"))
    assert said is not None
    assert "rollout.stop_strings=['c d']" in said
    tokenizer.chat_template = TEMPLATE.replace("<end>", "\n")
    assert turn_end_missing(tokenizer, CHAT, ids("</s>")) is None  # nothing that ends a turn
