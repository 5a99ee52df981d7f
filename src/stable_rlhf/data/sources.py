"""Loads prompts by name: from files, folders, the hub and the built-in set."""

from __future__ import annotations

import bisect
import gzip
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any, cast

import datasets
import pyarrow
import pyarrow.csv
import pyarrow.parquet
from datasets.table import InMemoryTable

from stable_rlhf.data.rows import FORMATS, convention, prompts_in
from stable_rlhf.errors import PromptError
from stable_rlhf.files import ASSETS
from stable_rlhf.hub import hub_fault, looked_up
from stable_rlhf.text import ends, kind_of, quoted

_FILE_SUFFIXES = (".jsonl", ".jsonl.gz", ".json", ".csv", ".csv.gz", ".parquet")
_BUILTIN_PROMPTS = ASSETS / "prompts.json"
_NO_TABLE = (pyarrow.ArrowException, ArithmeticError, AttributeError, LookupError, TypeError, ValueError)
"""Errors of Arrow and Python for values that are not those of a table."""
SHOWN = 500
"""Most characters of each end of another library's message: a library may quote a whole file."""
READ_AT_ONCE = 1000
"""Rows of a Parquet file that are read at once: few enough for long texts, and many enough to be read fast."""
_CSV: Any = {
    "parse_options": pyarrow.csv.ParseOptions(newlines_in_values=True),
    # Without column_types a prompt "42" would be read as a number.
    "convert_options": pyarrow.csv.ConvertOptions(column_types=dict.fromkeys(("prompt", "chosen"), pyarrow.string())),
}
_BUILTIN_SPLITS = {"train": "train", "eval": "eval", "test": "eval"}


def load_prompts(
    source: str | Path,
    *,
    format: str = "auto",
    split: str = "train",
    limit: int | None = None,
    config_name: str | None = None,
    data_dir: str | None = None,
    revision: str | None = None,
    prompt_column: str | None = None,
) -> datasets.Dataset:
    """Loads a data set with a validated `prompt` column. Other columns are kept for the reward functions.

    source: "builtin"; a local .jsonl, .json (an array of objects), .csv or .parquet file (.jsonl and .csv also as .gz);
        a folder that `save_to_disk` wrote, or of such files; or the name of a data set on the Hugging Face hub. Remote
        code of a data set is never run.
    format: "prompt" takes the `prompt` column. "messages" takes the chat of `messages` (or `conversations`) without a
        last message of the assistant. "preference" takes the common beginning of `chosen` and `rejected`, texts or
        chats. "hh" takes the dialogues of HH-RLHF (Bai et al. 2022, arXiv 2204.05862) from `chosen`; the prompt is
        every turn before the last answer, as chat messages, and the only column kept. "auto" decides by the columns.
    split: of a hub, saved or built-in set (built-in: "train", and "eval" alias "test"). A file is one split, taken
        whole.
    limit: at most this many rows, the first ones. Duplicate prompts stay: the caller weights its own data.
    config_name, data_dir, revision: of a hub data set: one of its parts, a folder in it, a commit, tag or branch.
    prompt_column: the column that "prompt" or "messages" reads, if it has another name. It stays there too.

    Raises PromptError for a missing, broken or empty source, an absent column, and the first malformed prompt.
    """
    if format not in FORMATS:
        raise PromptError(f"data format {format!r} is not one of {', '.join(FORMATS)}.")
    if limit is not None and limit < 1:
        raise PromptError(f"the prompt limit is {limit}; it must be at least 1, or None for all rows.")
    name = str(source)
    if name == "builtin":
        dataset = _builtin(split)
    elif Path(name).is_file() or name.endswith(_FILE_SUFFIXES):
        dataset = _local(Path(name))
    elif (Path(name) / "state.json").is_file() or (Path(name) / "dataset_dict.json").is_file():
        dataset = _saved(name, split)
    else:
        dataset = _hub(name, split=split, config_name=config_name, data_dir=data_dir, revision=revision)
    return with_prompts(dataset, format=format, prompt_column=prompt_column, limit=limit, name=name)


def open_stream(source: str, *, split: str, config_name: str | None, revision: str | None) -> Iterable[Any]:
    """The rows of what ``load_prompts`` loads, except the built-in set: read each time that they are iterated over.

    Only what is read at once differs. Raises PromptError for a source that is not there, and at its row for one that is
    broken.
    """
    path = Path(source)
    if path.is_file() or source.endswith(_FILE_SUFFIXES):
        _check_file(path)
        return FileRows(path)
    if (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():
        return _saved(source, split).to_iterable_dataset()
    return _hub(source, split=split, config_name=config_name, data_dir=None, revision=revision, streaming=True)


class FileRows:
    """The rows of a file, read as they are needed each time that this is iterated over."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __iter__(self) -> Iterator[dict[str, Any]]:
        if self.path.name.endswith(".parquet"):
            with pyarrow.parquet.ParquetFile(self.path) as parquet:
                for batch in parquet.iter_batches(READ_AT_ONCE):
                    batch.validate(full=True)  # texts are UTF-8
                    yield from batch.to_pylist()
        elif self.path.name.endswith((".csv", ".csv.gz")):
            try:
                with _open(self.path) as file, pyarrow.csv.open_csv(file, **_CSV) as batches:
                    for batch in batches:
                        yield from batch.to_pylist()
            except pyarrow.ArrowInvalid as error:
                raise PromptError(
                    f"{self.path} could not be read: {said(error)}. The types of its columns are those of its first "
                    "megabyte: repair the row, or save the file as JSON lines, whose rows may differ."
                ) from error
        else:
            yield from _read_json(self.path)


def with_prompts(
    dataset: datasets.Dataset, *, format: str, prompt_column: str | None, limit: int | None, name: str
) -> datasets.Dataset:
    """The first ``limit`` rows with a checked `prompt` column, found as ``load_prompts`` says. Raises PromptError."""
    if len(dataset) == 0:
        raise PromptError(f"{name} has no rows. Give a data set with at least one prompt.")
    if limit is not None:
        dataset = dataset.select(range(min(limit, len(dataset))))
    columns = dataset.column_names
    how = convention(columns, dataset[0], format=format, prompt_column=prompt_column, name=name)
    read = zip(*(dataset[column][:] for column in how.columns), strict=True)
    prompts = list(prompts_in((dict(zip(how.columns, row, strict=True)) for row in read), how, name))
    if how.columns == ("prompt",) and prompts == dataset["prompt"][:]:
        return dataset
    # Json keeps each message's own keys; Arrow's structs would give it those of all others.
    chats = None if isinstance(prompts[0], str) else datasets.Features({"prompt": datasets.List(datasets.Json())})
    found = datasets.Dataset.from_dict({"prompt": prompts}, features=chats)
    others = [column for column in columns if column != "prompt"]
    if how.format == "hh" or not others:
        return found
    return datasets.concatenate_datasets([dataset.select_columns(others), found], axis=1)


def _builtin(split: str) -> datasets.Dataset:
    if split not in _BUILTIN_SPLITS:
        raise PromptError(f"the built-in prompts have no split {split!r}; choose 'train' or 'eval'.")
    prompts = json.loads(_BUILTIN_PROMPTS.read_text(encoding="utf-8"))[_BUILTIN_SPLITS[split]]
    return datasets.Dataset.from_dict({"prompt": prompts})


def _hub(
    name: str,
    *,
    split: str,
    config_name: str | None,
    data_dir: str | None,
    revision: str | None,
    streaming: bool = False,
) -> Any:
    part: dict[str, Any] = {"data_dir": data_dir, "revision": revision, "split": split}
    if streaming:
        part["streaming"] = True
    try:
        with looked_up(name):
            dataset = datasets.load_dataset(name, config_name, **part)
    except Exception as error:  # of datasets, Arrow, the hub's client and the network: each has errors of its own
        parts = {"config_name": config_name, "revision": revision, "split": split}
        wanted = f"{name!r} ({', '.join(f'{part} {value!r}' for part, value in parts.items() if value is not None)})"
        where = "from this folder" if Path(name).is_dir() else "from the hub"
        remedy = (
            "Check its files." if Path(name).is_dir() else "No such file exists either. Check the name and the network."
        )
        why = (hub_fault(error) or said(error)).rstrip(".")
        raise PromptError(f"data set {wanted} could not be loaded {where}: {why}. {remedy}") from error
    if not isinstance(dataset, datasets.IterableDataset if streaming else datasets.Dataset):
        raise PromptError(f"data set {name!r}, split {split!r}, gave {kind_of(dataset)}; name one plain split.")
    return dataset


def _saved(folder: str, split: str) -> datasets.Dataset:
    """A folder that `save_to_disk` wrote: one data set, or several by their split."""
    try:
        saved = datasets.load_from_disk(folder)
    except Exception as error:
        raise PromptError(f"the saved data set {folder} could not be read: {said(error)}. Save it again.") from error
    return saved if isinstance(saved, datasets.Dataset) else split_of(saved, split, folder)


def split_of(splits: Mapping[Any, Any], split: str, name: str) -> Any:
    """One data set of several. A single one is taken whatever its name. Raises PromptError."""
    if split not in splits and len(splits) != 1:
        there = ", ".join(map(repr, splits))
        remedy = "Choose one with data.split, or data.eval_split for held-out prompts."
        raise PromptError(f"{name} has the splits {there}, not {split!r}. {remedy}")
    return splits[split] if split in splits else next(iter(splits.values()))


def said(error: Exception) -> str:
    """The message of another library's error as one short line, with the error's own cause where it has one."""
    text = str(error) or type(error).__name__
    if error.__cause__ is not None and str(error.__cause__) not in text:
        text = f"{text}: {error.__cause__}"
    return ends(" ".join(text.split()).rstrip("."), SHOWN)


def _check_file(path: Path) -> None:
    if not path.is_file():
        raise PromptError(f"prompt file {path} does not exist. Check the path (relative paths start at {Path.cwd()}).")
    if not path.name.endswith(_FILE_SUFFIXES):
        raise PromptError(f"prompt file {path} has an unknown ending; it must be one of {', '.join(_FILE_SUFFIXES)}.")


def _local(path: Path) -> datasets.Dataset:
    _check_file(path)
    try:
        if path.name.endswith(".parquet"):
            table = pyarrow.parquet.read_table(path)
            table.validate(full=True)  # texts are UTF-8
            return datasets.Dataset(InMemoryTable(table))
        if path.name.endswith((".csv", ".csv.gz")):
            return datasets.Dataset(InMemoryTable(_read_csv(path)))
        rows = list(_read_json(path))
        names = {key: None for row in rows for key in row}  # a dict keeps the order of first appearance
        return from_columns({key: [row.get(key) for row in rows] for key in names}, f"prompt file {path}")
    except (pyarrow.ArrowException, EOFError, OSError) as error:  # BadGzipFile is an OSError
        raise PromptError(f"prompt file {path} could not be read: {str(error)!r}. Repair the file.") from error


def from_columns(columns: dict[str, list[Any]], name: str) -> datasets.Dataset:
    """A data set of columns. Values of several types in one column are kept as they are. Raises PromptError."""
    try:
        return datasets.Dataset.from_dict(columns, on_mixed_types="use_json")
    except _NO_TABLE as error:
        fault = said(error)
    for column, values in columns.items():

        def refused(rows: int, column: str = column, values: list[Any] = values) -> bool:
            try:
                datasets.Dataset.from_dict({column: values[:rows]}, on_mixed_types="use_json")
            except _NO_TABLE:
                return True
            return False

        row = 1 + bisect.bisect_left(range(1, len(values) + 1), True, key=refused)
        if row <= len(values):  # the first row that does not go with those above it
            value = quoted(values[row - 1])
            raise PromptError(f"{name}, row {row}: a data set cannot hold {column!r} = {value}: {fault}.")
    raise PromptError(f"{name} is not a table: {fault}. Give every column the same number of rows.")


def _open(path: Path) -> IO[bytes]:
    return cast(IO[bytes], gzip.open(path) if path.name.endswith(".gz") else path.open("rb"))


def _read_csv(path: Path) -> pyarrow.Table:
    with _open(path) as file:
        return pyarrow.csv.read_csv(file, **_CSV)


def _read_json(path: Path) -> Iterable[dict[str, Any]]:
    """Yield the objects of a .jsonl file (blank lines are skipped) or of the array in a .json file."""
    with _open(path) as file:
        if path.name.endswith(".json"):
            items = _json(file.read(), str(path))
            if not isinstance(items, list):
                raise PromptError(f"{path} holds a JSON {type(items).__name__}; it must be an array of objects.")
        else:
            items = (_json(line, f"{path}, row {n}") for n, line in enumerate(file, start=1) if line.strip())
        for row, item in enumerate(items, start=1):
            if not isinstance(item, dict):
                raise PromptError(f"{path}, row {row} is {quoted(item)}, not a JSON object. Give it a 'prompt' field.")
            yield item


def _json(text: bytes, where: str) -> Any:
    try:
        value = json.loads(text.decode())  # undecoded bytes would be tried as UTF-16 too
        json.dumps(value, ensure_ascii=False).encode()  # refuses half of a surrogate pair, which JSON can hold
        return value
    except (ValueError, RecursionError) as error:
        raise PromptError(f"{where} is not JSON: {error}. Repair or remove it.") from error
