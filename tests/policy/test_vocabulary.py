"""Ids that the model has an embedding for: the pad token, the end tokens, and what is beyond."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer, GPT2LMHeadModel, GPT2Tokenizer, LlamaForCausalLM

from stable_rlhf.config import ModelConfig
from stable_rlhf.errors import ConfigError
from stable_rlhf.files import ASSETS
from stable_rlhf.policy.loading import load_tokenizer, prepare_tokenizer
from stable_rlhf.policy.vocabulary import embedding_rows, end_token_ids, pad_within
from tests.conftest import tiny_llama
from tests.tiny_runs import rows, settings, trainer


def test_a_pad_token_beyond_the_embedding_gives_way_to_eos(tokenizer: Any) -> None:
    own = copy.deepcopy(tokenizer)
    assert pad_within(own, len(own)) is None
    assert own.pad_token == "<pad>"
    own.add_special_tokens({"pad_token": "[PAD]"})
    said = pad_within(own, len(tokenizer))
    assert said is not None
    assert f"'[PAD]' (id {len(tokenizer)}) is beyond the model's embedding of {len(tokenizer)} rows: '<eos>'" in said
    assert (own.pad_token, own.pad_token_id) == ("<eos>", own.eos_token_id)


def test_the_run_is_the_same_whichever_token_pads(tokenizer: Any, tmp_path: Any, capsys: Any) -> None:
    beyond = copy.deepcopy(tokenizer)
    beyond.add_special_tokens({"pad_token": "[PAD]"})
    for name, own in (("plain", tokenizer), ("beyond", beyond)):
        trainer(settings(tmp_path / name, max_steps=1), own, model=tiny_llama(len(tokenizer))).train()
    assert rows(tmp_path / "plain") == rows(tmp_path / "beyond")
    assert "'[PAD]'" in capsys.readouterr().err


def test_stop_tokens_join_what_ends_a_completion(tokenizer: Any) -> None:
    model = tiny_llama(len(tokenizer))
    assert embedding_rows(model) == len(tokenizer)
    model.generation_config.eos_token_id = [2, 7]
    assert end_token_ids(model, tokenizer) == [2, 7]
    z = tokenizer.convert_tokens_to_ids("Z")
    newline = tokenizer.convert_tokens_to_ids("Ċ")
    assert end_token_ids(model, tokenizer, ["Z", 5, "\n", "<bos>"]) == sorted([1, 2, 5, 7, z, newline])


@pytest.mark.parametrize(
    ("token", "message"),
    [
        ("two", "rollout.stop_tokens: 'two' is 3 tokens under this tokenizer, not one; .*rollout.stop_strings"),
        ("", "rollout.stop_tokens: '' is 0 tokens"),
        (-1, r"rollout.stop_tokens: -1 \(id -1\) is not in the model's vocabulary of 259 ids"),
        (259, r"rollout.stop_tokens: 259 \(id 259\) is not in the model's vocabulary of 259 ids"),
    ],
)
def test_a_stop_token_that_cannot_be_sampled_is_refused(token: Any, message: str, tokenizer: Any) -> None:
    with pytest.raises(ConfigError, match=message):
        end_token_ids(tiny_llama(len(tokenizer)), tokenizer, [token])


def test_an_eos_token_beyond_the_embedding_is_refused(tokenizer: Any) -> None:
    own = copy.deepcopy(tokenizer)
    own.add_special_tokens({"eos_token": "<|im_end|>"})
    message = (
        r"EOS token '<\|im_end\|>' \(id 259\) is beyond the model's embedding of 259 rows, so no completion could end"
    )
    with pytest.raises(ConfigError, match=message):
        end_token_ids(tiny_llama(len(tokenizer)), own)


@pytest.mark.parametrize(
    "kind", [LlamaForCausalLM, GPT2LMHeadModel], ids=["refused by Transformers", "made empty by it"]
)
def test_a_folder_without_a_tokenizer_is_refused_with_the_remedy(kind: Any, tmp_path: Path) -> None:
    sizes = {"vocab_size": 16, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    config = kind.config_class(**sizes, bos_token_id=1, eos_token_id=2)
    kind(config).save_pretrained(tmp_path)
    with pytest.raises(
        ConfigError, match=r"^model\.name=.*: .* holds no tokenizer\. Save that of its base model there"
    ):
        load_tokenizer(ModelConfig(name=str(tmp_path)))
    AutoTokenizer.from_pretrained(ASSETS / "policy").save_pretrained(tmp_path)
    assert len(load_tokenizer(ModelConfig(name=str(tmp_path)))) > 16


def test_a_tokenizer_of_special_tokens_alone_is_refused() -> None:
    """Transformers makes it of a model's class where the files of the vocabulary are missing."""
    with pytest.raises(ConfigError, match="has no vocabulary: it knows only its special tokens"):
        prepare_tokenizer(GPT2Tokenizer())
