"""Trackers get the run's settings, its name, timings, evaluations, and a table of completions."""

from __future__ import annotations

import types
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainerCallback
from transformers.integrations.integration_utils import TensorBoardCallback, WandbCallback

from stable_rlhf.training.trackers import NumbersToMLflow, log_completions
from tests.tiny_runs import finished, rows, settings, trainer

HELD_OUT = [{"prompt": f"held out {i}"} for i in range(2)]


class Keeps(TrainerCallback):
    def __init__(self) -> None:
        self.logs: dict[str, Any] = {}

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        self.settings, self.plain, self.name = args.to_dict(), args.to_sanitized_dict(), args.run_name

    def on_log(self, args, state, control, logs=None, **kwargs) -> None:
        self.logs |= logs


def test_trackers_get_the_runs_settings_and_its_name(tokenizer, tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    keeps = Keeps()
    config = settings(tmp_path / "folder", max_steps=1, log={"report_to": ["tensorboard"], "run_name": "mine"})
    trainer(config, tokenizer, eval_dataset=HELD_OUT, callbacks=[keeps]).train()
    assert keeps.name == "mine"
    assert keeps.settings["optim.learning_rate"] == 1e-2
    assert keeps.settings["kl.settings.budget"] == 0.3
    assert keeps.settings["reward.functions"] == ["tests.tiny_runs:letters"]
    assert "learning_rate" not in keeps.settings  # of TrainingArguments
    assert all(isinstance(value, bool | int | float | str) for value in keeps.plain.values())
    assert keeps.logs.keys() >= {"objective/scores", "timings/rollout_s", "eval_reward", "train_runtime"}
    (file,) = (tmp_path / "folder" / "runs" / "mine").iterdir()
    found = accumulator.EventAccumulator(str(file)).Reload()
    assert {"eval/reward", "train/timings/rollout_s", "train/objective/kl"} <= set(found.Tags()["scalars"])
    texts = {tag.removesuffix("/text_summary") for tag in found.Tags()["tensors"]}
    assert {"args", "completions"} <= texts
    plain = Keeps()
    trainer(settings(tmp_path / "folder 2", max_steps=1), tokenizer, callbacks=[plain]).events.train_begin()
    assert plain.name == "folder 2"


def test_a_servers_query_is_not_given_to_trackers() -> None:
    from stable_rlhf.config import flat_settings

    flat = flat_settings({"reward": {"functions": ["http://host/score?key=secret", "builtin"]}})
    assert flat == {"reward.functions": ["http://host/score", "builtin"]}


def test_mlflow_is_given_numbers_alone(caplog: pytest.LogCaptureFixture) -> None:
    written: dict[str, float] = {}
    mlflow: Any = NumbersToMLflow.__new__(NumbersToMLflow)
    mlflow._initialized, mlflow._async_log, mlflow._auto_end_run = True, False, False
    mlflow._ml_flow = types.SimpleNamespace(
        log_metrics=lambda metrics, step: written.update(metrics), active_run=lambda: None
    )
    state = types.SimpleNamespace(is_world_process_zero=True, global_step=1)
    mlflow.on_log(None, state, None, {"objective/kl": 0.5, "safe/phase": "WARMUP"})
    assert written == {"objective/kl": 0.5}
    assert not caplog.records


def test_completions_are_a_table_in_which_nothing_is_markup() -> None:
    written: dict[str, Any] = {}
    board = TensorBoardCallback(types.SimpleNamespace(add_text=lambda tag, text, step: written.update({tag: text})))
    wandb: Any = WandbCallback.__new__(WandbCallback)
    wandb._wandb = types.SimpleNamespace(Table=lambda columns, data: (columns, data), log=written.update)
    row = {"prompt": "a|b\n", "completion": "`<script>\x1b[2J", "score": None, "length": 3, "kl": 0.25}
    log_completions([board], None, 7, [row])  # type: ignore[arg-type]
    lines = written["completions"].splitlines()
    assert lines[0] == "| step | prompt | completion | score | length | kl |"
    assert lines[2] == "| 7 | `a\u00a6b\u23ce` | `'<script>\\x1b[2J` |  | 3 | 0.25 |"
    log_completions([wandb], None, 7, [row] * 20)  # type: ignore[arg-type]
    columns, data = written["completions"]
    assert columns == ["step", "prompt", "completion", "score", "length", "kl"]
    assert len(data) == 16


def test_a_table_of_a_tracker_draws_none_of_the_runs_random_numbers(tokenizer, tmp_path: Path, monkeypatch) -> None:
    finished(settings(tmp_path / "without"), tokenizer)
    monkeypatch.setattr("stable_rlhf.training.trainer.log_completions", lambda *_: torch.rand(9))
    finished(settings(tmp_path / "with"), tokenizer)
    assert rows(tmp_path / "with") == rows(tmp_path / "without")
