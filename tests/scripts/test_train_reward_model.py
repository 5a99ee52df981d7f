"""The reward-model script: what it holds out, what it learns, and that its folder is a reward the trainer can load."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from stable_rlhf.rewards.functions import resolve_reward

pytest.importorskip("trl", reason="trl is not installed: pip install 'stable-rlhf[reward]'")

# TRL 1.12 and Transformers before 5.2x know this setting only by the name that newer ones call deprecated.
pytestmark = pytest.mark.filterwarnings("ignore:`gradient_checkpointing` is deprecated:FutureWarning")

SCRIPT = Path(__file__).parents[2] / "scripts" / "train_reward_model.py"
WORDS = ["<unk>", "</s>", "Human:", "Assistant:", "good", "bad", *(f"q{n}" for n in range(12))]


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("train_reward_model", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up by name
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def language_model(tmp_path_factory) -> Path:
    """A random language model without a pad token and without a chat template."""
    folder = tmp_path_factory.mktemp("language-model")
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", unk_token="<unk>").save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(WORDS), hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def hh_file(path: Path) -> Path:
    """12 prompts, the first as two dialogues of different length; the better answer is always "good"."""
    starts = [f"\n\nHuman: q{n}" for n in range(12)]
    starts.append(starts[0] + "\n\nAssistant: q1\n\nHuman: q2")
    rows = [{key: f"{start}\n\nAssistant: {word}" for key, word in ANSWERS.items()} for start in starts]
    rows.append({"chosen": "\n\nHuman: q1\n\nAssistant: good", "rejected": "\n\nHuman: q2\n\nAssistant: bad"})
    rows.append({"chosen": "\n\nHuman: q3\n\nAssistant: good", "rejected": "\n\nHuman: q3\n\nAssistant: good"})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


ANSWERS = {"chosen": "good", "rejected": "bad"}


def test_no_prompt_is_on_both_sides_of_the_split_and_no_pair_is_lost(script, tmp_path, capsys):
    source = str(hh_file(tmp_path / "pairs.jsonl"))
    pairs = script.load_pairs(source, format="hh", data_dir=None, split="train", limit=None)
    assert "left out 2 of 15 pairs" in capsys.readouterr().out
    for seed in range(20):
        training, held_out = script.split_pairs(pairs, 0.25, seed)
        assert sorted(map(repr, training + held_out)) == sorted(map(repr, pairs))
        assert not {pair.group for pair in training} & {pair.group for pair in held_out}
        assert 2 <= len(held_out) <= 3


@pytest.mark.parametrize("lora_r", [0, 4])
def test_a_short_run_learns_the_pairs_and_saves_a_loadable_reward(script, language_model, tmp_path, lora_r):
    output = tmp_path / "reward"
    source = hh_file(tmp_path / "pairs.jsonl")
    options = ["--data", source, "--model", language_model, "--output", output, "--lora-r", lora_r]
    options += ["--epochs", 2, "--batch-size", 8, "--learning-rate", 0.03, "--max-length", 8, "--eval-fraction", 0.25]
    script.main([str(option) for option in options])  # 10 or 11 training pairs in batches of 8: two steps an epoch

    record = json.loads((output / "reward_model.json").read_text())
    assert record["figures"]["after"]["held out"]["accuracy"] == 1.0
    assert record["figures"]["after"]["train"]["pairs"] == record["training_pairs"]
    assert not list(output.glob("adapter*"))
    reward = resolve_reward(output).function
    good, bad = reward([[{"role": "user", "content": "q5"}]] * 2, ["good", "bad"])
    assert good > bad + 0.1
    assert reward.model.config.pad_token_id == reward.tokenizer.pad_token_id == WORDS.index("</s>")
    assert reward.max_length == 8  # what it was trained with


def test_pairs_with_a_prompt_column_are_read_as_they_are(script, tmp_path):
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"q{n} ", **ANSWERS}) + "\n" for n in range(3)))
    pairs = script.load_pairs(str(path), format="pairs", data_dir=None, split="train", limit=2)
    assert pairs == [script.Pair(prompt=f"q{n} ", **ANSWERS) for n in range(2)]


def test_a_file_in_another_format_is_refused(script, tmp_path):
    path = tmp_path / "pairs.jsonl"
    path.write_text(json.dumps({"prompt": "q1", **ANSWERS}) + "\n")
    with pytest.raises(SystemExit, match="row 1 is not a dialogue"):
        script.load_pairs(str(path), format="hh", data_dir=None, split="train", limit=None)


def test_a_folder_with_files_in_it_is_not_written_to(script, tmp_path, capsys):
    (tmp_path / "model.safetensors").write_text("precious")
    with pytest.raises(SystemExit):
        script.main(["--output", str(tmp_path)])
    assert "is not empty; name a new folder" in capsys.readouterr().err
