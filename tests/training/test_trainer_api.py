"""What SAFETrainer takes: rewards of every kind, chats, adapters, callbacks, trackers; and what it pushes."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import datasets
import pyarrow.parquet as pq
import pytest
import torch
from transformers import LlamaForSequenceClassification, PreTrainedTokenizerFast, TrainerCallback

from stable_rlhf import ConfigError, SAFETrainer
from stable_rlhf.data.split import split_datasets
from stable_rlhf.errors import DivergenceError
from tests.tiny_runs import PROMPTS, finished, letters, lora, policy, rows, settings, trainer

CHAT_TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}{% if add_generation_prompt %}<a>{% endif %}"
)


# -- rewards ------------------------------------------------------------------------------------------------------


def test_chat_prompts_go_through_the_template_and_columns_reach_an_async_reward(tokenizer, tmp_path: Path) -> None:
    chat = copy.deepcopy(tokenizer)
    chat.chat_template = CHAT_TEMPLATE
    seen: list[tuple] = []

    async def reward(prompts, completions, answer, **columns):
        seen.extend(zip(prompts, completions, answer, strict=True))
        return [float(len(completion[0]["content"])) for completion in completions]

    data = datasets.Dataset.from_list(
        [{"prompt": [{"role": "user", "content": text}], "answer": text.upper()} for text in PROMPTS]
    )
    run = trainer(settings(tmp_path / "run", max_steps=1), chat, reward, train_dataset=data, processing_class=chat)
    assert chat.decode(run.train_prompts.input_ids[3]) == "<user>hello<a>"
    run.train()
    assert len(seen) == 8
    for prompt, completion, answer in seen:
        assert answer == prompt[0]["content"].upper()
        assert [message["role"] for message in completion] == ["assistant"]


def test_two_rewards_are_weighted_and_reported_apart(tokenizer, tmp_path: Path) -> None:
    def one(prompts, completions, **columns):
        return [1.0] * len(prompts)

    config = settings(tmp_path / "run", max_steps=1, reward={"weights": [2.0, -3.0]})
    (row,) = rows(finished(config, tokenizer, [letters, one]).run_dir)
    assert row["rewards/one/mean"] == 1.0
    assert row["objective/scores"] == pytest.approx(2 * row["rewards/letters/mean"] - 3)


def test_a_reward_model_object_scores_with_its_own_tokenizer(tokenizer, tmp_path: Path) -> None:
    base = policy(tokenizer)
    scorer_config = copy.deepcopy(base.config)
    scorer_config.num_labels = 1
    torch.manual_seed(1)
    scorer = LlamaForSequenceClassification(scorer_config)
    config = settings(tmp_path / "run", max_steps=1, reward={"normalise": "none"})
    with pytest.raises(ConfigError, match="reward_processing_classes has 2 entries for 1 reward_funcs"):
        trainer(config, tokenizer, scorer, reward_processing_classes=[tokenizer, tokenizer])
    run = finished(config, tokenizer, scorer, reward_processing_classes=[tokenizer])
    (entry,) = [
        e for e in pq.read_table(run.run_dir / "completions/step-000000.parquet").to_pylist() if e["prompt"] == "hello"
    ]
    ids = torch.tensor([tokenizer("hello" + entry["completion"])["input_ids"]])
    with torch.no_grad():
        assert entry["score"] == pytest.approx(scorer(input_ids=ids).logits.item(), abs=1e-4)


def test_a_peft_model_is_trained_as_it_comes_with_itself_as_reference(tokenizer, tmp_path: Path) -> None:
    adapted = lora(policy(tokenizer))
    frozen = {name: p.detach().clone() for name, p in adapted.named_parameters() if not p.requires_grad}
    run = finished(settings(tmp_path / "run", max_steps=2), tokenizer, model=adapted)
    assert run.model.policy is adapted
    assert rows(run.run_dir)[0]["objective/kl_k3"] == 0.0  # though the adapter has left its base before the first step
    assert rows(run.run_dir)[1]["objective/kl_k3"] > 0.0
    assert all(torch.equal(p, frozen[name]) for name, p in adapted.named_parameters() if name in frozen)


# -- callbacks, trackers, hub -------------------------------------------------------------------------------------


class Record(TrainerCallback):
    def __init__(self) -> None:
        self.events: list[tuple] = []
        self.logs: list[dict] = []

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        self.events.append(("begin", state.global_step, state.max_steps))

    def on_step_end(self, args, state, control, **kwargs) -> None:
        self.events.append(("step", state.global_step, state.epoch))
        control.should_save = state.global_step == 1
        control.should_training_stop = state.global_step == 3

    def on_save(self, args, state, control, **kwargs) -> None:
        self.events.append(("save", state.global_step))

    def on_log(self, args, state, control, logs=None, **kwargs) -> None:
        self.logs.append(logs)

    def on_train_end(self, args, state, control, **kwargs) -> None:
        self.events.append(("end", state.global_step))


def test_callbacks_see_the_step_and_the_row_and_may_save_or_stop(tokenizer, tmp_path: Path) -> None:
    record = Record()
    run = trainer(settings(tmp_path / "run", max_steps=6, save_steps=0), tokenizer)
    run.add_callback(record)
    run.train()
    assert record.events == [
        ("begin", 0, 6), ("step", 1, 1.0), ("save", 1), ("step", 2, 2.0), ("step", 3, 3.0), ("save", 3), ("end", 3),
    ]  # fmt: skip
    names = [path.name for path in sorted((run.run_dir / "checkpoints").iterdir())]
    assert names == ["step-000001", "step-000003"]
    written = [{name: value for name, value in row.items() if value is not None} for row in rows(run.run_dir)]
    logged = [
        {name: value for name, value in logs.items() if name != "epoch" and not name.startswith("timings/")}
        for logs in record.logs
    ]
    assert logged[:-1] == written
    assert logged[-1].keys() >= {"train_runtime", "train_loss"}


def test_a_save_that_is_asked_for_once_is_done_once_and_the_last_step_is_always_saved(
    tokenizer, tmp_path: Path
) -> None:
    class Asks(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs) -> None:
            if state.global_step == 2:
                control.should_save = True

    for every, expected in ((0, ["step-000002", "step-000005"]), (3, ["step-000002", "step-000003", "step-000005"])):
        config = settings(tmp_path / f"every {every}", max_steps=5, save_steps=every, save_total_limit=9)
        run = finished(config, tokenizer, callbacks=[Asks()])
        assert sorted(path.name for path in (run.run_dir / "checkpoints").iterdir()) == expected


def test_a_resumed_run_counts_its_steps_and_epochs_for_callbacks_from_where_it_was(tokenizer, tmp_path: Path) -> None:
    """Batches of 4 of 8 prompts: half an epoch a step."""
    smaller = {"rollout": {"batch_size": 4}}
    finished(settings(tmp_path / "run", max_steps=2, **smaller), tokenizer)
    record = Record()
    run = trainer(settings(tmp_path / "run", max_steps=3, **smaller), tokenizer, callbacks=[record])
    run.train(resume_from_checkpoint=True)
    assert record.events == [("begin", 2, 3), ("step", 3, 1.5), ("save", 3), ("end", 3)]


def test_tensorboard_has_every_number_of_the_metrics(
    tokenizer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    run = finished(settings(tmp_path / "run", max_steps=2, log={"report_to": ["tensorboard"]}), tokenizer)
    (events,) = run.run_dir.rglob("events.out.tfevents.*")
    found = accumulator.EventAccumulator(str(events)).Reload()
    for step, row in enumerate(rows(run.run_dir)):
        for name, value in row.items():
            if isinstance(value, int | float):
                (scalar,) = [event for event in found.Scalars(f"train/{name}") if event.step == step + 1]
                assert scalar.value == pytest.approx(value, rel=1e-6), name
    assert not caplog.records


def test_rows_keep_every_column_that_any_of_them_has(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    seen: list[Any] = []

    def labelled(prompts, completions, label):
        seen.extend(zip(prompts, label, strict=True))
        return letters(prompts, completions)

    data = [{"prompt": "a"}, {"prompt": "b", "label": 1}]
    config = settings(tmp_path / "run", max_steps=1, rollout={"batch_size": 2}, optim={"num_mini_batches": 1})
    trainer(config, tokenizer, labelled, train_dataset=data).train()
    assert set(seen) == {("a", None), ("b", 1)}


def test_a_weight_too_many_is_named_before_anything_loads(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    config = settings(tmp_path / "run", reward={"weights": [1.0, 2.0]})
    with pytest.raises(ConfigError, match=r"=\[1\.0, 2\.0\]: give a list of 1, one weight for each reward"):
        SAFETrainer("no such model", letters, config)


def test_a_policy_that_diverges_without_a_guard_stops_with_the_step_and_the_remedy(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    class Breaks(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs) -> None:
            if state.global_step == 3:
                with torch.no_grad():
                    model.model.norm.weight.fill_(1e30)

    config = settings(tmp_path / "run", guard={"enabled": False})
    made = trainer(config, tokenizer, callbacks=[Breaks()])
    with pytest.raises(DivergenceError, match=r"step 3: .* is (nan|inf).*lower optim\.learning_rate"):
        made.train()
    assert [row["step"] for row in rows(made.run_dir)] == [0, 1, 2]
    assert (made.run_dir / "checkpoints" / "step-000002").is_dir()


def test_no_held_out_conversation_is_trained_on_at_another_length(tokenizer, tmp_path: Path) -> None:
    turns = [[{"role": "user", "content": f"question {i // 2}"}] for i in range(20)]
    for i in range(1, 20, 2):
        turns[i] = [*turns[i], {"role": "assistant", "content": "so"}, {"role": "user", "content": "and?"}]
    file = tmp_path / "prompts.jsonl"
    file.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in turns))
    config = settings(tmp_path / "run", data={"train": str(file), "eval_size": 4})
    train, held_out = (prompts.dataset for prompts in split_datasets(config.data, config.seed, None, None))
    assert len(held_out) == 4
    began = {prompt[0]["content"] for prompt in held_out["prompt"]}
    assert began.isdisjoint(prompt[0]["content"] for prompt in train["prompt"])
    assert len(train) == 20 - 2 * len(began)


def test_a_run_steps_without_train_and_its_folder_is_free_once_it_ends_or_fails(tokenizer, tmp_path: Path) -> None:
    config = settings(tmp_path / "run", max_steps=2, save_steps=0)
    run = trainer(config, tokenizer)
    run.step()
    other = trainer(config, tokenizer)
    with pytest.raises(ConfigError, match="is in use by this process itself"):
        other.begin()
    with pytest.raises(ConfigError, match="has begun its run already"):
        run.begin()
    run.step()  # neither of the two has ended the run
    with pytest.raises(ConfigError, match=r"^max_steps=2: all of these steps are done"):
        run.step()
    run.end()
    with pytest.raises(ConfigError, match="holds a run already"):
        trainer(config, tokenizer).step()
    again = trainer(settings(tmp_path / "run", max_steps=3), tokenizer)
    again.begin(resume_from_checkpoint=True)  # the one that could not begin has left the lock
    assert again.step()["step"] == 2
    again.end()
