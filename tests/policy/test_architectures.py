"""Other causal language models: our log-probs are their own, sampling and an adapter work, or they are refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

from stable_rlhf.config.algorithm import CriticConfig
from stable_rlhf.config.sections import ModelConfig
from stable_rlhf.errors import ConfigError
from stable_rlhf.policy.actor_critic import ActorCritic
from stable_rlhf.policy.loading import wrap_policy
from stable_rlhf.policy.transformer import causal_lm
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
EXPERTS = {"num_experts": 4, "moe_intermediate_size": 8, "num_experts_per_tok": 2}
LATENT = {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 4}
PARTICULAR: dict[str, tuple[str, dict[str, Any]]] = {
    "one key head for all query heads": ("llama", {"num_key_value_heads": 1, "num_attention_heads": 4}),
    "half as many key heads": ("qwen3", {"num_attention_heads": 4, "head_dim": 8}),
    "one key head, learned positions": ("gpt_bigcode", FAMILIES["gpt2"]),
    "rotation of a part of each head": ("phi", {}),
    "layers without positions": ("smollm3", {"no_rope_layers": [0, 1]}),
    "tied embeddings": ("qwen2", {"tie_word_embeddings": True}),
    "experts": ("qwen3_moe", EXPERTS | {"head_dim": 8}),
    "latent attention": ("deepseek_v3", LATENT | {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 2,
                                                  "topk_group": 1, "moe_intermediate_size": 8}),
}  # fmt: skip
"""Models that attend fully, each in a way of its own: family and what it changes of SMALL."""
WINDOW = 4
UNCAPPED = {"final_logit_softcapping": None, "attn_logit_softcapping": None}
WINDOWED: dict[str, tuple[str, dict[str, Any]]] = {
    "mistral": ("mistral", {}),
    "phi3": ("phi3", {}),
    "starcoder2": ("starcoder2", {}),
    "qwen2, all layers": ("qwen2", {"use_sliding_window": True, "max_window_layers": 0}),
    "qwen2, some layers": ("qwen2", {"use_sliding_window": True, "max_window_layers": 1}),
    "gemma2": ("gemma2", {"head_dim": 8} | UNCAPPED),
    "gemma3": ("gemma3_text", {"head_dim": 8, "num_hidden_layers": 6} | UNCAPPED),
    "olmo3": ("olmo3", {}),
    "exaone4": ("exaone4", {"sliding_window_pattern": 2}),
}
"""Models of which some layers, or all, look back no further than WINDOW tokens."""
for _, changes in WINDOWED.values():
    changes["sliding_window"] = WINDOW
CONVOLVED = {"mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_chunk_size": 8}
PECULIAR: dict[str, tuple[str, dict[str, Any]]] = {
    "attention with sinks, in the window": ("gpt_oss", {"head_dim": 8, "sliding_window": 4096, "num_local_experts": 4}),
    "attention with sinks, beyond it": ("gpt_oss", {"head_dim": 8, "sliding_window": WINDOW, "num_local_experts": 4}),
    "soft-capped attention, in the window": ("gemma2", {"head_dim": 8, "final_logit_softcapping": None}),
    "GPT-J's own attention": ("gptj", {"n_embd": 16, "n_layer": 2, "n_head": 2, "rotary_dim": 4}),
    "Falcon's own attention": ("falcon", {}),
    "ALiBi (BLOOM)": ("bloom", {"n_layer": 2, "n_head": 2}),
    "ALiBi (MPT)": ("mpt", {"d_model": 16, "n_heads": 2, "n_layers": 2}),
    "a state (Mamba 2)": ("mamba2", {"num_heads": 4, "head_dim": 8, "state_size": 8, "n_groups": 2}),
    "convolutions (LFM2)": ("lfm2", {"layer_types": ["conv", "full_attention"]}),
    "attention beside a state (Falcon H1)": ("falcon_h1", CONVOLVED),
}
"""Models that are not made of Transformers' plain attention."""


def make(family: str, **changes):
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **(FAMILIES.get(family, SMALL) | changes))
    return AutoModelForCausalLM.from_config(config).eval()


pytestmark = pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False:UserWarning")  # peft sets it for GPT-2


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("adapter", [False, True])
def test_padded_log_probs_are_those_of_the_models_own_forward_without_padding(family: str, adapter: bool) -> None:
    lora = LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False)
    model = ActorCritic(wrap_policy(make(family), ModelConfig(), lora if adapter else None), CriticConfig())
    prompt = torch.tensor([[0, 0, 11], [21, 22, 23]])
    response = torch.tensor([[31, 32, 33, 34], [41, 42, 0, 0]])
    prompt_mask = torch.tensor([[False, False, True], [True, True, True]])
    mask = torch.tensor([[True, True, True, True], [True, True, False, False]])
    tokens = Tokens.pack(prompt, prompt_mask, response, mask)
    out = model(tokens, temperature=1.0)
    for row, (p, r) in enumerate([([11], [31, 32, 33, 34]), ([21, 22, 23], [41, 42])]):
        with torch.no_grad():
            logits = causal_lm(model.policy)(input_ids=torch.tensor([p + r])).logits[0, len(p) - 1 : -1]
        expected = logits.log_softmax(-1).gather(1, torch.tensor(r)[:, None])[:, 0]
        torch.testing.assert_close(out.logp[row, : len(r)], expected, atol=2e-5, rtol=0)
    settings = GenerationConfig(max_new_tokens=3, do_sample=False, pad_token_id=0, eos_token_id=2)
    sampled = causal_lm(model.policy).generate(
        input_ids=prompt, attention_mask=prompt_mask.long(), generation_config=settings
    )
    alone = causal_lm(model.policy).generate(input_ids=torch.tensor([[11]]), generation_config=settings)
    assert sampled[0, 3 : 3 + alone.shape[1] - 1].tolist() == alone[0, 1:].tolist()


@pytest.mark.parametrize(
    ("name", "adapter"),
    [*((name, False) for name in (*PARTICULAR, *WINDOWED, *PECULIAR)), *((name, True) for name in WINDOWED)],
)
def test_log_probs_are_the_models_own_also_beyond_a_window_and_with_an_attention_of_its_own(
    name: str, adapter: bool
) -> None:
    """Rows of 3 to 24 tokens, the shortest within WINDOW: alone, without a mask or padding, and together."""
    family, changes = (PARTICULAR | WINDOWED | PECULIAR)[name]
    lora = LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False)
    model = ActorCritic(wrap_policy(make(family, **changes), ModelConfig(), lora if adapter else None), CriticConfig())
    generator = torch.Generator().manual_seed(0)
    prompt, response = (torch.randint(3, 97, (5, 12), generator=generator) for _ in range(2))
    lengths, counts = torch.tensor([1, 12, 2, 2, 7]), torch.tensor([12, 12, 1, 2, 5])
    prompt_mask, mask = torch.arange(12) >= 12 - lengths[:, None], torch.arange(12) < counts[:, None]
    tokens = Tokens.pack(prompt, prompt_mask, response, mask)
    short = tokens.rows(torch.tensor([2, 3]), width=WINDOW - 1, length=2)  # goes without a mask
    exact = tokens.rows(torch.tensor([3]), width=WINDOW, length=2)
    for rows, part in (([0, 1, 2, 3, 4], tokens), ([2, 3], short), ([3], exact)):
        logp = model(part, temperature=1.0).logp
        for at, row in enumerate(rows):
            p, r = prompt[row][prompt_mask[row]], response[row][mask[row]]
            with torch.no_grad():
                logits = causal_lm(model.policy)(input_ids=torch.cat([p, r])[None]).logits[0, len(p) - 1 : -1]
            expected = logits.log_softmax(-1).gather(1, r[:, None])[:, 0]
            torch.testing.assert_close(logp[at, : len(r)], expected, atol=2e-5, rtol=0)


@pytest.mark.parametrize("total", range(WINDOW - 1, WINDOW + 3))
def test_a_text_as_long_as_the_window_and_one_token_longer(total: int) -> None:
    model = ActorCritic(make("mistral", sliding_window=WINDOW, initializer_range=0.5), CriticConfig())
    ids = torch.randint(3, 97, (2, total + 1), generator=torch.Generator().manual_seed(1))
    everything = torch.ones(2, total, dtype=torch.bool)
    tokens = Tokens.pack(ids[:, :1], everything[:, :1], ids[:, 1:], everything).rows(torch.arange(2), width=total)
    with torch.no_grad():
        expected = causal_lm(model.policy)(input_ids=ids).logits[:, :-1].log_softmax(-1)
    expected = expected.gather(2, ids[:, 1:, None]).squeeze(2)
    torch.testing.assert_close(model(tokens, temperature=1.0).logp, expected, atol=2e-5, rtol=0)


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
