"""Prompts of a stream, such as a streaming data set: read as they are needed, in the order of arrival."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import datasets

from stable_rlhf.data.encoding import PromptEncoder
from stable_rlhf.data.given import dataset_of, row_of
from stable_rlhf.data.rows import Convention, convention, prompt_in, same_kind
from stable_rlhf.data.sources import said, with_prompts
from stable_rlhf.errors import PromptError


class StreamedRows:
    """The rows of something that can be iterated again and again, each with its checked `prompt`.

    ``format``, ``prompt_column`` and ``limit`` as in ``load_prompts``; ``name`` is for messages. A pass over the rows
    gives the same rows in the same order each time, or in an order that ``set_epoch`` determines.
    """

    def __init__(
        self, source: Iterable[Any], *, format: str, prompt_column: str | None, limit: int | None, name: str
    ) -> None:
        self.name = name
        self._source, self._format, self._prompt_column, self._limit = source, format, prompt_column, limit
        self._how: Convention | None = None
        self._kind: type | None = None

    def read(self, number: int) -> Iterator[dict[str, Any]]:
        """Yields the rows of a pass, counted from 0. Raises PromptError for a row that cannot be read or used."""
        source: Any = self._source
        if hasattr(source, "set_epoch"):
            source.set_epoch(number)
        for count, row in enumerate(itertools.islice(self._raw(), self._limit), start=1):
            where = f"{self.name}, row {count}"
            if self._how is None:
                self._how = convention(
                    list(row), row, format=self._format, prompt_column=self._prompt_column, name=self.name
                )
            prompt = prompt_in(row, self._how, where)
            self._kind = same_kind(prompt, self._kind, where)
            yield {**row, "prompt": prompt}

    def first(self, count: int) -> datasets.Dataset:
        """The first rows of the first pass as a data set with their checked `prompt`, at most ``count``."""
        rows = dataset_of(list(itertools.islice(self.read(0), count)), self.name)
        return with_prompts(rows, format="prompt", prompt_column=None, limit=None, name=self.name)

    def _raw(self) -> Iterator[dict[str, Any]]:
        count = 0
        try:
            for count, item in enumerate(self._source, start=1):
                yield row_of(item, f"{self.name}, row {count}")
        except PromptError:
            raise
        except Exception as error:  # of datasets, the network, or the code that makes the rows
            raise PromptError(f"{self.name}, row {count + 1} could not be read: {said(error)}.") from error


class StreamedPrompts:
    """Rows, token ids and order of a stream's prompts. Rows are numbered in the order of arrival, over all passes.

    At the end of the stream the next pass begins. One row is read ahead of each batch, which tells whether the batch
    was the last of its pass; what is wrong with that row is said when it is needed. Only the rows of the last batch,
    and those read ahead of it, are in memory. It stands where a data set, its ``EncodedPrompts`` and its
    ``PromptStream`` stand otherwise.

    ahead: rows that are read, checked and encoded at once, so that what is wrong with them is said before training.

    The state is a position in a pass and a digest of the prompts up to it. Resuming reads the rows before the position
    again, and refuses a stream that gives others.
    """

    _VERSION = 1

    def __init__(self, rows: StreamedRows, encoder: PromptEncoder, ahead: int) -> None:
        self._rows, self._encoder = rows, encoder
        self.input_ids: dict[int, list[int]] = {}
        self.truncated: dict[int, bool] = {}
        self._columns: dict[int, dict[str, Any]] = {}
        self._before: dict[int, dict[str, Any]] = {}  # the state before each row in memory
        self._broken = False  # reading the row after `_end` failed
        self._fault: PromptError | None = None  # of a row that was read ahead and is not needed yet
        self._state = self._start(0, 0)
        self._open(self._state)
        for _ in range(ahead):
            self._read()

    @property
    def passes(self) -> float:
        """Passes over the stream that are complete; how much there is of the present one nobody knows."""
        return float(self._state["epoch"])

    @property
    def is_between(self) -> bool:
        """Whether the next row is the first of a pass."""
        return self._state["position"] == 0

    def leave_pass(self) -> None:
        """Leaves the rest of the present pass: the next row is the first of the next one."""
        self._open(self._start(self._state["epoch"] + 1, self._state["taken"]))
        for number in [number for number in self._before if number >= self._end["taken"]]:
            self._forget(number)
        self._state, self._broken, self._fault = self._end, False, None

    def take(self, k: int) -> list[int]:
        """Return the numbers of the next `k` rows, continuing into the next passes as needed; `k` must be >= 1."""
        if k < 1:
            raise PromptError(f"a batch of {k} prompts was asked for; it must be at least 1.")
        first = self._state["taken"]
        while self._end["taken"] < first + k:
            self._read()
        if self._end["taken"] == first + k:
            self._look_ahead()
        self._state = self._before.get(first + k, self._end)
        for number in [number for number in self._before if number < first]:
            self._forget(number)
        return list(range(first, first + k))

    def __getitem__(self, numbers: Sequence[int]) -> dict[str, list[Any]]:
        """The columns of rows that were taken last, as a data set gives them; None where a row has no such column."""
        rows = [self._columns[number] for number in numbers]
        names = {name: None for row in rows for name in row}  # a dict keeps the order of first appearance
        return {name: [row.get(name) for row in rows] for name in names}

    def state_dict(self) -> dict[str, Any]:
        return dict(self._state)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues where `state` was saved. Raises PromptError if the stream has other prompts up to there."""
        kinds = {name: type(value) for name, value in state.items()}
        if kinds != {name: type(value) for name, value in self._state.items()} or state["version"] != self._VERSION:
            remedy = "Resume with the same prompts and release, or start a new run."
            raise PromptError(f"prompt stream state {state!r} is not one of a stream. {remedy}")
        if state == self._before.get(state["taken"], self._end):  # its rows are in memory, or it is where reading is
            self._state = dict(state)
            return
        self._read_up_to(state)
        for known in (self._before, self._columns, self.input_ids, self.truncated):
            known.clear()
        self._state = dict(state)

    def _read_up_to(self, state: dict[str, Any]) -> None:
        """Reads the pass again up to a state. Raises PromptError, and changes nothing, where it has other prompts."""
        rows, end = self._rows.read(state["epoch"]), self._start(state["epoch"], state["taken"] - state["position"])
        for row in itertools.islice(rows, state["position"]):
            end = self._after(end, row)
        if end != state:
            raise PromptError(
                f"{self._rows.name}: its first {state['position']} rows are not those of the saved run. Resume with "
                "the same stream (shuffled, if at all, with the same seed), or start a new run."
            )
        self._pass, self._end, self._broken, self._fault = rows, end, False, None

    def _start(self, epoch: int, taken: int) -> dict[str, Any]:
        return {"version": self._VERSION, "epoch": epoch, "position": 0, "taken": taken, "digest": ""}

    def _open(self, start: dict[str, Any]) -> None:
        self._end = start  # the state after the last row that was read
        self._pass = self._rows.read(start["epoch"])

    def _after(self, before: dict[str, Any], row: dict[str, Any]) -> dict[str, Any]:
        """The state after a row that follows a state."""
        text = before["digest"] + json.dumps(row["prompt"], sort_keys=True, default=repr)
        moved = {"position": before["position"] + 1, "taken": before["taken"] + 1}
        return {**before, **moved, "digest": hashlib.sha256(text.encode()).hexdigest()}

    def _forget(self, number: int) -> None:
        for known in (self._before, self._columns, self.input_ids, self.truncated):
            del known[number]

    def _look_ahead(self) -> None:
        """Reads one row more, or finds that the pass is over. An error is kept until the row is needed."""
        self._broken = True
        try:
            self._read_row()
        except PromptError as error:
            self._fault = error
        else:
            self._broken = False

    def _read(self) -> None:
        """Reads the next row that is needed, of the next pass where this one is over."""
        if self._fault is not None:
            fault, self._fault = self._fault, None
            raise fault
        if self._broken:  # a generator that raised is at its end: the rows that it did not give would be left out
            self._read_up_to(self._end)
        self._broken = True
        if not self._read_row() and not self._read_row():
            again = f" in pass {self._end['epoch'] + 1}: it can be read only once" if self._end["epoch"] else ""
            raise PromptError(f"{self._rows.name} has no rows{again}. Give a stream with at least one prompt.")
        self._broken = False

    def _read_row(self) -> bool:
        """Reads a row; False at the end of a pass, where it opens the next one."""
        if (row := next(self._pass, None)) is None:
            if self._end["position"] > 0:
                self._open(self._start(self._end["epoch"] + 1, self._end["taken"]))
            return False
        number, where = self._end["taken"], f"{self._rows.name}, row {self._end['position'] + 1}"
        self.input_ids[number], self.truncated[number] = self._encoder.encode(row, where)
        self._columns[number], self._before[number] = row, self._end
        self._end = self._after(self._end, row)
        return True
