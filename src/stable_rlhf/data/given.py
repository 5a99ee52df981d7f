"""Takes data sets given as objects: data sets of every kind, splits, tables, lists, and streams."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import datasets
import pyarrow
from datasets.table import InMemoryTable

from stable_rlhf.data.sources import from_columns, said, split_of
from stable_rlhf.errors import PromptError
from stable_rlhf.text import kind_of, quoted

_KINDS = (
    "Give a datasets.Dataset, DatasetDict or IterableDataset, a pandas DataFrame, a dict of columns, or a list of "
    "texts, chats or rows"
)


def as_dataset(given: Any, split: str, name: str) -> datasets.Dataset | Iterable[Any]:
    """The rows given as an object: a Dataset in plain Python values, or a stream, which is not read yet.

    given: a Dataset with any format; a DatasetDict, or a dict of splits, of which ``split`` is taken (a single one
        whatever its name); a pandas or polars DataFrame or an Arrow table; a dict of columns; a list of texts, of chats
        or of rows; anything with ``__len__`` and ``__getitem__``. Everything else that can be iterated again and again
        is a stream, such as an IterableDataset.
    name: of the data set, for messages.

    Raises PromptError for anything else.
    """
    if isinstance(given, Mapping) and given and all(_is_set(value) for value in given.values()):
        given = split_of(given, split, name)
    if isinstance(given, datasets.Dataset):
        return _plain(given, name)
    if isinstance(given, Mapping):
        return from_columns({str(column): _listed(values, column, name) for column, values in given.items()}, name)
    if (table := _table(given, name)) is not None:
        return table
    has_rows = hasattr(given, "__len__") and hasattr(given, "__getitem__")
    if isinstance(given, str | bytes) or not (has_rows or isinstance(given, Iterable)):
        raise PromptError(f"{name} is {quoted(given)}. {_KINDS}; data.train names files and hub data sets.")
    if isinstance(given, datasets.IterableDataset):
        return given.with_format(None)
    if has_rows:
        return dataset_of(_items(given, name), name)
    if iter(given) is given:
        raise PromptError(
            f"{name} is {kind_of(given)}, which can be read only once, so no run on it could be resumed. "
            "Give a list, or IterableDataset.from_generator(function)."
        )
    return given


def row_of(item: Any, where: str) -> dict[str, Any]:
    """A row of a list or a stream: a row as it is, a text or a chat as the prompt. Raises PromptError."""
    if isinstance(item, Mapping):
        return dict(item)
    if isinstance(item, str | list):
        return {"prompt": item}
    raise PromptError(f"{where} is {quoted(item)}, not a row with a prompt, a text or a chat. {_KINDS}.")


def _is_set(value: Any) -> bool:
    """Whether a value of a dict is a data set of its own, rather than a column."""
    return isinstance(value, datasets.Dataset | datasets.IterableDataset) or _is_frame(value)


def _is_frame(value: Any) -> bool:
    return type(value).__name__ == "DataFrame" and type(value).__module__.split(".")[0] in ("pandas", "polars")


def _plain(dataset: datasets.Dataset, name: str) -> datasets.Dataset:
    """The data set with plain Python values; one with a transform of its own as what the transform gives."""
    if dataset.format["type"] != "custom":
        return dataset.with_format(None)
    try:
        rows = list(dataset)
    except Exception as error:
        raise PromptError(f"{name}: its own transform (set_transform) failed: {said(error)}.") from error
    return dataset_of(rows, name)


def _table(given: Any, name: str) -> datasets.Dataset | None:
    """A table of another library as a data set; None for anything else."""
    try:
        if isinstance(given, pyarrow.Table):
            return datasets.Dataset(InMemoryTable(given))
        if _is_frame(given) and type(given).__module__.startswith("pandas"):
            return datasets.Dataset.from_pandas(given, preserve_index=False)
        if _is_frame(given):
            return datasets.Dataset.from_polars(given)
    except Exception as error:  # Arrow's, for values of several types in a column
        raise PromptError(f"{name}: its {type(given).__name__} is not a data set: {said(error)}.") from error
    return None


def dataset_of(items: Sequence[Any], name: str) -> datasets.Dataset:
    """A list of rows, texts or chats as a data set with every column that any row has. Raises PromptError."""
    rows = [row_of(item, f"{name}, row {number}") for number, item in enumerate(items, start=1)]
    columns = {column: None for row in rows for column in row}  # a dict keeps the order of first appearance
    return from_columns({column: [row.get(column) for row in rows] for column in columns}, name)


def _items(given: Any, name: str) -> list[Any]:
    """The items of something with a length: a list, an array, a series, or a data set class of the caller's own."""
    if isinstance(given, list | tuple):
        return list(given)
    try:
        return given.tolist() if hasattr(given, "tolist") else [given[i] for i in range(len(given))]
    except Exception as error:  # of the caller's own class
        raise PromptError(f"{name}: its rows could not be read: {said(error)}.") from error


def _listed(values: Any, column: Any, name: str) -> list[Any]:
    if isinstance(values, str | bytes | Mapping) or not hasattr(values, "__len__"):
        raise PromptError(f"{name}: the column {column!r} is {quoted(values)}, not a list of values. {_KINDS}.")
    return _items(values, f"{name}: the column {column!r}")
