"""Callbacks are called at the events, and with the state, that Transformers' own Trainer gives them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import EarlyStoppingCallback, Trainer, TrainerCallback, TrainingArguments

from stable_rlhf import ConfigError
from stable_rlhf.errors import RewardUnavailable
from tests.tiny_runs import PROMPTS, letters, settings, trainer

EVENTS = [
    "init_end", "train_begin", "train_end", "epoch_begin", "epoch_end", "step_begin", "step_end", "pre_optimizer_step",
    "optimizer_step", "evaluate", "save", "log",
]  # fmt: skip
ONE_UPDATE = {"num_iterations": 1, "num_mini_batches": 1}
HELD_OUT = [{"prompt": f"held out {i}"} for i in range(2)]


class Record(TrainerCallback):
    """Every event with ``global_step`` and ``epoch``; ``logged``: how long the history was at each ``on_log``."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, int, float]] = []
        self.logged: list[int] = []

    def note(self, event: str, state: Any) -> None:
        self.seen.append((event, state.global_step, state.epoch))
        if event == "log":
            self.logged.append(len(state.log_history))


for _event in EVENTS:
    setattr(Record, f"on_{_event}", lambda self, args, state, control, _event=_event, **_: self.note(_event, state))


class Line(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.slope = nn.Parameter(torch.zeros(()))

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"loss": (self.slope * x - labels).square().mean()}


def test_events_come_as_from_transformers_trainer(tokenizer, tmp_path: Path) -> None:
    """Four steps of half an epoch, an evaluation after each, a checkpoint after two; ours also evaluates before."""
    theirs, ours = Record(), Record()
    arguments = TrainingArguments(
        output_dir=str(tmp_path / "theirs"),
        max_steps=4,
        per_device_train_batch_size=4,
        logging_steps=1,
        eval_strategy="steps",
        eval_steps=1,
        save_steps=2,
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
    )
    data = [{"x": torch.tensor(float(i)), "labels": torch.tensor(float(i))} for i in range(len(PROMPTS))]
    Trainer(Line(), arguments, train_dataset=data, eval_dataset=data, callbacks=[theirs]).train()  # type: ignore[arg-type]
    config = settings(tmp_path / "ours", eval_steps=1, rollout={"batch_size": 4}, optim=ONE_UPDATE)
    trainer(config, tokenizer, eval_dataset=HELD_OUT, callbacks=[ours]).train()
    before = [("log", 0, 0.0), ("evaluate", 0, 0.0)]
    assert ours.seen[2:4] == before
    assert ours.seen[:2] + ours.seen[4:] == theirs.seen
    assert ours.logged == [i + 1 for i in range(len(ours.logged))]  # each is in the history before on_log


class LeavesEpochs(TrainerCallback):
    """Leaves each epoch after its first step: as its figures come, or at the step's end."""

    def __init__(self, at: str = "step_end") -> None:
        setattr(self, f"on_{at}", self.leave)

    def leave(self, args, state, control, **kwargs) -> None:
        control.should_epoch_stop = True


@pytest.mark.parametrize("at", ["step_end", "evaluate"])
def test_an_epoch_is_left_as_by_transformers_trainer(at: str, tokenizer, tmp_path: Path) -> None:
    """Six steps of a third of an epoch, which are two epochs: both Trainers take a step of each."""
    theirs, ours = Record(), Record()
    data = [{"x": torch.tensor(float(i)), "labels": torch.tensor(float(i))} for i in range(6)]
    arguments = TrainingArguments(
        output_dir=str(tmp_path / "theirs"),
        max_steps=6,
        per_device_train_batch_size=2,
        logging_steps=1,
        eval_strategy="steps",
        eval_steps=1,
        save_steps=1,
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
    )
    Trainer(Line(), arguments, train_dataset=data, eval_dataset=data, callbacks=[theirs, LeavesEpochs(at)]).train()  # type: ignore[arg-type]
    config = settings(tmp_path / "ours", max_steps=6, save_steps=1, eval_steps=1, rollout={"batch_size": 2})
    few = [{"prompt": prompt} for prompt in PROMPTS[:6]]
    run = trainer(config, tokenizer, train_dataset=few, eval_dataset=HELD_OUT, callbacks=[ours, LeavesEpochs(at)])
    assert run.train().global_step == 2

    def events(record: Record) -> list[tuple[str, int]]:
        inner = ("pre_optimizer_step", "optimizer_step", "init_end")
        return [(event, step) for event, step, _ in record.seen if event not in inner]

    before = [("log", 0), ("evaluate", 0)]
    assert [each for each in events(ours) if each not in before] == events(theirs)
    ends = [entry for entry in ours.seen if entry[0] == "epoch_end"]
    assert ends == [("epoch_end", 1, 1 / 3), ("epoch_end", 2, 4 / 3)]


@pytest.mark.parametrize("streamed", [False, True])
def test_a_run_that_leaves_epochs_resumes_exactly(streamed: bool, tokenizer, tmp_path: Path) -> None:
    def trained(folder: str, steps: int, resumed: bool = False) -> list[dict[str, Any]]:
        config = settings(tmp_path / folder, max_steps=steps, save_steps=1, rollout={"batch_size": 2})
        data = Rows() if streamed else [{"prompt": prompt} for prompt in PROMPTS]
        run = trainer(config, tokenizer, train_dataset=data, callbacks=[LeavesOnce()])
        run.train(resume_from_checkpoint=resumed)
        logged = [{k: v for k, v in entry.items() if not k.startswith("t")} for entry in run.state.log_history]
        return [entry for entry in logged if "objective/scores" in entry]

    whole = trained("whole", 8)
    assert [entry["step"] for entry in whole] == list(range(1, 9 if streamed else 7))
    trained("parts", 2)
    assert trained("parts", 8, resumed=True) == whole
    assert (tmp_path / "parts/metrics.jsonl").read_bytes() == (tmp_path / "whole/metrics.jsonl").read_bytes()


def test_a_snapshot_of_a_step_that_left_its_epoch_goes_on_with_the_next(tokenizer, tmp_path: Path) -> None:
    config = settings(
        tmp_path / "run", max_steps=6, rollout={"batch_size": 2}, guard={"enabled": True, "snapshot_steps": 1}
    )
    data = [{"prompt": prompt} for prompt in PROMPTS]
    run = trainer(config, tokenizer, train_dataset=data, callbacks=[LeavesOnce()])
    run.begin()
    for _ in range(2):
        run.step()
    candidate = run.recovery.snapshots.candidate
    assert candidate is not None
    (kept,) = (tmp_path / "run/snapshot").glob("step-*2/state.json")
    assert json.loads(kept.read_text())["parts"]["prompts"] == json.loads(json.dumps(run.stream.state_dict()))
    run.end()


class LeavesOnce(TrainerCallback):
    def __init__(self, at: str = "step_end") -> None:
        setattr(self, f"on_{at}", self.leave)

    def leave(self, args, state, control, **kwargs) -> None:
        control.should_epoch_stop |= state.global_step == 2


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("at", ["log", "evaluate"])
@pytest.mark.parametrize("batch", [2, 4])  # the second step is within its epoch, and ends it
def test_an_evaluation_that_is_made_up_for_leaves_its_epoch(
    batch: int, at: str, streamed: bool, tokenizer, tmp_path: Path
) -> None:
    def trained(folder: str, fails: bool = False, resumed: bool = False) -> tuple[Any, dict[str, Any]]:
        def reward(prompts: list[Any], completions: list[Any], trainer_state: Any, **columns: Any) -> list[float]:
            if fails and trainer_state.global_step == 2 and prompts[0] == HELD_OUT[0]["prompt"]:
                raise RewardUnavailable("the server is gone.")
            return letters(prompts, completions)

        config = settings(
            tmp_path / folder,
            max_steps=5,
            eval_steps=2,
            save_steps=0,
            rollout={"batch_size": batch},
            reward={"accept_changed": True},
        )
        data = Rows() if streamed else [{"prompt": prompt} for prompt in PROMPTS]
        record = Record()
        run = trainer(
            config,
            tokenizer,
            reward,
            train_dataset=data,
            eval_dataset=HELD_OUT,
            callbacks=[record, LeavesOnce(at)],
        )
        run.train(resume_from_checkpoint=resumed)
        ends = [entry for entry in record.seen if entry[0] == "epoch_end" and entry[1] >= 2]
        return ends, run.stream.state_dict()

    whole = trained("whole")
    with pytest.raises(RewardUnavailable, match="continues from step 2"):
        trained("parts", fails=True)
    parts = trained("parts", resumed=True)
    assert (tmp_path / "parts/metrics.jsonl").read_bytes() == (tmp_path / "whole/metrics.jsonl").read_bytes()
    assert parts[1] == whole[1]
    assert parts[0] == (whole[0] if (at, batch) == ("evaluate", 2) else whole[0][1:])  # saved within it, or at its end


class Asks(TrainerCallback):
    """Asks for an evaluation and for nothing else, against the settings, and stops after the second step."""

    def __init__(self) -> None:
        self.logs = 0

    def on_step_end(self, args, state, control, **kwargs) -> None:
        control.should_evaluate = state.global_step == 1
        control.should_log = False
        control.should_training_stop = state.global_step == 2

    def on_log(self, args, state, control, logs=None, **kwargs) -> None:
        self.logs += "objective/scores" in logs


def test_what_control_asks_for_is_done_and_what_it_declines_is_not(tokenizer, tmp_path: Path) -> None:
    asks = Asks()
    run = trainer(settings(tmp_path, save_steps=0), tokenizer, eval_dataset=HELD_OUT, callbacks=[asks])
    result = run.train()
    assert [figures["step"] for figures in result["during"]] == [1]
    assert asks.logs == 0
    assert result.global_step == 2
    assert result.metrics["eval_reward"] == result["after"]["reward"]
    assert result.metrics["eval_reward_before"] == result["before"]["reward"]
    again = trainer(settings(tmp_path, max_steps=2, save_steps=0), tokenizer, eval_dataset=HELD_OUT)
    finished = again.train(resume_from_checkpoint=True)  # nothing is left to train
    assert finished.global_step == 2
    assert finished["after"] == result["after"]
    shared = [name for name in result.metrics if not name.startswith(("train_", "timings/"))]
    assert {name: finished.metrics[name] for name in shared} == {name: result.metrics[name] for name in shared}
    assert finished.training_loss == result.training_loss


def test_early_stopping_says_which_settings_it_needs(tokenizer, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"EarlyStoppingCallback .* set eval_steps and metric_for_best_model"):
        trainer(settings(tmp_path), tokenizer, callbacks=[EarlyStoppingCallback()]).train()
    with pytest.raises(ConfigError, match="eval_steps=2: there are no held-out prompts"):
        trainer(settings(tmp_path, eval_steps=2), tokenizer)


def test_a_resumed_stream_goes_on_in_its_pass(tokenizer, tmp_path: Path) -> None:
    def seen(folder: str, steps: int, resumed: bool = False) -> list[tuple[str, int, float]]:
        record = Record()
        half = settings(tmp_path / folder, max_steps=steps, rollout={"batch_size": 4})
        run = trainer(half, tokenizer, train_dataset=Rows(), callbacks=[record])
        assert run.train(resume_from_checkpoint=resumed).metrics["epoch"] == run.epoch > 0
        return [entry for entry in record.seen if entry[0] in ("epoch_begin", "epoch_end", "train_begin")]

    whole = seen("whole", 6)
    seen("stopped", 4)
    resumed = seen("stopped", 6, resumed=True)
    assert resumed[:2] == [("train_begin", 4, 2.0), ("epoch_begin", 4, 2.0)]
    assert [(event, step) for event, step, _ in whole if event == "epoch_end"] == [("epoch_end", n) for n in (2, 4, 6)]
    assert resumed[2:] == whole[-len(resumed[2:]) :]


class Rows:
    """A stream of PROMPTS."""

    def __iter__(self) -> Iterator[Any]:
        return iter(PROMPTS)


class AsksTwice(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs) -> None:
        control.should_evaluate = True

    on_epoch_end = on_step_end


def test_after_one_step_there_is_one_evaluation(tokenizer, tmp_path: Path) -> None:
    run = trainer(settings(tmp_path, max_steps=2), tokenizer, eval_dataset=HELD_OUT, callbacks=[AsksTwice()])
    assert [figures["step"] for figures in run.train()["during"]] == [1, 2]


class FailsOnce(TrainerCallback):
    failed = False

    def on_step_end(self, args, state, control, **kwargs) -> None:
        if state.global_step == 2 and not self.failed:
            self.failed = True
            raise OSError("once")


def test_a_trainer_that_resumes_after_a_failure_begins_its_epoch(tokenizer, tmp_path: Path) -> None:
    record = Record()
    config = settings(tmp_path, max_steps=3, save_steps=1)
    run = trainer(
        config, tokenizer, train_dataset=[{"prompt": p} for p in PROMPTS * 3], callbacks=[FailsOnce(), record]
    )
    with pytest.raises(OSError, match="once"):
        run.train()
    run.train(resume_from_checkpoint=True)
    assert [step for event, step, _ in record.seen if event == "epoch_begin"] == [0, 1]


def test_a_reward_that_fails_in_an_evaluation_costs_no_step(tokenizer, tmp_path: Path) -> None:
    evaluations = iter(range(9))

    def reward(prompts: list[Any], completions: list[Any], **columns: Any) -> list[float]:
        if prompts[0] == HELD_OUT[0]["prompt"] and next(evaluations) == 2:  # the one after the second step
            raise RewardUnavailable("the server is gone.")
        return letters(prompts, completions)

    config = settings(tmp_path, max_steps=3, save_steps=0, eval_steps=1)
    run = trainer(config, tokenizer, reward, eval_dataset=HELD_OUT)
    with pytest.raises(RewardUnavailable, match=r"is gone\. .* continues from step 2\."):
        run.train()
    assert run.train(resume_from_checkpoint=True).global_step == 3
