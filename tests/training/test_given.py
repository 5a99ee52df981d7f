"""What a trainer is given as objects: the names that config.yaml has for them, and the scorer made of them."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    LlamaConfig,
    LlamaForSequenceClassification,
)

from stable_rlhf.config.config import Config, complete_settings
from stable_rlhf.errors import ConfigError
from stable_rlhf.rewards.build import make_scorer
from stable_rlhf.training.given import as_given, check_columns, check_held_out
from tests.tiny_runs import letters, lora, policy

CPU = torch.device("cpu")


class Scores:
    """A reward that is an object."""

    def __call__(self, prompts: list[Any], completions: list[Any], **columns: Any) -> list[float]:
        return [10.0 + i for i in range(len(prompts))]


def length(prompts: list[Any], completions: list[Any], **columns: Any) -> list[float]:
    return [float(len(completion)) for completion in completions]


def classifier(vocabulary: int) -> LlamaForSequenceClassification:
    torch.manual_seed(0)
    return LlamaForSequenceClassification(
        LlamaConfig(
            vocab_size=vocabulary,
            hidden_size=8,
            intermediate_size=8,
            num_hidden_layers=1,
            num_attention_heads=1,
            num_labels=1,
            pad_token_id=0,
        )
    )


# -- names --------------------------------------------------------------------------------------------------------


def test_a_model_is_named_by_where_it_was_loaded_from_and_else_by_its_class(tokenizer, tiny_folder: Path) -> None:
    loaded = AutoModelForCausalLM.from_pretrained(tiny_folder)
    for model, name in (
        ("some/name", "some/name"),
        (loaded, str(tiny_folder)),
        (lora(loaded), str(tiny_folder)),
        (policy(tokenizer), "<LlamaForCausalLM>"),
    ):
        assert as_given(Config(), model, letters, None).model.name == name


def test_rewards_are_named_by_their_path_their_function_or_their_class(tokenizer, tmp_path: Path) -> None:
    model = classifier(len(tokenizer))
    model.save_pretrained(tmp_path / "reward")
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "reward")
    given = [letters, Scores(), model, loaded, "pkg.module:function"]
    assert as_given(Config(), "m", given, None).reward.functions == [
        "tests.tiny_runs:letters",
        "tests.training.test_given:Scores",
        "<LlamaForSequenceClassification>",
        str(tmp_path / "reward"),
        "pkg.module:function",
    ]
    assert as_given(Config(), "m", "pkg.module:function", None).reward.functions == ["pkg.module:function"]
    assert as_given(Config(), "m", letters, None).reward.functions == ["tests.tiny_runs:letters"]


def test_what_is_not_given_stays_as_the_settings_have_it() -> None:
    config = Config.from_preset("safe", reward={"functions": ["a:b"]}, data={"train": "file.jsonl"})
    assert as_given(config, "m", None, None).reward == config.reward
    assert as_given(config, "m", None, None).data == config.data
    assert as_given(config, "m", None, [{"prompt": "p"}]).data.train == "<train_dataset>"


def test_rewards_given_as_objects_leave_no_server(tmp_path: Path) -> None:
    """Nothing is asked of its address, which nobody answers."""
    config = Config.from_preset("safe", reward={"url": "http://127.0.0.1:9"})
    given = as_given(config, "m", letters, None)
    assert (given.reward.functions, given.reward.url) == (["tests.tiny_runs:letters"], None)


def test_a_server_stands_once_in_a_runs_settings_among_the_rewards(tmp_path: Path) -> None:
    """So that config.yaml can be read again, which refuses to be given both."""
    config = Config.from_preset("safe", reward={"url": "http://127.0.0.1:9"})
    written = complete_settings(config, tmp_path)
    assert (written["reward"]["functions"], written["reward"]["url"]) == (["http://127.0.0.1:9"], None)
    assert written["output_dir"] == str(tmp_path)
    assert Config.from_preset(**written).reward.functions == ["http://127.0.0.1:9"]


@pytest.mark.parametrize("name", ["timeout", "retries", "max_wait"])
def test_a_servers_setting_needs_a_server_also_where_rewards_are_given_as_objects(name: str) -> None:
    config = Config.from_preset("safe", reward={"url": "http://127.0.0.1:9", name: 7})
    with pytest.raises(ConfigError, match=rf"reward\.{name}=7.*one of reward\.functions is the URL of a server"):
        as_given(config, "m", letters, None)


def test_weights_are_one_for_each_of_the_rewards_that_are_given() -> None:
    config = Config.from_preset("safe", reward={"weights": [1.0, 2.0]})
    assert as_given(config, "m", [letters, length], None).reward.weights == [1.0, 2.0]
    with pytest.raises(ConfigError, match=r"give a list of 3, one weight for each reward"):
        as_given(config, "m", [letters, length, Scores()], None)


# -- the scorer ---------------------------------------------------------------------------------------------------


def test_the_scorer_weighs_what_is_given_and_takes_the_penalty_of_the_settings() -> None:
    reward = {"functions": ["no:such"], "weights": [2.0, -1.0], "missing_eos_penalty": 0.5}
    config = Config.from_preset("safe", reward={**reward, "functions": ["no:such", "no:other"]})
    scorer = make_scorer(config.reward, [length, Scores()], None, CPU)
    scores = scorer.score(["p", "q"], ["abc", "d"], {}, [True, False])
    assert scores.total == [2 * 3 - 10.0, 2 * 1 - 11.0 - 0.5]
    assert scores.per_function == {"length": [3.0, 1.0], "Scores": [10.0, 11.0]}


def test_the_settings_rewards_are_used_where_none_are_given() -> None:
    config = Config.from_preset("safe", reward={"functions": ["tests.training.test_given:length"]})
    assert make_scorer(config.reward, None, None, CPU).score(["p"], ["abcd"], {}, [True]).total == [4.0]


@pytest.mark.parametrize("size", [1, 2, 5])
def test_a_reward_model_is_given_batches_of_the_size_that_is_set(tokenizer, size: int) -> None:
    model = classifier(len(tokenizer))
    batches: list[int] = []
    model.model.register_forward_pre_hook(lambda module, args: batches.append(len(args[0])))
    config = Config.from_preset("safe", reward={"batch_size": size})
    scorer = make_scorer(config.reward, model, [tokenizer], CPU)
    scorer.score([f"p{i}" for i in range(5)], ["c"] * 5, {}, [True] * 5)
    assert sorted(batches, reverse=True) == {1: [1] * 5, 2: [2, 2, 1], 5: [5]}[size]


def test_a_column_for_a_reward_server_that_is_not_there_is_named_with_the_one_that_was_meant() -> None:
    config = Config(reward={"functions": ["http://127.0.0.1:1/"], "columns": ["subjekt"]})
    rows = datasets.Dataset.from_dict({"prompt": ["a"], "subject": ["b"], "n": [1]})
    with pytest.raises(ConfigError, match=r"no column 'subjekt'\. Did you mean subject\?$"):
        check_columns(config, rows)
    config = dataclasses.replace(config, reward=dataclasses.replace(config.reward, columns=["n", "zz"]))
    with pytest.raises(ConfigError, match=r"no column 'zz'; it has subject, n$"):
        check_columns(config, rows)
    check_columns(config, None)  # of a stream nobody knows yet


@pytest.mark.parametrize(("streaming", "remedy"), [(True, "held-out rows in data.eval"), (False, "data.train")])
def test_missing_held_out_prompts_are_named_where_they_can_come_from(streaming: bool, remedy: str) -> None:
    data = {"train": "rows.jsonl", "streaming": streaming, "eval_size": 0}
    for asked in ({"eval_steps": 1}, {"reward": {"gold": "builtin"}}):
        with pytest.raises(ConfigError) as caught:
            check_held_out(Config(data=data, **asked), None)  # pyright: ignore
        assert str(caught.value).endswith(f"give eval_dataset, or name {remedy} with data.eval_size above 0")
