"""What a run saves loads with ``from_pretrained`` to the policy's own logits: final/ and exported checkpoints."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AutoPeftModelForCausalLM
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from stable_rlhf import ConfigError, SAFETrainer
from stable_rlhf.cli import main
from stable_rlhf.config import ModelConfig
from stable_rlhf.errors import Exit
from stable_rlhf.policy import load_policy, saved_fault
from tests.conftest import byte_tokenizer
from tests.tiny_runs import PROMPTS, letters, lora, policy, settings, trainer

IDS = torch.tensor([[5, 70, 130, 200, 9]])


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


def test_a_checkpoint_of_a_model_given_as_an_object_is_exported(tokenizer, tmp_path: Path) -> None:
    run = trainer(settings(tmp_path / "run", max_steps=1), tokenizer)
    run.train()
    out = tmp_path / "out"
    assert main(["export", str(run.run_dir), str(out)]) == Exit.DONE
    loaded = AutoModelForCausalLM.from_pretrained(out)
    assert torch.equal(logits(loaded), logits(run.model.policy))
    assert loaded.generation_config.eos_token_id == run.model.policy.generation_config.eos_token_id
    assert AutoTokenizer.from_pretrained(out).get_vocab() == tokenizer.get_vocab()
    assert (out / "value_heads.safetensors").read_bytes() == (
        run.run_dir / "final/value_heads.safetensors"
    ).read_bytes()
    checkpoint = str(run.run_dir / "checkpoints" / "step-000001")
    assert main(["export", checkpoint, str(out)]) == Exit.BAD_INPUT  # there is something in it
    assert main(["export", checkpoint, str(tmp_path / "merged"), "--merge"]) == Exit.BAD_INPUT
    assert not (tmp_path / "merged").exists()


def test_an_adapter_is_exported_as_it_is_or_merged(tokenizer, tmp_path: Path) -> None:
    policy(tokenizer).save_pretrained(tmp_path / "policy")
    tokenizer.save_pretrained(tmp_path / "policy")
    config = settings(tmp_path / "run", max_steps=1, model={"name": str(tmp_path / "policy"), "lora_r": 2})
    run = SAFETrainer(config.model.name, "tests.tiny_runs:letters", config, [{"prompt": p} for p in PROMPTS])
    run.train()
    own = logits(run.model.policy)
    for name, kind, more in (("adapter", AutoPeftModelForCausalLM, []), ("merged", AutoModelForCausalLM, ["--merge"])):
        assert main(["export", str(run.run_dir), str(tmp_path / name), *more]) == Exit.DONE
        torch.testing.assert_close(logits(kind.from_pretrained(tmp_path / name)), own, rtol=1e-5, atol=1e-5)
        card = (tmp_path / name / "README.md").read_text()
        assert ("AutoPeftModelForCausalLM" in card) == (name == "adapter")
        assert f"| steps | 1 of {config.rollout.batch_size} prompts each |" in card
    assert not (tmp_path / "merged" / "adapter_config.json").exists()
    torch.testing.assert_close(logits(AutoPeftModelForCausalLM.from_pretrained(run.run_dir / "final")), own)
    assert saved_fault(run.model, run.run_dir / "final") is None
    with torch.no_grad():  # of the base in memory only: the saved adapter is then one of another model
        run.model.policy.get_base_model().lm_head.weight.mul_(1.5)
    assert "its logits differ" in str(saved_fault(run.model, run.run_dir / "final"))


def test_an_adapter_on_an_object_is_exported_and_cannot_be_merged(tokenizer, tmp_path: Path, capsys) -> None:
    run = trainer(settings(tmp_path / "run", max_steps=1), tokenizer, model=lora(policy(tokenizer)))
    run.train()
    assert "names no base model" in capsys.readouterr().err
    assert main(["export", str(run.run_dir), str(tmp_path / "out")]) == Exit.DONE
    exported, final = (folder / "adapter_model.safetensors" for folder in (tmp_path / "out", run.run_dir / "final"))
    assert exported.read_bytes() == final.read_bytes()
    assert main(["export", str(run.run_dir), str(tmp_path / "merged"), "--merge"]) == Exit.BAD_INPUT
    assert "load_checkpoint() and save_model()" in capsys.readouterr().err


def test_what_cannot_be_saved_is_known_before_the_first_step(tokenizer, tmp_path: Path, capsys) -> None:
    model = policy(tokenizer)
    model.generation_config.temperature = 0.7  # sampling settings without do_sample
    trainer(settings(tmp_path / "mended", max_steps=1), tokenizer, model=model).begin()
    assert "do_sample=True" in capsys.readouterr().err
    model = policy(tokenizer)
    model.config.note = object()
    run = trainer(settings(tmp_path / "refused"), tokenizer, model=model)
    with pytest.raises(ConfigError, match=r"the policy \(LlamaForCausalLM\) could not be saved at the end of training"):
        run.train()
    assert not (tmp_path / "refused" / "metrics.jsonl").exists()


def test_a_run_begun_in_python_says_how_it_is_resumed(tokenizer, tmp_path: Path, capsys) -> None:
    run = trainer(settings(tmp_path / "run", max_steps=1), tokenizer)
    run.train()
    assert main(["resume", str(run.run_dir)]) == Exit.BAD_INPUT
    assert "was given to SAFETrainer as an object" in (said := capsys.readouterr().err)
    assert "train(resume_from_checkpoint=True)" in said


def test_a_tokenizer_with_several_chat_templates_is_exported_with_all(tmp_path: Path) -> None:
    several = byte_tokenizer()
    several.chat_template = {"default": "{{ messages }}", "tool_use": "{{ tools }}"}
    run = trainer(settings(tmp_path / "run", max_steps=1), several)
    run.train()
    assert main(["export", str(run.run_dir), str(tmp_path / "out")]) == Exit.DONE
    assert AutoTokenizer.from_pretrained(tmp_path / "out").chat_template == several.chat_template


def test_what_does_not_fit_next_to_the_policy_is_not_checked(tokenizer, tmp_path: Path, monkeypatch) -> None:
    run = trainer(settings(tmp_path, max_steps=1), tokenizer)
    run.train()
    used = type(run.model.policy).forward

    def lacks(model: Any, **given: Any) -> Any:
        if model is not run.model.policy:
            raise torch.OutOfMemoryError("of the copy")
        return used(model, **given)

    monkeypatch.setattr(type(run.model.policy), "forward", lacks)
    assert saved_fault(run.model, tmp_path / "final") is None


@pytest.mark.parametrize("rank", [0, 4])
def test_what_is_saved_is_compared_as_the_policy_computes_in_bfloat16(
    rank: int, tiny_folder: Path, tmp_path: Path
) -> None:
    config = settings(
        tmp_path / "run", max_steps=1, model={"name": str(tiny_folder), "dtype": "bfloat16", "lora_r": rank}
    )
    run = SAFETrainer(str(tiny_folder), letters, config, [{"prompt": "the cat"}, {"prompt": "a dog"}] * 4)
    run.train()
    assert saved_fault(run.model, run.run_dir / "final") is None


def test_a_run_with_an_adapter_shows_no_warning_and_no_bar_of_a_library(
    tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    log = {"progress": False}
    config = settings(tmp_path / "run", max_steps=1, log=log, model={"name": str(tiny_folder), "lora_r": 2})
    shown = logging.is_progress_bar_enabled()
    logging.enable_progress_bar()
    try:
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            run = SAFETrainer(config.model.name, letters, config, [{"prompt": p} for p in PROMPTS])
            capsys.readouterr()  # loading by name shows a bar, as it does without us
            run.train()
            run.save_model(tmp_path / "again")
            load_policy(ModelConfig(name=str(run.run_dir / "final")))
        assert [str(each.message) for each in warned if each.category is FutureWarning] == []
        assert "model shards" not in capsys.readouterr().err
        assert logging.is_progress_bar_enabled()  # as the user has it
    finally:
        logging.enable_progress_bar() if shown else logging.disable_progress_bar()
