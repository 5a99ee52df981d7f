"""Sweeps as they run: what is skipped, resumed, recorded and said. tests/faults has the kills."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from stable_rlhf.errors import Exit
from stable_rlhf.evidence.sweep import _last_words
from tests.faults import children
from tests.faults.sweeps import GRID, Sweeps, use_forks
from tests.faults.training import Tiny


@pytest.fixture(scope="module")
def sweeps(tmp_path_factory: pytest.TempPathFactory) -> Sweeps:
    made = Sweeps(Tiny.make(tmp_path_factory.mktemp("sweeps")))
    made.run("whole")
    return made


def _path(sweeps: Sweeps, name: str) -> Path:
    return sweeps.tiny.folder / name


def outcomes(sweeps: Sweeps, sweep: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (sweeps.tiny.folder / sweep / "outcomes.jsonl").read_text().splitlines()]


def test_a_sweep_leaves_its_cells_outcomes_logs_and_what_was_asked(sweeps: Sweeps) -> None:
    folder = sweeps.tiny.folder / "whole"
    names = ["preset=ppo,seed=0", "preset=safe,seed=0", "preset=ppo,seed=1", "preset=safe,seed=1"]
    ends = outcomes(sweeps, "whole")
    assert [end["cell"] for end in ends] == names
    assert all(end["exit_code"] == 0 and end["reason"] is None and end["seconds"] > 0 for end in ends)
    asked = yaml.safe_load((folder / "sweep.yaml").read_text())
    assert (asked["version"], asked["seeds"], asked["grid"]) == (1, [0, 1], {"preset": ["ppo", "safe"]})
    assert asked["base"]["max_steps"] == 2
    assert {path.name for path in (folder / "logs").iterdir()} == {f"{name}.txt" for name in names}
    config = yaml.safe_load((folder / "cells" / names[3] / "config.yaml").read_text())
    assert (config["preset"], config["seed"], config["max_steps"]) == ("safe", 1, 2)


def test_a_line_for_each_cell_says_its_reward_its_end_and_the_time_left(sweeps: Sweeps) -> None:
    lines = (sweeps.tiny.folder / "whole.said.txt").read_text().splitlines()
    assert lines[0] == "4 cells: 2 arms x 2 seeds, 1 at a time on the CPU; 4 to be started"
    rows = (sweeps.tiny.folder / "whole" / "cells" / "preset=ppo,seed=0" / "metrics.jsonl").read_text().splitlines()
    reward = sum(json.loads(row)["objective/scores"] for row in rows) / len(rows)
    assert lines[1].startswith(f"[1/4] preset=ppo  seed 0  reward {reward:.3f}  finished after 0:00:0")
    assert "  left 0:0" in lines[1]
    assert "left" not in lines[4]
    assert lines[5] == f"4 of 4 cells complete: {sweeps.tiny.folder / 'whole'}"


def test_complete_cells_are_skipped_values_are_added_and_a_torn_line_is_removed(sweeps: Sweeps) -> None:
    sweeps.run("more", "--preset", "ppo")
    before = outcomes(sweeps, "more")
    assert "; 1 complete\n1 of 1 cell complete" in sweeps.run("more", "--preset", "ppo")
    with (_path(sweeps, "more") / "outcomes.jsonl").open("a") as file:
        file.write('{"cell": "pre')
    assert "; 1 complete, 1 to be started" in sweeps.run("more", "--preset", "safe,ppo")
    after = outcomes(sweeps, "more")
    assert after[:1] == before
    assert [end["cell"] for end in after] == ["preset=ppo,seed=0", "preset=safe,seed=0"]
    sweeps.assert_same(
        "more", {name: sweeps.results("whole")[name] for name in ("preset=ppo,seed=0", "preset=safe,seed=0")}
    )


def test_a_cell_that_fails_is_a_result_and_is_tried_again_only_when_asked(sweeps: Sweeps) -> None:
    grid = ("--set", "reward.functions=[tests.faults.injections:reward],[tests.cli.test_main:broken]")
    said = sweeps.run("failed", *grid)
    failed = next(end for end in outcomes(sweeps, "failed") if end["exit_code"] != 0)
    assert failed["exit_code"] == Exit.REWARD
    assert "no such lexicon" in failed["reason"]
    assert "reward -  failed (4): " in said
    assert "1 of 2 cells complete; 1 failed, which is their result (--retry tries them again)" in said
    assert "1 complete, 1 failed\n" in sweeps.run("failed", *grid)
    assert len(outcomes(sweeps, "failed")) == 2
    assert "the failed ones are tried again" in sweeps.run("failed", *grid, "--retry")
    assert len(outcomes(sweeps, "failed")) == 3


def test_one_that_the_guard_gives_up_is_a_result_with_its_reason(sweeps: Sweeps) -> None:
    guard = ("--preset", "safe-no-regulation", "--guard.max_rollbacks", "0", "--guard.max_kl", "1e-9")
    assert "given up by the guard: " in sweeps.run("guard", *guard)
    assert outcomes(sweeps, "guard")[-1]["exit_code"] == Exit.GUARD


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        (["1/2 steps", "stable-rlhf: first", "stable-rlhf: the cause", "leaked semaphore"], "the cause"),
        (["stable-rlhf: a report", "Traceback (most recent call last):", 'File "x"', "KeyError: 3"], "KeyError: 3"),
        (["Killed"], "Killed"),
        ([], ""),
    ],
)
def test_the_reason_is_the_commands_own_last_line_or_that_of_a_traceback(lines: list[str], words: str) -> None:
    assert _last_words(lines) == words


def until(true: Callable[[], bool]) -> None:
    end = time.monotonic() + 60
    while not true():
        assert time.monotonic() < end
        time.sleep(0.02)


def stopped(sweeps: Sweeps, name: str, number: int, *grid: str) -> list[int]:
    """The exit codes of the cells of a sweep that got a signal once a cell had saved a checkpoint."""
    child = sweeps.start(name, *grid)
    until(lambda: any(_path(sweeps, name).glob("cells/*/checkpoints/step-*")))
    os.kill(child.pid, number)
    assert child.end() == 128 + number
    assert child.said.splitlines()[-1].endswith(" of 4 cells. The same command continues the sweep")
    return [end["exit_code"] for end in outcomes(sweeps, name)]


def test_ctrl_c_lets_the_cell_save_and_the_same_command_goes_on_to_the_same_bytes(sweeps: Sweeps) -> None:
    assert set(stopped(sweeps, "interrupted", signal.SIGINT, *GRID)) <= {0, 130}  # it may just have ended
    sweeps.run("interrupted", *GRID)
    sweeps.assert_same("interrupted", sweeps.results("whole"))


def test_sigterm_reaches_every_cell_and_no_other_is_started(sweeps: Sweeps) -> None:
    codes = stopped(sweeps, "terminated", signal.SIGTERM, *GRID, "--jobs", "2", "--max_steps", "50")
    assert 143 in codes
    assert set(codes) <= {143, -signal.SIGTERM}  # of one that had not begun to train
    assert len(codes) == 2
    begun = {folder.name for folder in _path(sweeps, "terminated").glob("cells/*")}  # one may have had no time for it
    assert begun <= {end["cell"] for end in outcomes(sweeps, "terminated")}


def test_two_sweeps_do_not_run_the_same_cells(sweeps: Sweeps) -> None:
    first = sweeps.start("twice", "--preset", "ppo")
    until(lambda: (_path(sweeps, "twice") / "cells").exists())
    second = children.start(sweeps.arguments("twice", "--preset", "ppo"), _path(sweeps, "second.txt"), use_forks)
    assert second.end() == Exit.BAD_INPUT
    assert f"is in use by process {first.pid} on " in second.said
    assert first.end() == Exit.DONE


def test_a_dry_run_writes_nothing_and_says_what_is_left(sweeps: Sweeps) -> None:
    before = sorted((sweeps.tiny.folder / "whole").rglob("*"))
    said = sweeps.run("whole", "--preset", "ppo,safe", "--seeds", "3", "--dry-run").splitlines()
    assert said[0] == "preset=ppo  seed 0  complete"
    assert said[5] == "preset=safe  seed 2  to be started"
    assert said[6].endswith("; 4 complete, 2 to be started")
    assert said[7].startswith("forecast: 0:00:0")
    assert said[7].endswith(" for 2 cells, as the cells that are complete took")
    assert sorted((sweeps.tiny.folder / "whole").rglob("*")) == before


@pytest.mark.parametrize(
    ("file", "text", "said"),
    [
        ("sweep.yaml", "version: 9\nbase: {}\ngrid: {preset: [ppo]}\nseeds: [0]\n", "version 9 is not 1"),
        ("sweep.yaml", "version: 1\nbase: {}\nseeds: [0]\n", "grid is missing or of the wrong kind"),
        ("sweep.yaml", "version: 1\nbase: {}\ngrid: {preset: 3}\nseeds: [0]\n", "grid.preset is missing or of the"),
        ("sweep.yaml", "version: [1\n", "repair the YAML"),
        ("outcomes.jsonl", "{}\n", "outcomes.jsonl:1: not an outcome"),
        ("outcomes.jsonl", "[" * 100_000 + "\n", "outcomes.jsonl:1: not an outcome"),
    ],
)
def test_a_damaged_sweep_costs_a_sentence(sweeps: Sweeps, file: str, text: str, said: str) -> None:
    folder = _path(sweeps, "damaged")
    folder.mkdir(exist_ok=True)
    if file != "sweep.yaml":
        asked = yaml.safe_load((_path(sweeps, "whole") / "sweep.yaml").read_text())
        (folder / "sweep.yaml").write_text(yaml.dump(asked))
    (folder / file).write_text(text)
    child = sweeps.start("damaged")
    assert child.end() == Exit.BAD_INPUT
    assert said in child.said
    assert len(child.said.splitlines()) == 1


def test_a_folder_of_another_kind_and_another_sweep_are_refused(sweeps: Sweeps) -> None:
    (_path(sweeps, "other")).mkdir()
    (_path(sweeps, "other") / "notes.txt").touch()
    child = sweeps.start("other")
    assert child.end() == Exit.BAD_INPUT
    assert "is not empty and no sweep; choose a new folder" in child.said
    child = sweeps.start("whole", "--preset", "ppo,safe", "--seeds", "2", "--set", "optim.lam=0.5,0.9")
    assert child.end() == Exit.BAD_INPUT
    assert "holds another sweep: optim.lam varies here, and not there" in child.said
