"""Streams: read as needed, in the order of arrival, again and again, and resumed exactly."""

from __future__ import annotations

import dataclasses
import gzip
import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import pytest
import yaml

from stable_rlhf.cli import main
from stable_rlhf.config import DataConfig
from stable_rlhf.data import split_datasets
from stable_rlhf.data.encoding import PromptEncoder
from stable_rlhf.data.streamed import StreamedPrompts, StreamedRows
from stable_rlhf.errors import ConfigError, PromptError
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
    assert prompts.passes == 1
    assert taken(prompts, 12) == ["d", "e", *LETTERS, *LETTERS]


def test_only_what_is_needed_is_read_and_only_the_last_batch_is_kept() -> None:
    source = Source([f"a {letter}" for letter in LETTERS] * 40)
    prompts = stream(source, ahead=4)
    assert source.read == 4
    taken(prompts, 4)
    assert source.read == 5  # one more, to know whether the pass is over
    for _ in range(10):
        taken(prompts, 4)
    assert source.read == 45
    assert len(prompts.input_ids) <= 8


def test_the_end_of_a_pass_is_known_with_its_last_row() -> None:
    prompts = stream(Source(LETTERS), ahead=2)
    passes = []
    for _ in range(6):
        prompts.take(2)
        passes.append(prompts.passes)
    assert passes == [0, 0, 1, 1, 2, 2]
    limited = stream(Source(LETTERS), limit=2)
    limited.take(2)
    assert limited.passes == 1


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_a_pass_that_is_left_is_followed_by_the_next_also_after_a_resume(steps: int) -> None:
    prompts = stream(Source(LETTERS, shuffled=True), ahead=2)
    for _ in range(steps):
        prompts.take(2)
    before = int(prompts.passes)
    if steps < 3:
        prompts.leave_pass()
    assert prompts.passes == 1
    resumed = stream(Source(LETTERS, shuffled=True), ahead=2)
    resumed.load_state_dict(json.loads(json.dumps(prompts.state_dict())))
    expected = "cdeacdeab" if before else "bcdeacdea"
    assert taken(prompts, 9) == taken(resumed, 9) == list(expected)


def test_what_is_wrong_with_a_row_that_is_not_needed_yet_is_said_when_it_is() -> None:
    prompts = stream(Source(["a", "b", " "]))
    assert taken(prompts, 2) == ["a", "b"]
    for _ in range(2):  # the second time the rows before it are read again
        with pytest.raises(PromptError, match="row 3: the prompt is empty"):
            prompts.take(1)
    once = iter(["a", "b"])

    class Once:
        def __iter__(self) -> Iterator[Any]:
            return once

    assert taken(stream(Once()), 2) == ["a", "b"]  # a run that needs no more has no fault


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
    taken(prompts, 1)
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


# -- by name --------------------------------------------------------------------------------------------------------

TABLE = {"prompt": ["a", "4", "null", "b c"], "n": [1, 2, 3, None]}


def written(folder: Path, kind: str) -> Path:
    """TABLE as a file or a folder."""
    path, table = folder / f"rows{kind}", datasets.Dataset.from_dict(TABLE)
    if kind in (".jsonl", ".jsonl.gz"):
        lines = "\n\n".join(json.dumps(row) for row in table).encode()
        path.write_bytes(gzip.compress(lines) if kind.endswith("gz") else lines)
    elif kind == ".json":
        path.write_text(json.dumps(list(table)))
    elif kind in (".csv", ".csv.gz"):
        table.to_csv(folder / "plain.csv")
        lines = (folder / "plain.csv").read_bytes()
        path.write_bytes(gzip.compress(lines) if kind.endswith("gz") else lines)
    elif kind == ".parquet":
        table.to_parquet(path)
    elif kind == " saved":
        table.save_to_disk(path)
    else:
        path.mkdir()
        table.to_parquet(path / "train.parquet")
    return path


@pytest.mark.parametrize("kind", [".jsonl", ".jsonl.gz", ".json", ".csv", ".csv.gz", ".parquet", " saved", " folder"])
def test_a_streamed_source_has_the_rows_of_the_loaded_one(kind: str, tmp_path: Path) -> None:
    name = str(written(tmp_path, kind))
    (whole, _), (streamed, none) = (
        split_datasets(DataConfig(train=name, eval_size=0, streaming=streaming), 0, None, None)
        for streaming in (False, True)
    )
    assert isinstance(streamed, StreamedRows)
    for _ in range(2):  # again and again
        assert list(streamed.read(0)) == list(whole.dataset) == list(datasets.Dataset.from_dict(TABLE))
    assert none is None
    data = DataConfig(train=name, eval=name, eval_size=3, limit=2, streaming=True)
    data = dataclasses.replace(data, eval_split="train") if kind in (" saved", " folder") else data
    limited, held_out = split_datasets(data, 0, None, None)
    assert [row["prompt"] for row in limited.read(0)] == TABLE["prompt"][:2]
    assert held_out.dataset["prompt"][:] == TABLE["prompt"][:3]


def test_a_file_is_read_as_it_is_needed(tmp_path: Path) -> None:
    name = tmp_path / "rows.jsonl"
    name.write_text('{"prompt": "a"}\n{"prompt": "b"}\n{"prompt": \n')
    with pytest.raises(PromptError, match="row 3 is not JSON"):
        split_datasets(DataConfig(train=str(name), eval_size=0), 0, None, None)
    rows, _ = split_datasets(DataConfig(train=str(name), eval_size=0, streaming=True), 0, None, None)
    read = rows.read(0)
    assert [next(read)["prompt"], next(read)["prompt"]] == ["a", "b"]
    with pytest.raises(PromptError, match="row 3 is not JSON"):
        next(read)
    table = tmp_path / "rows.csv"
    long = "x" * 600_000  # the type of a column is that of the file's first megabyte
    table.write_text("prompt,n\n" + f"{long},1\n" * 4 + "y,z\n")
    rows, _ = split_datasets(DataConfig(train=str(table), eval_size=0, streaming=True), 0, None, None)
    seen = []
    # Arrow names the row in some of its threads only.
    told = r"rows\.csv could not be read: .*'z'.*first megabyte: repair the row, or save the file as JSON"
    with pytest.raises(PromptError, match=told):
        seen.extend(row["n"] for row in rows.read(0))
    assert seen
    assert set(seen) == {1}


@pytest.mark.parametrize(
    ("settings", "fault"),
    [
        ({"train": "builtin"}, r"data\.streaming=True: has no effect unless data\.train is a file, a folder or a hub"),
        ({"train": "{file}"}, r"data\.eval_size=128 rows cannot be held out .* name held-out prompts in data\.eval"),
        ({"train": "gone.jsonl", "eval_size": 0}, r"prompt file gone\.jsonl does not exist"),
        ({"train": "no/such-set", "eval_size": 0}, r"data set 'no/such-set' .* could not be loaded from the hub"),
    ],
)
def test_what_cannot_be_streamed_costs_a_sentence(settings: dict[str, Any], fault: str, tmp_path: Path) -> None:
    settings = {name: written(tmp_path, ".jsonl") if at == "{file}" else at for name, at in settings.items()}
    settings["train"] = str(settings["train"])
    with pytest.raises((ConfigError, PromptError), match=fault):
        split_datasets(DataConfig(streaming=True, **settings), 0, None, None)


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


def test_a_streamed_file_resumes_from_the_command_line(tiny_folder: Path, tmp_path: Path) -> None:
    lines = "".join(json.dumps({"prompt": f"p {number}"}) + "\n" for number in range(7))
    (tmp_path / "rows.jsonl").write_text(lines)

    def train(name: str, steps: int) -> None:
        sections = {
            "model": {"name": str(tiny_folder)},
            "data": {"train": str(tmp_path / "rows.jsonl"), "streaming": True, "eval_size": 0},
            "reward": {"functions": ["tests.tiny_runs:letters"]},
            "rollout": {"batch_size": 4},
        }
        config = settings(tmp_path / name, max_steps=steps, save_steps=1, **sections)
        file = tmp_path / f"{name}.yaml"
        file.write_text(yaml.safe_dump({**config.to_dict(), "reward": {"functions": ["tests.tiny_runs:letters"]}}))
        assert main(["train", "--config", str(file)]) == 0

    train("whole", 3)
    train("parts", 2)
    assert main(["resume", str(tmp_path / "parts"), "--max_steps", "3"]) == 0
    assert rows(tmp_path / "parts") == rows(tmp_path / "whole")
    (tmp_path / "rows.jsonl").write_text(lines.replace("p 3", "q 3"))
    assert main(["resume", str(tmp_path / "parts"), "--max_steps", "4"]) == 2  # other rows than the run's
