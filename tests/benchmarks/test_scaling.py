"""benchmarks/scaling.py: a cell is a run of step.py, and one that does not fit is written down as such."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

import scaling
import step

PARTS = ["rollout", "scoring", "log-probs", "update", "controller, guard", "other"]


def scale(tmp_path: Path, *options: str) -> dict[str, Any]:
    scaling.main([f"--output={tmp_path / 'scaling.json'}", "--steps=2", "--warmup=1", "--device=cpu", *options])
    return json.loads((tmp_path / "scaling.json").read_text())


def test_scaling_runs_step_in_a_cell_and_passes_the_rest_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(subprocess, "run", lambda command, **options: step.main(command[2:]))
    monkeypatch.setattr(step, "provenance", lambda device: "here")  # which asks git, by a process
    records = scale(tmp_path, "--cells=tiny/4/8", "--prompt-length=6", "--lora-r=4")
    record = records["tiny/4/8"]
    assert record["status"] == "measured"
    assert record["options"] == ["--prompt-length=6", "--lora-r=4"]
    assert sum(record["parts_s"][part] for part in PARTS) == pytest.approx(record["step_s"], rel=1e-9)  # of two steps
    assert record["tokens_per_s"] == pytest.approx(4 * 8 / record["step_s"])
    assert f"| tiny | 4 | 8 | {record['step_s']:.4f}" in capsys.readouterr().out


def fake(outcomes: dict[str, Any]) -> Any:
    """subprocess.run that writes the outcome of its --batch-size, or raises it."""
    real = subprocess.run

    def run(command: list[str], **options: Any) -> Any:
        if not command[1].endswith("step.py"):  # matplotlib asks for fonts
            return real(command, **options)
        given = dict(part.removeprefix("--").split("=") for part in command[2:])
        outcome = outcomes[given["batch-size"]]
        if isinstance(outcome, Exception):
            raise outcome
        return Path(given["json"]).write_text(json.dumps(outcome))

    return run


MEASURED = {
    "steps": [{"update": 1.0, "other": 1.0, "total": 2.0}],
    "floors": {"update": {"seconds": 0.5}},
    "first_step_s": 3.0,
    "peak_mib": 1024.0,
    "reserved_mib": 2048.0,
    "provenance": "here",
}


def test_scaling_records_a_lack_of_memory_and_of_time_and_says_where_memory_first_runs_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    full, late = {"out_of_memory": "tried 2 GiB"}, subprocess.TimeoutExpired("step.py", 600)
    monkeypatch.setattr(subprocess, "run", fake({"4": MEASURED, "8": late, "16": full, "32": full}))
    scale(tmp_path, "--cells=tiny/4/8")
    records = scale(tmp_path, "--cells=tiny/32/8,tiny/16/8,tiny/8/8", f"--plot={tmp_path / 'scaling.png'}")
    assert {name: record["status"] for name, record in records.items()} == {
        "tiny/4/8": "measured",  # by the call before
        "tiny/32/8": "out of memory",
        "tiny/16/8": "out of memory",
        "tiny/8/8": "over the time limit",
    }
    printed = capsys.readouterr().out
    assert "| tiny | 4 | 8 | 2.0000 (0.0000) | 0.5 | 4.00 | 16 | 1024 (2048) |" in printed
    assert "completions a step: runs out of memory first at 16" in printed
    assert "tokens a completion: not out of memory up to 8" in printed
    assert (tmp_path / "scaling.png").read_bytes().startswith(b"\x89PNG")


def test_any_other_failure_of_a_cell_ends_the_call_and_keeps_what_was_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(subprocess, "run", fake({"4": MEASURED, "8": subprocess.CalledProcessError(1, "step.py")}))
    with pytest.raises(subprocess.CalledProcessError):
        scale(tmp_path, "--cells=tiny/4/8,tiny/8/8")
    assert list(json.loads((tmp_path / "scaling.json").read_text())) == ["tiny/4/8"]


def test_scaling_refuses_cells_that_it_cannot_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for given in ("3b/16", "1b/16/128", "3b/0/128", "3b/16/x"):
        with pytest.raises(SystemExit):
            scaling.parse([f"--cells={given}"])
        assert f"'{given}': give MODEL/BATCH/RESPONSE" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="holds no cell to show"):
        scale(tmp_path, "--cells=none")
    assert [cell.name for cell in scaling.parse(["--cells=3b/16/128,7b/8/256"])[0].cells] == ["3b/16/128", "7b/8/256"]
    assert scaling.parse([])[0].cells == scaling.SWEEPS
