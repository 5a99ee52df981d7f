"""The command `sweep` as it is typed: its options, and one cell in a process of its own."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from stable_rlhf.cli.main import main
from stable_rlhf.cli.sweep import how_all_ended
from tests.cli.test_main import said, tiny_run


@pytest.fixture
def tiny(tiny_folder: Path, tmp_path: Path) -> list[str]:
    settings = tiny_run(tiny_folder, tmp_path)
    at = settings.index("--output_dir")
    return ["sweep", *settings[:at], *settings[at + 2 :], "--out", str(tmp_path / "SWEEP")]


def test_a_cell_is_forecast_trained_and_said(
    tiny: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With `doctor` and `train` as commands of their own, a reward next to the run and one step."""
    tiny += ["--max_steps", "1"]
    assert main([*tiny, "--dry-run"]) == 0
    shown = capsys.readouterr().out.splitlines()
    assert shown[:2] == [
        "preset=safe  seed 0  to be started",
        "1 cell: 1 arm x 1 seed, 1 at a time on the CPU; 1 to be started",
    ]
    assert shown[2].startswith("forecast: 0:00:0")
    assert shown[2].endswith(" for 1 cell, as `doctor` forecasts a cell of each preset, loading not counted")
    assert not (tmp_path / "SWEEP").exists()
    assert main(tiny) == 0
    shown = capsys.readouterr().out.splitlines()
    assert shown[1].startswith("[1/1] preset=safe  seed 0  reward 0.")
    assert shown[2] == f"1 of 1 cell complete: {tmp_path / 'SWEEP'}"
    (outcome,) = map(json.loads, (tmp_path / "SWEEP" / "outcomes.jsonl").read_text().splitlines())
    assert (outcome["cell"], outcome["exit_code"]) == ("preset=safe,seed=0", 0)
    assert (tmp_path / "SWEEP" / "cells" / "preset=safe,seed=0" / "report.html").exists()


def test_a_doctor_that_fails_is_quoted(
    tiny: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("stable_rlhf.cli.sweep.COMMAND", ("/bin/sh", "-c", "echo 'failed   no \033[1m disk'"))
    assert main([*tiny, "--dry-run"]) == 0
    last = capsys.readouterr().out.splitlines()[-1]
    assert last == "forecast: unknown, since `doctor` fails for preset=safe: failed   no \\x1b[1m disk"


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ((), "the following arguments are required: --out; usage: stable-rlhf sweep [FILE]"),
        (("--out", "x", "--jobs", "0"), "--jobs=0: must be 1 or more"),
        (("--out", "x", "--address", "auto"), "--address='auto': has no effect without --launcher ray"),
        (("--out", "x", "--resources", "GPU=1"), "--resources='GPU=1': has no effect without --launcher ray"),
        (("--out", "x", "--resources", "GPU", "--launcher", "ray"), "--resources GPU: give NAME=NUMBER"),
        (("--out", "x", "--model.device", "cuda:1"), "model.device='cuda:1': each cell sees one GPU, as cuda:0"),
        (("--out", "x", "--seed", "3"), "--seed: a sweep gives each cell its own; give --seeds"),
        (("--out", "x", "no.yaml"), "no.yaml: No such file or directory; check the path"),
        (("--out", "x" * 300), "--out='xxx"),
        (("--out", "/proc/none/x"), "--out='/proc/none/x': /proc cannot be written to"),
        (("--out", __file__), f"--out={__file__!r}: {__file__} is a file"),
    ],
)
def test_what_cannot_be_swept_costs_a_sentence(
    arguments: tuple[str, ...],
    sentence: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["sweep", *arguments]) == 2
    assert said(capsys).startswith(sentence)
    assert list(tmp_path.iterdir()) == []


def test_several_cells_on_one_gpu_are_said_to_gain_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,3")
    monkeypatch.setattr("stable_rlhf.cli.sweep.COMMAND", ("/bin/false",))
    assert main(["sweep", "--out", str(tmp_path / "x"), "--jobs", "2", "--dry-run"]) == 0
    shown = capsys.readouterr().out
    assert "take turns: several at a time gain nothing unless the model is small" in shown
    assert "4 at a time on 2 GPUs" in shown


def test_a_file_of_a_sweep_is_not_one_of_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "sweep.yaml").write_text("max_steps: 1\nsweep: {seeds: 2}\n")
    assert main(["train", str(tmp_path / "sweep.yaml")]) == 2
    assert said(capsys).endswith("unknown setting 'sweep'; only `stable-rlhf sweep` takes a file with it")


def test_help_shows_every_option(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["sweep", "--help"])
    assert ended.value.code == 0
    shown = capsys.readouterr().out
    assert shown.startswith("usage: stable-rlhf sweep [FILE]")
    assert "A FILE may name the sweep itself" in shown
    assert all(option in shown for option in ("--seeds", "--set", "--preset", "--dry-run", "--launcher"))


def test_the_last_line_says_what_becomes_of_cells_that_were_stopped() -> None:
    assert how_all_ended(8, 8, 0) == "8 of 8 cells complete"
    one = "7 of 8 cells complete; 1 stopped by a signal; the same command resumes it"
    assert how_all_ended(8, 7, 0) == one
    failed = "1 failed, which is their result (--retry tries them again)"
    assert how_all_ended(8, 5, 1) == (
        f"5 of 8 cells complete; {failed}; 2 stopped by a signal; the same command resumes them"
    )
