"""Callbacks that have a state go on with it, through a resume and through a reward that fails."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast, TrainerCallback
from transformers.trainer_callback import ExportableState

from stable_rlhf import ConfigError, RewardError
from stable_rlhf.errors import SaveError
from tests.tiny_runs import broken, settings, trainer


class Counts(TrainerCallback, ExportableState):
    """Steps that began, and steps that ended."""

    def __init__(self, began: int = 0) -> None:
        self.began, self.ended = began, 0

    def on_step_begin(self, args, state, control, **kwargs) -> None:
        self.began += 1

    def on_step_end(self, args, state, control, **kwargs) -> None:
        self.ended += 1

    def state(self) -> dict[str, Any]:
        return {"args": {}, "attributes": {"began": self.began, "ended": self.ended}}


def test_a_callback_with_a_state_goes_on_counting(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    trainer(settings(tmp_path, max_steps=2), tokenizer, callbacks=[Counts()]).train()
    counter = Counts()
    trainer(settings(tmp_path, max_steps=3), tokenizer, callbacks=[counter]).train(resume_from_checkpoint=True)
    assert (counter.began, counter.ended) == (3, 3)


CIRCULAR: dict[str, Any] = {}
CIRCULAR["self"] = CIRCULAR


@pytest.mark.parametrize("guarded", [False, True])
@pytest.mark.parametrize("value", [{1, 2}, math.inf, math.nan, CIRCULAR], ids=["set", "inf", "nan", "circular"])
def test_a_callback_whose_state_is_no_json_is_named_before_anything_is_trained(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path, guarded: bool, value: Any
) -> None:
    class Odd(TrainerCallback, ExportableState):
        def state(self) -> dict[str, Any]:
            return {"args": {}, "attributes": {"best": value}}

    config = settings(tmp_path, max_steps=2, guard={"enabled": guarded})
    with pytest.raises(ConfigError, match=r"callbacks: the state\(\) of Odd cannot be saved as JSON \(.*\); give it"):
        trainer(config, tokenizer, callbacks=[Odd()]).train()
    assert not (tmp_path / "metrics.jsonl").exists()


def test_two_callbacks_of_a_class_each_go_on_with_their_own_state(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    trainer(settings(tmp_path, max_steps=2), tokenizer, callbacks=[Counts(), Counts(100)]).train()
    both = [Counts(), Counts()]
    trainer(settings(tmp_path, max_steps=3), tokenizer, callbacks=both).train(resume_from_checkpoint=True)
    assert [counter.began for counter in both] == [3, 103]


def test_why_a_reward_failed_is_said_also_where_the_checkpoint_cannot_be_written(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = trainer(settings(tmp_path, max_steps=4, save_steps=0), tokenizer, reward=broken("raises"))

    def full(*arguments: object, **named: object) -> None:
        raise SaveError("the disk is full")

    monkeypatch.setattr(run, "save_checkpoint", full)
    with pytest.raises(SaveError, match="the disk is full"):
        run.train()
    assert "the server does not answer" in capsys.readouterr().err


def test_a_callback_counts_a_step_whose_reward_fails_once(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    with pytest.raises(RewardError):
        trainer(settings(tmp_path, max_steps=4), tokenizer, reward=broken("raises"), callbacks=[Counts()]).train()
    counter = Counts()
    trainer(settings(tmp_path, max_steps=4), tokenizer, callbacks=[counter]).train(resume_from_checkpoint=True)
    assert (counter.began, counter.ended) == (4, 4)
