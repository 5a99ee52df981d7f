"""incidents.jsonl: what is written is what is read, to the byte of a torn line; and a person's screen is safe."""

from __future__ import annotations

import contextlib
import json
import math
import os
import pty
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from stable_rlhf.runs import incidents
from tests import flushes

INCIDENT: dict[str, Any] = {
    "step": 7,
    "action": "roll back",
    "rule": "max_kl",
    "seen": "the KL is 6 nats per token, above its ceiling of 2",
    "done": "went back to the state after 4 steps",
    "advice": "lower optim.learning_rate",
    "figures": {"objective/kl": 6.0, "episode": 64, "val/explained_variance": None},
}


def of_step(step: int) -> dict[str, Any]:
    return {**INCIDENT, "step": step}


def test_a_run_without_incidents_has_none(tmp_path: Path) -> None:
    assert incidents.read(tmp_path) == []
    incidents.truncate(tmp_path, 3)
    assert list(tmp_path.iterdir()) == []


def test_what_is_recorded_is_read_back_in_order_and_said_in_one_sentence(tmp_path: Path, capsys) -> None:
    for step in (7, 9):
        incidents.record(tmp_path, of_step(step))
    assert incidents.read(tmp_path) == [of_step(7), of_step(9)]
    out, err = capsys.readouterr()
    assert out == ""
    assert err.splitlines() == [
        f"step {step}: the KL is 6 nats per token, above its ceiling of 2: went back to the state after 4 steps. If it "
        "continues: lower optim.learning_rate."
        for step in (7, 9)
    ]


def test_figures_that_are_not_finite_are_words_in_strict_json(tmp_path: Path) -> None:
    figures = {"a": math.nan, "b": math.inf, "c": -math.inf, "d": 1e308}
    incidents.record(tmp_path, {**INCIDENT, "figures": figures})
    (line,) = (tmp_path / "incidents.jsonl").read_text(encoding="ascii").splitlines()
    assert not {"NaN", "Infinity"} & set(line.replace(":", " ").replace(",", " ").replace("}", " ").split())
    assert incidents.read(tmp_path)[0]["figures"] == {"a": "nan", "b": "inf", "c": "-inf", "d": 1e308}


def test_hostile_text_is_kept_as_it_is_and_shown_as_text(tmp_path: Path, capsys) -> None:
    hostile = {**INCIDENT, "seen": "rewards/\x1b]0;owned\x07\x1b[2J\u202e/mean is nan\nstep 9: all is well \ud800"}
    incidents.record(tmp_path, hostile)
    (line,) = (tmp_path / "incidents.jsonl").read_bytes().splitlines()
    assert json.loads(line)["seen"] == hostile["seen"]
    assert incidents.read(tmp_path) == [hostile]
    shown = capsys.readouterr().err
    assert shown.count("\n") == 1
    assert "rewards/\\x1b]0;owned\\x07\\x1b[2J\\u202e/mean is nan step 9: all is well \\ud800" in shown


@pytest.mark.parametrize("kept", [1, 40, -1])
def test_a_torn_last_line_is_left_out_and_gone_after_a_truncation(tmp_path: Path, kept: int) -> None:
    """-1: all of it but the newline."""
    for step in (1, 2):
        incidents.record(tmp_path, of_step(step))
    path = tmp_path / "incidents.jsonl"
    first, second = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(first + second[:kept])
    assert incidents.read(tmp_path) == [of_step(1)]
    incidents.truncate(tmp_path, 9)
    assert path.read_bytes() == first
    incidents.record(tmp_path, of_step(3))
    assert incidents.read(tmp_path) == [of_step(1), of_step(3)]


@pytest.mark.parametrize(("step", "left"), [(0, []), (4, []), (5, [4]), (6, [4, 5]), (99, [4, 5, 6])])
def test_truncating_drops_the_step_and_later_ones_and_keeps_the_bytes_of_the_rest(
    tmp_path: Path, step: int, left: list[int]
) -> None:
    for number in (4, 5, 6):
        incidents.record(tmp_path, of_step(number))
    path = tmp_path / "incidents.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    incidents.truncate(tmp_path, step)
    assert path.read_bytes() == b"".join(lines[: len(left)])
    assert [found["step"] for found in incidents.read(tmp_path)] == left
    assert [file.name for file in tmp_path.iterdir()] == ["incidents.jsonl"]


WRONG: dict[str, tuple[Any, str]] = {
    "a list": ([1, 2], "expected an object with step, action, rule, seen, done, advice, figures"),
    "a number": (3, "expected an object with"),
    "too few": ({"step": 1}, "expected an object with"),
    "too many": ({**INCIDENT, "more": 1}, "expected an object with"),
    "no step": ({**INCIDENT, "step": "7"}, "its step is '7', expected a whole number from 0 up"),
    "true": ({**INCIDENT, "step": True}, "its step is True, expected"),
    "negative": ({**INCIDENT, "step": -1}, "its step is -1, expected"),
    "no text": ({**INCIDENT, "seen": None}, "its seen is None, expected a text"),
    "a list for a text": ({**INCIDENT, "advice": ["x"]}, "its advice is ['x'], expected a text"),
    "no figures": ({**INCIDENT, "figures": [1]}, "its figures are [1], expected numbers by their names"),
    "a text": ({**INCIDENT, "figures": {"a": "<script>"}}, "its figures are {'a': '<script>'}, expected numbers"),
    "a truth": ({**INCIDENT, "figures": {"a": True}}, "its figures are {'a': True}, expected numbers"),
    "nested": ({**INCIDENT, "figures": {"a": {}}}, "its figures are {'a': {}}, expected numbers"),
}


@pytest.mark.parametrize("kind", WRONG)
def test_a_line_that_is_no_incident_is_named_and_nothing_is_changed(tmp_path: Path, kind: str) -> None:
    value, fault = WRONG[kind]
    refused(tmp_path, json.dumps(value).encode(), fault)


@pytest.mark.parametrize(
    ("line", "fault"),
    [
        (b"", "Expecting value"),
        (b"{", "Expecting property name"),
        (b'"\xff"', "codec can't decode"),
        (json.dumps(INCIDENT).replace("6.0", "NaN").encode(), "NaN is not a finite number"),
        (json.dumps(INCIDENT).replace("6.0", "1e999").encode(), "1e999 is not a finite number"),
        (b"[" * 100_000, "recursion"),
    ],
)
def test_a_line_that_is_no_strict_json_is_named(tmp_path: Path, line: bytes, fault: str) -> None:
    refused(tmp_path, line, fault)


def refused(folder: Path, line: bytes, fault: str) -> None:
    incidents.record(folder, INCIDENT)
    path = folder / "incidents.jsonl"
    path.write_bytes(path.read_bytes() + line + b"\n" + path.read_bytes())
    whole = path.read_bytes()
    for act in (lambda: incidents.read(folder), lambda: incidents.truncate(folder, 99)):
        with pytest.raises(ValueError, match="not an incident") as caught:
            act()
        assert str(caught.value).startswith(f"{path}:2: not an incident (")
        assert fault in str(caught.value)
        assert str(caught.value).endswith("); repair or remove this line")
    assert path.read_bytes() == whole


@pytest.mark.parametrize("quiet", [True, False])
def test_what_a_person_must_know_is_on_the_terminal_beside_a_bar_and_without_one(quiet: bool) -> None:
    """In a pseudo-terminal, whose two ends are standard output and standard error as on a real one."""
    code = (
        "from rich.console import Console; from stable_rlhf.console import Progress, tell\n"
        f"with Progress(3, console=Console(quiet={quiet})):\n"
        "    tell('step 1: gone back')\n"
    )
    ours, theirs = pty.openpty()
    environment = {**os.environ, "TERM": "xterm"}
    with subprocess.Popen([sys.executable, "-c", code], stdout=theirs, stderr=theirs, env=environment):
        os.close(theirs)
        shown = b""
        with contextlib.suppress(OSError):  # how Linux ends a pseudo-terminal whose other end is closed
            while piece := os.read(ours, 65536):
                shown += piece
    os.close(ours)
    assert b"step 1: gone back" in shown


# -- the disk and a resume ------------------------------------------------------------------------------------------


def test_an_incident_is_on_the_disk_whole_before_it_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events = flushes.recorded(monkeypatch)
    lengths = []
    for step in (7, 9):
        incidents.record(tmp_path, of_step(step))
        lengths.append((tmp_path / "incidents.jsonl").stat().st_size)
    assert events == [f"incidents.jsonl: {length} bytes flushed" for length in lengths]


def test_truncated_incidents_are_written_aside_and_flushed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for step in (4, 5):
        incidents.record(tmp_path, of_step(step))
    events = flushes.recorded(monkeypatch)
    incidents.truncate(tmp_path, 5)
    assert events == flushes.as_replaced(tmp_path / "incidents.jsonl")


def test_a_stop_is_recorded_and_left_to_the_error_to_say(tmp_path: Path, capsys) -> None:
    stop = {**INCIDENT, "action": "stop", "step": 0}
    incidents.record(tmp_path, stop)
    assert incidents.read(tmp_path) == [stop]
    assert capsys.readouterr() == ("", "")
    assert incidents.sentence(stop) == (
        "step 0: the KL is 6 nats per token, above its ceiling of 2: went back to the state after 4 steps. In a new "
        "run: lower optim.learning_rate."
    )
