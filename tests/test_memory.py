"""Free memory, and none left; the formula of what a run needs is held against literals and measurements in
test_doctor.py."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from stable_rlhf import cli, memory, optimize


def test_a_containers_files_that_can_be_dropped_are_free_memory(tmp_path: Path) -> None:
    for name, text in (("max", "9000\n"), ("current", "8000\n"), ("stat", "anon 2500\ninactive_file 5000\n")):
        (tmp_path / f"memory.{name}").write_text(text)
    assert memory.free(torch.device("cpu"), tmp_path) == 6000
    (tmp_path / "memory.stat").unlink()
    assert memory.free(torch.device("cpu"), tmp_path) == 1000
    (tmp_path / "memory.max").write_text("max\n")
    assert memory.free(torch.device("cpu"), tmp_path) > 6000


@pytest.mark.parametrize(
    ("said", "shown"),
    [
        (
            "CUDA out of memory. Tried to allocate 2 MiB. GPU 0 has 1 MiB.",
            "CUDA out of memory. Tried to allocate 2 MiB",
        ),
        ("CUDA error: out of memory\nCompile with", "CUDA error: out of memory"),
        ("CUBLAS_STATUS_ALLOC_FAILED when calling", "CUBLAS_STATUS_ALLOC_FAILED when calling"),
        ("CUDA error: device-side assert triggered", None),
    ],
)
def test_a_lack_of_memory_is_told_from_other_errors(said: str, shown: str | None) -> None:
    assert memory.shortage(RuntimeError(said)) == shown


def test_a_run_that_runs_out_of_memory_says_what_takes_less_and_goes_on_with_shorter_passes(
    tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps({"prompt": f"row {i}"}) + "\n" for i in range(8)))
    run = tmp_path / "run"
    settings = [
        *("--model.name", str(tiny_folder), "--data.train", str(tmp_path / "prompts.jsonl"), "--data.eval_size", "0"),
        *("--reward.functions", '["tests.runs:letters"]', "--rollout.batch_size", "4", "--model.device", "cpu"),
        *("--rollout.max_completion_length", "4", "--output_dir", str(run), "--log.progress", "false"),
        *("--max_steps", "4", "--save_steps", "1"),
    ]
    update, calls = optimize.update, []

    def greedy(*given: Any) -> Any:
        calls.append(0)
        return update(*given) if len(calls) < 3 else torch.empty(2**60)  # the allocator's own error

    monkeypatch.setattr(optimize, "update", greedy)
    assert cli.main(["train", *settings]) == cli.Exit.FAILED
    [line] = capsys.readouterr().err.splitlines()
    assert re.match(r"stable-rlhf: step 2: .*allocate memory", line)
    assert f"; {memory.LESS}. `" in line
    assert line.endswith("goes on from step 2.")
    assert (run / "report.html").is_file()
    monkeypatch.setattr(optimize, "update", update)
    config = run / "config.yaml"
    given = config.read_text()
    config.write_text(re.sub(r"microbatch_tokens: \d+", "microbatch_tokens: 16", given))
    assert config.read_text() != given
    assert cli.main(["resume", str(run)]) == cli.Exit.DONE
    assert len((run / "metrics.jsonl").read_text().splitlines()) == 4
