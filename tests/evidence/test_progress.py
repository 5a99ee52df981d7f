"""What a sweep says of the end of a cell."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from stable_rlhf.evidence.progress import ended_line


@pytest.mark.parametrize(
    ("exit_code", "reason", "said"),
    [
        (0, None, "finished after 0:01:05"),
        (-9, "killed by SIGKILL", "stopped by signal 9; the same command resumes it"),
        (143, "stopped by SIGTERM", "stopped by signal 15; the same command resumes it"),
        (-11, "killed by SIGSEGV", "failed (-11): killed by SIGSEGV"),
        (4, "no such lexicon", "failed (4): no such lexicon"),
    ],
)
def test_a_cell_that_a_signal_stopped_is_not_called_failed(
    exit_code: int, reason: str | None, said: str, tmp_path: Path
) -> None:
    cell = cast(Any, SimpleNamespace(arm="preset=safe", seed=1))
    outcome = {"exit_code": exit_code, "reason": reason, "seconds": 65.0}
    line = ended_line(3, 8, cell, tmp_path, outcome, None)
    assert line == f"[3/8] preset=safe  seed 1  reward -  {said}"
