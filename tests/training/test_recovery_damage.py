"""A last good state that cannot be read, and what a resume makes of roll-backs that are past."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from transformers import TrainerCallback

from stable_rlhf.checkpoints import store
from stable_rlhf.errors import ConfigError, GuardStop
from stable_rlhf.runs import incidents
from tests.guarded_runs import GUARD, guarded
from tests.tiny_runs import settings, trainer


class Damages(TrainerCallback):
    """Changes a byte of every kept state on disk at the end of a step."""

    def __init__(self, run_dir: Path, step: int) -> None:
        self.run_dir, self.step = run_dir, step

    def on_step_end(self, args, state, control, **kwargs) -> None:
        if state.global_step == self.step:
            for file in (self.run_dir / "snapshot").glob("step-*/model.safetensors"):
                data = bytearray(file.read_bytes())
                data[-1] ^= 1
                file.write_bytes(bytes(data))


def test_a_damaged_last_good_state_keeps_no_checkpoint_from_being_saved(
    tokenizer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = guarded(tmp_path / "run", save_steps=3)
    trainer(config, tokenizer, callbacks=[Damages(tmp_path / "run", 3)]).train()
    assert "the last good state cannot be read and is not saved: " in capsys.readouterr().err
    assert [path.name for path in store.found(tmp_path / "run" / "checkpoints")] == ["step-000006", "step-000008"]
    _, state = store.load(tmp_path / "run" / "checkpoints" / "step-000006")
    assert state["step"] == 6


def test_a_roll_back_to_a_damaged_state_ends_the_run_with_its_last_checkpoint_as_it_was(tokenizer, tmp_path) -> None:
    run_dir = tmp_path / "run"
    kl = {"controller": "none", "in_reward": False}
    config = guarded(
        run_dir, save_steps=1, guard={"max_kl": 1e-9, "max_kl_ratio": None}, kl=kl, optim={"preview": False}
    )
    run = trainer(config, tokenizer, callbacks=[Damages(run_dir, 1)])
    with pytest.raises(
        GuardStop, match=r"could not go back, since the last good state cannot be read \(.*\), and"
    ) as stop:
        run.train()
    (incident,) = incidents.read(run_dir)  # with rule and figures, like every verdict
    assert (incident["step"], incident["action"], incident["rule"]) == (1, "stop", "max_kl")
    assert incident["figures"]["objective/kl"] > 1e-9
    resumes = (
        f"`train(resume_from_checkpoint=True)` of a SAFETrainer made as before, with output_dir='{run_dir}', continues "
        "from step 1."
    )
    assert str(stop.value) == f"{incidents.sentence(incident)} {resumes}"  # whatever `guard` is then
    (saved,) = store.found(run_dir / "checkpoints")
    assert store.load(saved)[1]["step"] == store.steps_of(saved) == 1
    assert not (run_dir / "snapshot").exists()


def test_what_roll_backs_have_made_of_the_rate_stays_with_another_factor_and_without_the_guard(
    tokenizer, tmp_path: Path
) -> None:
    config = guarded(tmp_path / "run", save_steps=2, max_steps=2)
    run = trainer(config, tokenizer)
    run.begin()
    run.guard.state = dataclasses.replace(run.guard.state, rollbacks=2, factor=0.64)
    run.counters.step = 2
    run.save_checkpoint()
    run.end()
    for guard in ({**GUARD, "rollback_factor": 0.1}, {"enabled": False}):
        again = trainer(settings(tmp_path / "run", guard=guard, save_steps=0, optim={"learning_rate": 1e-3}), tokenizer)
        again.begin(resume_from_checkpoint=True)
        assert [group["lr"] for group in again.optimizer.param_groups] == [1e-3 * 0.64] * 2
        assert again._loop.factor == 0.64
        again.end()


def test_a_folder_with_a_checkpoint_alone_is_left_alone(tokenizer, tmp_path: Path) -> None:
    config = guarded(tmp_path / "run", max_steps=2)
    trainer(config, tokenizer).train()
    (tmp_path / "run" / "metrics.jsonl").unlink()
    with pytest.raises(ConfigError, match=r"holds a run already; resume it with train.resume_from"):
        trainer(config, tokenizer).train()
