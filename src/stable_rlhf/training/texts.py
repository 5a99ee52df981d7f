"""Texts of around the best of the reward, which are scored again where it falls."""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping
from typing import Any

from stable_rlhf.control import Rescored
from stable_rlhf.errors import RewardError
from stable_rlhf.records import Rollout
from stable_rlhf.rewards import Scorer
from stable_rlhf.user_code import RandomStream

MOST = 32
"""Texts that are kept: the error of the mean of 32 is a sixth of one score's spread, and they cost a reward model or a
server half of the smallest usual batch."""


class Texts:
    """The newest texts that were scored, and those that were the newest when the reward was at its best.

    Each is all that the rewards were given of it, with its score. As a part of a run they are in checkpoints and
    snapshots; so a row whose columns JSON cannot hold is not kept.
    """

    def __init__(self, scorer: Scorer, seed: int) -> None:
        self._scorer, self._seed = scorer, seed
        self._recent: list[dict[str, Any]] = []
        self._best: list[dict[str, Any]] = []

    def add(self, rollout: Rollout, step: int) -> None:
        """Keeps the first scored texts of a step, and earlier ones where these are fewer than MOST."""
        rows = [row for row, valid in enumerate(rollout.valid) if valid][:MOST]
        ids = rollout.tokens.response
        new = [
            {
                "step": step,
                "score": rollout.scores[row],
                "prompt": rollout.prompts[row],
                "completion": rollout.completions[row],
                "columns": {name: values[row] for name, values in rollout.columns.items()},
                "ended": rollout.ended[row],
                "ids": ids[row][rollout.tokens.mask[row]].tolist(),
                "whole": None if rollout.whole is None else rollout.whole[row],
            }
            for row in rows
        ]
        self._recent = [*filter(_fits_json, new), *self._recent][:MOST]

    def mark(self) -> None:
        """The reward is at its best: the newest texts are those to be scored again where it falls."""
        self._best = self._recent

    def again(self, step: int) -> Rescored | str:
        """The texts' scores now, or why there are none. ``step``: the one just done, which seeds random rewards.

        The run's own random numbers of rewards stay where they are.
        """
        texts = self._best
        if not texts:
            return "no earlier texts are kept that could be scored again"
        names = {name: None for text in texts for name in text["columns"]}  # of a stream, rows may lack some
        try:
            with self._scorer.drawing_from(RandomStream(self._seed, zlib.crc32(b"texts"), step)):
                scores = self._scorer.score(
                    [text["prompt"] for text in texts],
                    [text["completion"] for text in texts],
                    {name: [text["columns"].get(name) for text in texts] for name in names},
                    [text["ended"] for text in texts],
                    [text["ids"] for text in texts],
                    None if texts[0]["whole"] is None else [text["whole"] for text in texts],
                )
        except RewardError as error:
            return f"earlier texts could not be scored again ({str(error).rstrip('.')})"
        pairs = [
            (text["score"], score)
            for text, score, valid in zip(texts, scores.total, scores.valid, strict=True)
            if valid
        ]
        before, now = zip(*pairs, strict=True)
        return Rescored(step=texts[0]["step"], before=before, now=now)

    def state_dict(self) -> dict[str, Any]:
        return {"recent": self._recent, "best": self._best}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._recent, self._best = list(state["recent"]), list(state["best"])


def _fits_json(text: dict[str, Any]) -> bool:
    try:
        return json.loads(json.dumps(text, allow_nan=False)) == text
    except (TypeError, ValueError, RecursionError):  # of whatever class a data set's values are
        return False
