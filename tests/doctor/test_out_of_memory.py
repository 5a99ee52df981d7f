"""Free memory, and none left; the formula of what a run needs is held against literals and measurements in
test_checks.py."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from stable_rlhf import errors
from stable_rlhf.cli.main import main
from stable_rlhf.hardware import memory
from stable_rlhf.training import step


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
        ("CUDNN_STATUS_ALLOC_FAILED", "CUDNN_STATUS_ALLOC_FAILED"),
        ("backend='inductor' raised:\nOutOfMemoryError: CUDA out of memory.", "OutOfMemoryError: CUDA out of memory"),
        ("CUDA error: device-side assert triggered", None),
    ],
)
def test_a_lack_of_memory_is_told_from_other_errors(said: str, shown: str | None) -> None:
    assert memory.shortage(RuntimeError(said)) == shown


def test_an_error_of_the_gpus_allocator_is_one_whatever_it_says() -> None:
    assert memory.shortage(torch.OutOfMemoryError("tried 2 GiB\nmore")) == "tried 2 GiB"
    assert memory.shortage(torch.OutOfMemoryError()) == "OutOfMemoryError"


def greedy_reward(prompts: list[Any], completions: list[str], **columns: Any) -> Any:
    return torch.empty(2**60)  # the allocator's own error


def greedy_loading(*given: Any, **named: Any) -> Any:
    return torch.empty(2**60)


@pytest.fixture
def settings(tiny_folder: Path, tmp_path: Path) -> list[str]:
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps({"prompt": f"row {i}"}) + "\n" for i in range(8)))
    return [
        *("--model.name", str(tiny_folder), "--data.train", str(tmp_path / "prompts.jsonl"), "--data.eval_size", "0"),
        *("--reward.functions", '["tests.tiny_runs:letters"]', "--rollout.batch_size", "4", "--model.device", "cpu"),
        *("--rollout.max_completion_length", "4", "--output_dir", str(tmp_path / "run"), "--log.progress", "false"),
        *("--max_steps", "4", "--save_steps", "1"),
    ]


def test_a_run_that_runs_out_of_memory_says_what_takes_less_and_goes_on_with_it(
    settings: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run, update, calls = tmp_path / "run", step.update, []

    def greedy(*given: Any) -> Any:
        calls.append(0)
        return update(*given) if len(calls) < 3 else torch.empty(2**60)

    monkeypatch.setattr(step, "update", greedy)
    assert main(["train", *settings]) == errors.Exit.FAILED
    [line] = capsys.readouterr().err.splitlines()
    assert re.match(r"stable-rlhf: after 2 steps: .*allocate memory", line)
    assert (
        f"; lower optim.microbatch_tokens or reward.batch_size, or set model.gradient_checkpointing, in {run}/" in line
    )
    assert "continues from step 2." in line
    assert (run / "report.html").is_file()
    monkeypatch.setattr(step, "update", update)
    config = run / "config.yaml"
    for setting, less in (("microbatch_tokens: \\d+", "16"), ("gradient_checkpointing: false", "true")):
        given = config.read_text()
        name = setting.split(":")[0]
        config.write_text(re.sub(setting, f"{name}: {less}", given))
        assert config.read_text() != given
    assert main(["resume", str(run)]) == errors.Exit.DONE
    assert len((run / "metrics.jsonl").read_text().splitlines()) == 4


def test_a_reward_and_a_model_for_which_memory_is_too_little_are_told_as_that(
    settings: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    rewarded = [*settings, "--reward.functions", '["tests.doctor.test_out_of_memory:greedy_reward"]']
    assert main(["train", *rewarded]) == errors.Exit.FAILED
    line = capsys.readouterr().err
    assert re.match(r"stable-rlhf: after 0 steps, in the reward: .*allocate memory", line)
    assert "continues from step 0." in line  # it was saved as of before the rollout in hand
    monkeypatch.setattr("stable_rlhf.training.run.ActorCritic", greedy_loading)
    assert main(["train", *settings, "--output_dir", str(tmp_path / "again")]) == errors.Exit.FAILED
    line = capsys.readouterr().err
    assert re.match(r"stable-rlhf: loading: .*allocate memory", line)
    assert line.endswith(f"{memory.LESS}\n")
