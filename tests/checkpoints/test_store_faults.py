"""Checkpoints under fire, the short form: tests/faults/checkpoints.py has what is done, and counts how it ends."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from stable_rlhf import errors
from stable_rlhf.checkpoints import store
from stable_rlhf.errors import CheckpointError, SaveError
from tests.faults import checkpoints
from tests.faults.checkpoints import read, save
from tests.faults.counts import Counts

SEED = 4


@pytest.mark.parametrize(
    ("fault", "count"),
    [
        ("checkpoint bytes flipped", 200),
        ("checkpoint files cut or lengthened", 50),
        ("saves killed at random", 15),
        ("saves killed at each operation", 0),
        ("saves of files that may not be so long", 20),
        ("saves on a full disk", 20),
    ],
)
def test_nothing_is_lost(fault: str, count: int) -> None:
    try:
        counts = checkpoints.FAULTS[fault](count, SEED)
    except PermissionError as error:
        pytest.skip(str(error))
    assert counts.lost == ()
    assert counts.survived == counts.tried >= max(count, 15)


def test_counts_say_what_was_lost() -> None:
    assert str(Counts(3, 3)) == "3 tried, 3 survived, 0 lost"
    assert str(Counts(3, 2, ("byte 7 was 1: loaded",))) == "3 tried, 2 survived, 1 lost\n  byte 7 was 1: loaded"


def test_no_byte_of_the_manifest_can_change(tmp_path: Path) -> None:
    """Not even to another spelling of the same: of a letter, capital or small."""
    saved = save(tmp_path, 4)
    file = saved / "manifest.json"
    content = file.read_bytes()
    for place, byte in enumerate(content):
        flipped = byte ^ (0x20 if chr(byte).isalpha() else 0x01)
        file.write_bytes(content[:place] + bytes([flipped]) + content[place + 1 :])
        with pytest.raises(CheckpointError, match="step-000004 is not a whole checkpoint"):
            store.load(saved)
    for other in (content + b"\n", b" " + content, content.replace(b"\n", b"\r\n"), b"", b"\xef\xbb\xbf" + content):
        file.write_bytes(other)
        with pytest.raises(CheckpointError, match="step-000004 is not a whole checkpoint"):
            store.load(saved)
    file.write_bytes(content)
    assert read(saved) == (4, 0)


# -- the disk -------------------------------------------------------------------------------------------------------


def test_everything_is_flushed_before_it_gets_its_name_and_the_name_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []
    fsync, rename = os.fsync, Path.rename

    def flushed(opened: int) -> None:
        events.append(os.path.relpath(Path(f"/proc/self/fd/{opened}").readlink(), tmp_path))
        fsync(opened)

    def renamed(path: Path, target: Path) -> Path:
        events.append(f"{path.name} -> {target.name}")
        return rename(path, target)

    monkeypatch.setattr(os, "fsync", flushed)
    monkeypatch.setattr(Path, "rename", renamed)
    save(tmp_path / "run" / "checkpoints", 4)
    aside, folder = "run/checkpoints/.writing-step-000004", "run/checkpoints"
    names = ["manifest.json", "model.safetensors", "optimizer.safetensors", "random.safetensors", "state.json"]
    assert events[:3] == ["run", ".", ".."]  # new folders: their names are in those above
    assert sorted(events[3:8]) == [f"{aside}/{name}" for name in names]
    assert events[8:] == [aside, ".writing-step-000004 -> step-000004", folder]
    events.clear()
    save(tmp_path / "run" / "checkpoints", 4, attempt=1)
    assert events[6:] == [
        "step-000004 -> .replaced-step-000004",
        ".writing-step-000004 -> step-000004",
        folder,
        ".replaced-step-000004 -> .removed-step-000004",
    ]


def test_a_disk_that_keeps_other_bytes_than_it_was_given_is_noticed_before_the_rename(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path, 2)
    fsync = os.fsync

    def bad(opened: int) -> None:
        fsync(opened)
        path = Path(f"/proc/self/fd/{opened}").readlink()
        if path.name == "optimizer.safetensors":
            path.write_bytes(path.read_bytes()[:-1] + b"?")

    monkeypatch.setattr(os, "fsync", bad)
    sentence = r"read back, differs from what was written \(optimizer.safetensors has changed since it was saved\)"
    with pytest.raises(SaveError, match=sentence):
        save(tmp_path, 4)
    assert [path.name for path in tmp_path.iterdir()] == ["step-000002"]
    assert read(tmp_path / "step-000002") == (2, 0)


@pytest.mark.parametrize(
    ("number", "sentence"),
    [
        (
            errno.ENOSPC,
            r"No space left on device; it needs {need} bytes in {folder}, where [\d,]+ are free.*; make room",
        ),
        (errno.EDQUOT, r"Disk quota exceeded; it needs {need} bytes in .* free, so a quota.*; free some of your"),
        (errno.EFBIG, r"File too large; it needs {need} bytes in .*raise the limit on .* \(ulimit -f\)$"),
        (errno.EIO, r"Input/output error; earlier checkpoints are unchanged; correct that$"),
    ],
)
def test_an_error_of_the_disk_while_flushing_costs_a_sentence_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, sentence: str
) -> None:
    """Where a file system finds room only when it flushes, as some over a network do."""
    older = save(tmp_path, 2)
    fsync = os.fsync

    def full(opened: int) -> None:
        if Path(f"/proc/self/fd/{opened}").readlink().name == "state.json":
            raise OSError(number, os.strerror(number))
        fsync(opened)

    monkeypatch.setattr(os, "fsync", full)
    match = sentence.format(need="10,462", folder=tmp_path)  # 10,255 of the tensors, the rest of state.json
    with pytest.raises(SaveError, match=rf"{tmp_path / 'step-000004'} could not be written: {match}") as raised:
        save(tmp_path, 4)
    assert isinstance(raised.value, errors.NoRoomError) == (number != errno.EIO)
    assert [path.name for path in tmp_path.iterdir()] == ["step-000002"]
    assert read(older) == (2, 0)


def test_a_folder_that_cannot_be_made_costs_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(SaveError, match=r"step-000004 could not be written: Not a directory; correct that$"):
        save(tmp_path / "file" / "checkpoints", 4)


def test_an_interrupted_save_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(opened: int) -> None:
        raise KeyboardInterrupt

    save(tmp_path, 2)
    monkeypatch.setattr(os, "fsync", interrupted)
    with pytest.raises(KeyboardInterrupt):
        save(tmp_path, 4)
    assert [path.name for path in tmp_path.iterdir()] == ["step-000002"]
