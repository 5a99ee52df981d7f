"""The guard at work, a verdict at a time: which states are kept, what a roll-back leaves as it is, what is recorded."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedTokenizerFast, TrainerCallback
from transformers.trainer_callback import ExportableState

from stable_rlhf import SAFETrainer, errors
from stable_rlhf.checkpoints import store
from stable_rlhf.control import Observation, make_controller
from stable_rlhf.errors import GuardStop
from stable_rlhf.runs import incidents
from stable_rlhf.training.step import bounded
from tests.guarded_runs import ADAPTER, captured, guarded
from tests.tiny_runs import settings, trainer

BAD, GOOD = {"objective/kl": 9.0, "safe/threshold": 0.3}, {"objective/kl": 0.01, "safe/threshold": 0.3}
"""A step's figures: above the ceiling of GUARD, and below it."""
UNSURE = {**GOOD, "policy/skipped_steps": 1}
"""An update of which a part was not finite: suspect, and skipped already."""


class Counts(TrainerCallback, ExportableState):
    def __init__(self) -> None:
        self.count = 0

    def state(self) -> dict[str, Any]:
        return {"args": {}, "attributes": {"count": self.count}}


def begun(tokenizer: PreTrainedTokenizerFast, folder: Path, lora_r: int = 0, **guard: Any) -> SAFETrainer:
    """A run before its first step, whose schedule falls to 0 in 8 steps."""
    optim = {"learning_rate": 1e-3, "lr_scheduler_type": "linear"}
    run = trainer(guarded(folder, lora_r, optim=optim, guard=guard), tokenizer, callbacks=[Counts()])
    run.run_dir.mkdir(exist_ok=True)
    run.recovery.begin(*captured(run))
    return run


def weight(run: SAFETrainer) -> torch.Tensor:
    return next(iter(run.model.trained_state().values()))


def after(run: SAFETrainer, figures: dict[str, Any], value: float | None = None) -> None:
    """A step that fills a weight, the guard's verdict on its figures, and the state after it kept where that is due."""
    if value is not None:
        with torch.no_grad():
            weight(run).fill_(value)
    run.counters.step += 1
    run.judge(figures)
    if run.recovery.snapshot_due(run.steps_done):
        run.recovery.snapshots.keep(*captured(run))


def filled_with(run: SAFETrainer, value: float) -> bool:
    return bool((weight(run) == value).all())


@ADAPTER
def test_a_state_is_good_once_the_step_after_it_was(tokenizer, tmp_path: Path, lora_r: int) -> None:
    """Kept every second step: that of 2 is good from step 3 on, and that of 4 never, as step 5 goes wrong."""
    run = begun(tokenizer, tmp_path, lora_r)
    for step in (1, 2, 3, 4):
        after(run, GOOD, float(step))
    after(run, BAD, 5.0)
    assert filled_with(run, 2.0)
    assert incidents.read(tmp_path)[0]["done"].startswith("went back to the state after 2 steps (roll-back 1 of 3)")


@pytest.mark.parametrize(("steps", "due"), [(0, True), (1, False), (2, True), (3, False), (4, True)])
def test_states_are_kept_at_multiples_of_snapshot_steps(tokenizer, tmp_path: Path, steps: int, due: bool) -> None:
    run = begun(tokenizer, tmp_path)
    assert run.recovery.snapshot_due(steps) == due


@ADAPTER
def test_a_suspect_step_ends_the_candidate_and_is_none_itself(tokenizer, tmp_path: Path, lora_r: int) -> None:
    """Candidates of 2 and 6 steps: the first is unsure at step 3, the second was made by an unsure step."""
    run = begun(tokenizer, tmp_path, lora_r)
    for step, figures in enumerate([GOOD, GOOD, UNSURE, GOOD, GOOD, UNSURE, GOOD], start=1):
        after(run, figures, float(step))
        assert run.recovery.suspect == (figures is UNSURE)
    after(run, BAD, 8.0)
    assert filled_with(run, 4.0)
    assert not run.recovery.suspect
    assert run.recovery.snapshot_due(run.steps_done)  # the state gone back to is one to keep: 8 is a multiple of 2


@ADAPTER
def test_a_candidate_that_a_suspect_step_ended_is_not_confirmed_by_a_later_good_one(
    tokenizer, tmp_path: Path, lora_r: int
) -> None:
    """That of 2 is unsure at step 3, and nothing is kept after step 4: step 5 has no candidate to confirm."""
    run = begun(tokenizer, tmp_path, lora_r)
    for step, figures in enumerate([GOOD, GOOD, UNSURE, UNSURE, GOOD], start=1):
        after(run, figures, float(step))
    after(run, BAD, 6.0)
    assert incidents.read(tmp_path)[-1]["done"].startswith("went back to the state after 0 steps")
    assert not filled_with(run, 2.0)


def test_a_failure_before_anything_was_confirmed_goes_back_to_the_beginning(tokenizer, tmp_path: Path) -> None:
    run = begun(tokenizer, tmp_path)
    first = weight(run).clone()
    after(run, BAD, 1.0)
    assert torch.equal(weight(run), first)
    assert incidents.read(tmp_path)[0]["done"].startswith("went back to the state after 0 steps")


def test_a_roll_back_leaves_steps_prompts_draws_schedule_and_callbacks_as_they_have_become(
    tokenizer, tmp_path: Path
) -> None:
    run = begun(tokenizer, tmp_path, rollback_factor=0.25)
    counter = next(callback for callback in run.events.handler.callbacks if isinstance(callback, Counts))
    taken = run.stream.take(3)
    torch.rand(2)
    run.counters.step, run.counters.episode, counter.count = 4, 35, 5
    run.controller.load_state_dict({**run.controller.state_dict(), "next_step": 5})
    prompts, drawn = run.stream.state_dict(), torch.get_rng_state()
    assert len(taken) == 3
    after(run, BAD)
    assert (run.steps_done, run.counters.episode, counter.count, run.controller.next_step) == (5, 35, 5, 5)
    assert run.stream.state_dict() == prompts
    assert torch.equal(torch.get_rng_state(), drawn)
    assert run.scheduler.last_epoch == 5
    rates = [group["lr"] for group in run.optimizer.param_groups]
    assert rates == [1e-3 * (1 - 5 / 8) * 0.25] * 2
    assert run._loop.factor == 0.25  # of the bound on an update, and not of the budget
    assert run.controller.settings.budget == 0.3
    assert (run.guard.state.rollbacks, run.recovery.factor) == (1, 0.25)
    after(run, BAD)  # from the beginning again, but for what the roll-backs have made of it
    assert (run.guard.state.rollbacks, run.recovery.factor) == (2, 0.25**2)
    assert run._loop.factor == 0.25**2
    assert run.controller.settings.budget == 0.3


def test_an_incident_has_the_number_of_the_step_that_it_is_of_and_its_figures(tokenizer, tmp_path: Path) -> None:
    run = begun(tokenizer, tmp_path)
    for figures in (GOOD, UNSURE, BAD):
        after(run, figures)
    skip, back = incidents.read(tmp_path)
    assert (skip["step"], skip["action"], skip["done"]) == (1, "skip", "learned from the rest of the step")
    assert (skip["figures"], back["figures"]) == (UNSURE, BAD)
    assert (back["step"], back["action"], back["rule"]) == (2, "roll back", "max_kl")


def test_a_stop_saves_the_good_state_it_went_back_to(tokenizer, tmp_path: Path) -> None:
    run = begun(tokenizer, tmp_path, max_rollbacks=0)
    for step in (1, 2, 3):
        after(run, GOOD, float(step))
    with pytest.raises(GuardStop, match=r"^step 3: .* and stopped there, after guard\.max_rollbacks=0 roll-backs"):
        after(run, BAD, 4.0)
    (saved,) = store.found(tmp_path / "checkpoints")
    tensors, state = store.load(saved)
    assert state["step"] == 4
    name = next(iter(run.model.trained_state()))
    assert (tensors["model"][name] == 2.0).all()


def test_a_stop_for_want_of_a_good_state_saves_nothing_of_the_bad_one(tokenizer, tmp_path: Path) -> None:
    run = begun(tokenizer, tmp_path)
    run.recovery.snapshots.forget()
    with pytest.raises(GuardStop, match="there is no snapshot to go back to") as stop:
        after(run, BAD, 1.0)
    assert isinstance(stop.value.__cause__, errors.CheckpointError)
    assert store.found(tmp_path / "checkpoints") == []
    assert [incident["action"] for incident in incidents.read(tmp_path)] == ["stop"]


def test_a_resumed_run_keeps_the_states_of_its_checkpoint_and_none_at_its_end(tokenizer, tmp_path: Path) -> None:
    run = begun(tokenizer, tmp_path)
    for step in (1, 2, 3):
        after(run, GOOD, float(step))
    path = run.save_checkpoint()
    again = trainer(run.args, tokenizer)
    tensors, state = again.load_checkpoint(path)
    again.recovery.resume(tensors, state)
    assert filled_with(again, 3.0)
    after(again, BAD, 4.0)
    assert filled_with(again, 2.0)
    assert (tmp_path / "snapshot").is_dir()
    again.recovery.end()
    assert not (tmp_path / "snapshot").exists()


def test_a_run_that_never_began_leaves_the_folder_of_another_process_alone(tokenizer, tmp_path: Path) -> None:
    begun(tokenizer, tmp_path)
    before = sorted((tmp_path / "snapshot").rglob("*"))
    trainer(guarded(tmp_path), tokenizer).recovery.end()
    assert sorted((tmp_path / "snapshot").rglob("*")) == before != []


def test_a_run_resumed_without_the_guard_clears_what_a_guarded_one_left(tokenizer, tmp_path: Path) -> None:
    run = begun(tokenizer, tmp_path)
    path = run.save_checkpoint()
    off = settings(
        tmp_path, guard={"enabled": False}, save_steps=0, optim=json.loads(json.dumps(run.settings["optim"]))
    )
    again = trainer(off, tokenizer, callbacks=[Counts()])
    again.recovery.resume(*again.load_checkpoint(path))
    assert not (tmp_path / "snapshot").exists()
    again.recovery.judge(BAD, 2)
    assert incidents.read(tmp_path) == []


def test_a_roll_back_shortens_what_an_update_may_move() -> None:
    decision = make_controller("fixed").observe(Observation(0, 0.0, 0.1, 1.0))
    assert bounded(decision, None, 0.25) == decision  # no bound
    bound = dataclasses.replace(decision, update_kl=0.02)
    assert bounded(bound, None, 0.25) == dataclasses.replace(decision, update_kl=0.005)
    assert bounded(bound, None, 1.0) == bound
    assert bounded(bound, 0.5, 0.25) == dataclasses.replace(decision, update_kl=0.125)  # the setting comes first
