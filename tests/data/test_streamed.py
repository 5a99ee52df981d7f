"""Streams: read as needed, in the order of arrival, again and again, and resumed exactly."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import pytest

from stable_rlhf.data.encoding import PromptEncoder
from stable_rlhf.data.streamed import StreamedPrompts, StreamedRows
from stable_rlhf.errors import PromptError
from tests.data.words import ids, words
from tests.tiny_runs import rows, settings, trainer

LETTERS = ["a", "b", "c", "d", "e"]


class Source:
    """Rows that can be iterated again and again, and how many were read."""

    def __init__(self, rows: list[Any], shuffled: bool = False, fails_at: int | None = None) -> None:
        self.rows, self.fails_at, self.read, self.epoch = rows, fails_at, 0, 0
        if shuffled:
            self.set_epoch = lambda epoch: setattr(self, "epoch", epoch)

    def __iter__(self) -> Iterator[Any]:
        turn = self.epoch % len(self.rows) if self.rows else 0
        for number, row in enumerate(self.rows[turn:] + self.rows[:turn], start=1):
            if number == self.fails_at:
                raise ConnectionError("the hub is gone")
            self.read += 1
            yield row


def stream(source: Any, ahead: int = 0, limit: int | None = None, prompt_column: str | None = None) -> StreamedPrompts:
    made = StreamedRows(source, format="auto", prompt_column=prompt_column, limit=limit, name="the stream")
    encoder = PromptEncoder(words(), max_prompt_length=9, context_length=None, max_completion_length=1)
    return StreamedPrompts(made, encoder, ahead)


def taken(prompts: StreamedPrompts, k: int) -> list[str]:
    numbers = prompts.take(k)
    texts = prompts[numbers]["prompt"]
    assert [prompts.input_ids[number] for number in numbers] == [ids(text) for text in texts]
    assert [prompts.truncated[number] for number in numbers] == [False] * k
    return texts


def test_rows_come_in_the_order_of_arrival_and_the_next_pass_follows_the_end() -> None:
    prompts = stream(Source(LETTERS))
    assert taken(prompts, 3) == ["a", "b", "c"]
    assert taken(prompts, 4) == ["d", "e", "a", "b"]
    assert prompts.take(1) == [7]  # numbered over all passes
    assert prompts.epoch == 1
    assert taken(prompts, 12) == ["d", "e", *LETTERS, *LETTERS]


def test_only_what_is_needed_is_read_and_only_the_last_batch_is_kept() -> None:
    source = Source([f"a {letter}" for letter in LETTERS] * 40)
    prompts = stream(source, ahead=4)
    assert source.read == 4
    taken(prompts, 4)
    assert source.read == 4
    for _ in range(10):
        taken(prompts, 4)
    assert source.read == 44
    assert len(prompts.input_ids) <= 8


def test_a_limit_ends_each_pass() -> None:
    assert taken(stream(Source(LETTERS), limit=2), 5) == ["a", "b", "a", "b", "a"]


def test_a_shuffled_stream_is_told_its_pass() -> None:
    prompts = stream(Source(LETTERS, shuffled=True))
    assert taken(prompts, 10) == [*"abcde", *"bcdea"]


@pytest.mark.parametrize("kind", ["own", "shuffled", "IterableDataset"])
@pytest.mark.parametrize("steps", [0, 1, 2, 5, 7])
def test_a_restored_stream_goes_on_where_it_was(kind: str, steps: int) -> None:
    def source() -> Any:
        if kind == "IterableDataset":
            rows = datasets.Dataset.from_dict({"prompt": LETTERS}).to_iterable_dataset()
            return rows.shuffle(seed=1, buffer_size=3)
        return Source(LETTERS, shuffled=kind == "shuffled")

    prompts = stream(source(), ahead=2)
    for _ in range(steps):
        prompts.take(2)
    state = json.loads(json.dumps(prompts.state_dict()))
    resumed = stream(source(), ahead=2)
    resumed.load_state_dict(state)
    assert [taken(resumed, 2) for _ in range(6)] == [taken(prompts, 2) for _ in range(6)]
    assert resumed.state_dict() == prompts.state_dict()


def test_a_step_back_reads_nothing_again() -> None:
    source = Source(LETTERS)
    prompts = stream(source)
    taken(prompts, 2)
    before = prompts.state_dict()
    second = taken(prompts, 2)
    prompts.load_state_dict(before)
    assert taken(prompts, 2) == second
    assert source.read == 4


@pytest.mark.parametrize("other", [["a", "b", "e", "d"], ["a", "b"], ["b", "a", "c", "d"]])
def test_a_stream_with_other_rows_is_not_resumed(other: list[str]) -> None:
    prompts = stream(Source(LETTERS))
    prompts.take(3)
    with pytest.raises(PromptError, match="the stream: its first 3 rows are not those of the saved run"):
        stream(Source(other)).load_state_dict(prompts.state_dict())
    with pytest.raises(PromptError, match="is not one of a stream"):
        prompts.load_state_dict({"version": 1, "n_rows": 5, "seed": 0, "epoch": 0, "position": 0})


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (Source([]), r"the stream has no rows\. Give a stream"),
        (Source(["a", " "]), r"the stream, row 2: the prompt is empty"),
        (
            Source(["a", [{"role": "user", "content": "b"}]]),
            r"the stream, row 2: .* is a chat, but that of row 1 is text",
        ),
        (Source(["a", 5]), r"the stream, row 2 is 5, not a row with a prompt"),
        (Source([{"prompt": "a"}, {"text": "b"}]), r"the stream, row 2: the prompt is None"),
        (Source([{"text": "b"}]), r"the stream has the columns 'text'; .*Set data\.prompt_column"),
        (Source(LETTERS, fails_at=2), r"the stream, row 2 could not be read: the hub is gone"),
    ],
)
def test_a_row_that_cannot_be_used_costs_a_sentence_with_its_number(source: Source, message: str) -> None:
    with pytest.raises(PromptError, match=message):
        stream(source, ahead=2)


def test_rows_that_can_be_read_only_once_are_said_at_their_end() -> None:
    once = iter([{"prompt": "a"}])

    class Once:
        def __iter__(self) -> Iterator[Any]:
            return once

    with pytest.raises(PromptError, match="the stream has no rows in pass 2: it can be read only once"):
        stream(Once()).take(2)


def test_other_columns_and_a_prompt_of_another_name_come_along() -> None:
    prompts = stream(Source([{"q": "a", "n": 1}, {"q": "b"}]), prompt_column="q")
    assert prompts[prompts.take(2)] == {"q": ["a", "b"], "n": [1, None], "prompt": ["a", "b"]}
    with pytest.raises(PromptError, match="a batch of 0 prompts"):
        prompts.take(0)


# -- runs -----------------------------------------------------------------------------------------------------------


def endless() -> Iterator[dict[str, Any]]:
    for number in itertools.count():
        yield {"prompt": f"p {number}", "n": number}


def test_a_run_on_an_endless_stream_resumes_to_the_same_rows(tokenizer: Any, tmp_path: Path) -> None:
    seen: list[int] = []

    def reward(prompts: list[str], completions: list[str], n: list[int], **columns: Any) -> list[float]:
        seen.extend(n)
        return [len(completion) + number / 8 for completion, number in zip(completions, n, strict=True)]

    def made(name: str, steps: int) -> Any:
        config = settings(
            tmp_path / name, max_steps=steps, save_steps=1, data={"eval_size": 0}, rollout={"batch_size": 4}
        )
        data = datasets.IterableDataset.from_generator(endless)
        return trainer(config, tokenizer, reward, train_dataset=data)

    made("whole", 3).train()
    assert seen == list(range(12))
    made("parts", 2).train()
    made("parts", 3).train(resume_from_checkpoint=True)
    assert rows(tmp_path / "parts") == rows(tmp_path / "whole")
    assert seen == [*range(12), *range(12)]


def test_a_bad_row_in_a_run_says_how_to_resume_and_loses_nothing(tokenizer: Any, tmp_path: Path) -> None:
    good = [f"p {number}" for number in range(8)]
    config = settings(tmp_path / "run", max_steps=3, save_steps=0, data={"eval_size": 0}, rollout={"batch_size": 4})
    run = trainer(config, tokenizer, train_dataset=Source([*good, " "]))
    with pytest.raises(
        PromptError,
        match=r"row 9: the prompt is empty\. .*`train\(resume_from_checkpoint=True\)` .* from step 2",
    ):
        run.train()
    repaired = trainer(config, tokenizer, train_dataset=Source([*good, "p 8"]))
    repaired.train(resume_from_checkpoint=True)
    assert [row["step"] for row in rows(tmp_path / "run")] == [0, 1, 2]


@pytest.mark.parametrize("fault", ["the source", "the row"])
def test_after_a_row_that_could_not_be_read_no_row_is_left_out(fault: str) -> None:
    source = Source([*LETTERS, "a"], fails_at=4) if fault == "the source" else Source([*"abc", " ", *"ea"])
    prompts = stream(source)
    taken(prompts, 2)
    before = prompts.state_dict()
    for _ in range(2):  # it fails as long as it is not repaired
        with pytest.raises(PromptError, match="the stream, row 4"):
            prompts.take(2)
        prompts.load_state_dict(before)
    source.fails_at, source.rows[3] = None, "d"
    assert taken(prompts, 6) == [*"cdea", *"ab"]
