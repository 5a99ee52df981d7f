"""What `SAFETrainer` is given: an argument of another kind is named, an adapter is recorded, a run is replaced."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from peft import IA3Config, LoraConfig

from stable_rlhf import Config, SAFETrainer
from stable_rlhf.config import ModelConfig
from stable_rlhf.errors import ConfigError, Exit, RewardInputError
from stable_rlhf.policy.adapter import lora_config
from stable_rlhf.training.arguments import as_settings
from stable_rlhf.training.given import as_given
from tests.tiny_runs import finished, policy, rows, settings, trainer


@pytest.mark.parametrize(
    ("argument", "value", "sentence"),
    [
        ("args", "ppo", "is a str; give Config(preset='ppo'), or Config.from_yaml(FILE)"),
        ("args", "run.yaml", "is a str; give Config(preset='safe', max_steps=100), or Config.from_yaml(FILE)"),
        ("args", {"seed": 1}, "is a dict; give Config(**args), or Config.from_yaml(FILE)"),
        ("model", ["builtin"], "is a list; give one causal language model, its folder, or its name on the hub"),
        ("model", None, "is None; give one causal language model, its folder, or its name on the hub"),
        ("model", torch.nn.ReLU(), "is a ReLU; give a causal language model of Transformers, such as AutoModelFor"),
        ("reward_funcs", 5, "is an int; give functions, names such as 'package.module:function', or sequence-"),
        ("reward_funcs", ["builtin", None], "is None; give functions, names such as"),
        ("processing_class", "gpt2", "is a str; give a tokenizer, such as AutoTokenizer.from_pretrained(NAME), or"),
        ("reward_processing_classes", "gpt2", "is a str; give a list with a tokenizer or None for each reward"),
        ("reward_processing_classes", ["gpt2"], "is a str; give a tokenizer, such as AutoTokenizer"),
        ("callbacks", 5, "is an int; give a list of transformers.TrainerCallback objects"),
        (
            "callbacks",
            [print],
            "is a builtin_function_or_method; each entry of the list must be a transformers.TrainerCallback",
        ),
        ("peft_config", {"r": 8}, "is a dict; it is no adapter; give a peft.LoraConfig, or set model.lora_r"),
        ("peft_config", IA3Config(), "is an IA3Config; it is another adapter than LoRA; give a peft.LoraConfig, or"),
    ],
)
def test_an_argument_of_another_kind_is_named_before_anything_loads(argument: str, value: Any, sentence: str) -> None:
    with pytest.raises(ConfigError) as caught:
        SAFETrainer(**{"model": "no/such-model", "reward_funcs": "builtin", argument: value})
    assert str(caught.value).startswith(f"SAFETrainer({argument}=")
    assert sentence in str(caught.value)


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"max_steps": 5}, "SAFETrainer(max_steps=5): is a setting: give args=Config(max_steps=...)"),
        ({"learning_rate": 1}, "unknown argument. Did you mean optim.learning_rate or critic.learning_rate? Settings"),
        ({"max_new_tokens": 9}, "unknown argument; here it is rollout.max_completion_length. Settings are given in "),
        (
            {"reward_func": "builtin"},
            "SAFETrainer(reward_func='builtin'): unknown argument. Did you mean reward_funcs?",
        ),
        ({"config": None}, "unknown argument. Did you mean args?"),
        ({"tokenizer": None}, "unknown argument. Did you mean processing_class?"),
        ({"ref_model": None}, "none is needed: the reference and the value heads are made from the model"),
        ({"zzz": 1}, "SAFETrainer(zzz=1): unknown argument; SAFETrainer has model, reward_funcs, args, "),
    ],
)
def test_an_argument_that_there_is_not_is_told_what_it_is_here(given: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ConfigError) as caught:
        SAFETrainer("no/such-model", **given)
    assert sentence in str(caught.value)


class AnyArguments(SAFETrainer):
    def __init__(self, *values: Any, **given: Any) -> None:
        self.given = values, given


class OwnArguments(SAFETrainer):
    def __init__(self, *, name: str) -> None:
        self.given = (), {"name": name}


def test_a_subclass_has_the_arguments_of_its_own_init() -> None:
    assert AnyArguments(model="builtin", tokenizer=None).given == ((), {"model": "builtin", "tokenizer": None})
    assert AnyArguments("builtin", 1, 2, 3).given == (("builtin", 1, 2, 3), {})
    assert OwnArguments(name="x").given == ((), {"name": "x"})
    with pytest.raises(ConfigError, match="Did you mean name"):
        OwnArguments(nam="x")  # pyright: ignore[reportCallIssue]


def test_a_model_that_is_missing_or_given_twice_is_told(tiny_folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"^SAFETrainer\(\): model is missing; "):
        SAFETrainer()  # pyright: ignore[reportCallIssue]
    with pytest.raises(ConfigError, match="an argument is given twice, or too many are; it has model, reward_funcs, "):
        SAFETrainer("builtin", model="builtin")  # pyright: ignore[reportCallIssue]


def test_a_reward_that_asks_for_a_column_that_is_not_there_costs_no_step(tokenizer, tmp_path: Path) -> None:
    def graded(prompts: list[Any], completions: list[Any], answer: list[str], **columns: Any) -> list[float]:
        return [0.0] * len(prompts)

    with pytest.raises(
        RewardInputError, match=r"'graded' asks for 'answer', .* besides the prompt it has none"
    ) as caught:
        trainer(settings(tmp_path / "run"), tokenizer, graded)
    assert caught.value.exit_code == Exit.BAD_INPUT
    assert not (tmp_path / "run").exists()


# -- how a model is loaded ------------------------------------------------------------------------------------------


def test_a_model_named_next_to_the_settings_is_loaded_as_they_say(tiny_folder: Path) -> None:
    args = Config(model={"gguf_file": "x.gguf"})  # pyright: ignore[reportArgumentType]
    assert as_given(args, str(tiny_folder), None, None).model == ModelConfig(name=str(tiny_folder), gguf_file="x.gguf")
    with pytest.raises(ConfigError, match=r"gguf_file='x\.gguf': .* does not appear to have a file named x\.gguf"):
        SAFETrainer(tiny_folder, "builtin", args)


@pytest.mark.parametrize("name", ["gguf_file", "revision"])
def test_how_to_load_a_model_that_is_not_loaded_by_name_is_refused(name: str, tokenizer) -> None:
    args = Config(model={name: "x"})  # pyright: ignore[reportArgumentType]
    with pytest.raises(ConfigError, match=f"^model.{name}='x': has no effect unless the model is given by its name"):
        as_given(args, policy(tokenizer), None, None)
    with pytest.raises(ConfigError, match=f"^model.{name}='x': has no effect unless model.name is"):
        as_given(args, "builtin", None, None)


# -- peft_config ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "adapter",
    [
        LoraConfig(r=4),
        LoraConfig(r=4, lora_alpha=32, target_modules=["v_proj", "q_proj"], task_type="CAUSAL_LM"),
        LoraConfig(r=2, target_modules="all-linear", use_rslora=True, lora_dropout=0.1),
        LoraConfig(r=2, target_modules=r".*\.q_proj", rank_pattern={"layers.0": 1}, init_lora_weights="gaussian"),
    ],
    ids=["r", "two modules", "all-linear", "pattern"],
)
def test_a_peft_config_is_recorded_so_that_the_settings_make_the_same_adapter(adapter: LoraConfig) -> None:
    recorded = as_settings(ModelConfig(), adapter)
    again = ModelConfig(**yaml.safe_load(yaml.safe_dump(Config(model=recorded).to_dict()["model"])))
    made = lora_config(again)
    assert made is not None
    assert made.to_dict() | {"task_type": None} == adapter.to_dict() | {"task_type": None}


def test_what_no_file_can_hold_is_refused_where_the_adapter_is_made_again() -> None:
    recorded = ModelConfig(lora_r=2, lora_options={"eva_config": "<EvaConfig>"})
    with pytest.raises(
        ConfigError, match=r"^model\.lora_options={eva_config: '<EvaConfig>'}: .* pass peft_config again"
    ):
        lora_config(recorded)
    with pytest.raises(
        ConfigError, match=r"use_rslor: True}: peft.LoraConfig has no such field. Did you mean use_rslora"
    ):
        lora_config(ModelConfig(lora_r=2, lora_options={"use_rslor": True}))
    with pytest.raises(ConfigError, match=r"^model\.lora_options=.*: set model\.lora_r instead$"):
        ModelConfig(lora_r=2, lora_options={"r": 4})
    with pytest.raises(ConfigError, match=r"^model\.lora_options=.*: has no effect without an adapter"):
        ModelConfig(lora_options={"use_rslora": True})


def test_an_adapter_in_both_places_is_refused_unless_it_is_the_same() -> None:
    asked = Config(model={"lora_r": 4})  # pyright: ignore[reportArgumentType]
    with pytest.raises(ConfigError, match=r"^peft_config: model\.lora_r=4 in args asks for an adapter too"):
        as_given(asked, "builtin", None, None, LoraConfig(r=8))
    recorded = as_given(Config(), "builtin", None, None, LoraConfig(r=8))
    assert as_given(recorded, "builtin", None, None, LoraConfig(r=8)) == recorded


# -- overwrite_output_dir -------------------------------------------------------------------------------------------


def test_a_run_is_replaced_where_that_is_asked_for(tokenizer, tmp_path: Path) -> None:
    short = {"max_steps": 1, "save_steps": 1, "log": {"completions_steps": 1, "progress": False}}
    finished(settings(tmp_path / "run", seed=1, **short), tokenizer)
    (tmp_path / "run" / "notes.txt").write_text("mine")
    (tmp_path / "run" / "checkpoints" / "step-000009").mkdir()
    again = settings(tmp_path / "run", overwrite_output_dir=True, **short)
    finished(again, tokenizer)
    finished(settings(tmp_path / "new", **short), tokenizer)
    assert rows(tmp_path / "run") == rows(tmp_path / "new")
    files = {
        name: sorted(str(path.relative_to(tmp_path / name)) for path in (tmp_path / name).rglob("*") if path.is_file())
        for name in ("run", "new")
    }
    assert files["run"] == sorted([*files["new"], "notes.txt"])
    assert (tmp_path / "run" / "notes.txt").read_text() == "mine"
    assert yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["overwrite_output_dir"] is False


def test_a_run_that_trains_is_never_replaced_and_one_that_is_resumed_is_not_either(tokenizer, tmp_path: Path) -> None:
    config = settings(tmp_path / "run", overwrite_output_dir=True, max_steps=2, save_steps=1)
    running = trainer(config, tokenizer)
    running.step()
    with pytest.raises(ConfigError, match="is in use by "):
        trainer(config, tokenizer).train()
    assert len(rows(tmp_path / "run")) == 1
    running.end()
    trainer(config, tokenizer).train(resume_from_checkpoint=True)
    assert [row["step"] for row in rows(tmp_path / "run")] == [0, 1]


def test_a_folder_to_replace_has_to_be_named() -> None:
    with pytest.raises(ConfigError, match=r"^overwrite_output_dir=True: set output_dir to the folder"):
        Config(overwrite_output_dir=True)


def test_a_run_is_replaced_by_a_new_trainer_only_and_only_once_nothing_is_refused(
    tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("stable_rlhf.training.hub.get_token", lambda: None)
    config = settings(tmp_path / "run", overwrite_output_dir=True, max_steps=1, save_steps=1)
    run = finished(config, tokenizer)
    there = sorted(path for path in run.run_dir.rglob("*") if path.is_file())
    with pytest.raises(ConfigError, match=r"^this trainer has already done 1 step: resume with train\("):
        run.train()
    with pytest.raises(ConfigError, match="there is no token for the hub"):
        trainer(dataclasses.replace(config, push_to_hub=True), tokenizer).train()
    assert sorted(path for path in run.run_dir.rglob("*") if path.is_file()) == there
