"""What `compare` is given: runs, sweeps and foreign logs, each under a name of its own."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

from stable_rlhf.cli.main import main
from stable_rlhf.errors import ConfigError, Exit, RunError
from stable_rlhf.evidence import find_outcomes
from stable_rlhf.evidence.outcome import Outcome, Status
from stable_rlhf.runs import RunLock, sweeps
from tests.evidence.outcomes import SCORES, incident, write_run

ROWS: list[dict[str, Any]] = [{SCORES: 0.25}, {SCORES: 0.75}]


def end(cell: str, code: int, reason: str | None = None) -> dict[str, Any]:
    return {"cell": cell, "exit_code": code, "reason": reason, "seconds": 1.0, "ended": "2026-11-27T00:00:00Z"}


@pytest.fixture
def sweep(tmp_path: Path) -> Path:
    """Cells: a finished one, one that crashed before its first step, one that the guard gave up, one not begun."""
    folder, names = tmp_path / "SWEEP", ["done", "ill", "given-up", "waiting"]
    (folder / sweeps.SETTINGS).mkdir(parents=True)
    (folder / sweeps.ASKED).write_text(
        yaml.safe_dump({"version": 1, "base": {}, "grid": {}, "seeds": [0], "cells": names})
    )
    for seed, name in enumerate(names):
        sweeps.write_settings(folder, name, yaml.safe_dump({"preset": "ppo", "seed": seed}))
    write_run(sweeps.cell_folder(folder, "done"), ROWS, config={"preset": "ppo"})
    write_run(sweeps.cell_folder(folder, "given-up"), ROWS, config={"max_steps": 9}, incidents=[incident(1, "stop")])
    lines = [end("done", 0), end("ill", 1, "out of memory"), end("given-up", 3, "the guard stopped the run")]
    (folder / sweeps.OUTCOMES).write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def test_every_cell_of_a_sweep_is_a_row_that_says_how_it_ended(sweep: Path) -> None:
    found = find_outcomes([sweep])
    assert [(each.name, each.status) for each in found] == [
        ("done", Status.FINISHED),
        ("ill", Status.CRASHED),
        ("given-up", Status.GIVEN_UP),
        ("waiting", Status.MISSING),
    ]
    done, ill, _, waiting = found
    assert done.figures["reward/average"] == 0.5
    assert ill.why == "it ended with exit code 1: out of memory"
    assert (ill.settings["preset"], ill.seed, ill.figures) == ("ppo", 1, {"healthy": 0.0})
    assert waiting.why == "it has not begun"
    assert waiting.settings["preset"] == "ppo"


def test_a_sweep_whose_own_files_are_broken_is_refused_with_the_file(sweep: Path) -> None:
    (sweep / sweeps.ASKED).write_text("cells: 3\n")
    with pytest.raises(RunError, match=r"sweep\.yaml: it has no list `cells` of names, as older versions wrote it"):
        find_outcomes([sweep])
    (sweep / sweeps.ASKED).write_text("cells: [\n")
    with pytest.raises(RunError, match=r"sweep\.yaml: cannot be read as YAML"):
        find_outcomes([sweep])


def test_runs_of_one_name_are_told_apart_by_their_folders(tmp_path: Path) -> None:
    for parent in ("a", "b"):
        write_run(tmp_path / parent / "run", ROWS)
    write_run(tmp_path / "other", ROWS)
    found = find_outcomes([tmp_path / "a/run", tmp_path / "b/run", tmp_path / "other"])
    assert [each.name for each in found] == ["a/run", "b/run", "other"]


def test_a_run_given_twice_is_refused(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", ROWS)
    os.symlink(run, tmp_path / "link")
    with pytest.raises(ConfigError, match="link is given twice"):
        find_outcomes([run, tmp_path / "link"])


def test_a_peers_log_is_an_outcome_of_its_own_name(tmp_path: Path) -> None:
    (tmp_path / "grpo-seed3.csv").write_text(f"step,{SCORES}\n1,0.25\n2,0.75\n")
    (found,) = find_outcomes([tmp_path / "grpo-seed3.csv"])
    assert (found.name, found.seed, found.figures["reward/average"]) == ("grpo-seed3.csv", 3, 0.5)


def ended(folder: Path, ends: Mapping[str, int]) -> Path:
    """Cells by name -> exit code; each did 2 of 4 steps."""
    (folder / "settings").mkdir(parents=True)
    asked = {"version": 1, "base": {}, "grid": {}, "seeds": [0], "cells": [*ends, "seed=99"]}
    (folder / "sweep.yaml").write_text(yaml.safe_dump(asked))
    (folder / "settings" / "seed=99.yaml").write_text("preset: safe\nseed: 99\n")
    for name, code in ends.items():
        write_run(folder / "cells" / name, [{SCORES: 1.0}] * 2, config={"max_steps": 4})
        sweeps.record_outcome(folder, name, code, "out of memory" if code else None, 1.0)
    return folder


def one(found: list[Outcome], name: str) -> Outcome:
    return next(each for each in found if each.name == name)


def test_a_cell_that_failed_has_crashed_and_one_that_somebody_stopped_is_unfinished(tmp_path: Path) -> None:
    codes = {"failed": Exit.FAILED, "stopped": Exit.INTERRUPTED, "killed": -9, "terminated": Exit.TERMINATED}
    found = find_outcomes([ended(tmp_path / "a sweep", codes)])
    assert one(found, "failed").status is Status.CRASHED
    assert "exit code 1: out of memory" in (one(found, "failed").why or "")
    assert one(found, "failed").figures["healthy"] == 0.0
    for name in ("stopped", "killed", "terminated"):  # the same command continues them: they are no result
        assert one(found, name).status is Status.UNFINISHED
        assert "healthy" not in one(found, name).figures
    assert (one(found, "seed=99").why, one(found, "seed=99").seed) == ("it has not begun", 99)


def test_a_cell_that_failed_before_and_runs_again_is_running(tmp_path: Path) -> None:
    folder = ended(tmp_path / "sweep", {"again": Exit.FAILED})
    lock = RunLock(folder / "cells" / "again")
    lock.take()
    try:
        found = one(find_outcomes([folder]), "again")
    finally:
        lock.release()
    assert found.status is Status.RUNNING
    assert "healthy" not in found.figures


def test_a_run_counts_once(tmp_path: Path) -> None:
    folder = ended(tmp_path / "sweep", {"cell": Exit.DONE})
    with pytest.raises(ConfigError, match="cell is given twice, by itself and as a cell of its sweep"):
        find_outcomes([folder / "cells" / "cell", folder])


def test_a_mapping_that_no_path_needs_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"--mapping m\.yaml: has no effect, as no CSV or JSON-lines file is given"):
        find_outcomes([write_run(tmp_path / "run", [{SCORES: 1.0}])], Path("m.yaml"))


@pytest.mark.parametrize(
    ("file", "line", "said"),
    [
        (
            "metrics.jsonl",
            {"step": 2, SCORES: 1e300},
            "metrics.jsonl:3: objective/scores is 1e+300: a figure",
        ),
        ("metrics.jsonl", {"step": 2, SCORES: 10**400}, "metrics.jsonl:3: objective/scores is 1000"),
        (
            "metrics.jsonl",
            {"step": 10**30, SCORES: 1.0},
            "metrics.jsonl:3: a row needs an integer `step`",
        ),
        ("starts.jsonl", {"time": "2026-01-01", "device": "cpu", "inputs": [1]}, "starts.jsonl:1: not a start"),
        (
            "evaluation.json",
            {"before": {"reward": 1}, "after": {"reward": 1e300}},
            "reward of step 2 in evaluation.json",
        ),
    ],
)
def test_a_figure_of_which_no_mean_can_be_taken_is_a_broken_run(
    tmp_path: Path, file: str, line: Mapping[str, object], said: str
) -> None:
    run = write_run(tmp_path / "run", [{SCORES: 1.0}] * 2)
    with (run / file).open("a") as opened:
        opened.write(json.dumps(line) + "\n")
    [found] = find_outcomes([run])
    assert found.status is Status.BROKEN
    assert said in (found.why or "")


# -- the command ----------------------------------------------------------------------------------------------------


def test_the_command_prints_tables_or_json_and_writes_the_page(sweep: Path, tmp_path: Path, capsys) -> None:
    page = tmp_path / "compare.html"
    assert main(["compare", str(sweep), "--out", str(page)]) == 0
    told = capsys.readouterr().out
    assert "training average" in told
    assert "Note: 1 of 4 runs has no figures: waiting: it has not begun." in told.replace("\n", " ")
    assert told.rstrip().endswith(f"Page: {page}")
    assert "out of memory" in page.read_text()
    assert main(["compare", str(sweep), "--json"]) == 0
    made = json.loads(capsys.readouterr().out)
    assert [run["status"] for run in made["runs"]] == ["finished", "crashed", "given up", "missing"]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["{run}", "--by", "sed"], "--by sed: no run has this setting: did you mean seed?"),
        (["{run}", "--baseline", "x"], "--baseline 'x': no arm has this name: the arms are all runs"),
        (["{none}"], "there is nothing to compare: {none}/metrics.jsonl does not exist: give the folder of a run"),
        (["{run}", "{run}"], "{run} is given twice: give each run and each sweep once"),
    ],
)
def test_bad_input_costs_a_sentence(arguments: list[str], sentence: str, tmp_path: Path, capsys) -> None:
    places = {"run": str(write_run(tmp_path / "run", ROWS)), "none": str(tmp_path / "none")}
    assert main(["compare", *(each.format(**places) for each in arguments)]) == 2
    assert sentence.format(**places) in capsys.readouterr().err


def test_a_broken_run_among_others_is_a_row(sweep: Path, tmp_path: Path, capsys) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(sweeps.cell_folder(sweep, "done"), broken)
    (broken / "metrics.jsonl").write_text('{"step": 0, "objective/scores": NaN}\n')
    assert main(["compare", str(sweep), str(broken), "--json"]) == 0
    run = json.loads(capsys.readouterr().out)["runs"][-1]
    assert run["status"] == "broken"
    assert "metrics.jsonl:1: not a JSON object (NaN is not a finite number)" in run["why"]


def test_a_folder_of_logs_and_runs_says_what_to_give(tmp_path: Path) -> None:
    other = tmp_path / "other"
    write_run(other / "z-run", ROWS)
    (other / "a.csv").write_text("step,reward\n1,0.5\n")
    (other / "readme.txt").write_text("")
    (found,) = find_outcomes([other])
    assert found.status is Status.MISSING
    said = f"{other} is no run or log, but holds 2: give what it holds, such as {other}/a.csv {other}/z-run"
    assert found.why == said


def test_a_run_before_its_first_step_is_no_folder_of_logs(tmp_path: Path) -> None:
    (tmp_path / "starts.jsonl").write_text("")
    (found,) = find_outcomes([tmp_path])
    assert "such as" not in (found.why or "")
