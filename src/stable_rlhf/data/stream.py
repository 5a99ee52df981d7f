"""The order in which prompts are trained on."""

from __future__ import annotations

from typing import Any

import torch

from stable_rlhf.errors import PromptError


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
        """Return the next `k` row indexes, continuing into the next epochs as needed; `k` must be >= 1."""
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

    @property
    def passes(self) -> float:
        """Passes over the rows so far, fractions included."""
        return (self._epoch * self._n_rows + self._position) / self._n_rows

    @property
    def is_between(self) -> bool:
        """Whether the next row is the first of a pass."""
        return self._position in (0, self._n_rows)

    def leave_pass(self) -> None:
        """Leaves the rest of the present pass: the next row is the first of the next one."""
        self._start_epoch(self._epoch + 1)
        self._position = 0

    def state_dict(self) -> dict[str, int]:
        order = {"version": self._VERSION, "n_rows": self._n_rows, "seed": self._seed}
        return order | {"epoch": self._epoch, "position": self._position}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues where `state` was saved. Raises PromptError if it belongs to another data set size or seed."""
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
