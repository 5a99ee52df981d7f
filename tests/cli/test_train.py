"""The commands that take a run's folder, and what is said of a folder that a run cannot have."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import yaml

from stable_rlhf.cli.main import main
from stable_rlhf.report import closing_line
from tests.cli.test_main import said, tiny_run


@pytest.fixture
def tiny(tiny_folder: Path, tmp_path: Path) -> list[str]:
    return tiny_run(tiny_folder, tmp_path)


def test_resume_of_a_finished_run_says_so_and_max_steps_takes_it_further(
    tiny: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    assert main(["train", *tiny]) == 0
    where = f"the policy is in {run}/final, the report in {run}/report.html"
    assert capsys.readouterr().out == f"2 steps done; {where}\n"
    evaluation = {"before": {"reward": 0.25}, "after": {"reward": 1}}
    assert closing_line(run, evaluation, 1) == f"1 step done, reward 0.250 before and 1.000 after; {where}"
    assert main(["export", str(run / "final"), str(tmp_path / "out")]) == 2
    assert said(capsys).startswith(
        f"{run}/final is no checkpoint but a finished policy, which from_pretrained loads as"
    )
    assert main(["resume", str(run)]) == 0
    finished = f"{run} is finished: 2 of 2 steps are done. To train it further: stable-rlhf resume {run} --max_steps 4"
    assert capsys.readouterr().out.strip() == finished
    assert main(["resume", str(run), "--max_steps", "1"]) == 2
    assert said(capsys).startswith("max_steps=1: the run has already done 2 steps; give that many or more")
    assert main(["resume", str(run), "--max_steps", "3"]) == 0
    assert len((run / "metrics.jsonl").read_text().splitlines()) == 3
    assert yaml.safe_load((run / "config.yaml").read_text())["max_steps"] == 3
    capsys.readouterr()
    assert main(["resume", str(run)]) == 0
    assert "3 of 3 steps are done" in capsys.readouterr().out


def test_a_run_that_was_stopped_after_its_last_step_still_gets_its_model(tiny: list[str], tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert main(["train", *tiny]) == 0
    model = (run / "final" / "model.safetensors").read_bytes()
    (run / "final" / "value_heads.safetensors").unlink()  # what is written last
    (run / "final" / "model.safetensors").unlink()
    assert main(["resume", str(run)]) == 0
    assert (run / "final" / "model.safetensors").read_bytes() == model


def test_resume_takes_no_other_settings_and_no_other_folders(
    tiny: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    assert main(["resume", str(run)]) == 2
    assert said(capsys) == f"{run} is not a run folder: it has no config.yaml; check the path"
    assert main(["resume"]) == 2
    assert said(capsys).startswith("the following arguments are required: run; usage: stable-rlhf resume ")
    assert main(["train", *tiny]) == 0
    assert main(["resume", str(run), "--optim.lam", "1"]) == 2
    assert said(capsys).startswith("unrecognized arguments: --optim.lam 1; usage: stable-rlhf resume ")
    assert main(["resume", str(run), "--max_steps", "3", "--checkpoint", str(tmp_path / "no")]) == 2
    missing = f"--checkpoint {tmp_path / 'no'}: there is no such folder; the checkpoints in {run}: step-"
    assert said(capsys).startswith(missing)
    changed = (run / "config.yaml").read_text().replace("heads: 1", "heads: 2")
    (run / "config.yaml").write_text(changed)
    assert main(["resume", str(run), "--max_steps", "3"]) == 2
    assert said(capsys).startswith("critic.heads is 2 here and 1 in the checkpoint: resume with the run's own")


def test_report_names_a_folder_that_is_no_run(
    tiny: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["report", str(tmp_path)]) == 2
    assert said(capsys) == f"{tmp_path / 'metrics.jsonl'} does not exist: give the folder of a run"
    (tmp_path / "metrics.jsonl").write_text("{broken\n")
    assert main(["report", str(tmp_path)]) == 2
    assert said(capsys).startswith(f"{tmp_path / 'metrics.jsonl'}:1: not a JSON object")
    assert main(["train", *tiny]) == 0
    (tmp_path / "run" / "report.html").unlink()
    capsys.readouterr()
    assert main(["report", str(tmp_path / "run")]) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "run" / "report.html")


def test_report_of_a_run_without_a_step_says_that_it_is_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.yaml").write_text("preset: safe\n")
    assert main(["report", str(tmp_path)]) == 2
    assert said(capsys) == f"{tmp_path / 'metrics.jsonl'} does not exist: the run has not done a step yet"


def test_a_checkpoint_may_be_named_without_its_path_and_what_is_done_again_is_said(
    tiny: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", *tiny, "--max_steps", "3", "--save_total_limit", "3"]) == 0
    capsys.readouterr()
    assert main(["resume", str(tmp_path / "run"), "--checkpoint", "step-000001"]) == 0
    told = "Removed everything from step 1 on (including step-000002, step-000003); those steps will be repeated\n"
    assert capsys.readouterr().err == told
    assert main(["resume", str(tmp_path / "run"), "--checkpoint", "step-000003"]) == 0
    assert capsys.readouterr().err == ""  # there is nothing after it


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="no folder that nobody can write to")
def test_a_folder_that_cannot_be_written_to_costs_a_sentence(
    tiny: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    fault = "output_dir='/proc/none/run': /proc cannot be written to (No such file or directory); choose another folder"
    assert main(["train", *tiny, "--output_dir", "/proc/none/run"]) == 2
    assert said(capsys) == fault
    assert main(["doctor", *tiny, "--output_dir", "/proc/none/run"]) == 1
    assert capsys.readouterr().out.startswith(f"failed   {fault}\n")


def test_a_command_to_type_next_is_named_as_it_was_typed(
    tiny: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main(["train", *tiny]) == 0
    monkeypatch.setattr(sys, "argv", ["some/bin/stable-rlhf", "train"])
    capsys.readouterr()
    assert main(["train", *tiny]) == 2
    assert f"resume it with `some/bin/stable-rlhf resume {tmp_path / 'run'}`" in said(capsys)


def test_an_incident_that_cannot_be_read_costs_a_resume_a_sentence(
    tiny: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", *tiny]) == 0
    (tmp_path / "run" / "incidents.jsonl").write_text("{}\n")
    capsys.readouterr()
    assert main(["resume", str(tmp_path / "run"), "--max_steps", "3"]) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith(f"stable-rlhf: {tmp_path / 'run' / 'incidents.jsonl'}:1: not an incident (")
