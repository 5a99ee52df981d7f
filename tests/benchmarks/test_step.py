"""benchmarks/step.py and peer_trl.py: the parts are the step, a peer does the same work, failures are said."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

import floors
import measuring
import shapes
import step

SIZES = ["--device=cpu", "--batch-size=4", "--prompt-length=6", "--response-length=8", "--lora-r=4"]
SHORT = [*SIZES, "--steps=3", "--warmup=1"]
PARTS = ["rollout", "scoring", "log-probs", "update", "controller, guard", "other"]


def rows(printed: str) -> dict[str, list[str]]:
    """The printed tables' rows by their first cell."""
    lines = [line.strip("| ").split("|") for line in printed.splitlines() if line.startswith("| ")]
    return {cells[0].strip(): [cell.strip() for cell in cells[1:]] for cells in lines}


# -- a run --------------------------------------------------------------------------------------------------------


def test_the_printed_parts_are_the_step_and_the_floors_follow_from_the_ceilings(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    step.main([*SHORT, f"--json={tmp_path / 'step.json'}"])
    printed = rows(capsys.readouterr().out)
    result = json.loads((tmp_path / "step.json").read_text())
    assert len(result["steps"]) == 3
    for seconds in result["steps"]:
        assert sum(seconds[part] for part in PARTS) == pytest.approx(seconds["total"], rel=1e-9)
        assert -1e-3 < seconds["other"] < 0.5 * seconds["total"]
        assert min(seconds["rollout"], seconds["log-probs"], seconds["update"]) > 1e-4
    for part in (*PARTS, "total"):
        middle = sorted(seconds[part] for seconds in result["steps"])[1]
        assert float(printed[part][0].split(" ")[0]) == pytest.approx(middle, abs=0.51e-4)
    ceilings, work = (
        floors.Ceilings(**result["ceilings"]),
        floors.Work(batch=4, prompt=6, response=8, iterations=2, rank=4),
    )
    counted = floors.floors(floors.Geometry.of(shapes.shape_config("tiny")), work, ceilings, 4)
    for part, floor in counted.items():
        assert float(printed[part][2]) == pytest.approx(floor.seconds, rel=6e-3)  # three digits are printed
    total = sorted(seconds["total"] for seconds in result["steps"])[1]
    assert float(printed["new tokens a second, step"][0]) == pytest.approx(4 * 8 / total, rel=1e-2)
    assert float(printed["first step, s"][0]) == pytest.approx(result["first_step_s"], abs=0.51e-3)
    assert result["first_step_s"] not in [seconds["total"] for seconds in result["steps"]]
    assert result["peak_mib"] > 100  # torch alone is more


def test_every_prompt_and_completion_has_its_length_and_a_shorter_one_is_refused(tmp_path: Path) -> None:
    trainer, seconds = step.make_trainer(step.parse(SHORT), tmp_path / "run")
    assert {len(ids) for ids in trainer.train_prompts.input_ids} == {6}
    assert min(seconds.values()) > 0
    assert step.take_step(trainer) > 0
    trainer.sampler = dataclasses.replace(trainer.sampler, eos_token_ids=list(range(512)))  # every token ends it
    with pytest.raises(measuring.MeasurementError, match=r"step 1: completions have \{1\.0\} tokens"):
        step.take_step(trainer)


def test_what_is_set_reaches_the_trainer(tmp_path: Path) -> None:
    arguments = step.parse([*SHORT, "--num-mini-batches=1", "--set", "optim.microbatch_tokens=4096"])
    config = step.make_config(arguments, tmp_path)
    assert (config.optim.microbatch_tokens, config.optim.num_mini_batches) == (4096, 1)
    assert (config.model.lora_r, config.rollout.batch_size, config.rollout.max_completion_length) == (4, 4, 8)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--warmup=0"], "--warmup 0: give 1 or more"),
        (["--steps=0"], "--steps 0: give 1 or more"),
        (["--model=1b"], "invalid choice: '1b'"),
        (["--set", "optim"], "give SECTION.FIELD=VALUE"),
        (["--set", "rollout.batch_size=8"], "give --batch-size, which the floors and the peer follow too"),
    ],
)
def test_step_refuses_what_would_measure_nothing(
    options: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        step.parse([*SIZES, *options])
    assert said in capsys.readouterr().err


TIMING = {"step": 7, "rollout_s": 1.0, "scoring_s": 0.25, "logprobs_s": 0.5, "update_s": 2.0, "control_s": 0.125}


def test_other_is_what_the_clock_saw_beyond_the_parts() -> None:
    assert measuring.split({**TIMING, "total_s": 4.0}, 4.5) == {
        "rollout": 1.0, "scoring": 0.25, "log-probs": 0.5, "update": 2.0, "controller, guard": 0.125,
        "other": 0.625, "total": 4.5,
    }  # fmt: skip


def test_parts_that_overlap_and_parts_that_are_not_timed_are_refused() -> None:
    with pytest.raises(measuring.MeasurementError, match=r"step 7: the parts take 3\.8750 s"):
        measuring.split({**TIMING, "total_s": 3.8}, 4.0)
    with pytest.raises(measuring.MeasurementError, match="each must hold the one before"):
        measuring.split({**TIMING, "total_s": 4.0}, 3.9)
    old = {key: value for key, value in TIMING.items() if key not in ("logprobs_s", "control_s")}
    with pytest.raises(measuring.MeasurementError, match="has no logprobs_s, control_s: the trainer"):
        measuring.split({**old, "total_s": 4.0}, 4.0)


def test_only_a_lack_of_memory_is_a_result() -> None:
    assert measuring.out_of_memory(torch.OutOfMemoryError("tried 2 GiB\nmore")) == {"out_of_memory": "tried 2 GiB"}
    for said in ("CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate"):
        assert measuring.out_of_memory(RuntimeError(said)) == {"out_of_memory": said}
    with pytest.raises(RuntimeError, match="device-side assert"):
        measuring.out_of_memory(RuntimeError("device-side assert triggered"))


# -- the peer -----------------------------------------------------------------------------------------------------


def test_trl_takes_as_many_optimiser_steps_as_ours_in_a_process_of_its_own() -> None:
    pytest.importorskip("trl.experimental", reason="the peer is an extra")
    result = step.measure_peer(step.parse([*SIZES, "--peer-steps=2", "--peer-warmup=1"]), "tiny")
    assert result["optimizer_steps"] == 3 * 2 * 2
    assert len(result["steps"]) == 2
    assert all(1e-3 < seconds["total"] < 60 for seconds in result["steps"])
    assert result["first_step_s"] not in [seconds["total"] for seconds in result["steps"]]
    assert result["peak_mib"] > 100


def test_a_peer_that_takes_fewer_optimiser_steps_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(command: list[str], **options: Any) -> None:
        target = next(part for part in command if part.startswith("--json=")).removeprefix("--json=")
        Path(target).write_text(json.dumps({"steps": [{"total": 1.0}], "optimizer_steps": 8}))

    monkeypatch.setattr(subprocess, "run", run)
    with pytest.raises(measuring.MeasurementError, match="TRL took 8 optimiser steps, and ours takes 16"):
        step.measure_peer(step.parse([*SHORT, "--peer-steps=2", "--peer-warmup=2"]), "same")


def run_of(*totals: float, mib: float) -> dict[str, Any]:
    steps = [{"total": total} for total in totals]
    return {"steps": steps, "first_step_s": 9.0, "peak_mib": mib, "reserved_mib": mib}


def test_the_peers_table_gives_both_ratios_and_says_who_ran_out_of_memory() -> None:
    peers = {"large": {"out_of_memory": "tried 2 GiB"}, "alike": run_of(5.0, 6.0, 60.0, mib=300.0)}
    printed = rows(step.peer_table(run_of(1.0, 2.0, 4.0, mib=200.0), peers))
    assert printed["stable-rlhf"][:2] == ["2.0000 (0.7500)", "1.00"]
    assert printed["alike"] == ["6.0000 (13.7500)", "3.00", "9.000", "300 (300)", "1.50"]
    assert printed["large"][0] == "out of memory"
    alone = rows(step.peer_table({"out_of_memory": "tried 1 GiB"}, peers))
    assert alone["alike"][:2] == ["6.0000 (13.7500)", ""]  # no ratio to nothing
