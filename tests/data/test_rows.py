"""Where the prompt of a row is: conventions by columns, messages made plain, and sentences for what is none."""

from __future__ import annotations

import json
from typing import Any

import datasets
import pytest
from trl.data_utils import extract_prompt

from stable_rlhf.data.given import as_dataset
from stable_rlhf.data.sources import with_prompts
from stable_rlhf.errors import PromptError

USER, ANSWER = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}
OTHER = {"role": "assistant", "content": "no"}


def prompts(rows: list[dict[str, Any]], format: str = "auto", prompt_column: str | None = None) -> list[Any]:
    made = as_dataset(rows, "train", "rows")
    assert isinstance(made, datasets.Dataset)
    return with_prompts(made, format=format, prompt_column=prompt_column, limit=None, name="rows")["prompt"][:]


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"prompt": "hi"}, "hi"),
        ({"prompt": [USER]}, [USER]),
        ({"prompt": "hi", "messages": [USER, ANSWER]}, "hi"),
        ({"messages": [USER, ANSWER]}, [USER]),
        ({"messages": [USER]}, [USER]),
        ({"messages": [USER, ANSWER, USER, OTHER]}, [USER, ANSWER, USER]),
        ({"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "yes"}]}, [USER]),
        ({"conversations": [{"from": "user", "value": "hi"}]}, [USER]),
        ({"chosen": [USER, ANSWER], "rejected": [USER, OTHER]}, [USER]),
        ({"chosen": [USER, ANSWER], "rejected": [USER, ANSWER]}, [USER]),  # a pair of equals
        ({"chosen": [USER, ANSWER, USER, ANSWER], "rejected": [USER, ANSWER, USER, OTHER]}, [USER, ANSWER, USER]),
        ({"chosen": "The sky is blue.", "rejected": "The sky is green."}, "The sky is"),
        ({"chosen": "\n\nHuman: hi\n\nAssistant: yes", "rejected": "\n\nHuman: hi\n\nAssistant: no"}, [USER]),
        (
            {"prompt": [{"role": "user", "content": [{"type": "text", "text": "h"}, {"type": "text", "text": "i"}]}]},
            [USER],
        ),
        (
            {"prompt": [{"role": "developer", "content": "be kind"}, USER]},
            [{"role": "developer", "content": "be kind"}, USER],
        ),
    ],
)
def test_the_prompt_is_found_by_the_columns(row: dict[str, Any], expected: Any) -> None:
    assert prompts([row, row]) == [expected, expected]


@pytest.mark.parametrize(
    "row",
    [
        {"chosen": [USER, ANSWER], "rejected": [USER, OTHER]},
        {"chosen": [USER, ANSWER, USER, ANSWER], "rejected": [USER, ANSWER, USER, OTHER]},
        {"chosen": "The sky is blue.", "rejected": "The sky is green."},
        {"chosen": "Two: a", "rejected": "Two: b"},
    ],
)
def test_the_prompt_of_a_pair_is_that_of_trl(row: dict[str, Any]) -> None:
    assert prompts([row]) == [extract_prompt(dict(row))["prompt"]]


def test_a_chat_of_tool_calls_keeps_its_own_keys_although_arrow_gives_all_the_same() -> None:
    call = {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": {"x": 1}}}]}
    result = {"role": "tool", "name": "f", "content": ""}
    other = {"role": "assistant", "tool_calls": [{"function": {"name": "g", "arguments": {"y": "z"}}}]}
    rows = [{"prompt": [USER, call, result]}, {"prompt": [USER, other, result, USER]}]
    expected = [[USER, {**call, "content": ""}, result], [USER, {**other, "content": ""}, result, USER]]
    assert prompts(rows) == expected
    united = datasets.Dataset.from_list([{"prompt": [USER, result]}, {"prompt": [USER]}])
    assert united[0]["prompt"][0] == {**USER, "name": None}
    assert with_prompts(united, format="auto", prompt_column=None, limit=None, name="rows")["prompt"][:] == [
        [USER, result],
        [USER],
    ]


def test_a_column_of_another_name_is_read_and_kept_under_its_own() -> None:
    rows = as_dataset([{"question": "hi", "answer": "yes"}], "train", "rows")
    made = with_prompts(rows, format="auto", prompt_column="question", limit=None, name="rows")  # type: ignore[arg-type]
    assert made.to_list() == [{"question": "hi", "answer": "yes", "prompt": "hi"}]
    assert prompts([{"prompt": "no", "text": "hi"}], prompt_column="text") == ["hi"]
    assert prompts([{"chat": [USER, ANSWER]}], "messages", "chat") == [[USER]]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"text": "hi"}, r"columns 'text'; .* needs 'prompt'\. Set data\.prompt_column to the column that holds"),
        (
            {"prompt": "a", "completions": ["b"]},
            r"a column 'completions', which is an argument of every reward\. Rename",
        ),
        ({"prompt": "a", "trainer_state": 1}, "a column 'trainer_state', which is an argument of every reward"),
        (
            {"prompt": [USER, ANSWER]},
            r"row 1: .* ends with an assistant message, .*data\.format=messages leaves it out",
        ),
        ({"messages": []}, r"row 1: the prompt is \[\]"),
        ({"messages": [ANSWER]}, r"row 1: the prompt is \[\]"),
        ({"chosen": "a", "rejected": [USER]}, r"row 1: 'chosen' is 'a' and 'rejected' is \[.*needs two texts or two"),
        ({"chosen": [USER, ANSWER], "rejected": [ANSWER]}, r"row 1: .* do not begin alike"),
        (
            {"prompt": [{"role": "user", "content": [{"type": "image", "url": "x"}]}]},
            r"row 1: the prompt has a message 1 with the part .*'image'.*: only parts of text are read",
        ),
        ({"prompt": [{"role": "user", "content": []}]}, r"row 1: .* message 1 whose content is ''"),
        ({"prompt": [{"from": "narrator", "value": "x"}]}, r"row 1: .* message 1 with the role 'narrator', not one of"),
        ({"prompt": ["hi"]}, r"row 1: .* message 1 without 'role' and 'content': 'hi'"),
    ],
)
def test_a_row_without_a_prompt_costs_a_sentence(row: dict[str, Any], message: str) -> None:
    with pytest.raises(PromptError, match=message):
        prompts([row])


@pytest.mark.parametrize("column", ["prompt", "messages"])
def test_a_chat_that_a_table_holds_as_json_text_is_read_as_a_chat(column: str) -> None:
    assert prompts([{column: json.dumps([USER])}, {column: json.dumps([ANSWER, USER])}]) == [[USER], [ANSWER, USER]]


@pytest.mark.parametrize("text", ["[1, 2]", "[not json", '["a"]', '[{"role": "user"}]', "[]", '{"role": "user"}'])
def test_a_text_that_is_json_but_no_chat_stays_a_text(text: str) -> None:
    assert prompts([{"prompt": text}]) == [text]
