"""Every family of causal language models in Transformers, in tiny form: trained and sampled rightly, refused, or wrong.

    python -m tests.policy.families > docs/models.md

The oracle is the family's own forward on each row alone: its log-probs, and its likeliest tokens one by one.
"""

from __future__ import annotations

import sys
import warnings
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils import logging

from stable_rlhf.config.algorithm import CriticConfig
from stable_rlhf.config.sections import ModelConfig
from stable_rlhf.errors import ConfigError
from stable_rlhf.policy.actor_critic import ActorCritic
from stable_rlhf.policy.loading import wrap_policy
from stable_rlhf.records import Tokens
from stable_rlhf.rollout.backend import Sampling
from stable_rlhf.rollout.decoder import Decoder

NAMES = sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
VOCABULARY = 97
LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers")
SIZES: dict[str, Any] = {
    **dict.fromkeys(("vocab_size", "vocab_size_per_layer_input"), VOCABULARY),
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "embedding_size", "dim", "word_embed_proj_dim"), 32),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "n_inner", "decoder_ffn_dim", "d_ff"), 48),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads", "decoder_attention_heads"), 4),
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads"), 2),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "seq_length"), 128),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size"), 16),
    **dict.fromkeys(("num_experts_per_tok", "moe_k"), 2),
    **dict.fromkeys(("n_group", "topk_group", "n_groups", "mamba_n_groups"), 1),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank", "laurel_rank", "hidden_size_per_layer_input", "block_size"), 8),
    **dict.fromkeys(("qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim", "rotary_dim", "time_step_rank"), 4),
    **dict.fromkeys(("state_size", "mamba_d_state", "ssm_state_size", "chunk_size", "mamba_chunk_size"), 8),
    **dict.fromkeys(("mamba_n_heads", "mamba_num_heads", "linear_num_value_heads"), 4),
    **dict.fromkeys(("mamba_d_head", "mamba_head_dim"), 16),
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim"), 8),
    **dict.fromkeys(("lru_width", "conv_dim"), 32),
    **dict.fromkeys(("final_logit_softcapping", "attn_logit_softcapping"), None),
    **dict.fromkeys(("initializer_range", "init_std"), 0.15),
    **dict.fromkeys(("logit_scale", "logits_scaling", "lm_head_multiplier"), 1.0),
    "head_dim": 8, "mamba_d_ssm": 64, "n_mamba_heads": 2, "linear_num_key_heads": 2, "sliding_window": 64,
    "attention_chunk_size": 64, "num_kv_shared_layers": 0, "is_decoder": True,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
"""What the families call their sizes. Soft caps and scales of logits are off: a model that has one is refused."""
LATENT = ("q_lora_rank", "kv_lora_rank")
"""Families with these have heads of the size of their rotated part."""
LARGEST = 10_000_000
"""Most weights: beyond it a family has sizes of its own that these names do not reach."""


def tiny(family: str) -> Any:
    """A tiny model of the family. Raises whatever its configuration or its code raises."""
    default = AutoConfig.for_model(family)
    known = default.to_dict()
    sizes = {name: value for name, value in SIZES.items() if name in known or hasattr(default, name)}
    if all(name in known for name in LATENT):
        sizes["head_dim"] = sizes["qk_rope_head_dim"]
        sizes["num_key_value_heads"] = sizes["num_attention_heads"]
    for depth in (4, 2):  # 4: where one kind of layer follows on three of another
        config = AutoConfig.for_model(family, **sizes | {name: depth for name in LAYERS if name in known})
        with torch.device("meta"):
            count = sum(p.numel() for p in AutoModelForCausalLM.from_config(config).parameters())
        if count <= LARGEST:
            break
    else:
        raise ValueError(f"{count:,} weights")
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval().float()
    with torch.no_grad():
        for parameter in model.parameters():  # weights so large that a wrong position or mask shows
            if parameter.dim() >= 2 and 0 < float(parameter.std()) < 0.1:
                parameter.mul_(0.15 / parameter.std())
    return model


def own_logits(lm: Any, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return lm(input_ids=ids[None], use_cache=False).logits[0].float().log_softmax(-1)


def faults(model: ActorCritic, decoder: Decoder) -> list[str]:
    """What differs from the model's own forward on each row alone: log-probs that train, tokens that are sampled."""
    prompts, count = [[11, 12, 13], [21], [31, 32, 33, 34, 35, 36, 37], [41, 42]], 6
    width = max(map(len, prompts))
    prompt = torch.tensor([[0] * (width - len(ids)) + ids for ids in prompts])
    mask = torch.tensor([[False] * (width - len(ids)) + [True] * len(ids) for ids in prompts])
    response = 50 + torch.arange(len(prompts) * count).view(len(prompts), count) % 40
    tokens = Tokens.pack(prompt, mask, response, torch.ones_like(response, dtype=torch.bool))
    with torch.no_grad():
        logp = model(tokens, temperature=1.0).logp
    sampling = Sampling(max_new_tokens=count, temperature=1e-4, eos_token_ids=(2,), pad_token_id=0)
    sampled, found = decoder.sample(prompt, mask, sampling), list[str]()
    for row, ids in enumerate(prompts):
        text = torch.tensor(ids + response[row].tolist())
        own = own_logits(model.policy, text)[len(ids) - 1 : -1].gather(1, response[row][:, None])[:, 0]
        if not (difference := float((own - logp[row]).abs().max())) < 1e-3:
            found.append(f"log-probs of row {row} are {difference:.2g} nats off")
        written: list[int] = []
        for place in range(count):
            scores = own_logits(model.policy, torch.tensor(ids + written))[-1]
            token = int(sampled[row, place]) if place < sampled.shape[1] else 0
            if float(scores.max() - scores[token]) > 1e-3:  # a tie may fall either way
                found.append(f"row {row} samples another token at {place}")
                break
            written.append(token)
            if token == 2:
                break
    return found


def verdict(family: str) -> tuple[str, str]:
    """(right, refused, wrong or not built; why)."""
    try:
        lm = tiny(family)
    except Exception as error:  # noqa: BLE001 - a family's own code; what it raises is in the table
        return "not built", f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    try:
        model = ActorCritic(wrap_policy(lm, ModelConfig()), CriticConfig())
        decoder = Decoder(model)
    except ConfigError as error:
        return "refused", str(error).splitlines()[0]
    found = faults(model, decoder)
    ways = [] if decoder.loops else ["Transformers' loop"]
    ways += [] if decoder.pads else ["prompts of each length apart"]
    return ("wrong", "; ".join(found)) if found else ("right", ", ".join(ways) or "our loop")


def main() -> None:
    warnings.filterwarnings("ignore")
    logging.set_verbosity_error()
    rows = [(family, *verdict(family)) for family in NAMES]
    total = {kind: sum(row[1] == kind for row in rows) for kind in ("right", "refused", "wrong", "not built")}
    print("# Models\n")
    print(f"Every family of causal language models in Transformers {transformers.__version__}, tried in tiny form:")
    print(f"{total['right']} are trained and sampled as their own forward says, {total['refused']} are refused by a")
    print(f"sentence, {total['wrong']} are wrong, {total['not built']} could not be made so small. The oracle is each")
    print("family's own forward on one row alone: its log-probs, and its likeliest tokens one by one.\n")
    print("    python -m tests.policy.families > docs/models.md\n")
    print(
        "A model is tried in the same way whenever it is loaded (`model.self_check`), so that a model of your own that"
    )
    print("is in no table is either trained rightly or refused too.\n")
    print("| family | verdict | sampled by, or why |\n|---|---|---|")
    for family, kind, why in rows:
        print(f"| {family} | {kind} | {why.replace('|', '/')[:160]} |")
    sys.exit(1 if total["wrong"] else 0)


if __name__ == "__main__":
    main()
