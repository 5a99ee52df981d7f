"""The best checkpoint by a figure of the evaluations in training."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import EarlyStoppingCallback

from tests.tiny_runs import settings, trainer

HELD_OUT = [{"prompt": f"held out {i}"} for i in range(3)]


def evaluated(folder: Path, **overrides: Any) -> Any:
    """Every step is evaluated. The entropy falls from step to step, so the greatest is that after the first."""
    best = {"eval_steps": 1, "metric_for_best_model": "entropy", "load_best_model_at_end": True}
    return settings(folder, "ppo", save_steps=0, save_total_limit=1, **{"max_steps": 3, **best, **overrides})


def checkpoints(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "checkpoints").iterdir())


def test_the_best_checkpoint_is_kept_and_becomes_final(tokenizer, tmp_path: Path) -> None:
    run = trainer(evaluated(tmp_path / "most"), tokenizer, eval_dataset=HELD_OUT)
    result = run.train()
    entropies = [figures["entropy"] for figures in result["during"]]
    assert entropies[0] == max(entropies)
    assert checkpoints(run.run_dir) == ["step-000001", "step-000003"]
    assert (run.state.best_metric, run.state.best_global_step) == (entropies[0], 1)
    assert result["after"]["entropy"] == entropies[0]
    final = load_file(run.run_dir / "final" / "model.safetensors")
    best = load_file(run.run_dir / "checkpoints/step-000001/model.safetensors")
    name = "model.layers.0.self_attn.q_proj.weight"
    assert torch.equal(final[name], best[f"policy.{name}"])
    least = evaluated(tmp_path / "least", greater_is_better=False, load_best_model_at_end=False)
    run = trainer(least, tokenizer, eval_dataset=HELD_OUT)
    run.train()
    assert run.state.best_global_step == 1 + entropies.index(min(entropies))
    assert run.state.best_global_step != 1


def test_a_resumed_run_remembers_the_best_and_the_log(tokenizer, tmp_path: Path) -> None:
    def history(run: Any) -> list[dict[str, Any]]:
        timeless = [
            {name: value for name, value in entry.items() if not name.startswith(("timings/", "train_"))}
            for entry in run.state.log_history
        ]
        return [entry for entry in timeless if len(entry) > 2]  # the summary at the end of each call is left out

    whole = trainer(evaluated(tmp_path / "whole"), tokenizer, eval_dataset=HELD_OUT)
    whole.train()
    trainer(evaluated(tmp_path / "parts", max_steps=2), tokenizer, eval_dataset=HELD_OUT).train()
    parts = trainer(evaluated(tmp_path / "parts"), tokenizer, eval_dataset=HELD_OUT)
    parts.train(resume_from_checkpoint=True)
    assert history(parts) == history(whole)
    assert (parts.state.best_metric, parts.state.best_global_step) == (whole.state.best_metric, 1)
    files = [json.loads((run.run_dir / "evaluation.json").read_text()) for run in (whole, parts)]
    assert files[0] == files[1]
    assert checkpoints(parts.run_dir) == checkpoints(whole.run_dir)


def test_early_stopping_stops_a_run_that_gets_no_better(tokenizer, tmp_path: Path) -> None:
    run = trainer(evaluated(tmp_path), tokenizer, eval_dataset=HELD_OUT, callbacks=[EarlyStoppingCallback()])
    assert run.train().global_step == 2
