"""Random numbers of user code, apart from the run's."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch

from stable_rlhf.checkpoints import RandomState


class RandomStream:
    """States of Python's, NumPy's and torch's generators that user code draws from; they go on from call to call.

    As a part of the run, a resumed run continues them. seed: one or more integers of 0 or more; streams of different
    seeds are independent.
    """

    def __init__(self, *seed: int) -> None:
        self.seed(*seed)

    def seed(self, *seed: int) -> None:
        """Begins the stream again."""
        self._seed, self._state = seed, None

    @contextlib.contextmanager
    def drawn(self) -> Iterator[dict[str, Any]]:
        """Makes the process's generators this stream, inside the context; gives their state before, which is put back
        afterwards."""
        generators = RandomState()
        before = generators.state_dict()
        if self._state is None:
            # Not the seed itself: torch would then give user code the numbers that the run samples with.
            (number,) = np.random.SeedSequence((len(self._seed), *self._seed)).generate_state(1).tolist()
            random.seed(number)
            np.random.seed(number)
            torch.manual_seed(number)
        else:
            generators.load_state_dict(self._state)
        try:
            yield before
        finally:
            self._state = generators.state_dict()
            generators.load_state_dict(before)

    def state_dict(self) -> dict[str, Any]:
        if self._state is None:
            with self.drawn():
                pass
        assert self._state is not None
        return self._state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._state = dict(state)
