"""Which checkpoint a run goes on from, what is kept, and what is never loaded."""

from __future__ import annotations

import json
import resource
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from stable_rlhf.checkpoints import manifest, store
from stable_rlhf.cli.main import main
from stable_rlhf.errors import CheckpointError
from tests.faults.checkpoints import read, save
from tests.tiny_runs import letters, rows, settings, trainer


def flip(path: Path, name: str = "model.safetensors") -> None:
    content = bytearray((path / name).read_bytes())
    content[-1] ^= 1
    (path / name).write_bytes(content)


def forge(path: Path, name: str, content: bytes) -> Path:
    """A file replaced, and the manifest made to fit, as somebody would who wants it loaded."""
    (path / name).write_bytes(content)
    (path / "manifest.json").unlink()
    (path / "manifest.json").write_bytes(manifest.Manifest.of(path, 4).encoded())
    return path


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# -- the newest -----------------------------------------------------------------------------------------------------


def test_the_newest_whole_one_wins_and_each_newer_one_is_named_with_its_fault(tmp_path: Path) -> None:
    for step in (2, 4, 6, 8):
        save(tmp_path, step, keep=9)
    assert store.newest(tmp_path) == (tmp_path / "step-000008", [])
    flip(tmp_path / "step-000008")
    (tmp_path / "step-000006" / "state.json").unlink()
    before = names(tmp_path)
    faults = [
        f"{tmp_path}/step-000008 is not a whole checkpoint (model.safetensors has changed since it was saved)",
        f"{tmp_path}/step-000006 is not a whole checkpoint (state.json is missing)",
    ]
    assert store.newest(tmp_path) == (tmp_path / "step-000004", faults)
    assert names(tmp_path) == before


def test_without_a_whole_one_each_is_named(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    with pytest.raises(CheckpointError, match=f"{tmp_path} has no checkpoint: start a new run"):
        store.newest(folder)
    for step in (2, 4):
        flip(save(folder, step))
    sentence = r"step-000004 is not .*; .*step-000002 is not .*: restore one from a copy, or start a new run"
    with pytest.raises(CheckpointError, match=sentence):
        store.newest(folder)
    assert names(folder) == ["step-000002", "step-000004"]


def test_a_folder_that_is_not_as_it_was_saved_is_refused_with_its_fault(tmp_path: Path) -> None:
    saved = save(tmp_path / "a", 4)

    def fault() -> str:
        with pytest.raises(CheckpointError) as raised:
            store.load(saved)
        found = str(raised.value)
        assert found.startswith(f"{saved} is not a whole checkpoint (")
        assert found.endswith("in Python resume_from_checkpoint), or start a new run")
        return found.removeprefix(f"{saved} is not a whole checkpoint (").partition("): choose")[0]

    (saved / "extra\x1b.bin").write_bytes(b"")
    assert fault() == r"'extra\x1b.bin' was not saved with it; move it out of the folder"
    (saved / "extra\x1b.bin").unlink()
    (saved / "folder").mkdir()
    assert fault() == "'folder' is not a plain file"
    (saved / "folder").rmdir()
    (saved / "model.safetensors").rename(tmp_path / "elsewhere")
    (saved / "model.safetensors").symlink_to(tmp_path / "elsewhere")
    assert fault() == "'model.safetensors' is not a plain file"
    (saved / "model.safetensors").unlink()
    assert fault() == "model.safetensors is missing"
    (tmp_path / "elsewhere").rename(saved / "model.safetensors")
    assert read(saved) == (4, 0)
    saved = saved.rename(tmp_path / "a" / "step-000009")  # a lie about the step
    assert fault() == "it was saved as step 4; rename it back"
    saved = saved.rename(tmp_path / "a" / "best")  # a name that says nothing of it
    assert read(saved) == (4, 0)


# -- leftovers of a kill --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("then", ["save", "resume"])
def test_one_that_was_being_replaced_is_found_and_gets_its_name_back(tmp_path: Path, then: str) -> None:
    """Killed between the two renames: all that there is of any step has another name."""
    save(tmp_path, 4).rename(tmp_path / ".replaced-step-000004")
    save(tmp_path / "other", 4, attempt=1).rename(tmp_path / ".writing-step-000004")
    (tmp_path / "other").rmdir()
    assert store.newest(tmp_path) == (tmp_path / ".replaced-step-000004", [])
    assert store.steps_of(tmp_path / ".replaced-step-000004") == 4
    if then == "save":
        save(tmp_path, 6)
        assert names(tmp_path) == ["step-000004", "step-000006"]
    else:
        assert store.forget_after(tmp_path, 4) == []
        assert names(tmp_path) == ["step-000004"]
    assert read(tmp_path / "step-000004") == (4, 0)


def test_a_replaced_one_goes_where_the_new_one_is_whole_and_stays_where_it_is_not(tmp_path: Path) -> None:
    for damaged in (False, True):
        folder = tmp_path / str(damaged)
        shutil.copytree(save(folder, 4), folder / ".replaced-step-000004")
        save(folder / "other", 4, attempt=1).replace(folder / "new")
        shutil.rmtree(folder / "step-000004")
        (folder / "new").rename(folder / "step-000004")
        (folder / "other").rmdir()
        if damaged:
            flip(folder / "step-000004")
        path, faults = store.newest(folder)
        assert (read(path), len(faults)) == (((4, 0), 1) if damaged else ((4, 1), 0))
        store.forget_after(folder, 4)
        assert names(folder) == (["damaged-step-000004"] if damaged else []) + ["step-000004"]
        assert read(folder / "step-000004") == ((4, 0) if damaged else (4, 1))


def test_half_removed_and_half_written_ones_are_no_checkpoints_and_go(tmp_path: Path) -> None:
    for name in (".removed-step-000002", ".writing-step-000006", ".writing-step-000008"):
        save(tmp_path / "other", 6).rename(tmp_path / name)
        (tmp_path / name / "state.json").unlink()
    (tmp_path / "other").rmdir()
    (tmp_path / ".writing-notes").mkdir()
    save(tmp_path, 4)
    assert names(tmp_path) == [".writing-notes", "step-000004"]


# -- what is kept ---------------------------------------------------------------------------------------------------


def test_a_damaged_one_is_not_counted_as_kept(tmp_path: Path) -> None:
    save(tmp_path, 2)
    flip(save(tmp_path, 4))
    save(tmp_path, 6)
    assert names(tmp_path) == ["step-000002", "step-000004", "step-000006"]  # two whole ones
    (tmp_path / "step-000006" / "state.json").unlink()
    save(tmp_path, 8)
    assert names(tmp_path) == ["step-000002", "step-000004", "step-000006", "step-000008"]
    save(tmp_path, 10)  # with two whole ones that are newer, what is damaged goes as well
    assert names(tmp_path) == ["step-000008", "step-000010"]


def test_the_last_whole_one_is_never_removed(tmp_path: Path) -> None:
    """Not even where others have higher numbers, or where one alone is to be kept."""
    save(tmp_path, 6, keep=1)
    flip(save(tmp_path, 8))
    assert save(tmp_path, 4, keep=1).is_dir()
    assert store.newest(tmp_path)[0] == tmp_path / "step-000006"
    shutil.rmtree(tmp_path / "step-000006")
    assert store.newest(tmp_path)[0] == tmp_path / "step-000004"


def test_of_long_ones_the_rotation_compares_lengths_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "HASHED_BY_ROTATION", 10_000)  # they have more
    for step in (2, 4):
        save(tmp_path, step)
    flip(tmp_path / "step-000004")
    save(tmp_path, 6)
    assert names(tmp_path) == ["step-000004", "step-000006"]
    (tmp_path / "step-000006" / "model.safetensors").write_bytes(b"torn")
    save(tmp_path, 8)
    assert names(tmp_path) == ["step-000004", "step-000006", "step-000008"]


def test_going_on_from_an_older_step_removes_the_whole_ones_after_it_and_puts_damaged_ones_aside(
    tmp_path: Path,
) -> None:
    for step in (2, 4, 6):
        save(tmp_path, step, keep=9)
    for _ in range(2):
        flip(save(tmp_path, 8, keep=9))
        flip(tmp_path / "step-000002")
        kept = store.forget_after(tmp_path, 4)
        flip(tmp_path / "step-000002")
    assert kept == [tmp_path / "damaged-step-000008-2"]
    assert names(tmp_path) == ["damaged-step-000008", "damaged-step-000008-2", "step-000002", "step-000004"]
    assert store.found(tmp_path) == [tmp_path / "step-000002", tmp_path / "step-000004"]
    assert store.forget_after(tmp_path / "nowhere", 4) == []


def test_a_checkpoint_that_is_no_folder_does_not_stop_a_save(tmp_path: Path) -> None:
    (tmp_path / "step-000002").write_text("a file")
    save(tmp_path / "other", 4).rename(tmp_path / "linked")
    (tmp_path / "step-000004").symlink_to(tmp_path / "linked")
    for step in (6, 8):
        save(tmp_path, step)
    assert names(tmp_path) == ["linked", "other", "step-000006", "step-000008"]
    assert read(tmp_path / "linked") == (4, 0)


# -- what is never loaded -------------------------------------------------------------------------------------------


def header(tensors: Any, data: bytes = b"", length: int | None = None) -> bytes:
    text = tensors if isinstance(tensors, bytes) else json.dumps(tensors).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[" * 100_000,
        b'{"a":' * 100_000,
        b'{"step": 4, "a": NaN}',
        b'{"step": 4, "a": -Infinity}',
        b'{"step": 4, "a": 1e999}',
        b'{"step": 4, "a": ' + b"1" * 5000 + b"}",
        b'{"step": 5}',
        b'{"step": "4"}',
        b"{}",
        b"[4]",
        b"4",
        b"null",
        b"\xff\xfe{}",
        b"\x80\x04N.",  # a pickle
    ],
)
def test_a_hostile_state_ends_in_a_sentence(tmp_path: Path, content: bytes) -> None:
    forged = forge(save(tmp_path, 4), "state.json", content)
    with pytest.raises(
        CheckpointError, match=r"step-000004 does not hold the state of a run \(.*choose an older checkpoint"
    ):
        store.load(forged)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\xff" * 8,
        header(b"{"),
        header(b"[" * 100_000),
        header({}, b"rest"),
        header({}, length=1 << 40),
        header({"a": {"dtype": "F32", "shape": [1 << 60, 1 << 60], "data_offsets": [0, 0]}}),
        header({"a": {"dtype": "F32", "shape": [0, 1 << 63], "data_offsets": [0, 0]}}),
        header({"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}}, b"data"),
        header({"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}}, b"data" * 2),
        header({"a": {"dtype": "pickle", "shape": [4], "data_offsets": [0, 4]}}, b"data"),
        header({"a": {"dtype": "F6_E2M3", "shape": [4], "data_offsets": [0, 3]}}, b"dat"),
        b"\x80\x04N.",
    ],
)
def test_a_hostile_safetensors_file_ends_in_a_sentence(tmp_path: Path, content: bytes) -> None:
    forged = forge(save(tmp_path, 4), "model.safetensors", content)
    with pytest.raises(
        CheckpointError, match=r"step-000004 does not hold the state of a run \(.*choose an older checkpoint"
    ):
        store.load(forged)


@pytest.mark.parametrize(
    ("content", "fault"),
    [
        (b"[" * 100_000, "manifest.json has changed since it was saved: it is nested too deeply"),
        (b" " * (1 << 20) + b"{}", "manifest.json is longer than 1,048,576 bytes"),
        (b"[]", "manifest.json has changed since it was saved"),
        (b'{"version": 6, "step": 4, "files": 5}', "manifest.json has changed since it was saved"),
        (b'{"version": 6, "step": 4, "files": {"state.json": []}}', "manifest.json has changed since it was saved"),
        (b'{"version": 6, "step": NaN, "files": {}}', "NaN is not a finite number"),
        (manifest.Manifest(4, {}).encoded(), "manifest.json has changed since it was saved"),
        (manifest.Manifest(4, {"state.json": (0, "")}).encoded(), r"'model.safetensors' was not saved with it"),
        (manifest.Manifest(4, {"state.json": (0, ""), "../x": (0, "")}).encoded(), "../x is missing"),
    ],
)
def test_a_hostile_manifest_ends_in_a_sentence(tmp_path: Path, content: bytes, fault: str) -> None:
    saved = save(tmp_path, 4)
    (saved / "manifest.json").write_bytes(content)
    with pytest.raises(CheckpointError) as raised:
        store.load(saved)
    assert str(raised.value).startswith(f"{saved} is not a whole checkpoint (")
    assert fault in str(raised.value)


def test_what_has_changed_is_never_parsed(tmp_path: Path) -> None:
    """The fault is the digest's, not the parser's."""
    saved = save(tmp_path, 4)
    for name in ("state.json", "model.safetensors"):
        content = (saved / name).read_bytes()
        (saved / name).write_bytes(b"\xff" * len(content))
        with pytest.raises(CheckpointError, match=rf"\({name} has changed since it was saved\)"):
            store.load(saved)
        (saved / name).write_bytes(content)


def test_a_change_after_loading_does_not_reach_what_was_loaded(tmp_path: Path) -> None:
    saved = save(tmp_path, 4)
    loaded = store.load(saved)[0]["model"]["policy.weight"]
    before = loaded.clone()
    with (saved / "model.safetensors").open("r+b") as file:
        file.seek(-4096, 2)
        file.write(bytes(4096))
    assert torch.equal(loaded, before)


# -- a run ----------------------------------------------------------------------------------------------------------


def test_a_run_whose_newest_checkpoint_is_damaged_goes_on_from_the_one_before_bit_for_bit(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = settings(tmp_path / "run")
    trainer(config, tokenizer).train()
    text = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    folder = tmp_path / "run" / "checkpoints"
    flip(folder / "step-000004", "optimizer.safetensors")
    resumed = trainer(config, tokenizer)
    capsys.readouterr()
    resumed.train(resume_from_checkpoint=True)
    said = capsys.readouterr().err.splitlines()
    assert said[0] == (
        f"{folder}/step-000004 is not a whole checkpoint (optimizer.safetensors has changed since it was saved): "
        "skipped, the run resumes from step 2"
    )
    assert said[1].startswith(f"{folder}/damaged-step-000004: a damaged checkpoint of a later step now has this name")
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == text
    assert names(folder) == ["damaged-step-000004", "step-000002", "step-000004"]


@pytest.mark.parametrize("part", ["scheduler", "optimizer", "random", "prompts"])
def test_a_whole_checkpoint_whose_state_is_of_another_kind_is_refused(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path, part: str
) -> None:
    config = settings(tmp_path / "run", max_steps=4, save_steps=4)
    trainer(config, tokenizer).train()
    saved = tmp_path / "run" / "checkpoints" / "step-000004"
    state = json.loads((saved / "state.json").read_text())
    parts = state["parts"]
    for other in ({name: own for name, own in parts.items() if name != part}, {**parts, part: 5}):
        forge(saved, "state.json", json.dumps({**state, "parts": other}).encode())
        with pytest.raises(
            CheckpointError, match=r"step-000004 does not hold the state of a run \((Key|Type|Attribute)Error: "
        ):
            trainer(config, tokenizer).train(resume_from_checkpoint=True)


calls = 0


def narrow(prompts: list[Any], completions: list[Any], **columns: Any) -> list[float]:
    """A reward; from the second step on no file may be longer than 20 kB, which is less than the model has."""
    global calls
    calls += 1
    if calls == 2:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
    return letters(prompts, completions)


@pytest.fixture
def unlimited() -> Iterator[None]:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_run_without_room_stops_with_a_code_of_its_own_and_goes_on_when_there_is(
    tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], unlimited: None
) -> None:
    global calls
    calls = 0
    run = tmp_path / "run"
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "one"}\n{"prompt": "two"}\n')
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    arguments = [
        *("--model.name", str(tiny_folder), "--data.train", str(tmp_path / "prompts.jsonl"), "--data.eval_size", "0"),
        *("--reward.functions", '["tests.checkpoints.test_store_newest:narrow"]', "--rollout.batch_size", "2"),
        *("--rollout.max_completion_length", "4", "--output_dir", str(run), "--log.progress", "false"),
        *("--save_steps", "1", "--max_steps", "3", "--model.device", "cpu"),
    ]
    assert main(["train", *arguments]) == 5
    sentence = capsys.readouterr().err.splitlines()[-1]
    assert sentence.startswith(f"stable-rlhf: {run}/checkpoints/step-000002 could not be written: File too large; it ")
    go_on = f"`stable-rlhf resume {run}` continues from step 1."
    assert sentence.endswith(f"; raise the limit on the length of a file (ulimit -f). {go_on}")
    assert names(run / "checkpoints") == ["step-000001"]
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert main(["resume", str(run)]) == 0
    assert [row["step"] for row in rows(run)] == [0, 1, 2]
    for path in (run / "checkpoints").iterdir():
        flip(path)
    capsys.readouterr()
    assert main(["resume", str(run), "--max_steps", "4"]) == 2
    sentence = capsys.readouterr().err
    assert sentence.startswith(f"stable-rlhf: {run} has no checkpoint to resume from; {run}/checkpoints/step-000003 is")
    assert "step-000002 is not a whole checkpoint (model.safetensors has changed since it was saved); start" in sentence
