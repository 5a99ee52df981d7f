"""Prompts: from a data set to token ids, and the order in which they are drawn.

A prompt is a text, or a list of chat messages ``{"role": ..., "content": ...}``. The way through this module:

    load_prompts -> Dataset with a `prompt` column -> encode_prompts -> EncodedPrompts
    PromptStream.take(k) -> k row indexes into both

Rows are counted from 1 in messages to people, as editors count them, and from 0 in code.
"""

from __future__ import annotations

import gzip
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, TypeAlias, cast

import datasets
import pyarrow
import pyarrow.csv
import pyarrow.parquet
import torch
from datasets.table import InMemoryTable
from transformers import PreTrainedTokenizerBase

from stable_rlhf.display import quoted

Message: TypeAlias = dict[str, str]
Prompt: TypeAlias = str | list[Message]
FORMATS = ("auto", "prompt", "hh")
ROLES = ("system", "user", "assistant", "tool")
_FILE_SUFFIXES = (".jsonl", ".jsonl.gz", ".json", ".csv", ".csv.gz", ".parquet")
_HH_TURN = re.compile(r"\n\n(Human|Assistant):")
_HH_ROLES = {"Human": "user", "Assistant": "assistant"}
_BUILTIN_PROMPTS = Path(__file__).parent / "assets" / "prompts.json"
_BUILTIN_SPLITS = {"train": "train", "eval": "eval", "test": "eval"}


class PromptError(ValueError):
    """Prompts that cannot be used. The message names the source, the row, the value and the remedy."""


@dataclass(frozen=True, kw_only=True)
class EncodedPrompts:
    """Token ids of prompts, unpadded, in the order of the data set.

    input_ids: one list of token ids a prompt, 1 to `max_prompt_length` long.
    truncated: True where tokens were cut off the left end of that prompt.
    """

    input_ids: list[list[int]]
    truncated: list[bool]

    def __len__(self) -> int:
        return len(self.input_ids)


def load_prompts(
    source: str | Path,
    *,
    format: str = "auto",
    split: str = "train",
    limit: int | None = None,
    config_name: str | None = None,
    data_dir: str | None = None,
) -> datasets.Dataset:
    """Load a data set with a validated `prompt` column; its other columns are kept, they reach the reward functions.

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
    return _with_prompts(dataset, _resolve_format(dataset.column_names, format, name), name)


def encode_prompts(
    dataset: datasets.Dataset,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_prompt_length: int,
    context_length: int | None,
    max_completion_length: int,
) -> EncodedPrompts:
    """Turn the `prompt` column into token ids, each at most `max_prompt_length` long (all lengths in tokens).

    A text is tokenised with the special tokens that the tokenizer itself adds; a chat goes through its chat template
    with the generation prompt, after which no special token is added a second time. A longer prompt is cut on the left,
    so that the end, next to the response, stays; a leading BOS token is kept, because models that were trained with one
    degrade without it.

    context_length: positions that the model has for prompt and completion together; None is no bound.

    Raises PromptError for the first row that does not fit the context with its completion, a malformed prompt, chats
    without a chat template, and a prompt of no tokens.
    """
    if min(max_prompt_length, max_completion_length) < 1:
        raise PromptError(
            f"data.max_prompt_length ({max_prompt_length}) and rollout.max_completion_length ({max_completion_length}) "
            "must each be at least 1."
        )
    _resolve_format(dataset.column_names, "prompt", "the data set")  # it need not come from load_prompts
    _check_prompts(dataset["prompt"], "the data set")
    input_ids: list[list[int]] = []
    truncated: list[bool] = []
    bos = cast(int | None, tokenizer.bos_token_id)
    for row, ids in enumerate(_token_ids(dataset["prompt"], tokenizer), start=1):
        if not ids:
            raise PromptError(f"prompt in row {row} has no tokens under this tokenizer. Remove the row.")
        is_long = len(ids) > max_prompt_length
        kept = _cut_left(ids, max_prompt_length, bos) if is_long else ids
        if context_length is not None and len(kept) + max_completion_length > context_length:
            raise PromptError(
                f"prompt in row {row} has {len(kept)} tokens, which with rollout.max_completion_length "
                f"({max_completion_length}) do not fit the model's context of {context_length}. Set "
                f"data.max_prompt_length to {max(1, context_length - max_completion_length)} to cut it."
            )
        input_ids.append(kept)
        truncated.append(is_long)
    return EncodedPrompts(input_ids=input_ids, truncated=truncated)


def prompt_text(prompt: Prompt) -> str:
    """Show a prompt to a person: a text as it is, a chat as "role: content" paragraphs. Not escaped for HTML."""
    return (
        prompt
        if isinstance(prompt, str)
        else "\n\n".join(f"{message['role']}: {message['content']}" for message in prompt)
    )


def parse_hh(dialogue: str) -> list[Message]:
    """Parse "\\n\\nHuman: ...\\n\\nAssistant: ..." into chat messages with the roles user and assistant.

    The format has no escapes, so white space around a turn belongs to the markers and is stripped. About one dialogue
    in 350 of HH-RLHF repeats a marker: turns of one speaker in a row become one message, joined by a blank line, since
    chat templates want alternating roles. Empty turns are dropped, but an empty last answer stays an empty message.

    Raises ValueError for text before the first marker, or without a marker.
    """
    before, *parts = _HH_TURN.split(dialogue)
    if before.strip() or not parts:
        raise ValueError(r'is not a dialogue of "\n\nHuman: ..." and "\n\nAssistant: ..." turns')
    turns = [(_HH_ROLES[speaker], text.strip()) for speaker, text in zip(parts[::2], parts[1::2], strict=True)]
    messages: list[Message] = []
    for position, (role, content) in enumerate(turns, start=1):
        is_last = position == len(turns)
        if messages and messages[-1]["role"] == role:
            messages[-1]["content"] = "\n\n".join(filter(None, (messages[-1]["content"], content)))
        elif content or is_last:
            messages.append({"role": role, "content": content})
    return messages


def hh_prompt(dialogue: str) -> list[Message]:
    """The turns of an HH dialogue before its last answer: what a policy is asked to answer.

    Raises ValueError if there is no answer, or nothing before it.
    """
    messages = parse_hh(dialogue)
    answers = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
    if not answers or answers[-1] == 0:
        raise ValueError("has no Assistant turn after a Human turn, so there is nothing to answer")
    return messages[: answers[-1]]


class PromptStream:
    """An endless stream of row indexes 0..n_rows-1: every epoch is a fresh permutation given by (seed, epoch).

    The order is a function of (n_rows, seed, epoch), so a position in it is all there is to save and to resume.
    """

    _VERSION = 1

    def __init__(self, n_rows: int, seed: int) -> None:
        if n_rows < 1:
            raise PromptError(f"a prompt stream needs at least 1 row, got {n_rows}.")
        self._n_rows = n_rows
        self._seed = seed
        self._position = 0
        self._start_epoch(0)

    def take(self, k: int) -> list[int]:
        """Return the next `k` row indexes, going on into the next epochs as often as needed; `k` must be >= 1."""
        if k < 1:
            raise PromptError(f"a batch of {k} prompts was asked for; it must be at least 1.")
        taken: list[int] = []
        while len(taken) < k:
            if self._position == self._n_rows:
                self._start_epoch(self._epoch + 1)
                self._position = 0
            rows = self._order[self._position : self._position + k - len(taken)]
            taken += rows
            self._position += len(rows)
        return taken

    def state_dict(self) -> dict[str, int]:
        order = {"version": self._VERSION, "n_rows": self._n_rows, "seed": self._seed}
        return order | {"epoch": self._epoch, "position": self._position}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state` was taken. Raises PromptError if it belongs to another data set size or seed."""
        if set(state) != set(self.state_dict()) or not all(type(value) is int for value in state.values()):
            raise PromptError(f"prompt stream state {state!r} is not {sorted(self.state_dict())} of integers.")
        for key, own in self.state_dict().items():
            if key in ("version", "n_rows", "seed") and state[key] != own:
                remedy = "Resume with the same prompts, seed and release, or start a new run."
                raise PromptError(f"prompt stream state was saved with {key} {state[key]}, here it is {own}. {remedy}")
        if state["epoch"] < 0 or not 0 <= state["position"] <= self._n_rows:
            raise PromptError(f"prompt stream state is out of range: {state!r}.")
        self._position = state["position"]
        self._start_epoch(state["epoch"])

    def _start_epoch(self, epoch: int) -> None:
        # 1,000,003 is prime: seeds that people choose (0, 1, 2, 42) share no epoch order before a million epochs.
        generator = torch.Generator().manual_seed((self._seed * 1_000_003 + epoch) % 2**63)
        self._epoch = epoch
        self._order: list[int] = torch.randperm(self._n_rows, generator=generator).tolist()


def _cut_left(ids: list[int], length: int, bos: int | None) -> list[int]:
    if bos is not None and ids[0] == bos and length > 1:
        return [bos, *ids[len(ids) - length + 1 :]]
    return ids[len(ids) - length :]


def _token_ids(prompts: Iterable[Prompt], tokenizer: PreTrainedTokenizerBase) -> Iterable[list[int]]:
    for row, prompt in enumerate(prompts, start=1):
        is_text = isinstance(prompt, str)
        if not is_text and tokenizer.chat_template is None:
            remedy = "Set tokenizer.chat_template, use an instruction-tuned model, or give prompts as text."
            raise PromptError(f"prompt in row {row} is a chat, but the tokenizer has no chat template. {remedy}")
        text = prompt if is_text else tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
        # verbose=False: "longer than the maximum length" is handled here, by cutting or refusing.
        yield list(tokenizer(text, add_special_tokens=is_text, verbose=False)["input_ids"])  # type: ignore[arg-type]


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
        raise PromptError(f"data set {wanted} could not be loaded from the hub: {error} {remedy}") from error
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
    except (pyarrow.ArrowException, EOFError, gzip.BadGzipFile) as error:
        _check_prompts(columns.get("prompt", []), str(path))  # names the row, if a prompt is what is wrong
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
        value = json.loads(text.decode())  # bytes alone would be tried as UTF-16 as well
        json.dumps(value, ensure_ascii=False).encode()  # half of a surrogate pair can be written so, and is no text
        return value
    except (ValueError, RecursionError) as error:
        raise PromptError(f"{where} is not JSON: {error}. Repair or remove it.") from error


def _resolve_format(columns: Sequence[str], format: str, name: str) -> str:
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
    _check_prompts(dataset["prompt"], name)
    return dataset


def _check_prompts(prompts: Iterable[object], name: str) -> None:
    first: type | None = None
    for row, prompt in enumerate(prompts, start=1):
        problem = _problem(prompt)
        if problem is None and first not in (None, type(prompt)):
            problem = "is text where row 1 is messages, or the other way round"
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
    """What is wrong with a prompt, as the end of a sentence "the prompt ...", or None."""
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
