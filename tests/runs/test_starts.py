"""runs.starts: one line for each start, of this run only; damaged lines are named."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from stable_rlhf.errors import RunError
from stable_rlhf.report.html import about, duration
from stable_rlhf.report.run import read_run
from stable_rlhf.runs import starts


def test_a_resume_adds_a_line_and_a_new_run_begins_the_file_anew(tmp_path: Path) -> None:
    starts.record(tmp_path, 0, "an earlier try", {})
    starts.record(tmp_path, 0, "cpu", {})
    starts.record(tmp_path, 20, "cuda:0, NVIDIA H100\ud800", {})
    assert [(start["step"], start["device"]) for start in starts.read(tmp_path)] == [
        (0, "cpu"),
        (20, "cuda:0, NVIDIA H100\ufffd"),
    ]
    assert set(starts.read(tmp_path)[0]) == set(starts.FIELDS)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["starts.jsonl"]


def test_a_line_that_a_kill_tore_is_replaced(tmp_path: Path) -> None:
    starts.record(tmp_path, 0, "cpu", {})
    whole = (tmp_path / "starts.jsonl").read_text()
    (tmp_path / "starts.jsonl").write_text(whole + '{"step": 2, "ti')
    starts.record(tmp_path, 3, "cuda:1", {})
    assert [start["device"] for start in starts.read(tmp_path)] == ["cpu", "cuda:1"]


def test_a_run_of_an_older_version_has_none(tmp_path: Path) -> None:
    assert starts.read(tmp_path) == []
    starts.record(tmp_path, 20, "cpu", {})
    assert len(starts.read(tmp_path)) == 1


@pytest.mark.parametrize(
    "line", ["{}", "[]", "x", '{"time": "yesterday", "device": "cpu"}', '{"time": "2026-01-01", "device": 1}']
)
def test_a_line_that_is_no_start_is_named(tmp_path: Path, line: str) -> None:
    starts.record(tmp_path, 0, "cpu", {})
    with (tmp_path / "starts.jsonl").open("a") as file:
        file.write(line + "\n")
    with pytest.raises(RunError, match=r"starts\.jsonl:2: not a start"):
        starts.read(tmp_path)


def test_the_head_of_a_report_says_model_data_reward_date_duration_and_device(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 0}\n{"step": 1}\n')
    (tmp_path / "timings.jsonl").write_text('{"step": 0, "total_s": 100.5}\n{"step": 1, "total_s": 24.5}\n')
    lines = [
        {"step": 0, "time": "2026-03-04T05:06:07+00:00", "device": "cuda:0, <b>H100</b>", "versions": {}},
        {"step": 1, "time": "2026-03-05T05:06:07+00:00", "device": "cpu", "versions": {}},
    ]
    (tmp_path / "starts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (tmp_path / "config.yaml").write_text(
        "preset: safe\nmodel: {name: org/model, lora_r: 16}\ndata: {train: prompts.jsonl}\n"
        "reward: {functions: [builtin, 'package.module:function']}\n"
    )
    assert about(read_run(tmp_path)) == [
        ("model", "org/model (LoRA, rank 16)"),
        ("data", "prompts.jsonl"),
        ("reward", "builtin, package.module:function"),
        ("preset", "safe"),
        ("begun", "2026-03-04 05:06 UTC"),
        ("time in steps", "2 min 5 s"),
        ("device", "cuda:0, <b>H100</b>, then cpu"),
    ]


def test_sections_of_a_foreign_configuration_are_not_read(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 0}\n')
    (tmp_path / "config.yaml").write_text("model: [1]\ndata: text\nreward: {functions: 7}\n")
    assert dict(about(read_run(tmp_path))) | {"reward": "7"} == {
        **dict.fromkeys(("model", "data", "preset", "begun", "time in steps", "device"), "not recorded"),
        "reward": "7",
    }


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (0.04, "0.04 s"),
        (59.9, "59.9 s"),
        (60, "1 min 0 s"),
        (3599.4, "59 min 59 s"),
        (3600, "1 h 0 min"),
        (90000, "25 h 0 min"),
    ],
)
def test_a_duration_has_two_units_at_most(seconds: float, words: str) -> None:
    assert duration(seconds) == words


def test_inputs_and_the_packages_source_are_recorded_by_digest(tmp_path: Path) -> None:
    starts.record(tmp_path, 0, "cpu", {"data": "d1", "reward": None})
    (start,) = starts.read(tmp_path)
    assert start["inputs"] == {"data": "d1", "reward": None}
    assert start["code"] == starts.source_digest()
    assert len(start["code"]) == 64
