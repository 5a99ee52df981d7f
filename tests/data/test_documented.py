"""Every row of the tables of docs/data.md is tried."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args, get_type_hints

import datasets
import pandas
import pyarrow
import pytest
import torch

from stable_rlhf.config import DataConfig
from stable_rlhf.data.rows import FORMATS
from stable_rlhf.data.sources import _FILE_SUFFIXES
from stable_rlhf.data.split import split_datasets
from stable_rlhf.data.streamed import StreamedRows
from stable_rlhf.errors import PromptError

PAGE = (Path(__file__).parents[2] / "docs" / "data.md").read_text(encoding="utf-8")


def table(heading: str) -> list[list[str]]:
    """The cells of the rows below the table's heading, which begins with ``heading``."""
    lines = PAGE[PAGE.index(f"\n| {heading}") + 1 :].split("\n\n")[0].splitlines()
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines[2:]]


def prompts(given: Any) -> list[Any]:
    train, _ = split_datasets(DataConfig(train="<train_dataset>"), 0, given, None)
    if isinstance(train, StreamedRows):
        return [row["prompt"] for row in train.read(0)]
    return train.dataset["prompt"][:]


@pytest.mark.parametrize("cells", table("type and format"), ids=lambda cells: cells[0])
def test_a_type_of_trl_gives_the_prompt_or_the_sentence_of_the_table(cells: list[str]) -> None:
    _, example, _, here = cells
    if example == "`{}`":
        assert here.startswith("no")
        return
    row = json.loads(example.strip("`"))
    if here.startswith("refused: "):
        with pytest.raises(PromptError, match=f"(?i){here.removeprefix('refused: ')}"):
            prompts([row])
    else:
        assert prompts([row]) == [json.loads(here.strip("`"))]


TEXTS = ["one", "two"]
ROWS = [{"prompt": text} for text in TEXTS]
PLAIN = datasets.Dataset.from_list(ROWS)


class MapStyle(torch.utils.data.Dataset[dict[str, str]]):
    def __len__(self) -> int:
        return len(ROWS)

    def __getitem__(self, index: int) -> dict[str, str]:
        return ROWS[index]


class Iterable(torch.utils.data.IterableDataset[dict[str, str]]):
    def __iter__(self) -> Iterator[dict[str, str]]:
        return iter(ROWS)


OBJECTS: dict[str, Any] = {
    "`Dataset`": PLAIN,
    '`Dataset` with a format (`with_format("numpy")`)': PLAIN.with_format("numpy"),
    "`Dataset` with a transform (`set_transform`)": PLAIN.with_transform(lambda batch: batch),
    "`DatasetDict`, or a dict of data sets": datasets.DatasetDict({"train": PLAIN, "test": PLAIN.select([0])}),
    "`IterableDataset`": PLAIN.to_iterable_dataset(),
    "`IterableDatasetDict`": datasets.IterableDatasetDict({"train": PLAIN.to_iterable_dataset()}),
    "pandas `DataFrame`": pandas.DataFrame(ROWS),
    "Arrow table": pyarrow.Table.from_pylist(ROWS),
    "dict of columns": {"prompt": TEXTS},
    "list of rows": ROWS,
    "list of texts": TEXTS,
    "list of chats": [[{"role": "user", "content": text}] for text in TEXTS],
    "map-style data set of torch": MapStyle(),
    "iterable data set of torch": Iterable(),
    "iterator or generator": iter(ROWS),
}


@pytest.mark.parametrize("cells", table("`train_dataset`"), ids=lambda cells: cells[0])
def test_an_object_is_taken_or_refused_as_the_table_says(cells: list[str]) -> None:
    kind, _, here = cells
    if here.startswith("no"):
        with pytest.raises(PromptError, match=here.removeprefix("no: it ").split(",")[0]):
            prompts(OBJECTS[kind])
        return
    found = prompts(OBJECTS[kind])
    assert [text if isinstance(text, str) else text[0]["content"] for text in found] == TEXTS
    train, _ = split_datasets(DataConfig(train="<train_dataset>"), 0, OBJECTS[kind], None)
    assert isinstance(train, StreamedRows) == ("stream" in here)


def test_the_formats_and_endings_of_files_are_those_of_the_code() -> None:
    assert {cells[1].strip("`") for cells in table("columns")} == set(FORMATS) - {"auto"}
    assert get_args(get_type_hints(DataConfig)["format"]) == FORMATS
    endings = {part.strip("`") for cells in table("`data.train`") for part in cells[0].split(", ")}
    assert {ending for ending in endings if ending.startswith(".")} == set(_FILE_SUFFIXES)
    assert f"`data.eval_size` prompts ({DataConfig().eval_size})" in PAGE
