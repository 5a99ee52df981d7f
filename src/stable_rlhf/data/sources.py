"""Loads prompts from files, the hub and the built-in set, and checks every one."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import IO, Any, cast

import datasets
import pyarrow
import pyarrow.csv
import pyarrow.parquet
from datasets.table import InMemoryTable

from stable_rlhf.data.chat import ROLES, Message, hh_prompt
from stable_rlhf.errors import PromptError
from stable_rlhf.files import ASSETS
from stable_rlhf.hub import hub_fault
from stable_rlhf.text import quoted

FORMATS = ("auto", "prompt", "hh")
_FILE_SUFFIXES = (".jsonl", ".jsonl.gz", ".json", ".csv", ".csv.gz", ".parquet")
_BUILTIN_PROMPTS = ASSETS / "prompts.json"
_BUILTIN_SPLITS = {"train": "train", "eval": "eval", "test": "eval"}


def load_prompts(
    source: str | Path,
    *,
    format: str = "auto",
    split: str = "train",
    limit: int | None = None,
    config_name: str | None = None,
    data_dir: str | None = None,
) -> datasets.Dataset:
    """Loads a data set with a validated `prompt` column. Other columns are kept for the reward functions.

    source: "builtin"; a local .jsonl, .json (an array of objects), .csv or .parquet file (.jsonl and .csv also as .gz);
        or the name of a data set on the Hugging Face hub. Remote code of a data set is never run.
    format: "prompt" takes the `prompt` column. "hh" takes the dialogues of HH-RLHF (Bai et al. 2022, arXiv 2204.05862)
        from `chosen`; the prompt is every turn before the last answer, as chat messages, and the only column kept.
        "auto" is "prompt" where that column exists, else "hh" where `chosen` and `rejected` do.
    split: of a hub or built-in set (built-in: "train", and "eval" alias "test"). A file is one split, taken whole.
    limit: at most this many rows, the first ones. Duplicate prompts stay: the caller weights its own data.
    config_name, data_dir: of a hub data set that has several parts.

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
    else:
        dataset = _hub(name, split=split, config_name=config_name, data_dir=data_dir)
    if len(dataset) == 0:
        raise PromptError(f"{name} has no rows. Give a data set with at least one prompt.")
    if limit is not None:
        dataset = dataset.select(range(min(limit, len(dataset))))
    return _with_prompts(dataset, resolve_format(dataset.column_names, format, name), name)


def _builtin(split: str) -> datasets.Dataset:
    if split not in _BUILTIN_SPLITS:
        raise PromptError(f"the built-in prompts have no split {split!r}; choose 'train' or 'eval'.")
    prompts = json.loads(_BUILTIN_PROMPTS.read_text(encoding="utf-8"))[_BUILTIN_SPLITS[split]]
    return datasets.Dataset.from_dict({"prompt": prompts})


def _hub(name: str, *, split: str, config_name: str | None, data_dir: str | None) -> datasets.Dataset:
    if Path(name).is_dir():
        raise PromptError(f"{name} is a folder. Give one file ({', '.join(_FILE_SUFFIXES)}) or a hub data set's name.")
    try:
        dataset = datasets.load_dataset(name, config_name, data_dir=data_dir, split=split)
    except (OSError, ValueError) as error:
        wanted = f"{name!r} (config {config_name!r}, split {split!r})"
        remedy = "No such file exists either. Check the name and the network."
        raise PromptError(
            f"data set {wanted} could not be loaded: {(hub_fault(error) or str(error)).rstrip('.')}. {remedy}"
        ) from error
    if not isinstance(dataset, datasets.Dataset):
        raise PromptError(f"data set {name!r}, split {split!r}, gave a {type(dataset).__name__}; name one plain split.")
    return dataset


def _local(path: Path) -> datasets.Dataset:
    if not path.is_file():
        raise PromptError(f"prompt file {path} does not exist. Check the path (relative paths start at {Path.cwd()}).")
    if not path.name.endswith(_FILE_SUFFIXES):
        raise PromptError(f"prompt file {path} has an unknown ending; it must be one of {', '.join(_FILE_SUFFIXES)}.")
    columns: dict[str, list[Any]] = {}
    try:
        if path.name.endswith(".parquet"):
            table = pyarrow.parquet.read_table(path)
            table.validate(full=True)  # texts are UTF-8
            return datasets.Dataset(InMemoryTable(table))
        if path.name.endswith((".csv", ".csv.gz")):
            return datasets.Dataset(InMemoryTable(_read_csv(path)))
        rows = list(_read_json(path))
        names = {key: None for row in rows for key in row}  # a dict keeps the order of first appearance
        columns = {key: [row.get(key) for row in rows] for key in names}
        return datasets.Dataset.from_dict(columns)
    except (pyarrow.ArrowException, EOFError, OSError) as error:  # BadGzipFile is an OSError
        check_prompts(columns.get("prompt", []), str(path))  # names the row, if a prompt is what is wrong
        raise PromptError(f"prompt file {path} could not be read: {str(error)!r}. Repair the file.") from error


def _open(path: Path) -> IO[bytes]:
    return cast(IO[bytes], gzip.open(path) if path.name.endswith(".gz") else path.open("rb"))


def _read_csv(path: Path) -> pyarrow.Table:
    # Without column_types a prompt "42" would be read as a number.
    convert = pyarrow.csv.ConvertOptions(column_types=dict.fromkeys(("prompt", "chosen"), pyarrow.string()))
    parse = pyarrow.csv.ParseOptions(newlines_in_values=True)
    with _open(path) as file:
        return pyarrow.csv.read_csv(file, parse_options=parse, convert_options=convert)


def _read_json(path: Path) -> Iterable[dict[str, Any]]:
    """Yield the objects of a .jsonl file (blank lines are skipped) or of the array in a .json file."""
    with _open(path) as file:
        if path.name.endswith(".json"):
            items = _json(file.read(), str(path))
            if not isinstance(items, list):
                raise PromptError(f"{path} holds a JSON {type(items).__name__}; it must be an array of objects.")
        else:
            items = [_json(line, f"{path}, row {n}") for n, line in enumerate(file, start=1) if line.strip()]
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


def resolve_format(columns: Sequence[str], format: str, name: str) -> str:
    if format == "auto":
        format = "hh" if "prompt" not in columns and {"chosen", "rejected"} <= set(columns) else "prompt"
    needed = "prompt" if format == "prompt" else "chosen"
    if needed not in columns:
        found = ", ".join(map(repr, columns)) or "none"
        remedy = "Rename the column that holds the prompts, or choose another data format."
        raise PromptError(f"{name} has the columns {found}; the format {format!r} needs {needed!r}. {remedy}")
    return format


def _with_prompts(dataset: datasets.Dataset, format: str, name: str) -> datasets.Dataset:
    """Check every prompt; for "hh" parse it out of the dialogue first."""
    if format == "hh":
        prompts = [_hh_row(text, f"{name}, row {row}") for row, text in enumerate(dataset["chosen"], start=1)]
        return datasets.Dataset.from_dict({"prompt": prompts})
    check_prompts(dataset["prompt"], name)
    return dataset


def check_prompts(prompts: Iterable[object], name: str) -> None:
    first: type | None = None
    for row, prompt in enumerate(prompts, start=1):
        problem = _problem(prompt)
        if problem is None and first not in (None, type(prompt)):
            problem = "is text where row 1 is messages, or the reverse"
        if problem is not None:
            valid = "a non-empty text, or a list of {'role', 'content'} messages that ends before the answer"
            raise PromptError(f"{name}, row {row}: the prompt {problem}. A prompt is {valid}.")
        first = first or type(prompt)


def _hh_row(dialogue: object, where: str) -> list[Message]:
    if not isinstance(dialogue, str):
        raise PromptError(f"{where}: 'chosen' is {quoted(dialogue)}, but the format 'hh' needs the dialogue as text.")
    try:
        return hh_prompt(dialogue)
    except ValueError as error:
        raise PromptError(f"{where}: the dialogue {quoted(dialogue)} {error}. Repair or remove the row.") from error


def _problem(prompt: object) -> str | None:
    """The fault of a prompt, as the end of a sentence "the prompt ...", or None."""
    if isinstance(prompt, str):
        return None if prompt.strip() else "is empty"
    if not isinstance(prompt, list) or not prompt:
        return f"is {quoted(prompt)}, not text or messages"
    for number, message in enumerate(prompt, start=1):
        if not isinstance(message, dict) or not {"role", "content"} <= set(message):
            return f"has a message {number} without 'role' and 'content': {quoted(message)}"
        role, content = message["role"], message["content"]
        if role not in ROLES:
            return f"has a message {number} with the role {quoted(role)}, not one of {', '.join(ROLES)}"
        if not isinstance(content, str) or not content.strip():
            return f"has a message {number} whose content is {quoted(content)}, not a non-empty text"
    if prompt[-1]["role"] == "assistant":
        return "ends with an assistant message, so the answer is already there"
    return None
