"""Names of reward functions that are almost right."""

from __future__ import annotations

from pathlib import Path

import pytest

from stable_rlhf.errors import RewardInputError
from stable_rlhf.rewards.functions import resolve_reward


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("my_rewards.on_topic", "my_rewards:on_topic"),
        ("my_rewards", "my_rewards:FUNCTION"),
        ("my_rewards.py:on_topic", "my_rewards:on_topic"),
        ("./my_rewards.py:on_topic", "my_rewards:on_topic"),
        ("my_rewards.py", "my_rewards:FUNCTION"),
        ("own/more.py:f", "own.more:f"),
        ("own.more.f", "own.more:f"),
    ],
)
def test_a_function_of_a_file_that_is_there_is_named_as_it_should_be_written(
    written: str, meant: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "own").mkdir()
    for file in ("my_rewards.py", "own/more.py"):
        (tmp_path / file).write_text("def on_topic(prompts, completions): return [0.0] * len(prompts)\nf = on_topic\n")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RewardInputError, match=rf"named MODULE:FUNCTION\. Did you mean {meant}\?$"):
        resolve_reward(written)
