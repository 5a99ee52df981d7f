"""Checkpoints: what is saved comes back bit for bit, what is damaged or of another run is refused with a sentence."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import PreTrainedTokenizerFast

from stable_rlhf.checkpoints import manifest, store
from stable_rlhf.checkpoints import state as checkpoints_state
from stable_rlhf.errors import CheckpointError, SaveError
from tests.tiny_runs import lora, policy, settings, trainer

TENSORS = {"model": {"a": torch.arange(6.0).view(2, 3), "b": torch.tensor([1], dtype=torch.int64)}, "random": {}}
FILES = ["manifest.json", "model.safetensors", "random.safetensors", "state.json"]


def save(folder: Path, step: int = 4, keep: int = 2, **state: Any) -> Path:
    return store.save(folder, step, TENSORS, {"episode": 0.1 + 0.2, **state}, keep)


def test_tensors_and_state_come_back_bit_for_bit(tmp_path: Path) -> None:
    saved = save(tmp_path, nested={"floats": [1e-300, 1 / 3]})
    assert saved == tmp_path / "step-000004"
    assert sorted(file.name for file in saved.iterdir()) == FILES
    tensors, state = store.load(saved)
    assert tensors.keys() == TENSORS.keys()
    for name, tensor in TENSORS["model"].items():
        assert tensors["model"][name].dtype == tensor.dtype
        assert torch.equal(tensors["model"][name], tensor)
    assert state == {"step": 4, "episode": 0.1 + 0.2, "nested": {"floats": [1e-300, 1 / 3]}}


def test_tensors_that_share_memory_or_are_views_are_saved_as_they_look(tmp_path: Path) -> None:
    whole = torch.arange(12.0).view(3, 4)
    group = {"whole": whole, "transposed": whole.T, "row": whole[1]}
    path = store.save(tmp_path, 1, {"model": group}, {}, 1)
    loaded = store.load(path)[0]["model"]
    assert all(torch.equal(loaded[name], tensor) for name, tensor in group.items())


def test_a_state_with_a_number_that_is_not_finite_is_named_and_not_saved(tmp_path: Path) -> None:
    state = {"episode": 1, "callbacks": {"Best": {"attributes": {"best": float("-inf")}}}}
    with pytest.raises(
        SaveError,
        match=r"step 4 could not be written: its 'callbacks' has a value that JSON cannot hold, such as a number that",
    ):
        store.save(tmp_path, 4, {}, state, 2)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", FILES)
def test_a_flipped_byte_in_any_file_is_refused_and_the_message_names_the_file(tmp_path: Path, name: str) -> None:
    saved = save(tmp_path)
    file = saved / name
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 0x01
    file.write_bytes(content)
    named = "step-000004" if name == "manifest.json" else name
    with pytest.raises(
        CheckpointError, match=rf"{named}.*choose an older checkpoint .*in Python resume_from_checkpoint"
    ):
        store.load(saved)


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file_is_refused(tmp_path: Path, name: str) -> None:
    saved = save(tmp_path)
    (saved / name).unlink()
    with pytest.raises(CheckpointError, match=r"is not a whole checkpoint .* choose an older checkpoint"):
        store.load(saved)


def test_a_cut_off_file_and_a_folder_that_is_not_there_are_refused(tmp_path: Path) -> None:
    saved = save(tmp_path)
    (saved / "model.safetensors").write_bytes((saved / "model.safetensors").read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=r"model.safetensors has \d+ bytes, but \d+ were saved"):
        store.load(saved)
    with pytest.raises(CheckpointError, match="step-000077 is not a whole checkpoint"):
        store.load(tmp_path / "step-000077")


def test_another_version_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved = save(tmp_path)
    monkeypatch.setattr(manifest, "VERSION", 99)
    with pytest.raises(
        CheckpointError, match=r"step-000004 is not .*it has format 6, but this release reads format 99"
    ):
        store.load(saved)
    monkeypatch.undo()
    assert store.load(saved)[1]["step"] == 4
    digests = {name: manifest.sha256(saved / name) for name in FILES[1:]}
    (saved / "manifest.json").write_text(json.dumps(digests, indent=1))  # as format 1 had it
    with pytest.raises(CheckpointError, match=r"it has format 1, but this release reads format 6.*or start a new run"):
        store.load(saved)


def test_rotation_keeps_the_newest_by_number_and_counts_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "step-notes").mkdir()
    (tmp_path / ".writing-step-000005").mkdir()  # what a kill leaves
    (tmp_path / "step-000003.tmp").write_text("")
    for step in (2, 4, 999_998, 1_000_000):
        save(tmp_path, step, keep=3)
    assert [path.name for path in store.found(tmp_path)] == ["step-000004", "step-999998", "step-1000000"]
    assert (tmp_path / "step-notes").is_dir()
    assert store.found(tmp_path / "nowhere") == []


def test_a_save_that_fails_leaves_the_older_checkpoint_and_nothing_that_passes_for_one(tmp_path: Path) -> None:
    save(tmp_path, 2)
    with pytest.raises(SaveError, match=r"its 'odd' has a value that JSON cannot hold.*not JSON serializable"):
        save(tmp_path, 4, odd=object())
    assert [path.name for path in store.found(tmp_path)] == ["step-000002"]
    assert store.load(tmp_path / "step-000002")[1]["step"] == 2
    save(tmp_path, 4)  # the same step again, over what was left aside
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-000002", "step-000004"]


def test_saving_a_step_again_replaces_it(tmp_path: Path) -> None:
    save(tmp_path, 4, run="first")
    (tmp_path / "step-000004" / "stray").write_text("of the first")
    save(tmp_path, 4, run="second")
    assert store.load(tmp_path / "step-000004")[1]["run"] == "second"
    assert [path.name for path in tmp_path.iterdir()] == ["step-000004"]
    assert not (tmp_path / "step-000004" / "stray").exists()


def test_forgetting_removes_only_the_checkpoints_after_the_step(tmp_path: Path) -> None:
    for step in (2, 4, 6):
        save(tmp_path, step, keep=5)
    store.forget_after(tmp_path, 4)
    assert [path.name for path in store.found(tmp_path)] == ["step-000002", "step-000004"]


def test_all_generators_draw_the_same_numbers_after_loading_through_the_files(tmp_path: Path) -> None:
    np.random.normal(), random.gauss(0, 1)  # both keep a second normal deviate for the next call
    parts = {"random": checkpoints_state.RandomState()}
    path = store.save(tmp_path, 1, *checkpoints_state.capture(parts, 1), 1)

    def draw() -> list[Any]:
        return [torch.rand(3).tolist(), random.gauss(0, 1), random.random(), np.random.normal(), np.random.rand()]

    first = draw()
    assert draw() != first
    checkpoints_state.restore(parts, *store.load(path))
    assert draw() == first


def test_the_optimisers_state_continues_bit_for_bit(tmp_path: Path) -> None:
    """A parameter that had no gradient yet has no moments, as the policy's in the critic's warm-up."""

    def made() -> tuple[list[torch.nn.Parameter], torch.optim.Optimizer]:
        parameters = [torch.nn.Parameter(torch.ones(2)), torch.nn.Parameter(torch.ones(3))]
        groups = [{"params": parameters[:1], "lr": 0.1}, {"params": parameters[1:], "lr": 0.2, "weight_decay": 0.3}]
        return parameters, torch.optim.AdamW(groups)

    def step(parameters: list[torch.nn.Parameter], optimizer: torch.optim.Optimizer, scale: float, both: bool) -> None:
        for parameter in parameters if both else parameters[1:]:
            parameter.grad = scale * torch.arange(1.0, 1 + len(parameter))
        optimizer.step()
        optimizer.zero_grad()

    first, optimizer = made()
    step(first, optimizer, 1.0, both=False)
    state = checkpoints_state.capture({"optimizer": checkpoints_state.OptimizerState(optimizer)}, 1)
    path = store.save(tmp_path, 1, *state, 1)
    second, other = made()
    for mine, theirs in zip(second, first, strict=True):
        mine.data.copy_(theirs.data)
    checkpoints_state.restore({"optimizer": checkpoints_state.OptimizerState(other)}, *store.load(path))
    for scale in (0.5, -2.0):
        step(first, optimizer, scale, both=True)
        step(second, other, scale, both=True)
    for mine, theirs in zip(second, first, strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize("adapter", [False, True])
def test_a_run_with_another_reference_model_is_refused(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path, adapter: bool
) -> None:
    def made(seed: int) -> Any:
        base = policy(tokenizer, seed)
        return trainer(settings(tmp_path / "run"), tokenizer, model=lora(base) if adapter else base)

    made(0).train()
    checkpoints = sorted((tmp_path / "run" / "checkpoints").iterdir())
    before = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    with pytest.raises(CheckpointError, match="its reference model differs; give the model that it began with"):
        made(1).train(resume_from_checkpoint=checkpoints[0])
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == before
    assert sorted((tmp_path / "run" / "checkpoints").iterdir()) == checkpoints


def test_a_checkpoint_holds_only_safetensors_and_json_and_the_trained_tensors(tokenizer, tmp_path: Path) -> None:
    run = trainer(settings(tmp_path / "run", max_steps=2), tokenizer, model=lora(policy(tokenizer)))
    run.train()
    (saved,) = (tmp_path / "run" / "checkpoints").iterdir()
    assert {file.suffix for file in saved.iterdir()} == {".safetensors", ".json"}
    names = store.load(saved)[0]["model"].keys()
    assert {name.split(".")[0] for name in names} == {"policy", "heads", "target_heads"}
    assert all("lora_" in name for name in names if name.startswith("policy."))  # the base model is not stored again
    assert json.loads((saved / "state.json").read_text())["step"] == 2
