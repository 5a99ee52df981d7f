"""Free memory; the formula of what a run needs is held against literals and measurements in test_doctor.py."""

from __future__ import annotations

from pathlib import Path

import torch

from stable_rlhf import memory


def test_a_containers_files_that_can_be_dropped_are_free_memory(tmp_path: Path) -> None:
    for name, text in (("max", "9000\n"), ("current", "8000\n"), ("stat", "anon 2500\ninactive_file 5000\n")):
        (tmp_path / f"memory.{name}").write_text(text)
    assert memory.free(torch.device("cpu"), tmp_path) == 6000
    (tmp_path / "memory.stat").unlink()
    assert memory.free(torch.device("cpu"), tmp_path) == 1000
    (tmp_path / "memory.max").write_text("max\n")
    assert memory.free(torch.device("cpu"), tmp_path) > 6000
