"""Where the guard gives up, where a run with incidents is resumed, and what there is without a guard."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from transformers import TrainerCallback

from stable_rlhf import SAFETrainer
from stable_rlhf.checkpoints import store
from stable_rlhf.errors import DivergenceError, GuardStop, NoRoomError
from stable_rlhf.runs import incidents
from tests.guarded_runs import ADAPTER, STEPS, Happens, StopAfter, fill, guarded, known, made, multiply, prints
from tests.tiny_runs import rows, settings, trainer

# -- the end of what can be rolled back -----------------------------------------------------------------------------


@ADAPTER
@pytest.mark.parametrize("allowed", [0, 2])
def test_after_max_rollbacks_the_run_stops_where_it_was_good(
    tokenizer, tmp_path: Path, capsys, allowed: int, lora_r: int
) -> None:
    happens = Happens(lambda run: multiply(run.model.policy_parameters()), *range(5, 100))
    config = guarded(tmp_path, lora_r, guard={"max_rollbacks": allowed, "snapshot_steps": 4}, max_steps=12)
    run = made(config, tokenizer, happens)
    with pytest.raises(GuardStop) as stop:
        run.train()
    assert [(action, rule) for _, action, rule in known(run)] == [("roll back", "max_kl")] * allowed + [
        ("stop", "max_kl")
    ]
    sentence = str(stop.value)
    assert f"and stopped there, after guard.max_rollbacks={allowed} roll-backs. In a new run: lower optim." in sentence
    told = capsys.readouterr().err
    assert told.count("the learning rate and the bound on") == allowed  # each roll-back
    assert "stopped there" not in told  # the error says it, and is not said twice
    assert not (tmp_path / "final").exists()
    (path,) = (tmp_path / "checkpoints").iterdir()
    saved = prints(*store.load(path))
    good = happens.seen[4]
    weights = [name for name in good if name.startswith(("model.", "optimizer.")) or name == "normaliser"]
    assert [saved[name] for name in weights] == [good[name] for name in weights]
    assert json.loads(saved["guard"])["rollbacks"] == allowed

    again = made(config, tokenizer, Happens())
    again.train(resume_from_checkpoint=True)
    last = rows(tmp_path)[-1]
    assert (last["step"], last["safe/rollbacks"]) == (11, allowed)
    assert last["lr"] == 1e-3 * 0.5**allowed
    assert len(known(again)) == allowed + 1


@pytest.mark.parametrize("where", ["its line", "its checkpoint"])
def test_a_stop_is_said_also_where_it_cannot_be_written(
    tokenizer, tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    """Then the disk's error ends the run, and a person must know of both."""
    happens = Happens(lambda run: multiply(run.model.policy_parameters()), *range(5, 100))
    run = made(guarded(tmp_path, guard={"max_rollbacks": 0}, max_steps=12, save_steps=0), tokenizer, happens)

    def full(*arguments: object, **named: object) -> None:
        raise NoRoomError("the disk is full")

    monkeypatch.setattr(*((incidents, "record") if where == "its line" else (run, "save_checkpoint")), full)
    with pytest.raises(NoRoomError, match="the disk is full"):
        run.train()
    assert capsys.readouterr().err.count("and stopped there, after guard.max_rollbacks=0 roll-backs") == 1


# -- resume ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("at", "stop", "lora_r"), [(4, 3, 0), (4, 4, 0), (4, 4, 2), (4, 5, 2), (5, 4, 2), (5, 5, 0), (5, 6, 0), (5, 7, 2)]
)
def test_a_run_that_is_resumed_about_a_failure_is_the_one_that_never_stopped(
    tokenizer, tmp_path: Path, at: int, stop: int, lora_r: int
) -> None:
    """Before the failure with a candidate, between snapshot and failure, right after the roll-back, later."""
    for name, stops in (("whole", [0]), ("parts", [stop, 0])):
        config = guarded(tmp_path / name, lora_r, optim={"learning_rate": 1e-3, "lr_scheduler_type": "cosine"})
        for number, after in enumerate(stops):
            run = made(config, tokenizer, Happens(lambda run: multiply(run.model.policy_parameters()), at))
            run.add_callback(StopAfter(after))
            run.train(resume_from_checkpoint=number > 0)
    assert_same(tmp_path / "whole", tmp_path / "parts")
    assert [(step, action) for step, action, _ in known(run)] == [(at, "roll back")]


@pytest.mark.parametrize("stop", [3, 4, 5, 6])
def test_a_run_that_is_resumed_while_a_rule_is_broken_counts_on(tokenizer, tmp_path: Path, stop: int) -> None:
    def hooked(folder: Path, *callbacks: TrainerCallback) -> SAFETrainer:
        run = made(guarded(folder), tokenizer, Happens())
        run.model.policy_parameters()[0].register_hook(lambda g: g * math.nan if run.steps_done in (3, 4, 5) else g)
        for callback in callbacks:
            run.add_callback(callback)
        return run

    hooked(tmp_path / "whole").train()
    hooked(tmp_path / "parts", StopAfter(stop)).train()
    run = hooked(tmp_path / "parts")
    run.train(resume_from_checkpoint=True)
    assert [(step, action) for step, action, _ in known(run)] == [(3, "skip"), (4, "skip"), (5, "roll back")]
    assert_same(tmp_path / "whole", tmp_path / "parts")


def assert_same(one: Path, other: Path) -> None:
    for name in ("metrics.jsonl", "incidents.jsonl"):
        assert (one / name).read_bytes() == (other / name).read_bytes(), name
    for file in (one / "final").glob("*.safetensors"):
        assert file.read_bytes() == (other / "final" / file.name).read_bytes(), file.name


def test_what_a_killed_process_left_of_its_snapshots_is_not_used(tokenizer, tmp_path: Path) -> None:
    config = guarded(tmp_path / "run", save_steps=2, max_steps=3)
    made(config, tokenizer, Happens()).train()
    left = tmp_path / "run" / "snapshot" / "step-000002"
    left.mkdir(parents=True)
    (left / "state.json").write_text("torn")
    longer = guarded(tmp_path / "run", save_steps=2, max_steps=6)
    run = made(longer, tokenizer, Happens(lambda run: multiply(run.model.policy_parameters()), 4))
    run.train(resume_from_checkpoint=True)
    assert [(step, action) for step, action, _ in known(run)] == [(4, "roll back")]
    assert not left.parent.exists()


def test_a_run_that_cannot_begin_leaves_the_snapshots_of_the_one_that_is_alive(tokenizer, tmp_path: Path) -> None:
    inside: list[bool] = []

    class Intrudes(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs) -> None:
            if state.global_step == 2:
                with pytest.raises(ValueError, match=r"is in use by|holds a run already"):
                    trainer(guarded(tmp_path), tokenizer).train()
                inside.append((tmp_path / "snapshot" / "step-000000" / "state.json").exists())

    run = trainer(guarded(tmp_path, max_steps=3), tokenizer, callbacks=[Intrudes()])
    run.train()
    assert inside == [True]


# -- off ------------------------------------------------------------------------------------------------------------


def test_without_the_guard_a_figure_that_is_not_finite_ends_the_run_and_nothing_is_kept(tokenizer, tmp_path) -> None:
    happens = Happens(lambda run: fill(run.model.policy_parameters(), math.nan), 3)
    config = settings(tmp_path, max_steps=STEPS, save_steps=2, guard={"enabled": False})
    run = made(config, tokenizer, happens)
    with pytest.raises(DivergenceError, match=r"^step 3: objective/kl is nan, so the policy has diverged"):
        run.train()
    assert run.recovery.snapshots.good is None
    assert not (tmp_path / "snapshot").exists()
    assert incidents.read(tmp_path) == []
    assert [row["step"] for row in rows(tmp_path)] == [0, 1, 2]
    assert "safe/rollbacks" not in rows(tmp_path)[0]
    state = json.loads((tmp_path / "checkpoints" / "step-000002" / "state.json").read_text())
    assert "snapshot" not in state
    assert sorted(path.name for path in (tmp_path / "checkpoints" / "step-000002").glob("*.safetensors")) == [
        "model.safetensors", "optimizer.safetensors", "random.safetensors", "reward_random.safetensors",
    ]  # fmt: skip


def test_without_the_guard_a_gradient_that_is_not_finite_ends_the_run(tokenizer, tmp_path: Path) -> None:
    run = made(settings(tmp_path, guard={"enabled": False}), tokenizer, Happens())
    run.model.policy_parameters()[0].register_hook(lambda g: g * math.nan if run.steps_done == 2 else g)
    with pytest.raises(DivergenceError, match=r"^step 2: .* is nan"):
        run.train()


def test_a_guard_that_sees_nothing_changes_nothing(tokenizer, tmp_path: Path) -> None:
    for name, guard in (("on", {}), ("off", {"enabled": False})):
        trainer(settings(tmp_path / name, guard=guard), tokenizer).train()
    on, off = (rows(tmp_path / name) for name in ("on", "off"))
    assert [{name: value for name, value in row.items() if name != "safe/rollbacks"} for row in on] == off
    assert not (tmp_path / "on" / "incidents.jsonl").exists()
