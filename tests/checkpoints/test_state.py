"""What a resume may change: settings that say where and how a run goes on, and none that make it another run."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from stable_rlhf import SAFETrainer
from stable_rlhf.checkpoints import snapshots
from stable_rlhf.checkpoints import state as checkpoints_state
from stable_rlhf.config.config import Config
from stable_rlhf.config.sections import SECTIONS
from stable_rlhf.control import SafeSettings
from stable_rlhf.errors import CheckpointError
from tests.tiny_runs import settings, trainer

ANOTHER = "another value"
NAMES = [
    f"{section}.{field}" if section else field
    for section in ("", *SECTIONS)
    for field in (SECTIONS[section] if section else Config).__dataclass_fields__
    if (section or field not in SECTIONS) and (section, field) != ("kl", "settings")
] + [f"kl.settings.{field}" for field in SafeSettings.__dataclass_fields__]
MAY_CHANGE = [
    "preset", "output_dir", "overwrite_output_dir", "max_steps", "save_steps", "save_total_limit",
    "eval_steps", "load_best_model_at_end", "push_to_hub", "hub_model_id", "hub_private",
    "model.name", "model.revision", "model.gguf_file", "model.trust_remote_code", "model.device",
    "model.self_check", "model.gradient_checkpointing", "model.cuda_graphs", "model.torch_compile",
    "optim.microbatch_tokens",
    "reward.batch_size", "reward.trust_remote_code", "reward.timeout", "reward.retries", "reward.max_wait",
    "reward.token_env", "reward.accept_changed",
    *(f"log.{field}" for field in SECTIONS["log"].__dataclass_fields__),
    *(f"guard.{field}" for field in SECTIONS["guard"].__dataclass_fields__),
]  # fmt: skip


@pytest.fixture(scope="module")
def run(tokenizer: PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory) -> SAFETrainer:
    made = trainer(settings(tmp_path_factory.mktemp("run"), max_steps=1), tokenizer)
    made.train()
    return made


def saved_with(run: SAFETrainer, name: str) -> tuple[snapshots.Tensors, dict[str, Any]]:
    """The run's state, saved by a run with another value of the setting."""
    tensors, state = checkpoints_state.capture(run.parts, run.steps_done)
    section_of(state["parts"]["settings"], name)[name.rpartition(".")[2]] = ANOTHER
    return tensors, state


def section_of(values: dict[str, Any], name: str) -> dict[str, Any]:
    for part in name.split(".")[:-1]:
        values = values[part]
    return values


@pytest.mark.parametrize("name", [name for name in NAMES if name not in MAY_CHANGE])
def test_a_setting_that_makes_it_another_run_is_refused_with_both_values(run: SAFETrainer, name: str) -> None:
    here = section_of(run.settings, name)[name.rpartition(".")[2]]
    with pytest.raises(CheckpointError) as caught:
        checkpoints_state.restore(run.parts, *saved_with(run, name))
    assert str(caught.value) == (
        f"{name} is {here!r} here and 'another value' in the checkpoint: resume with the run's own, or start a new run"
    )


@pytest.mark.parametrize("name", MAY_CHANGE)
def test_a_setting_that_says_where_and_how_may_be_another(run: SAFETrainer, name: str) -> None:
    assert name in NAMES
    checkpoints_state.restore(run.parts, *saved_with(run, name))
    assert run.steps_done == 1


def test_another_reference_is_refused_before_anything_is_changed(run: SAFETrainer, tmp_path: Path) -> None:
    tensors, state = checkpoints_state.capture(run.parts, run.steps_done)
    parts = {**state["parts"], "reference": {"fingerprint": "0" * 64}, "counters": {"step": 9, "episode": 72}}
    with pytest.raises(CheckpointError, match="its reference model differs; give the model that it began with"):
        checkpoints_state.restore(run.parts, tensors, {"step": 9, "parts": parts})
    assert run.steps_done == 1


@pytest.mark.parametrize(
    ("here", "there", "same"),
    [
        (["http://a:1"], ["https://b:2/score"], True),
        (["builtin", "http://a:1"], ["builtin", "http://b:1"], True),
        (["builtin"], ["http://b:1"], False),
        (["http://a:1"], ["http://a:1", "http://b:1"], False),
    ],
)
def test_a_server_may_have_moved_and_no_other_reward(
    run: SAFETrainer, monkeypatch: pytest.MonkeyPatch, here: list[str], there: list[str], same: bool
) -> None:
    tensors, state = checkpoints_state.capture(run.parts, run.steps_done)
    state["parts"]["settings"]["reward"]["functions"] = there
    reward = dataclasses.replace(run.args.reward, functions=here)
    monkeypatch.setattr(run, "args", dataclasses.replace(run.args, reward=reward))
    if same:
        checkpoints_state.restore(run.parts, tensors, state)
        return
    with pytest.raises(CheckpointError, match=r"^reward\.functions is "):
        checkpoints_state.restore(run.parts, tensors, state)
