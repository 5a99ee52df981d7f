"""Data sets given as objects: every kind gives the same rows, and what is none costs a sentence."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pandas
import pyarrow
import pytest

from stable_rlhf.config import DataConfig
from stable_rlhf.data.given import as_dataset
from stable_rlhf.data.sources import load_prompts
from stable_rlhf.data.split import split_datasets
from stable_rlhf.data.streamed import StreamedRows
from stable_rlhf.errors import ConfigError, PromptError

ROWS = [{"prompt": text, "n": [number, 2]} for number, text in enumerate(["one", "two", "three"])]
PLAIN = datasets.Dataset.from_list(ROWS)


class OwnRows:
    """A map-style data set, as torch has them."""

    def __len__(self) -> int:
        return len(ROWS)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return ROWS[index]


def doubled(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
    return {"prompt": [text * 2 for text in batch["prompt"]]}


KINDS: dict[str, Any] = {
    "Dataset": PLAIN,
    "numpy format": PLAIN.with_format("numpy"),
    "pandas format": PLAIN.with_format("pandas"),
    "some columns": PLAIN.with_format("numpy", columns=["prompt"]),
    "DatasetDict": datasets.DatasetDict({"train": PLAIN, "test": PLAIN.select([0])}),
    "one split of another name": datasets.DatasetDict({"default": PLAIN}),
    "dict of splits": {"train": PLAIN, "test": PLAIN.select([0])},
    "rows": ROWS,
    "tuple of rows": tuple(ROWS),
    "dict of columns": {"prompt": [row["prompt"] for row in ROWS], "n": [row["n"] for row in ROWS]},
    "dict of arrays": {"prompt": np.array([row["prompt"] for row in ROWS]), "n": np.array([row["n"] for row in ROWS])},
    "DataFrame": pandas.DataFrame(ROWS),
    "DataFrame with an index of its own": pandas.DataFrame(ROWS, index=[7, 8, 9]),
    "Arrow table": pyarrow.Table.from_pylist(ROWS),
    "map-style": OwnRows(),
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_gives_the_same_rows(kind: str) -> None:
    made = as_dataset(KINDS[kind], "train", "rows")
    assert isinstance(made, datasets.Dataset)
    assert made.to_list() == ROWS


@pytest.mark.parametrize("kind", ["list", "series", "column", "array"])
def test_a_list_of_texts_is_a_list_of_prompts(kind: str) -> None:
    texts = [row["prompt"] for row in ROWS]
    given = {
        "list": texts,
        "series": pandas.Series(texts, index=[3, 4, 5]),
        "column": PLAIN["prompt"],
        "array": np.array(texts),
    }
    made = as_dataset(given[kind], "train", "rows")
    assert isinstance(made, datasets.Dataset)
    assert made.to_list() == [{"prompt": text} for text in texts]


def test_a_list_of_chats_and_a_transform_of_ones_own() -> None:
    chats = [[{"role": "user", "content": "hi"}], [{"role": "user", "content": "you"}]]
    made = as_dataset(chats, "train", "rows")
    assert isinstance(made, datasets.Dataset)
    assert made["prompt"][:] == chats
    made = as_dataset(PLAIN.with_transform(doubled), "train", "rows")
    assert isinstance(made, datasets.Dataset)
    assert made["prompt"][:] == ["oneone", "twotwo", "threethree"]


def test_values_of_several_types_in_a_column_are_kept_as_they_are() -> None:
    made = as_dataset([{"prompt": "a", "answer": 1}, {"prompt": "b", "answer": "x"}], "train", "rows")
    assert isinstance(made, datasets.Dataset)
    assert made["answer"][:] == [1, "x"]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (iter(ROWS), r"rows is a list_iterator, which can be read only once.*IterableDataset\.from_generator"),
        ((row for row in ROWS), "rows is a generator, which can be read only once"),
        ("prompts.jsonl", r"rows is 'prompts\.jsonl'\. Give a .*; data\.train names files and hub data sets"),
        (5, r"rows is 5\. Give a datasets\.Dataset"),
        ([1, 2], "rows, row 1 is 1, not a row with a prompt"),
        (["a", None], "rows, row 2 is None, not a row with a prompt"),
        ({"prompt": "one"}, "rows: the column 'prompt' is 'one', not a list of values"),
        ({"prompt": ["a", "b"], "n": [1]}, "rows is not a table: .*Give every column the same number of rows"),
        (
            [{"prompt": "a", "f": 1}, {"prompt": "b", "f": {1, 2}}],
            r"rows, row 2: a data set cannot hold 'f' = \{1, 2\}",
        ),
        (
            {"a": PLAIN, "b": PLAIN},
            r"rows has the splits 'a', 'b', not 'train'\. Choose one with data\.split, or data\.eval_split",
        ),
        (pandas.DataFrame({"prompt": ["a", 5]}), "rows: its DataFrame is not a data set: "),
    ],
)
def test_what_is_no_data_set_costs_a_sentence(given: Any, message: str) -> None:
    with pytest.raises(PromptError, match=message):
        as_dataset(given, "train", "rows")


def test_errors_of_the_callers_own_code_become_sentences() -> None:
    class Fails(OwnRows):
        def __getitem__(self, index: int) -> dict[str, Any]:
            raise KeyError("gone")

    def fails(batch: Any) -> Any:
        raise KeyError("gone")

    with pytest.raises(PromptError, match="rows: its rows could not be read: 'gone'"):
        as_dataset(Fails(), "train", "rows")
    with pytest.raises(PromptError, match=r"rows: its own transform \(set_transform\) failed: 'gone'"):
        as_dataset(PLAIN.with_transform(fails), "train", "rows")


def test_settings_of_the_data_act_on_given_rows_too() -> None:
    data = DataConfig(train="<train_dataset>", prompt_column="q", limit=2)
    train, held_out = split_datasets(data, 0, [{"q": "a"}, {"q": "b"}, {"q": "c"}], [{"q": "d"}])
    assert not isinstance(train, StreamedRows)
    assert held_out is not None
    assert train.dataset["prompt"][:] == ["a", "b"]
    assert held_out.dataset["prompt"][:] == ["d"]


def test_of_a_held_out_stream_as_many_rows_are_read_as_are_evaluated() -> None:
    def endless() -> Any:
        number = 0
        while True:
            yield {"prompt": f"p {(number := number + 1)}"}

    stream = datasets.IterableDataset.from_generator(endless)
    _, held_out = split_datasets(DataConfig(train="<train_dataset>", eval_size=3), 0, ["a"], stream)
    assert held_out is not None
    assert held_out.dataset["prompt"][:] == ["p 1", "p 2", "p 3"]
    with pytest.raises(ConfigError, match=r"data\.eval_size=0: that many rows of eval_dataset, a stream"):
        split_datasets(DataConfig(train="<train_dataset>", eval_size=0), 0, ["a"], stream)


# -- folders --------------------------------------------------------------------------------------------------------


def test_saved_folders_and_folders_of_files_are_loaded_by_their_split(tmp_path: Path) -> None:
    PLAIN.save_to_disk(str(tmp_path / "one"))
    datasets.DatasetDict({"train": PLAIN, "test": PLAIN.select([1])}).save_to_disk(str(tmp_path / "two"))
    (tmp_path / "files").mkdir()
    PLAIN.to_json(tmp_path / "files" / "train.jsonl")
    PLAIN.select([1]).to_json(tmp_path / "files" / "test.jsonl")
    assert load_prompts(tmp_path / "one").to_list() == ROWS
    for folder in ("two", "files"):
        assert load_prompts(tmp_path / folder).to_list() == ROWS
        assert load_prompts(tmp_path / folder, split="test").to_list() == ROWS[1:2]
    with pytest.raises(
        PromptError, match=r"two has the splits 'train', 'test', not 'dev'\. Choose one with data\.split"
    ):
        load_prompts(tmp_path / "two", split="dev")
    with pytest.raises(PromptError, match=r"\(split 'dev'\) could not be loaded from this folder: Unknown split"):
        load_prompts(tmp_path / "files", split="dev")


def test_damaged_folders_cost_a_sentence(tmp_path: Path) -> None:
    PLAIN.save_to_disk(str(tmp_path / "one"))
    (tmp_path / "one" / "data-00000-of-00001.arrow").write_bytes(b"damaged")
    with pytest.raises(PromptError, match=r"the saved data set .*one could not be read: .*\. Save it again"):
        load_prompts(tmp_path / "one")
    (tmp_path / "files").mkdir()
    (tmp_path / "files" / "train.jsonl").write_text('{"prompt": "a"}\n{bad\n')
    with pytest.raises(PromptError, match=r"could not be loaded from this folder: .*Check its files"):
        load_prompts(tmp_path / "files")


# -- the split ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("texts", "size", "told"),
    [
        (["a", "b", "c", "d", "e", "f", "g", "h"], 2, "2 of 8 rows are held out to evaluate on; 6 are trained on"),
        (["a"] * 4 + ["b"] * 6, 1, None),
        (
            ["a", "b", "c", "d"],
            2,
            "2 of 4 rows are held out to evaluate on; 2 are trained on. That is half of",
        ),
    ],
)
def test_a_split_says_what_it_costs(texts: list[str], size: int, told: str | None, tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text("".join(f'{{"prompt": "{text}"}}\n' for text in texts))
    train, held_out = split_datasets(DataConfig(train=str(file), eval_size=size), 0, None, None)
    assert not isinstance(train, StreamedRows)
    assert held_out is not None
    said = str(held_out.cost)
    if told is not None:
        assert f"data.eval_size={size}: {told}" in said
    else:
        left = len(train.numbers)
        assert left == texts.count("b" if held_out.dataset["prompt"][0] == "a" else "a")
        assert (
            f"1 of 10 rows are held out to evaluate on, and {9 - left} more are left out since they begin like" in said
        )
        assert f"; {left} are trained on" in said


def test_rows_keep_their_number_in_the_source_through_a_split(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text("".join(f'{{"prompt": "p {number}"}}\n' for number in range(1, 9)))
    train, held_out = split_datasets(DataConfig(train=str(file), eval_size=3), 0, None, None)
    assert not isinstance(train, StreamedRows)
    assert held_out is not None
    for part in (train, held_out):
        assert part.dataset["prompt"][:] == [f"p {number}" for number in part.numbers]
        assert part.name == str(file)


def test_the_held_out_part_of_the_same_hub_set_has_its_config_and_revision(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[Any, ...]] = []

    def load_dataset(name: str, config: str | None, **named: Any) -> datasets.Dataset:
        asked.append((name, config, named["revision"], named["split"]))
        return PLAIN

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    data = {"train": "owner/name", "config_name": "main", "revision": "v2"}
    for held_out in ("owner/name", "owner/other"):
        split_datasets(DataConfig(**data, eval=held_out), 0, None, None)
    assert asked == [
        ("owner/name", "main", "v2", "train"),
        ("owner/name", "main", "v2", "test"),
        ("owner/name", "main", "v2", "train"),
        ("owner/other", None, None, "test"),
    ]
    for train in ("builtin", "a.jsonl", "<train_dataset>"):
        with pytest.raises(
            ConfigError, match=r"data\.config_name='main': has no effect unless data\.train is a hub name"
        ):
            DataConfig(train=train, config_name="main")


@pytest.mark.parametrize("streamed", [False, True])
def test_formatted_rows_are_plain_values(streamed: bool) -> None:
    rows = datasets.Dataset.from_dict({"prompt": ["a"], "n": [[1, 2]]})
    made = as_dataset((rows.to_iterable_dataset() if streamed else rows).with_format("numpy"), "train", "rows")
    (row,) = made
    assert (type(row["n"]), row) == (list, {"prompt": "a", "n": [1, 2]})
