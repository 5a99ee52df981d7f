"""Other causal language models: our log-probs are their own, sampling and an adapter work, or they are refused."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

from stable_rlhf.config import ConfigError, CriticConfig, ModelConfig
from stable_rlhf.models import ActorCritic, causal_lm, wrap_policy
from stable_rlhf.records import Tokens

SMALL = {
    "vocab_size": 97,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "initializer_range": 0.2,
}
FAMILIES = {
    "gpt2": {"vocab_size": 97, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64, "initializer_range": 0.2},
    "opt": SMALL | {"ffn_dim": 32, "word_embed_proj_dim": 8, "init_std": 0.2},  # projects in and out
    "gpt_neox": SMALL,
    "qwen2": SMALL,
    "qwen3": SMALL | {"head_dim": 8},
    "mistral": SMALL,
    "gemma": SMALL | {"head_dim": 8},
    "smollm3": SMALL,
}


def make(family: str, **changes):
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **(FAMILIES.get(family, SMALL) | changes))
    return AutoModelForCausalLM.from_config(config).eval()


@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False:UserWarning")  # peft sets it for GPT-2 by itself
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("adapter", [False, True])
def test_padded_log_probs_are_those_of_the_models_own_forward_without_padding(family: str, adapter: bool) -> None:
    lora = LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False)
    model = ActorCritic(wrap_policy(make(family), ModelConfig(), lora if adapter else None), CriticConfig())
    prompt = torch.tensor([[0, 0, 11], [21, 22, 23]])
    response = torch.tensor([[31, 32, 33, 34], [41, 42, 0, 0]])
    tokens = Tokens(
        prompt=prompt,
        prompt_mask=torch.tensor([[False, False, True], [True, True, True]]),
        response=response,
        mask=torch.tensor([[True, True, True, True], [True, True, False, False]]),
    )
    out = model(tokens, temperature=1.0)
    for row, (p, r) in enumerate([([11], [31, 32, 33, 34]), ([21, 22, 23], [41, 42])]):
        with torch.no_grad():
            logits = causal_lm(model.policy)(input_ids=torch.tensor([p + r])).logits[0, len(p) - 1 : -1]
        expected = logits.log_softmax(-1).gather(1, torch.tensor(r)[:, None])[:, 0]
        torch.testing.assert_close(out.logp[row, : len(r)], expected, atol=2e-5, rtol=0)
    settings = GenerationConfig(max_new_tokens=3, do_sample=False, pad_token_id=0, eos_token_id=2)
    sampled = causal_lm(model.policy).generate(
        input_ids=prompt, attention_mask=tokens.prompt_mask.long(), generation_config=settings
    )
    alone = causal_lm(model.policy).generate(input_ids=torch.tensor([[11]]), generation_config=settings)
    assert sampled[0, 3 : 3 + alone.shape[1] - 1].tolist() == alone[0, 1:].tolist()


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("gemma2", {"head_dim": 8, "final_logit_softcapping": 1.0}),
        ("granite", {"logits_scaling": 4.0}),
        ("cohere", {"logit_scale": 0.1}),
    ],
)
def test_a_model_that_bends_its_logits_is_refused_by_name(family: str, changes: dict) -> None:
    with pytest.raises(ConfigError, match=r"ForCausalLM: its logits differ from hidden @ lm_head\.weight"):
        wrap_policy(make(family, **changes), ModelConfig())
