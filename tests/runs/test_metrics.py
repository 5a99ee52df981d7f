"""runs: files that survive kills and refuse what is not true, and text that cannot act on a terminal."""

from __future__ import annotations

import io
import json
import re
import unicodedata
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from stable_rlhf import console as console_module
from stable_rlhf import files
from stable_rlhf import text as text_module
from stable_rlhf.report import summary
from stable_rlhf.runs import evaluation as runs_evaluation
from stable_rlhf.runs import metrics, names

DOC = Path(__file__).parent.parent.parent / "docs" / "metrics.md"


def console(*, terminal: bool = False, width: int = 100) -> Console:
    return Console(file=io.StringIO(), force_terminal=terminal, width=width, color_system=None, legacy_windows=False)


def printed(to: Console) -> str:
    assert isinstance(to.file, io.StringIO)
    return to.file.getvalue()


def write_steps(folder: Path, steps: int) -> metrics.MetricsWriter:
    writer = metrics.MetricsWriter(folder)
    for step in range(steps):
        writer.write({"step": step, "objective/kl": 0.1 * step, "safe/phase": "WARMUP"}, {"total_s": 1.5})
    return writer


# --- the list of metrics ---------------------------------------------------------------------------


def documented(heading: str) -> list[str]:
    section = DOC.read_text(encoding="utf-8").split(f"\n## {heading}\n")[1].split("\n## ")[0]
    return re.findall(r"^\| `([^`]+)` \|", section, flags=re.MULTILINE)


def test_documentation_lists_exactly_the_metrics_of_the_code():
    assert sorted(documented("metrics.jsonl")) == sorted(names.METRICS)
    assert documented("timings.jsonl") == list(names.TIMINGS)
    assert sorted(documented("evaluation.json")) == sorted(
        [*runs_evaluation.EVALUATION, "reward_se", "prompts", *runs_evaluation.gold_figures("<name>", [])]
    )


def test_every_documented_metric_has_formula_unit_and_healthy_range():
    section = DOC.read_text(encoding="utf-8").split("\n## timings.jsonl\n")[0]
    rows = [line for line in section.splitlines() if line.startswith("| `")]
    cells = {row.split("|")[1].strip(" `"): [cell.strip() for cell in row.split("|")[1:-1]] for row in rows}
    assert [name for name in names.METRICS if len(cells[name]) != 4 or not all(cells[name])] == []


# --- metrics.jsonl and timings.jsonl ---------------------------------------------------------------


def test_rows_are_on_disk_as_strict_json_after_each_write(tmp_path: Path):
    writer = metrics.MetricsWriter(tmp_path / "run")
    row = {
        "step": 0,
        "objective/kl": 0.1,
        "safe/threshold": None,
        "rewards/length/mean": -2,
        "safe/reason": "\ud800 \u2028",
    }
    writer.write(row, {"total_s": 1.5, "tokens_per_s": 100})
    row["safe/reason"] = "\ufffd \u2028"  # strict readers refuse half of a surrogate pair
    assert json.loads((tmp_path / "run" / "metrics.jsonl").read_text(encoding="ascii")) == row
    timing = json.loads((tmp_path / "run" / "timings.jsonl").read_text(encoding="ascii"))
    assert timing == {"step": 0, "total_s": 1.5, "tokens_per_s": 100}


@given(st.floats(allow_nan=False, allow_infinity=False))
def test_every_finite_number_comes_back_bit_for_bit(number: float):
    assert json.loads(json.dumps(number), parse_float=files.finite).hex() == number.hex()


@pytest.mark.parametrize(
    ("row", "timing", "message"),
    [
        ({"step": 0, "objective/kl": float("nan")}, {}, "objective/kl is nan"),
        ({"step": 0, "grad_norm/policy": float("inf")}, {}, "grad_norm/policy is inf"),
        ({"step": 0, "objective/klx": 1.0}, {}, "unknown metric 'objective/klx'"),
        ({"step": 0, "rewards/a/b/mean": 1.0}, {}, "unknown metric 'rewards/a/b/mean'"),
        ({"step": 0, "total_s": 1.0}, {}, "unknown metric 'total_s'"),
        ({"step": 0, "lr": "1e-4"}, {}, "lr is '1e-4'"),
        ({"step": 0, "lr": True}, {}, "lr is True"),
        ({"step": 0, "safe/phase": 3}, {}, "safe/phase is 3"),
        ({"step": -1}, {}, "step is -1"),
        ({"step": 1.0}, {}, "step is 1.0"),
        ({"objective/kl": 1.0}, {}, "step is None"),
        ({"step": 0}, {"wall_s": 1.0}, "unknown timing 'wall_s'"),
        ({"step": 0}, {"total_s": float("nan")}, "total_s is nan"),
        ({"step": 0}, {"step": 1}, "timing of step 1 given with the metrics of step 0"),
    ],
)
def test_row_that_is_not_true_is_refused_by_name_and_leaves_the_files_alone(tmp_path, row, timing, message):
    writer = metrics.MetricsWriter(tmp_path)
    with pytest.raises(ValueError, match=re.escape(message)):
        writer.write(row, timing)
    assert list(tmp_path.iterdir()) == []


def test_repeated_step_is_refused_also_by_a_new_writer(tmp_path: Path):
    writer = write_steps(tmp_path, 3)
    for each in (writer, metrics.MetricsWriter(tmp_path)):
        with pytest.raises(ValueError, match=r"step 2 after step 2: call truncate\(2\)"):
            each.write({"step": 2}, {})


def test_resumed_run_writes_the_same_bytes_as_one_that_was_never_stopped(tmp_path: Path):
    write_steps(tmp_path / "whole", 10)
    write_steps(tmp_path / "resumed", 7)
    with (tmp_path / "resumed" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 7, "objective/k')  # killed while writing
    writer = metrics.MetricsWriter(tmp_path / "resumed")
    writer.truncate(5)
    for step in range(5, 10):
        writer.write({"step": step, "objective/kl": 0.1 * step, "safe/phase": "WARMUP"}, {"total_s": 1.5})
    for name in ("metrics.jsonl", "timings.jsonl"):
        assert (tmp_path / "resumed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert list((tmp_path / "resumed").glob("*.tmp")) == []


def test_torn_last_line_must_be_truncated_before_writing(tmp_path: Path):
    write_steps(tmp_path, 3)
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(path.read_bytes()[:-10])
    writer = metrics.MetricsWriter(tmp_path)
    with pytest.raises(ValueError, match="torn line"):
        writer.write({"step": 3}, {})
    writer.truncate(2)
    writer.write({"step": 2}, {})
    assert [row["step"] for row in metrics.read_rows(path)[0]] == [0, 1, 2]


def test_row_that_lacks_only_its_newline_is_kept(tmp_path: Path):
    write_steps(tmp_path, 3)
    path = tmp_path / "metrics.jsonl"
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    metrics.MetricsWriter(tmp_path).truncate(3)
    assert path.read_bytes() == whole


def test_kill_at_any_byte_of_the_last_row_is_survived(tmp_path: Path):
    write_steps(tmp_path, 2)
    path = tmp_path / "metrics.jsonl"
    first, last = path.read_bytes().splitlines(keepends=True)
    for length in range(len(last)):
        path.write_bytes(first + last[:length])
        metrics.MetricsWriter(tmp_path).truncate(1)
        assert path.read_bytes() == first


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"step": 1, "objective/kl"', "not a JSON object"),
        (b"\xff\xfe", "not a JSON object"),
        (b"", "not a JSON object"),
        (b"[" * 100_000, "not a JSON object"),
        (b'{"step": 1, "objective/kl": 1e999}', "objective/kl is inf"),
        (b'{"step": 1, "objective/kl": 1' + b"0" * 400 + b"}", "objective/kl is 1000"),
        (b"[1]", "integer `step`"),
        (b'{"step": true}', "integer `step`"),
        (b'{"step": 0}', "step 0 follows step 0"),
        (b'{"step": 1, "objective/kl": [1]}', "objective/kl is \\[1\\]"),
    ],
)
def test_malformed_line_is_refused_with_its_number_and_nothing_is_changed(tmp_path: Path, line: bytes, message: str):
    writer = write_steps(tmp_path, 1)
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(path.read_bytes() + line + b'\n{"step": 2}\n')
    damaged = path.read_bytes()
    with pytest.raises(ValueError, match=rf"metrics\.jsonl:2: .*{message}"):
        writer.truncate(1)
    assert path.read_bytes() == damaged


def test_malformed_last_line_that_has_its_newline_is_no_torn_line(tmp_path: Path):
    (tmp_path / "metrics.jsonl").write_bytes(b'{"step": 0}\n{"step": 1, "ob\n')
    with pytest.raises(ValueError, match=r"metrics\.jsonl:2: not a JSON object"):
        metrics.MetricsWriter(tmp_path)


def test_truncate_drops_completions_of_the_steps_it_drops(tmp_path: Path):
    writer = write_steps(tmp_path, 30)
    for step in (0, 10, 20):
        metrics.write_completions(tmp_path, step, [])
    writer.truncate(20)
    assert sorted(path.name for path in (tmp_path / "completions").iterdir()) == [
        "step-000000.parquet",
        "step-000010.parquet",
    ]


# --- completions -----------------------------------------------------------------------------------


def test_completions_come_back_with_invalid_unicode_replaced(tmp_path: Path):
    rows = [
        {"prompt": "a\ud800b", "completion": "\ud83d\ude00 \x00", "score": 0.1, "length": 3, "kl": -0.02},
        {"prompt": "é", "completion": "", "score": None, "length": 0, "kl": None},
    ]
    path = metrics.write_completions(tmp_path, 10, rows)
    assert path == tmp_path / "completions" / "step-000010.parquet"
    assert pq.read_table(path).to_pylist() == [
        {**rows[0], "prompt": "a\ufffdb", "completion": "\U0001f600 \x00"},
        rows[1],
    ]
    assert [p.name for p in path.parent.iterdir()] == [path.name]


@pytest.mark.parametrize(
    ("change", "message"),
    [({"score": float("nan")}, "score of completion 1 is nan"), ({"reward": 1.0}, "completion 1: keys")],
)
def test_completion_that_is_not_true_is_refused_by_row(tmp_path: Path, change: dict, message: str):
    row = {"prompt": "p", "completion": "c", "score": 0.1, "length": 3, "kl": 0.0}
    with pytest.raises(ValueError, match=message):
        metrics.write_completions(tmp_path, 0, [row, row | change])
    assert not (tmp_path / "completions").exists()


# --- printable -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "limit", "expected"),
    [
        ("plain", 5, "plain"),
        ("plain", 4, "pla…"),
        ("plain", 1, "…"),
        ("", 1, ""),
        ("two\nlines\r\n", 40, "two⏎lines\\r⏎"),
        ("\x1b[31mred\x07", 40, "\\x1b[31mred\\x07"),
        ("\x9b31m \x7f", 40, "\\x9b31m \\x7f"),
        ("\u202egnp.exe\u2066", 40, "\\u202egnp.exe\\u2066"),
        ("zero\u200bwidth\ufeff", 40, "zero\\u200bwidth\\ufeff"),
        ("\u2028\u2029", 40, "\\u2028\\u2029"),
        ("\ud800\U000e0041", 40, "\\ud800\\U000e0041"),
        ("ab\x1bc", 6, "ab…"),  # an escape is left out rather than cut
        ("[bold]é漢😀[/]", 40, "[bold]é漢😀[/]"),
        ("a" + 10 * "\u0301" + "b\u0301", 40, "a" + 8 * "\u0301" + 2 * "\\u0301" + "b\u0301"),  # Tibetan stacks 8
    ],
)
def test_printable_shows_instead_of_acting(text: str, limit: int, expected: str):
    assert text_module.printable(text, limit) == expected


@given(st.text(st.characters()), st.integers(1, 50))
def test_printable_is_one_safe_line_within_its_limit(text: str, limit: int):
    shown = text_module.printable(text, limit)
    assert len(shown) <= limit
    assert [c for c in shown if unicodedata.category(c)[0] == "C" or c in "\u2028\u2029"] == []
    full = text_module.printable(text, 10 * len(text) + 1)
    assert shown == full if len(full) <= limit else shown.endswith("…") and full.startswith(shown[:-1])


def test_printable_refuses_a_limit_below_one():
    with pytest.raises(ValueError, match="limit is 0"):
        text_module.printable("x", 0)


# --- progress --------------------------------------------------------------------------------------

ROW = {"objective/scores": 0.51234, "objective/kl": 0.0345, "objective/entropy": 2.314, "safe/threshold": 0.3}


@pytest.mark.parametrize("total", [1, 7, 20, 100, 1234])
def test_without_a_terminal_there_are_at_most_twenty_plain_lines(total: int):
    to = console()
    with console_module.Progress(total, console=to) as progress:
        for step in range(total):
            progress.update({"step": step, **ROW})
    lines = printed(to).splitlines()
    assert len(lines) <= console_module.PLAIN_LINES
    assert len(lines) >= min(total, 10)
    assert lines[0].startswith(f"1/{total} steps ")
    assert lines[-1].startswith(f"{total}/{total} steps ")
    assert "\x1b" not in printed(to)


def test_plain_line_has_the_figures_and_the_time_left():
    now = [100.0]
    to = console()
    with console_module.Progress(110, first_step=10, console=to, clock=lambda: now[0]) as progress:
        now[0] += 60
        progress.update({"step": 10, **ROW})  # one step took 60 s, 99 are left
    assert printed(to) == "11/110 steps  reward 0.512  KL 0.035 / 0.300  entropy 2.31  left 1:39:00\n"


def test_metrics_that_a_preset_lacks_show_as_dashes():
    to = console()
    with console_module.Progress(1, console=to) as progress:
        progress.update({"step": 0, "safe/threshold": None, "objective/kl": 0.1})
    assert printed(to) == "1/1 steps  reward -  KL 0.100  entropy -  left 0:00:00\n"


def test_on_a_terminal_of_80_columns_the_bar_shows_every_figure():
    to = console(terminal=True, width=80)
    with console_module.Progress(200, first_step=100, console=to) as progress:
        progress.update({"step": 149, **ROW})
    last = re.split(r"\n|\r|\x1b\[2K", printed(to))[-2]  # the last drawing, before the cursor is shown again
    assert len(last) <= 80
    assert "150/200 steps" in last
    assert "reward 0.512  KL 0.035 / 0.300  entropy 2.31" in last


def test_progress_refuses_a_first_step_beyond_the_total():
    with pytest.raises(ValueError, match=r"first_step is 11: it must lie in 0\.\.10"):
        console_module.Progress(10, first_step=11)


# --- summary ---------------------------------------------------------------------------------------

BEFORE = {"reward": 0.5, "reward_se": 0.02, "kl": 0.0, "entropy": 3.2, "distinct_2": 0.8, "length": 30.0, "prompts": 64}
AFTER = {"reward": 0.9, "reward_se": 0.01, "kl": 0.3, "entropy": 2.9, "distinct_2": None, "length": 31.5, "prompts": 64}


def test_evaluation_rows_are_literal():
    assert runs_evaluation.evaluation_rows({"before": BEFORE, "after": AFTER}) == [
        ("reward", "0.5000 ± 0.0200", "0.9000 ± 0.0100", "+0.4000"),
        ("KL, nats per token", "0.0000", "0.3000", "+0.3000"),
        ("entropy, nats per token", "3.200", "2.900", "-0.300"),
        ("distinct-2", "0.800", "-", "-"),
        ("length, tokens", "30.0", "31.5", "+1.5"),
    ]
    assert runs_evaluation.evaluation_rows({"before": BEFORE})[0] == ("reward", "0.5000 ± 0.0200", "-", "-")


def test_gold_rewards_have_a_row_each_with_the_number_judged_where_it_is_not_all():
    before = BEFORE | {"gold/a/b/mean": 0.5, "gold/a/b/se": 0.25, "gold/a/b/judged": 64}
    after = AFTER | {"gold/a/b/mean": 0.25, "gold/a/b/se": None, "gold/a/b/judged": 1, "gold/\x1bc/mean": 1}
    rows = runs_evaluation.evaluation_rows({"before": before, "after": after | {"prompts": 64}})
    assert rows[5:] == [
        ("gold: a/b", "0.5000 ± 0.2500", "0.2500 (of 1)", "-0.2500"),
        ("gold: \\x1bc", "-", "1.0000", "-"),
    ]
    with pytest.raises(ValueError, match="the standard error of gold/a/b/mean of `before`"):
        runs_evaluation.evaluation_rows({"before": before | {"gold/a/b/se": "x"}, "after": after})


@pytest.mark.parametrize(
    ("evaluation", "message"),
    [({"after": AFTER}, "no `before`"), ({"before": BEFORE | {"kl": float("nan")}}, "kl of `before`")],
)
def test_evaluation_that_is_not_true_is_refused(evaluation: dict, message: str):
    with pytest.raises(ValueError, match=message):
        runs_evaluation.evaluation_rows(evaluation)


def test_summary_shows_hostile_text_and_markup_as_it_is():
    hostile = "[bold red]x[/bold red] [link=file:///etc/passwd]y[/link] \x1b]0;title\x07 \u202e"
    sample = {"prompt": hostile, "before": hostile, "after": None, "reward_before": 0.25, "reward_after": None}
    to = console(terminal=True, width=400)
    evaluation = {"before": BEFORE, "after": AFTER, "samples": [sample] * 5}
    resume = "stable-rlhf resume '[red]runs/x\x1b'"
    summary.print_summary("[red]runs/x\x1b", evaluation, resume, to)
    shown = printed(to)
    assert shown.count("[bold red]x[/bold red] [link=file:///etc/passwd]y[/link] \\x1b]0;title\\x07 \\u202e") == 3 * 2
    assert "[0.250] [bold red]x" in shown
    assert "Evaluation on 64 prompts" in shown
    assert (
        "\nRun: [red]runs/x\\x1b\nReport: [red]runs/x\\x1b/report.html\nResume: stable-rlhf resume '[red]runs/x\\x1b'\n"
        in shown
    )
    assert not re.search("\x1b(?!\\[[0-9;]*m)|[\x07\u202e]", shown)  # nothing but rich's own styles


@pytest.mark.parametrize(("rollbacks", "said"), [(0, None), (1, "once"), (3, "3 times")])
@pytest.mark.parametrize("held_out", [True, False])
def test_roll_backs_stand_in_the_closing_table(rollbacks: int, said: str | None, held_out: bool) -> None:
    side = {"reward": 1.0, "prompts": 2}
    to = Console(file=io.StringIO(), width=120)
    summary.print_summary("run", {"before": side, "after": side} if held_out else {}, None, to, rollbacks)
    shown = " ".join(to.file.getvalue().split())  # type: ignore[attr-defined]
    assert ("rolled this run back" in shown) == (said is not None)
    if said is not None:
        assert f"The guard rolled this run back {said}: see incidents.jsonl" in shown
