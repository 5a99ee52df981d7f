"""checkpoint.py: what is dropped from memory before it is read back, what an error says, and which ones are kept."""

from __future__ import annotations

import errno
import os
import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from stable_rlhf.checkpoints import state, store
from stable_rlhf.errors import CheckpointError, NoRoomError
from tests.checkpoints.test_store_newest import flip, names
from tests.faults.checkpoints import read, save


@pytest.mark.skipif(not hasattr(os, "posix_fadvise"), reason="a system that cannot be told to forget a file")
def test_every_file_is_forgotten_after_its_flush_so_that_it_is_read_back_from_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[tuple[str, str]] = []
    fsync, forget = os.fsync, os.posix_fadvise

    def name(opened: int) -> str:
        return Path(f"/proc/self/fd/{opened}").readlink().name

    def flushed(opened: int) -> None:
        events.append(("flushed", name(opened)))
        fsync(opened)

    def forgotten(opened: int, start: int, length: int, advice: int) -> None:
        assert (start, length, advice) == (0, 0, os.POSIX_FADV_DONTNEED)  # all of it
        events.append(("forgotten", name(opened)))
        forget(opened, start, length, advice)

    monkeypatch.setattr(os, "fsync", flushed)
    monkeypatch.setattr(os, "posix_fadvise", forgotten)
    saved = save(tmp_path, 4)
    for file in saved.iterdir():
        own = [what for what, whose in events if whose == file.name]
        assert own == ["flushed", "forgotten"], file.name
    assert sum(what == "forgotten" for what, _ in events) == 5


@pytest.mark.parametrize(("free", "quota"), [(10_461, False), (10_462, False), (10_463, True)])
def test_it_may_be_a_quota_only_where_more_is_free_than_is_needed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, free: int, quota: bool
) -> None:
    """10,462 bytes are needed, the state's included: see test_checkpoint_faults.py."""

    def full(opened: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    (tmp_path / "checkpoints").mkdir()
    monkeypatch.setattr(os, "fsync", full)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(2 * free, free, free))
    with pytest.raises(NoRoomError) as raised:
        save(tmp_path / "checkpoints", 4)
    odd = ", so a quota, the number of files or the length of a file is at its limit" if quota else ""
    assert str(raised.value) == (
        f"{tmp_path}/checkpoints/step-000004 could not be written: No space left on device; it needs 10,462 bytes in "
        f"{tmp_path}/checkpoints, where {free:,} are free{odd}; make room there"
    )


@pytest.mark.parametrize(("spare", "hashed"), [(0, True), (-1, False)])
def test_an_older_one_is_hashed_up_to_the_length_and_no_longer_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spare: int, hashed: bool
) -> None:
    """All of them have the same length; the middle one is damaged and counts as kept only where it is not hashed."""
    save(tmp_path, 2)
    middle = save(tmp_path, 4)
    length = sum(file.stat().st_size for file in middle.iterdir() if file.name != "manifest.json")
    monkeypatch.setattr(store, "HASHED_BY_ROTATION", length + spare)
    flip(middle)
    save(tmp_path, 6)
    assert names(tmp_path) == (["step-000002"] if hashed else []) + ["step-000004", "step-000006"]


@pytest.mark.parametrize("keep", [1, 2, 3])
def test_as_many_whole_ones_are_kept_as_were_asked_for(tmp_path: Path, keep: int) -> None:
    for step in range(1, 6):
        save(tmp_path, step, keep=keep)
        kept = range(max(1, step + 1 - keep), step + 1)
        assert names(tmp_path) == [f"step-{number:06d}" for number in kept]


def test_the_checkpoint_of_the_step_itself_is_not_forgotten(tmp_path: Path) -> None:
    for step in (4, 5):
        save(tmp_path, step)
    assert store.forget_after(tmp_path, 5) == []
    assert names(tmp_path) == ["step-000004", "step-000005"]
    assert store.forget_after(tmp_path, 4) == []
    assert names(tmp_path) == ["step-000004"]


def test_numbers_of_more_digits_come_after_those_of_fewer(tmp_path: Path) -> None:
    for step in (999_999, 1_000_000):
        save(tmp_path, step)
    assert [store.steps_of(path) for path in store.found(tmp_path)] == [999_999, 1_000_000]
    assert store.newest(tmp_path)[0].name == "step-1000000"
    assert read(tmp_path / "step-1000000") == (1_000_000, 0)


@pytest.mark.parametrize(("setting", "saved"), [("initial_lr", 0.2), ("weight_decay", 0.5)])
def test_an_optimiser_of_other_settings_is_refused_in_any_group(setting: str, saved: float) -> None:
    parameters = [torch.nn.Parameter(torch.ones(2)), torch.nn.Parameter(torch.ones(3))]
    optimizer = torch.optim.AdamW([{"params": [each], "initial_lr": 0.1, "weight_decay": 0.0} for each in parameters])
    part = state.OptimizerState(optimizer)
    kept = part.state_dict()
    part.load_state_dict(kept)
    kept["groups"][1][setting] = saved
    name = "learning_rate" if setting == "initial_lr" else setting
    here = 0.1 if setting == "initial_lr" else 0.0
    with pytest.raises(CheckpointError, match=rf"^{name} is {here} here and {saved} in the checkpoint: resume with"):
        part.load_state_dict(kept)


def test_the_second_of_a_pair_of_normal_deviates_comes_back() -> None:
    """Python's and NumPy's generators each keep one for the next call."""
    random.gauss(0, 1), np.random.normal()
    saved = state.RandomState().state_dict()
    first: list[Any] = [random.gauss(0, 1), float(np.random.normal())]
    random.gauss(0, 1), np.random.rand(3)
    state.RandomState().load_state_dict(saved)
    assert [random.gauss(0, 1), float(np.random.normal())] == first
