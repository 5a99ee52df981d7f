"""runs: files are written aside, flushed and renamed; steps, torn lines and plain lines are counted."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from stable_rlhf import console as console_module
from stable_rlhf import files
from stable_rlhf.control import Decision
from stable_rlhf.report import summary
from stable_rlhf.runs import evaluation, names
from stable_rlhf.runs import metrics as runs_metrics
from stable_rlhf.training.rows import decision_metrics
from tests import flushes
from tests.runs.test_metrics import BEFORE, ROW, console, printed, write_steps

# -- whole or not at all --------------------------------------------------------------------------------------------


def test_a_file_is_written_aside_flushed_and_then_renamed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "config.yaml"
    path.write_text("old")
    events = flushes.recorded(monkeypatch)
    files.replace_text(path, "newer")
    assert events == ["config.yaml.tmp: 5 bytes flushed", "config.yaml.tmp -> config.yaml"]
    assert path.read_text() == "newer"
    assert list(tmp_path.iterdir()) == [path]


def test_a_write_that_fails_half_way_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")

    def torn(aside: Path) -> None:
        aside.write_bytes(b"ne")
        raise OSError("the disk is full")

    with pytest.raises(OSError, match="the disk is full"):
        files.replace_file(path, torn)
    assert path.read_bytes() == b"old"


def test_completions_and_truncated_rows_are_written_aside_and_flushed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    writer = write_steps(tmp_path, 3)
    events = flushes.recorded(monkeypatch)
    path = runs_metrics.write_completions(tmp_path, 1, [])
    assert events == flushes.as_replaced(path)
    events.clear()
    writer.truncate(2)
    metrics, timings = tmp_path / "metrics.jsonl", tmp_path / "timings.jsonl"
    assert events == flushes.as_replaced(metrics) + flushes.as_replaced(timings)


# -- steps and torn lines -------------------------------------------------------------------------------------------


def steps_in(path: Path) -> list[int]:
    return [json.loads(line)["step"] for line in path.read_text().splitlines()]


@pytest.mark.parametrize("longer", ["metrics.jsonl", "timings.jsonl"])
def test_a_new_writer_goes_on_from_the_later_of_the_two_files(tmp_path: Path, longer: str) -> None:
    """A kill between the two appends leaves one of them a row longer."""
    write_steps(tmp_path, 3)
    for name in ("metrics.jsonl", "timings.jsonl"):
        if name != longer:
            path = tmp_path / name
            path.write_text("".join(path.read_text().splitlines(keepends=True)[:2]))
    with pytest.raises(ValueError, match=r"step 2 after step 2: call truncate\(2\)"):
        runs_metrics.MetricsWriter(tmp_path).write({"step": 2}, {})


@pytest.mark.parametrize("torn", ["metrics.jsonl", "timings.jsonl"])
def test_a_torn_line_in_either_file_must_be_truncated_first(tmp_path: Path, torn: str) -> None:
    write_steps(tmp_path, 2)
    with (tmp_path / torn).open("a") as file:
        file.write('{"step": 2')
    with pytest.raises(ValueError, match="torn line"):
        runs_metrics.MetricsWriter(tmp_path).write({"step": 2}, {})


def test_a_step_before_what_is_left_after_truncating_is_refused(tmp_path: Path) -> None:
    writer = write_steps(tmp_path, 5)
    writer.truncate(3)
    with pytest.raises(ValueError, match="step 1 after step 2"):
        writer.write({"step": 1}, {})
    writer.write({"step": 3}, {})
    with pytest.raises(ValueError, match="step 3 after step 3"):
        writer.write({"step": 3}, {})
    assert steps_in(tmp_path / "metrics.jsonl") == steps_in(tmp_path / "timings.jsonl") == [0, 1, 2, 3]


def test_a_damaged_line_before_a_torn_one_is_named(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_bytes(b'{"step": 0}\n{"step": \n{"step": 2}\n{"st')
    with pytest.raises(ValueError, match=r"metrics\.jsonl:2: not a JSON object"):
        runs_metrics.read_rows(tmp_path / "metrics.jsonl")


def test_a_number_where_a_text_belongs_is_named(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 0, "safe/phase": "WARMUP"}\n{"step": 1, "safe/phase": 1.5}\n')
    with pytest.raises(ValueError, match=r"metrics\.jsonl:2: safe/phase"):
        runs_metrics.read_rows(tmp_path / "metrics.jsonl")


# -- plain lines ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("first", "total", "expected"),
    [
        (0, 5, [1, 2, 3, 4, 5]),  # a line each
        (0, 40, [1, *range(3, 40, 3), 40]),  # ceil(40 / 18) = 3
        (7, 26, [8, *range(9, 26, 2), 26]),  # ceil(19 / 18) = 2, counted from where the run was resumed
        (7, 13, [8, 9, 10, 11, 12, 13]),
    ],
)
def test_plain_lines_come_at_even_distances_from_where_the_run_begins(
    first: int, total: int, expected: list[int]
) -> None:
    to = console()
    with console_module.Progress(total, first_step=first, console=to) as progress:
        for step in range(first, total):
            progress.update({"step": step, **ROW})
    assert [int(line.partition("/")[0]) for line in printed(to).splitlines()] == expected


def test_the_time_left_counts_from_the_first_step_of_this_process_and_not_from_when_the_bar_was_made() -> None:
    now, to = [0.0], console()
    progress = console_module.Progress(30, first_step=10, console=to, clock=lambda: now[0])
    now[0] = 500.0  # the evaluation before training, say
    with progress:
        for step in range(10, 30):
            now[0] += 6
            progress.update({"step": step, **ROW})
    lines = [line.rpartition("left ")[2] for line in printed(to).splitlines()]
    assert lines == [f"0:{6 * (30 - done) // 60:02}:{6 * (30 - done) % 60:02}" for done in [11, *range(12, 31, 2)]]


# -- what is told ---------------------------------------------------------------------------------------------------


def test_what_a_person_must_know_of_is_one_line_on_stderr_alone(capsys: pytest.CaptureFixture[str]) -> None:
    console_module.tell("two\nlines \x1b[2J")
    assert capsys.readouterr() == ("", "two lines \\x1b[2J\n")


def test_a_sentence_that_another_error_would_hide_is_told_and_the_error_goes_on(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(KeyError, match="gold"), console_module.said_if_lost("step 3 failed"):
        raise KeyError("gold")
    assert capsys.readouterr().err == "step 3 failed\n"
    with console_module.said_if_lost("step 4 failed"):
        pass
    assert capsys.readouterr().err == ""


def test_every_figure_of_a_decision_is_recorded_as_a_metric() -> None:
    figures: dict[str, Any] = {
        "kl_coef": 0.25, "threshold": 0.3, "excess": 0.01, "kl_short": 0.31, "kl_long": 0.29, "gate": 1.5,
        "phase": "PLATEAU", "pid_p": 0.1, "pid_i": -0.2, "pid_d": 0.3, "entropy_floor": 1.3, "reason": "why",
        "update_kl": 0.015,
    }  # fmt: skip
    expected = {f"safe/{name}": value for name, value in figures.items()}
    assert decision_metrics(Decision(**figures)) == expected
    assert set(expected) <= set(names.METRICS)


def test_only_the_reward_has_an_error_behind_it_and_only_three_samples_are_shown() -> None:
    assert [row[1] for row in evaluation.evaluation_rows({"before": BEFORE})] == [
        "0.5000 ± 0.0200", "0.0000", "3.200", "0.800", "30.0",
    ]  # fmt: skip
    sample: dict[str, Any] = {"prompt": "p", "before": "b", "after": "a", "reward_before": 1.0, "reward_after": 2.0}
    for count in (1, 3):
        table = summary.samples_table({"samples": [sample] * 5}, count=count)
        assert table.row_count == count
    to = Console(file=io.StringIO(), width=60, color_system=None)
    to.print(summary.samples_table({"samples": [sample]}))
    assert "[1.000] b" in printed(to)
    assert "[2.000] a" in printed(to)
