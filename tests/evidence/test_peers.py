"""evidence/peers.py: logs of TRL, CSV and JSON lines give the figures that the same numbers of ours give."""

from __future__ import annotations

import csv
import json
import os
import runpy
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from stable_rlhf.errors import ConfigError
from stable_rlhf.evidence.compare import compare
from stable_rlhf.evidence.outcome import Outcome, Status, read_outcome
from stable_rlhf.evidence.peers import is_foreign, read_foreign, seed_in

LOGGED = Path(__file__).with_name("trl")
"""Three steps of benchmarks/peers/trl_run.py with TRL 1.12.0: --steps 3 --batch-size 16 --max-completion-length 8."""


def state(folder: Path, rows: Sequence[Mapping[str, Any]], *, max_steps: int | None = None, **more: Any) -> Path:
    """A trainer_state.json as Transformers writes it, done up to its last row."""
    last = max((row.get("step", 0) for row in rows), default=0)
    held = {"global_step": last, "max_steps": max_steps or last, "logging_steps": 1, "log_history": list(rows), **more}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "trainer_state.json").write_text(json.dumps(held, indent=2) + "\n")
    return folder


def grpo(step: int, reward: float, kl: float | None = 0.25, **more: float) -> dict[str, Any]:
    row: dict[str, Any] = {"step": step, "reward": reward, "entropy": 2.0, "completions/mean_length": 8.0}
    row |= {"policy_loss": 0.5, "step_time": 2.0, "reward_std": 1.0, "frac_reward_zero_std": 0.0, **more}
    return row if kl is None else {**row, "kl": kl}


def written(path: Path, text: str | bytes) -> Path:
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


# -- TRL ------------------------------------------------------------------------------------------------------------


def test_figures_of_grpo_are_those_of_its_training_rows(tmp_path: Path) -> None:
    rows = [
        grpo(1, 1.0, kl=0.1),
        grpo(2, 2.0, kl=0.3),
        {"step": 2, "eval_reward": 1.5, "eval_kl": 9.0, "eval_runtime": 3.0},
        grpo(3, 6.0, kl=0.2),
        {"step": 3, "eval_reward": 4.5, "eval_kl": 9.0},
        {"step": 3, "train_runtime": 9.9, "train_loss": 7.0},
    ]
    found = read_foreign(state(tmp_path / "grpo", rows))
    assert (found.status, found.steps, found.why) == (Status.FINISHED, 3, None)
    assert found.settings["framework"] == found.inputs["framework"] == "TRL GRPO"
    assert found.figures["reward/average"] == pytest.approx(3.0)
    assert found.figures["reward/held_out"] == 4.5
    assert found.figures["kl/final"] == pytest.approx(0.2)
    assert found.figures["kl/max"] == 0.3
    assert (found.figures["entropy/final"], found.figures["length/final"], found.figures["seconds"]) == (2.0, 8.0, 2.0)
    assert found.curves["objective/scores"][0].tolist() == [0, 1, 2]
    assert "tokens_per_s" not in found.figures  # the number of completions is not in the log
    assert any("k3" in note for note in found.notes)


def test_without_a_beta_there_is_no_kl_and_a_note_says_so(tmp_path: Path) -> None:
    found = read_foreign(state(tmp_path, [grpo(1, 1.0, kl=None), grpo(2, 2.0, kl=None)]))
    assert not any(key.startswith("kl") for key in found.figures)
    assert any("without a beta" in note for note in found.notes)


def test_sums_of_ppo_become_means_over_tokens_or_are_left_out(tmp_path: Path) -> None:
    rows = [
        {"step": n, "eps": 3, "objective/kl": 2.0 * n, "objective/entropy": 12.0, "objective/scores": 0.5, "episode": n}
        for n in (1, 2)
    ]
    without = read_foreign(state(tmp_path / "without", rows))
    assert without.settings["framework"] == "TRL PPO"
    assert without.figures["reward/average"] == 0.5
    assert not {"kl/final", "entropy/final"} & set(without.figures)
    assert any("sums over an answer" in note for note in without.notes)
    known = [{**row, "completions/mean_length": 8.0} for row in rows]
    found = read_foreign(state(tmp_path / "with", known))
    assert found.curves["objective/kl"][1].tolist() == [0.25, 0.5]
    assert found.figures["entropy/final"] == 1.5


def test_a_row_for_several_steps_keeps_its_step_and_a_note_says_how_many(tmp_path: Path) -> None:
    found = read_foreign(state(tmp_path, [grpo(n, float(n)) for n in (10, 20, 30)], max_steps=32))
    assert found.curves["objective/scores"][0].tolist() == [9, 19, 29]
    assert (found.status, found.steps) == (Status.UNFINISHED, 30)
    assert any("every 10 steps" in note for note in found.notes)


def test_steps_after_the_last_row_count_as_done(tmp_path: Path) -> None:
    folder = state(tmp_path, [grpo(n, float(n)) for n in (10, 20)], max_steps=25, global_step=25)
    found = read_foreign(folder)
    assert (found.status, found.steps, found.settings["max_steps"]) == (Status.FINISHED, 25, 25)


@pytest.mark.parametrize("told", [True, False])
def test_optimiser_steps_of_one_rollout_are_one_step(tmp_path: Path, told: bool) -> None:
    """As the log shows, where only the first step of a rollout has a reward; or as settings.json says."""
    rows = []
    for step in range(1, 9):
        row = grpo(step, float(step), kl=0.1 * step)
        rows.append(row if step in (1, 5) else {"step": step, "kl": 0.1 * step, "step_time": 1.0})
    folder = state(tmp_path, rows)
    if told:
        (folder / "settings.json").write_text(json.dumps({"optimizer_steps_per_rollout": 4}))
    found = read_foreign(folder)
    assert (found.steps, found.status) == (2, Status.FINISHED)
    assert found.curves["objective/scores"][1].tolist() == [1.0, 5.0]
    assert found.curves["objective/kl"][1].tolist() == pytest.approx([0.1, 0.5])  # before the policy moved
    assert found.figures["seconds"] == pytest.approx(5.0)  # 2 + 3 x 1


def test_settings_beside_a_state_name_the_run(tmp_path: Path) -> None:
    folder = state(tmp_path / "run-seed9", [grpo(1, 1.0), grpo(2, 3.0)])
    beside = {"seed": 4, "optim": {"learning_rate": 0.5}, "rollout.batch_size": 16, "inputs": {"data": "abc"}}
    (folder / "settings.json").write_text(json.dumps(beside))
    (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "some/model"}))
    found = read_foreign(folder)
    assert (found.seed, found.settings["optim.learning_rate"]) == (4, 0.5)
    assert found.settings["model.name"] == "some/model"
    assert found.inputs == {"framework": "TRL GRPO", "data": "abc"}
    assert found.figures["tokens_per_s"] == 16 * 8 / 2


def test_of_checkpoints_the_newest_is_read(tmp_path: Path) -> None:
    for steps in (9, 10):
        state(tmp_path / f"checkpoint-{steps}", [grpo(n, float(n)) for n in range(1, steps + 1)], max_steps=12)
    assert is_foreign(tmp_path)
    found = read_foreign(tmp_path)
    assert (found.steps, found.status, found.why) == (10, Status.UNFINISHED, "it did 10 of 12 steps")
    state(tmp_path, [grpo(n, float(n)) for n in range(1, 13)])
    assert read_foreign(tmp_path).steps == 12


def test_a_nan_is_named_by_its_line_and_only_where_it_counts(tmp_path: Path) -> None:
    folder = state(tmp_path / "unused", [grpo(1, 1.0), grpo(2, 2.0, grad_norm=float("nan"))])
    assert read_foreign(folder).status is Status.FINISHED
    folder = state(tmp_path / "used", [grpo(1, 1.0), {"step": 1, "eval_reward": 1.0}, grpo(2, float("nan"))])
    lines = (folder / "trainer_state.json").read_text().splitlines()
    line = next(number for number, text in enumerate(lines, 1) if '"reward": NaN' in text)
    found = read_foreign(folder)
    assert found.status is Status.BROKEN
    assert found.why is not None
    assert f"trainer_state.json:{line}: reward is nan" in found.why


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "not JSON"),
        ("[1]", "no list `log_history`"),
        ('{"log_history": [{"step": 1, "reward": 1}]}', "no `global_step`"),
        ('{"log_history": [], "global_step": 0}', "no row of training yet"),
        ('{"log_history": [{"step": 1, "loss": 1}], "global_step": 1}', "no log of TRL's GRPO, RLOO or PPO"),
        ('{"log_history": [{"step": 2, "reward": 1}, {"step": 2, "reward": 1}], "global_step": 2}', "must increase"),
        ('{"log_history": [{"step": 1, "reward": 1}], "global_step": "x"}', "global_step is 'x'"),
        ('{"log_history": [{"step": 1, "reward": 1e999}], "global_step": 1}', "not a finite number"),
        ("[" * 100_000, "not JSON"),
        ("\xff\xfe", "not JSON"),
    ],
)
def test_a_state_that_cannot_be_read_is_a_broken_run(tmp_path: Path, text: str, said: str) -> None:
    path = written(tmp_path / "trainer_state.json", text.encode("latin-1"))
    found = read_foreign(path)
    assert found.status is Status.BROKEN
    assert found.why is not None
    assert said in found.why
    assert str(path) in found.why


@pytest.mark.parametrize(
    ("beside", "said"),
    [
        ("{", "not JSON"),
        ("[]", "not a JSON object"),
        ('{"seed": "x"}', "seed is 'x'"),
        ('{"rollout.batch_size": 0}', "rollout.batch_size is 0"),
        ('{"optimizer_steps_per_rollout": 1.5}', "optimizer_steps_per_rollout is 1.5"),
        ('{"inputs": 3}', "inputs is 3"),
    ],
)
def test_settings_that_cannot_be_read_are_named(tmp_path: Path, beside: str, said: str) -> None:
    state(tmp_path, [grpo(1, 1.0)])
    written(tmp_path / "settings.json", beside)
    why = read_foreign(tmp_path).why
    assert why is not None
    assert said in why
    assert "settings.json" in why


@pytest.mark.parametrize("algorithm", ["grpo", "rloo", "ppo"])
def test_figures_of_a_logged_run_are_trls_own_numbers(algorithm: str) -> None:
    folder = LOGGED / f"{algorithm}-seed3"
    check_against_trl(folder, algorithm)


@pytest.mark.filterwarnings("ignore:::transformers", "ignore:::trl", "ignore:::torch", "ignore:::accelerate")
def test_figures_of_a_run_of_trl_are_its_own_numbers(tmp_path: Path) -> None:
    """benchmarks/peers/trl_run.py itself fails unless completions and optimiser steps are as many as ours."""
    script = Path(__file__).resolve().parents[2] / "benchmarks" / "peers" / "trl_run.py"
    trl_run = runpy.run_path(str(script))
    sizes = ["--steps=2", "--batch-size=16", "--max-completion-length=4", "--device=cpu"]
    trl_run["main"](["--algorithm=grpo", *sizes, "--seed=5", f"--out={tmp_path}"])
    check_against_trl(tmp_path, "grpo")
    assert read_foreign(tmp_path).seed == 5


def check_against_trl(folder: Path, algorithm: str) -> None:
    """The rows of a rollout's first optimiser step hold reward and KL; it has four of them, except in PPO's log."""
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    ppo = algorithm == "ppo"
    firsts = [row for row in history if ("objective/scores" if ppo else "reward") in row]
    length = [row["completions/mean_length"] for row in firsts]
    each = length if ppo else [1.0] * len(firsts)
    names = ("objective/scores", "objective/kl", "objective/entropy") if ppo else ("reward", "kl", "entropy")
    found = read_foreign(folder)
    assert (found.status, found.steps) == (Status.FINISHED, len(firsts))
    assert found.settings["framework"] == f"TRL {algorithm.upper()}"
    curves = {name: values.tolist() for name, (_, values) in found.curves.items()}
    assert curves["objective/scores"] == pytest.approx([row[names[0]] for row in firsts])
    assert curves["objective/kl"] == pytest.approx([row[names[1]] / n for row, n in zip(firsts, each, strict=True)])
    assert curves["objective/entropy"] == pytest.approx(
        [row[names[2]] / n for row, n in zip(firsts, each, strict=True)]
    )
    assert curves["completions/mean_length"] == pytest.approx(length)
    timed = [row["step_time"] for row in history if "step_time" in row]
    parts = len(timed) // len(firsts)
    assert parts == (1 if ppo else 4)
    assert found.seconds is not None
    assert found.seconds[1][-1] == pytest.approx(sum(timed), rel=1e-5)


# -- CSV and JSON lines ---------------------------------------------------------------------------------------------

MAPPING = """
step: iteration
objective/scores: mean reward
objective/kl: {column: kl_sum, per: length}
objective/entropy: {column: bits, scale: 0.5}
total_s: seconds
seed: 7
max_steps: 4
settings: {framework: OpenRLHF, optim: {learning_rate: 1e-6}}
"""

TABLE = """iteration,"mean reward",kl_sum,length,bits,seconds,comment
1,0.5,2,8,3,1.5,"well, begun"
2,,4,8,3,1.5,nan
4,1.5,,0,,2.5,
"""


@pytest.fixture
def mapping(tmp_path: Path) -> Path:
    return written(tmp_path / "mapping.yaml", MAPPING)


@pytest.mark.parametrize("form", ["comma", "semicolon", "tab", "bom", "crlf", "jsonl", "no last newline"])
def test_a_mapping_makes_any_table_an_outcome(tmp_path: Path, mapping: Path, form: str) -> None:
    cells = list(csv.reader(TABLE.splitlines()))
    marks = {"semicolon": ";", "tab": "\t"}
    path = tmp_path / ("log.jsonl" if form == "jsonl" else "log.csv")
    if form == "jsonl":
        names = cells[0]
        numbers = [{n: float(c) for n, c in zip(names, row, strict=True) if c and n != "comment"} for row in cells[1:]]
        written(path, "".join(json.dumps(row) + "\n" for row in numbers))
    elif form in marks:
        with path.open("w", newline="") as file:
            csv.writer(file, delimiter=marks[form]).writerows(cells)
    else:
        text = TABLE.replace("\n", "\r\n") if form == "crlf" else TABLE
        text = text.rstrip("\n") if form == "no last newline" else text
        written(path, ("\ufeff" if form == "bom" else "") + text)
    found = read_foreign(path, mapping)
    assert (found.status, found.steps, found.seed, found.why) == (Status.FINISHED, 4, 7, None)
    assert found.settings["optim.learning_rate"] == 1e-6
    assert found.inputs["framework"] == "OpenRLHF"
    curves = {name: (steps.tolist(), values.tolist()) for name, (steps, values) in found.curves.items()}
    assert curves["objective/scores"] == ([0, 3], [0.5, 1.5])
    assert curves["objective/kl"] == ([0, 1], [0.25, 0.5])
    assert curves["objective/entropy"] == ([0, 1], [1.5, 1.5])
    assert found.figures["seconds"] == 1.5


def test_a_table_of_our_rows_gives_the_figures_of_the_run(tmp_path: Path) -> None:
    rows = [
        {"step": n, "objective/scores": n % 7 - n / 9, "objective/kl": n / 50, "safe/threshold": 0.3, "lr": 1e-4}
        for n in range(40)
    ]
    run = tmp_path / "run"
    run.mkdir()
    written(run / "metrics.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    with (tmp_path / "log.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    assert read_foreign(tmp_path / "log.csv").figures == read_outcome(run, "run").figures


def test_nested_json_lines_have_columns_with_dots(tmp_path: Path) -> None:
    log = written(tmp_path / "log.jsonl", '{"step": 1, "data": {"critic/score": 2.5}}\n')
    mapping = written(tmp_path / "mapping.yaml", "step: step\nobjective/scores: data.critic/score\n")
    assert read_foreign(log, mapping).figures["reward/average"] == 2.5


def test_names_of_trl_are_understood_in_a_table(tmp_path: Path) -> None:
    text = "train/global_step,train/reward,train/kl,train/frac_reward_zero_std\n1,0.5,0.1,0\n2,1.5,0.3,0\n"
    found = read_foreign(written(tmp_path / "wandb.csv", text))
    assert found.settings["framework"] == "TRL GRPO or RLOO"
    assert found.figures["reward/average"] == 1.0
    assert found.figures["kl/max"] == 0.3


@pytest.mark.parametrize(
    "columns", ["train/global_step,train/reward,train/kl", "step,reward,kl", "step,reward,loss,grad_norm,learning_rate"]
)
def test_the_name_of_trls_reward_is_enough(tmp_path: Path, columns: str) -> None:
    rows = [",".join(map(str, row[: columns.count(",") + 1])) for row in ((1, 0.5, 0.1, 9, 9), (2, 1.5, 0.3, 9, 9))]
    found = read_foreign(written(tmp_path / "log.csv", "\n".join([columns, *rows, ""])))
    assert (found.status, found.figures["reward/average"]) == (Status.FINISHED, 1.0)
    assert found.figures.get("kl/max") == (0.3 if "kl" in columns else None)
    assert "Its columns have TRL's names, so they are read in TRL's units." in found.notes


def test_our_reward_is_read_where_a_table_has_trls_name_too(tmp_path: Path) -> None:
    found = read_foreign(written(tmp_path / "log.csv", "step,objective/scores,reward\n0,1,9\n1,2,9\n"))
    assert found.figures["reward/average"] == 1.5


def test_a_kl_of_trls_ppo_is_not_taken_for_ours(tmp_path: Path) -> None:
    text = "step,objective/kl,objective/scores,val/num_eos_tokens\n1,12,0.5,3\n2,14,0.5,3\n"
    found = read_foreign(written(tmp_path / "ppo.csv", text))
    assert "kl/final" not in found.figures
    assert found.figures["reward/average"] == 0.5


def test_unknown_columns_are_answered_with_a_mapping_that_works(tmp_path: Path) -> None:
    path = written(tmp_path / "log.csv", "iteration,mean_reward\n1,0.5\n2,1.5\n")
    why = read_foreign(path).why
    assert why is not None
    assert "'iteration', 'mean_reward'" in why
    shown = why[why.index("such as ") + len("such as ") :]
    assert read_foreign(path, written(tmp_path / "mapping.yaml", shown)).figures["reward/average"] == 1.0


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("step,objective/scores\n0,nan\n", ":2: objective/scores is 'nan', which is not a finite number"),
        ("step,objective/scores\n0,1\n1,-inf\n", ":3: objective/scores is '-inf'"),
        ("step,objective/scores\n0,1e308\n1,1e308\n", ":2: objective/scores is '1e308', which is not a figure"),
        ("step,objective/scores\n0,0.5x\n", ":2: objective/scores is '0.5x', which is not a number"),
        ("step,objective/scores\n0,1\n0,1\n", ":3: step 0 follows step 0; steps must increase"),
        ("step,objective/scores\n5,1\n4,1\n", ":3: step 4 follows step 5"),
        ("step,objective/scores\n,1\n", ":2: step is empty"),
        ("step,objective/scores\n0.5,1\n", ":2: step is '0.5'; a step is an integer"),
        ("step,objective/scores\n1e30,1\n", "a step is an integer from 0"),
        ("step,objective/scores\n-1,1\n", "a step is an integer from 0"),
        ("step,objective/scores\n0,1,2\n1,1\n", ":2: 3 cells, but 2 columns"),
        ("step,objective/scores\n0,1\n1\n", ":3: 1 cell, but 2 columns"),
        ("step,step\n0,1\n", "'step' is there twice"),
        ("step,objective/scores\n", "no complete row yet"),
        ("step,objective/scores\n0,\n", "no row has a value"),
        ("", "no complete row yet"),
        ("\0\0\0", "log.csv"),
        (b"\xff\xfe\x00s", "not UTF-8"),
    ],
)
def test_a_table_that_cannot_be_used_is_a_broken_run(tmp_path: Path, text: str | bytes, said: str) -> None:
    found = read_foreign(written(tmp_path / "log.csv", text))
    assert found.status is Status.BROKEN
    assert found.why is not None
    assert said in found.why


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"step": 0, "objective/scores": NaN}\n', ":1: objective/scores is nan"),
        ('{"step": 0, "objective/scores": 1e999}\n', ":1: objective/scores is inf"),
        ('{"step": 0, "objective/scores": true}\n', ":1: objective/scores is True"),
        ('{"step": 0, "objective/scores": [1]}\n', ":1: objective/scores is [1], which is not a number"),
        ('{"step": 0, "objective/scores": ' + "9" * 400 + "}\n", "not a number"),
        ('{"step": 0}\nx\n', ":2: not a JSON object"),
        ("[1]\n", ":1: not a JSON object"),
        ("[" * 100_000 + "\n", ":1: not a JSON object"),
    ],
)
def test_json_lines_that_cannot_be_used_are_a_broken_run(tmp_path: Path, text: str, said: str) -> None:
    found = read_foreign(written(tmp_path / "log.jsonl", text))
    assert found.status is Status.BROKEN
    assert found.why is not None
    assert said in found.why


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("log.jsonl", '{"step": 0, "objective/scores": 1}\n{"step": 1, "objective/scores": 2}\n{"step": 2, "obj'),
        ("log.csv", "step,objective/scores,lr\n0,1,1\n1,2,1\n2,3"),
    ],
)
def test_a_torn_last_line_is_left_out_and_noted(tmp_path: Path, name: str, text: str) -> None:
    found = read_foreign(written(tmp_path / name, text))
    assert (found.status, found.steps) == (Status.FINISHED, 2)
    assert any("incomplete line" in note for note in found.notes)


def test_a_table_shorter_than_planned_is_unfinished(tmp_path: Path, mapping: Path) -> None:
    found = read_foreign(written(tmp_path / "log.csv", "".join(TABLE.splitlines(keepends=True)[:3])), mapping)
    assert (found.status, found.why) == (Status.UNFINISHED, "it did 2 of 4 steps")


def test_a_column_that_is_not_there_is_named_with_the_nearest(tmp_path: Path, mapping: Path) -> None:
    why = read_foreign(written(tmp_path / "log.csv", TABLE.replace("kl_sum", "kl_sums")), mapping).why
    assert why is not None
    assert "no column 'kl_sum' for objective/kl: did you mean 'kl_sums'?" in why


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("objective/scores: reward", "no column of the steps"),
        ("step: step", "no metric is named"),
        ("step: s\nobjective/score: r", "did you mean objective/scores?"),
        ("step: s\nobjective/scores: 3", "objective/scores is 3"),
        ("step: s\nobjective/scores: {column: r, factor: 2}", "scale: NUMBER"),
        ("step: s\nobjective/scores: {scale: 2}", "give a column"),
        ("step: s\nobjective/scores: {column: r, scale: 0}", "scale of objective/scores is 0"),
        ("step: s\nobjective/scores: {column: r, scale: .nan}", "scale of objective/scores is nan"),
        ("step: {column: s, scale: 2}\nobjective/scores: r", "steps are not scaled"),
        ("step: s\nobjective/scores: r\nseed: -1", "seed is -1"),
        ("step: s\nobjective/scores: r\nmax_steps: many", "max_steps is 'many'"),
        ("step: s\nobjective/scores: r\nsettings: [1]", "settings is [1]"),
        ("step: s\nsafe/reason: r", "safe/reason is not a metric"),
        (
            "step: s\nreward: r",
            "reward is not a metric (a mapping is `metric: column`); did you mean objective/scores?",
        ),
        ("step: s\ntrain/kl: r", "did you mean objective/kl?"),
        ("step: s\ncompletion_length: r", "did you mean completions/mean_length?"),
        ("step: s\nstep_time: r", "did you mean total_s?"),
        ("step: s\nzzz: r", "(a mapping is `metric: column`); docs/metrics.md has the names"),
        ("- 1", "is a list"),
        ("step: s\nstep: t", "given twice"),
    ],
)
def test_a_mapping_that_cannot_be_used_is_an_error(tmp_path: Path, text: str, said: str) -> None:
    path = written(tmp_path / "mapping.yaml", text)
    with pytest.raises(ConfigError, match=r"mapping\.yaml") as caught:
        read_foreign(written(tmp_path / "log.csv", TABLE), path)
    assert said in str(caught.value)


def test_a_peer_stands_in_a_table_by_preset_under_its_trainers_name(tmp_path: Path) -> None:
    ours = [
        Outcome(name=preset, status=Status.FINISHED, settings={"preset": preset, "seed": 0}, figures={"kl/max": 1.0})
        for preset in ("safe", "ppo")
    ]
    peer = read_foreign(state(tmp_path / "seed0", [grpo(1, 1.0), grpo(2, 2.0)]))
    assert [arm.name for arm in compare([*ours, peer], ["preset"]).arms] == ["safe", "ppo", "TRL GRPO"]


# -- which paths, and which seed ------------------------------------------------------------------------------------


def test_only_other_trainers_logs_are_foreign(tmp_path: Path) -> None:
    run = tmp_path / "run"
    state(run / "checkpoint-3", [grpo(3, 1.0)])
    assert is_foreign(run)
    written(run / "metrics.jsonl", "")
    assert not is_foreign(run)
    for name, foreign in {"a.csv": True, "a.TSV": True, "a.jsonl": True, "a.txt": False, "a.json": False}.items():
        assert is_foreign(written(tmp_path / name, "")) is foreign
    assert is_foreign(state(tmp_path / "out", [grpo(1, 1.0)]) / "trainer_state.json")
    for path in (tmp_path, tmp_path / "absent.csv", tmp_path / ("x" * 300), Path("x" * 5000 + ".csv")):
        assert not is_foreign(path)


def test_a_file_that_may_not_be_read_is_a_broken_run(tmp_path: Path) -> None:
    path = written(tmp_path / "log.csv", TABLE)
    path.unlink()
    os.mkfifo(path) if hasattr(os, "mkfifo") else path.mkdir()
    assert not is_foreign(path)
    assert read_foreign(tmp_path / "absent.csv").status is Status.BROKEN


@pytest.mark.parametrize(
    ("name", "seed"),
    [
        ("preset=ppo,lr=0.001,seed=3", 3),
        ("run-seed12", 12),
        ("seed_4", 4),
        ("Seed5.csv", 5),
        ("ppo-s7", 7),
        ("grpo_s8/checkpoint-40", 8),
        ("reseed3", None),
        ("steps3", None),
        ("checkpoint-40", None),
    ],
)
def test_a_seed_is_read_off_a_name(name: str, seed: int | None) -> None:
    assert seed_in(Path("/a/b/c") / name) == seed


def test_a_thousand_rows_of_fifty_columns_take_a_tenth_of_a_second(tmp_path: Path) -> None:
    names = ["step", "objective/scores", "objective/kl", *(f"user{n}" for n in range(47))]
    lines = [",".join([str(n), *(f"{n / 7 + k:.6f}" for k in range(49))]) for n in range(1000)]
    path = written(tmp_path / "log.csv", "\n".join([",".join(names), *lines]) + "\n")
    seconds = []
    for _ in range(3):
        before = time.process_time()
        assert read_foreign(path).steps == 1000
        seconds.append(time.process_time() - before)
    assert min(seconds) < 0.1
