"""What a state holds when it is taken and put back, and the last good state: in memory, on disk, in a checkpoint."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedTokenizerFast, TrainerCallback
from transformers.trainer_callback import ExportableState

from stable_rlhf import SAFETrainer
from stable_rlhf.checkpoints import snapshots as checkpoints_snapshots
from stable_rlhf.checkpoints import state as checkpoints_state
from stable_rlhf.checkpoints.snapshots import Snapshots
from stable_rlhf.errors import CheckpointError
from stable_rlhf.runs import incidents
from stable_rlhf.runs.metrics import MetricsWriter
from stable_rlhf.training import resume
from tests.runs.test_incidents import of_step
from tests.tiny_runs import settings, trainer

KEPT = pytest.mark.parametrize("on_disk", [False, True], ids=["in memory", "on disk"])


def kept_in(folder: Path, on_disk: bool) -> Snapshots:
    return Snapshots(folder / "snapshot" if on_disk else None)


def tensors_of(step: int, length: int = 3, dtype: torch.dtype = torch.float32) -> checkpoints_snapshots.Tensors:
    values = torch.arange(length, dtype=dtype) + step + 2**-30  # which float32 would round away
    return {"model": {"weight": values}, "random": {"cpu": torch.tensor([step], dtype=torch.uint8)}}


def keep(snapshots: Snapshots, step: int, **form: Any) -> None:
    snapshots.keep(tensors_of(step, **form), {"step": step, "episode": 8 * step})


def assert_good(snapshots: Snapshots, step: int, **form: Any) -> None:
    tensors, state = snapshots.load()
    assert state == {"step": step, "episode": 8 * step}
    expected = tensors_of(step, **form)
    assert tensors.keys() == expected.keys()
    for group, named in expected.items():
        for name, tensor in named.items():
            assert tensors[group][name].dtype == tensor.dtype
            assert torch.equal(tensors[group][name], tensor)


def on_disk_now(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "snapshot").iterdir())


@KEPT
def test_a_kept_state_is_a_copy_and_the_good_one_stays_while_candidates_come_and_go(
    tmp_path: Path, on_disk: bool
) -> None:
    snapshots = kept_in(tmp_path, on_disk)
    tensors, state = tensors_of(2), {"step": 2, "episode": 16}
    snapshots.keep(tensors, state)
    snapshots.confirm()
    tensors["model"]["weight"].zero_()
    assert_good(snapshots, 2)
    for step in (4, 6, 8):
        keep(snapshots, step)
        assert_good(snapshots, 2)
        snapshots.drop()
        snapshots.confirm()  # of nothing
        assert_good(snapshots, 2)
    for step in (10, 12, 14):
        keep(snapshots, step)
        snapshots.confirm()
        assert_good(snapshots, step)
        if on_disk:
            assert on_disk_now(tmp_path) == [f"step-{step:06d}"]


@KEPT
def test_the_good_state_kept_again_is_no_candidate_whose_end_would_be_its_own(tmp_path: Path, on_disk: bool) -> None:
    snapshots = kept_in(tmp_path, on_disk)
    keep(snapshots, 2)
    snapshots.confirm()
    keep(snapshots, 2)
    snapshots.drop()
    assert_good(snapshots, 2)


@KEPT
def test_a_state_of_another_form_is_kept_exactly_after_the_memory_of_others_is_free(
    tmp_path: Path, on_disk: bool
) -> None:
    snapshots = kept_in(tmp_path, on_disk)
    forms: list[dict[str, Any]] = [{}, {}, {"length": 5}, {"length": 5}, {"length": 5, "dtype": torch.float64}, {}, {}]
    for number, form in enumerate(forms):
        keep(snapshots, number, **form)
        snapshots.confirm()
        assert_good(snapshots, number, **form)


@KEPT
def test_forgetting_leaves_nothing_to_go_back_to(tmp_path: Path, on_disk: bool) -> None:
    snapshots = kept_in(tmp_path, on_disk)
    keep(snapshots, 2)
    snapshots.confirm()
    snapshots.forget()
    with pytest.raises(CheckpointError, match="there is no snapshot to go back to"):
        snapshots.load()
    assert list(tmp_path.iterdir()) == []


# -- inside a checkpoint --------------------------------------------------------------------------------------------


def checkpointed(snapshots: Snapshots, step: int) -> tuple[checkpoints_snapshots.Tensors, dict[str, Any]]:
    """A checkpoint's content at that step, as its own tensors and states."""
    tensors, state = tensors_of(step), {"step": step, "episode": 8 * step}
    snapshots.into(tensors, state)
    return copy.deepcopy((tensors, state))


@KEPT
@pytest.mark.parametrize("candidate", [None, 4, 6])
def test_a_checkpoint_brings_back_the_good_state_and_whether_its_own_is_the_candidate(
    tmp_path: Path, on_disk: bool, candidate: int | None
) -> None:
    """Saved after 6 steps: with no candidate, with one of another step, with its own state as the candidate."""
    before = kept_in(tmp_path / "before", on_disk)
    keep(before, 2)
    before.confirm()
    if candidate is not None:
        keep(before, candidate)
    tensors, state = checkpointed(before, 6)
    assert sorted(tensors) == ["model", "random", "snapshot-model", "snapshot-random"]
    assert (state["step"], state["snapshot"]["step"], state["candidate"]) == (6, 2, candidate == 6)
    after = kept_in(tmp_path / "after", on_disk)
    keep(after, 9)  # of a course that is given up
    after.confirm()
    keep(after, 11)
    after.out_of(tensors, state)
    assert_good(after, 2)
    after.confirm()
    assert_good(after, 6 if candidate == 6 else 2)


@KEPT
def test_a_checkpoint_of_the_good_state_holds_it_once_and_is_good_when_it_comes_back(
    tmp_path: Path, on_disk: bool
) -> None:
    before = kept_in(tmp_path / "before", on_disk)
    keep(before, 6)
    before.confirm()
    tensors, state = checkpointed(before, 6)
    assert (sorted(tensors), state) == (["model", "random"], {"step": 6, "episode": 48})
    after = kept_in(tmp_path / "after", on_disk)
    after.out_of(tensors, state)
    assert_good(after, 6)
    after.confirm()  # of nothing
    assert_good(after, 6)


@KEPT
def test_checkpoints_do_not_nest_however_often_a_run_is_resumed(tmp_path: Path, on_disk: bool) -> None:
    snapshots = kept_in(tmp_path, on_disk)
    keep(snapshots, 2)
    snapshots.confirm()
    for step in (4, 6, 8):
        keep(snapshots, step)
        tensors, state = checkpointed(snapshots, step)
        assert state["snapshot"] == {"step": step - 2, "episode": 8 * (step - 2)}
        snapshots.out_of(tensors, state)
        snapshots.confirm()


# -- what is taken and put back -------------------------------------------------------------------------------------


class Best(TrainerCallback, ExportableState):
    """A callback that gives its own attributes, not a copy."""

    def __init__(self, **attributes: Any) -> None:
        self.attributes = {"scores": [1.0], **attributes}

    def state(self) -> dict[str, Any]:
        return {"args": {}, "attributes": {"attributes": self.attributes}}


@pytest.fixture
def run(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> SAFETrainer:
    made = trainer(settings(tmp_path, max_steps=1, save_steps=0), tokenizer, callbacks=[Best(), Best(name="second")])
    for parameter in [*made.model.policy_parameters(), *made.model.critic_parameters()]:
        parameter.grad = torch.full_like(parameter, 0.5)
    made.optimizer.step()
    return made


def taken(run: SAFETrainer) -> tuple[checkpoints_snapshots.Tensors, dict[str, Any]]:
    return copy.deepcopy(checkpoints_state.capture(run.parts, run.steps_done))


def test_gradients_of_an_interrupted_update_are_gone_when_a_state_is_put_back(run: SAFETrainer) -> None:
    parameters = [*run.model.policy_parameters(), *run.model.critic_parameters()]
    state = taken(run)
    assert all(parameter.grad is not None for parameter in parameters)
    checkpoints_state.restore(run.parts, *state)
    assert all(parameter.grad is None for parameter in parameters)


def test_the_counts_of_a_run_and_what_its_preview_has_learned_come_back(run: SAFETrainer) -> None:
    preview = run.preview
    assert preview is not None
    run.counters.step, run.counters.episode = 3, 24
    preview.gain, preview.floor, preview.wary = 7.0, 1e-5, False
    run.normaliser.update([1.0, 5.0])
    state = taken(run)
    drawn = torch.rand(3)
    run.counters.step, run.counters.episode = 9, 72
    preview.gain, preview.floor, preview.wary = 9.0, 2e-5, True
    run.normaliser.update([100.0])
    checkpoints_state.restore(run.parts, *state)
    assert (run.steps_done, run.counters.episode) == (3, 24)
    assert (preview.gain, preview.floor, preview.wary) == (7.0, 1e-5, False)
    assert run.normaliser.state_dict() == state[1]["parts"]["normaliser"]
    assert torch.equal(torch.rand(3), drawn)


def test_what_is_learned_after_a_state_was_put_back_does_not_reach_the_state(run: SAFETrainer) -> None:
    tensors, state = taken(run)
    before = copy.deepcopy(tensors)
    checkpoints_state.restore(run.parts, tensors, state)
    for parameter in [*run.model.policy_parameters(), *run.model.critic_parameters()]:
        parameter.grad = torch.ones_like(parameter)
    run.optimizer.step()
    for group, named in before.items():
        for name, tensor in named.items():
            assert torch.equal(tensors[group][name], tensor), (group, name)


def test_the_states_of_callbacks_are_copies_under_names_of_their_own(run: SAFETrainer) -> None:
    first = next(callback for callback in run.events.handler.callbacks if isinstance(callback, Best))
    found = run.callback_states.state_dict()
    first.attributes["scores"].append(2.0)
    assert found == {
        "Best": {"args": {}, "attributes": {"attributes": {"scores": [1.0]}}},
        "Best 2": {"args": {}, "attributes": {"attributes": {"scores": [1.0], "name": "second"}}},
    }


@pytest.mark.parametrize("callbacks", [True, False])
def test_callbacks_get_their_states_back_where_that_is_asked_for(run: SAFETrainer, callbacks: bool) -> None:
    state = taken(run)
    first = next(callback for callback in run.events.handler.callbacks if isinstance(callback, Best))
    first.attributes = {"scores": [7.0]}
    checkpoints_state.restore(
        {name: part for name, part in run.parts.items() if callbacks or name != "callbacks"}, *state
    )
    assert first.attributes == {"scores": [1.0] if callbacks else [7.0]}


def test_what_the_folder_has_of_steps_that_are_repeated_goes_and_is_named(
    run: SAFETrainer, capsys: pytest.CaptureFixture[str]
) -> None:
    run.writer = MetricsWriter(run.run_dir)
    for step in range(5):
        run.counters.step = step + 1
        run.writer.write({"step": step}, {"total_s": 1.0})
        incidents.record(run.run_dir, of_step(step))
        if step in (1, 2, 4):
            run.save_checkpoint()
    run.counters.step = 3
    capsys.readouterr()
    resume.forget_after(run.run_dir, run.writer, run.steps_done)
    assert capsys.readouterr().err == (
        "Removed everything from step 3 on (including step-000005); those steps will be repeated\n"
    )
    assert [incident["step"] for incident in incidents.read(run.run_dir)] == [0, 1, 2]
    assert [[row["step"] for row in rows] for rows in run.writer.check().values()] == [[0, 1, 2]] * 2
    names = sorted(path.name for path in (run.run_dir / "checkpoints").iterdir())
    assert names == ["step-000003"]  # of the two that were kept
    resume.forget_after(run.run_dir, run.writer, run.steps_done)
    assert capsys.readouterr().err == ""
