"""A run that is stopped and resumed writes the same bytes as one that never stopped, whatever the preset."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from transformers import PreTrainedTokenizerFast, TrainerCallback

from stable_rlhf import Config, ConfigError, RewardError, SAFETrainer
from stable_rlhf.config.presets import PRESETS
from stable_rlhf.errors import CheckpointError
from tests.tiny_runs import PROMPTS, broken, letters, policy, rows, settings, trainer

SRC = Path(__file__).resolve().parents[2] / "src"


class StopAfter(TrainerCallback):
    def __init__(self, steps: int) -> None:
        self.steps = steps

    def on_step_end(self, args, state, control, **kwargs) -> None:
        control.should_training_stop = state.global_step == self.steps


def by_chance(prompts: list[Any], completions: list[Any], **columns: Any) -> list[float]:
    """A reward that draws from every global generator there is."""
    return [
        score + random.random() + float(np.random.rand()) + torch.rand(()).item()
        for score in letters(prompts, completions)
    ]


def metrics(config: Config) -> bytes:
    return (Path(str(config.output_dir)) / "metrics.jsonl").read_bytes()


def final_weights(config: Config) -> dict[str, bytes]:
    folder = Path(str(config.output_dir)) / "final"
    files = {path.name: path.read_bytes() for path in folder.glob("*.safetensors")}
    assert len(files) == 2  # policy or adapter, and the heads
    return files


def assert_resumes(made: Any, whole: Config, parts: Config, stop: int = 2) -> None:
    """``made(config)`` gives a new trainer each time; ``parts`` is stopped after ``stop`` steps and then goes on."""
    made(whole).train()
    first = made(parts)
    first.add_callback(StopAfter(stop))
    first.train()
    assert len(rows(first.run_dir)) == stop
    made(parts).train(resume_from_checkpoint=True)
    assert len(set(metrics(whole).splitlines())) == whole.max_steps
    assert metrics(parts) == metrics(whole)
    assert final_weights(parts) == final_weights(whole)


@pytest.mark.parametrize("lora_r", [0, 2])
@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_goes_on_bit_for_bit(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path, preset: str, lora_r: int
) -> None:
    given = {"critic": {"warmup_steps": 1}} if preset == "vapo" else {}  # its own is longer than the run
    whole, parts = (settings(tmp_path / name, preset, model={"lora_r": lora_r}, **given) for name in ("whole", "parts"))
    assert_resumes(lambda config: trainer(config, tokenizer), whole, parts)


@pytest.mark.parametrize("eval_size", [0, 8])
def test_rewards_that_draw_at_random_schedules_and_the_critics_warm_up_go_on_bit_for_bit(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path, eval_size: int
) -> None:
    held_out = [{"prompt": f"held out {i}"} for i in range(eval_size)] or None
    overrides: dict[str, Any] = {
        "max_steps": 6,
        "save_steps": 3,
        "seed": 5,
        "optim": {"lr_scheduler_type": "cosine", "warmup_steps": 2, "microbatch_tokens": 20},
        "critic": {"warmup_steps": 3, "learning_rate": 3e-2, "bootstrap": "target"},
        "model": {"gradient_checkpointing": True},
    }
    whole, parts = (settings(tmp_path / name, **overrides) for name in ("whole", "parts"))
    assert_resumes(
        lambda config: trainer(config, tokenizer, reward=by_chance, eval_dataset=held_out), whole, parts, stop=3
    )
    evaluations = [Path(str(config.output_dir)) / "evaluation.json" for config in (whole, parts)]
    assert [path.exists() for path in evaluations] == [bool(eval_size)] * 2
    if eval_size:
        assert evaluations[0].read_bytes() == evaluations[1].read_bytes()


def test_another_process_goes_on_bit_for_bit_by_the_command_line(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy(tokenizer).save_pretrained(tmp_path / "policy")
    tokenizer.save_pretrained(tmp_path / "policy")
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps({"prompt": p}) + "\n" for p in PROMPTS))
    (tmp_path / "chance_reward.py").write_text(
        "import random\n"
        "def reward(prompts, completions, **columns):\n"
        "    return [len(set(completion)) + random.random() for completion in completions]\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])  # the reward's import adds the folder
    whole, parts = (
        settings(
            tmp_path / name,
            model={"name": "policy", "lora_r": 2},
            data={"train": "prompts.jsonl", "eval_size": 2},
            reward={"functions": ["chance_reward:reward"]},
            optim={"lr_scheduler_type": "linear"},
        )
        for name in ("whole", "parts")
    )
    SAFETrainer(whole.model.name, args=whole).train()
    SAFETrainer(parts.model.name, args=parts, callbacks=[StopAfter(2)]).train()
    command = [sys.executable, "-m", "stable_rlhf", "resume", "parts"]
    environment = {**os.environ, "PYTHONPATH": str(SRC)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert metrics(parts) == metrics(whole)
    assert final_weights(parts) == final_weights(whole)
    assert (tmp_path / "parts" / "evaluation.json").read_bytes() == (
        tmp_path / "whole" / "evaluation.json"
    ).read_bytes()


def test_a_torn_line_after_the_checkpoint_is_dropped_and_written_again(tokenizer, tmp_path: Path) -> None:
    """A kill in step 3: rows after the checkpoint of step 2, the last one torn."""
    whole, parts = (settings(tmp_path / name) for name in ("whole", "parts"))
    trainer(whole, tokenizer).train()
    trainer(parts, tokenizer, callbacks=[StopAfter(2)]).train()
    third = metrics(whole).splitlines(keepends=True)[2]
    with (tmp_path / "parts" / "metrics.jsonl").open("ab") as file:
        file.write(third + third[:40])
    trainer(parts, tokenizer).train(resume_from_checkpoint=True)
    assert metrics(parts) == metrics(whole)


def test_resuming_from_an_older_checkpoint_forgets_the_newer_ones(tokenizer, tmp_path: Path) -> None:
    """Or the rotation would count them for new ones, and the next resume would go on from a course given up."""
    whole, parts = (settings(tmp_path / name, save_steps=1, save_total_limit=3) for name in ("whole", "parts"))
    trainer(whole, tokenizer).train()
    trainer(parts, tokenizer).train()
    checkpoints = tmp_path / "parts" / "checkpoints"
    assert sorted(path.name for path in checkpoints.iterdir()) == ["step-000002", "step-000003", "step-000004"]
    again = trainer(parts, tokenizer, callbacks=[StopAfter(3)])
    again.train(resume_from_checkpoint=checkpoints / "step-000002")
    assert sorted(path.name for path in checkpoints.iterdir()) == ["step-000002", "step-000003"]
    trainer(parts, tokenizer).train(resume_from_checkpoint=True)
    assert metrics(parts) == metrics(whole)
    assert final_weights(parts) == final_weights(whole)


def test_a_finished_run_that_is_resumed_only_finishes(tokenizer, tmp_path: Path) -> None:
    config = settings(tmp_path / "run")
    held_out = [{"prompt": "held out"}, {"prompt": "too"}]
    trainer(config, tokenizer, eval_dataset=held_out).train()
    text, weights, evaluation = metrics(config), final_weights(config), (tmp_path / "run/evaluation.json").read_text()
    (tmp_path / "run" / "final" / "value_heads.safetensors").unlink()
    again = trainer(config, tokenizer, eval_dataset=held_out)
    result = again.train(resume_from_checkpoint=True)
    assert again.steps_done == 4
    assert (metrics(config), final_weights(config)) == (text, weights)
    assert (tmp_path / "run/evaluation.json").read_text() == evaluation
    assert result == json.loads(evaluation)


def test_a_resume_may_train_longer_and_config_yaml_then_says_so(tokenizer, tmp_path: Path) -> None:
    whole, short, longer = (
        settings(tmp_path / name, max_steps=steps) for name, steps in (("whole", 4), ("parts", 2), ("parts", 4))
    )
    trainer(whole, tokenizer).train()
    trainer(short, tokenizer).train()
    trainer(longer, tokenizer).train(resume_from_checkpoint=True)
    assert metrics(longer) == metrics(whole)
    assert yaml.safe_load((tmp_path / "parts" / "config.yaml").read_text())["max_steps"] == 4
    with pytest.raises(ConfigError, match=r"max_steps=2: the run has already done 4 steps; give that many or more"):
        trainer(short, tokenizer).train(resume_from_checkpoint=True)
    assert metrics(longer) == metrics(whole)


def test_a_run_without_a_checkpoint_cannot_be_resumed(tokenizer, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="has no checkpoint: start a new run"):
        trainer(settings(tmp_path / "run"), tokenizer).train(resume_from_checkpoint=True)


@pytest.mark.parametrize("change", [{"seed": 1}, {"kl": {"controller": "fixed"}}, {"critic": {"heads": 2}}])
def test_a_resume_with_other_settings_of_the_saved_state_is_refused(tokenizer, tmp_path: Path, change: dict) -> None:
    bound = {"optim": {"max_update_kl": 0.01}}  # which every controller takes
    trainer(settings(tmp_path / "run", max_steps=2, **bound), tokenizer).train()
    with pytest.raises(CheckpointError, match=r" here and .* in the checkpoint: resume with the run's own, or start"):
        trainer(settings(tmp_path / "run", **bound, **change), tokenizer).train(resume_from_checkpoint=True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"optim": {"learning_rate": 1e-4}}, r"learning_rate is 0.0001 here and 0.01 in the checkpoint: resume with"),
        ({"critic": {"learning_rate": 0.5}}, r"critic.learning_rate is 0.5 here and 0.001 in the checkpoint"),
        ({"optim": {"weight_decay": 0.1}}, r"weight_decay is 0.1 here and 0.0 in the checkpoint"),
    ],
)
def test_a_resume_with_another_setting_of_the_optimiser_is_refused(tokenizer, tmp_path, change, message) -> None:
    """The optimiser's saved state holds them, so that the new ones would do nothing."""
    trainer(settings(tmp_path / "run", max_steps=2), tokenizer).train()
    with pytest.raises(CheckpointError, match=message):
        trainer(settings(tmp_path / "run", **change), tokenizer).train(resume_from_checkpoint=True)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("raises", r"reward function 'letters' raised TimeoutError: 'the server does not answer'"),
        ("count", r"reward function 'letters' returned 7 scores; it must return a list of 8 scores"),
        ("nan", r"reward function 'letters' returned nan for sample 8"),
    ],
)
def test_a_reward_that_fails_stops_the_run_which_can_be_resumed(
    tokenizer, tmp_path: Path, kind: str, message: str
) -> None:
    whole, parts = (settings(tmp_path / name, save_steps=2) for name in ("whole", "parts"))
    trainer(whole, tokenizer).train()
    with pytest.raises(RewardError, match=message):
        trainer(parts, tokenizer, reward=broken(kind)).train()
    assert metrics(parts).splitlines() == metrics(whole).splitlines()[:3]
    assert not (tmp_path / "parts" / "final").exists()
    trainer(parts, tokenizer).train(resume_from_checkpoint=True)
    assert metrics(parts) == metrics(whole)
    assert final_weights(parts) == final_weights(whole)


def test_a_run_made_of_objects_is_not_resumed_by_name_with_something_else(tokenizer, tmp_path: Path) -> None:
    """config.yaml names what was really trained and rewarded, never the built-in stand-ins of the defaults."""
    trainer(settings(tmp_path / "run", max_steps=2), tokenizer).train()
    written = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert written["reward"]["functions"] == ["tests.tiny_runs:letters"]
    assert written["data"]["train"] == "<train_dataset>"
    assert written["model"]["name"] == "<LlamaForCausalLM>"


def test_a_longer_run_is_not_final_until_it_is(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    """Extended and stopped on the way, it has neither the shorter run's model nor its evaluation for its own."""
    data = [{"prompt": text} for text in PROMPTS[:3]]
    short = settings(tmp_path, max_steps=2)
    trainer(short, tokenizer, eval_dataset=data).train()
    before = json.loads((tmp_path / "evaluation.json").read_text())

    class Killed(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs) -> None:
            raise KeyboardInterrupt

    longer = trainer(settings(tmp_path, max_steps=4), tokenizer, eval_dataset=data, callbacks=[Killed()])
    with pytest.raises(KeyboardInterrupt):
        longer.train(resume_from_checkpoint=True)
    known = json.loads((tmp_path / "evaluation.json").read_text())
    assert not (tmp_path / "final").exists()
    assert known["before"] == before["before"]
    assert "after" not in known
    assert set(known["samples"][0]) == {"prompt", "before", "reward_before"}
    after = trainer(settings(tmp_path, max_steps=4), tokenizer, eval_dataset=data).train(resume_from_checkpoint=True)
    assert after["after"] != before["after"]
    assert (tmp_path / "final" / "model.safetensors").is_file()


def test_a_longer_linear_schedule_is_that_of_the_longer_run(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    optim = {"lr_scheduler_type": "linear", "learning_rate": 0.006}
    trainer(settings(tmp_path, max_steps=3, optim=optim), tokenizer).train()
    trainer(settings(tmp_path, max_steps=6, optim=optim), tokenizer).train(resume_from_checkpoint=True)
    expected = [0.006, 0.004, 0.002, 0.003, 0.002, 0.001]
    assert [row["lr"] for row in rows(tmp_path)] == pytest.approx(expected, rel=1e-12)


def test_an_update_that_was_interrupted_leaves_no_gradient_behind(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = trainer(settings(tmp_path / "whole"), tokenizer)
    whole.train()
    step, calls = torch.optim.AdamW.step, []

    def interrupted(self, *arguments, **keywords):
        calls.append(1)
        if len(calls) == 10:  # 4 updates a step: in the third step, after the checkpoint of the second
            raise KeyboardInterrupt
        return step(self, *arguments, **keywords)

    monkeypatch.setattr(torch.optim.AdamW, "step", interrupted)
    parts = trainer(settings(tmp_path / "parts"), tokenizer)  # its scheduler wraps the step that it finds
    with pytest.raises(KeyboardInterrupt):
        parts.train()
    parts.train(resume_from_checkpoint=True)
    assert metrics(parts.args) == metrics(whole.args)


def test_a_checkpoint_of_another_folder_is_refused(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    trainer(settings(tmp_path / "one", max_steps=2), tokenizer).train()
    other = trainer(settings(tmp_path / "two", max_steps=4), tokenizer)
    with pytest.raises(ConfigError, match="set output_dir to the run that the checkpoint belongs to"):
        other.train(resume_from_checkpoint=tmp_path / "one" / "checkpoints" / "step-000002")


@pytest.mark.parametrize("name", ["incidents.jsonl", "timings.jsonl", "metrics.jsonl"])
def test_a_line_that_cannot_be_read_stops_a_resume_before_anything_is_removed(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path, name: str
) -> None:
    trainer(settings(tmp_path, max_steps=6, save_steps=2, save_total_limit=3), tokenizer).train()
    with (tmp_path / name).open("a") as file:
        file.write("{\n")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    again = trainer(settings(tmp_path, max_steps=6), tokenizer)
    with pytest.raises(ValueError, match=rf"{name}:[0-9]+: "):
        again.train(resume_from_checkpoint=tmp_path / "checkpoints" / "step-000002")
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
