"""The policy with its value heads and its reference, and how they are loaded."""

from stable_rlhf.policy.actor_critic import (
    ActorCritic,
    Output,
    ValueHead,
    compile_layers,
    detached,
    weights_digest,
)
from stable_rlhf.policy.adapter import adapter_folder, adapter_settings, lora_config, peft_unwarned, with_adapter
from stable_rlhf.policy.loading import (
    check_model,
    given_policy,
    load_policy,
    load_tokenizer,
    model_named,
    policy_dtype,
    policy_source,
    prepare_tokenizer,
)
from stable_rlhf.policy.parts import Reference, TrainedState
from stable_rlhf.policy.saving import (
    HEADS,
    SavedFault,
    save_description,
    save_heads,
    save_policy,
    saved_fault,
    without_bars,
)
from stable_rlhf.policy.self_check import apart, check_checkpointing, foreign_errors, probe, tolerance
from stable_rlhf.policy.transformer import causal_lm, compile_layer, context_length, eos_token_ids, layers, lm_head
from stable_rlhf.policy.vocabulary import embedding_rows, end_token_ids, pad_within

__all__ = [
    "HEADS",
    "ActorCritic",
    "Output",
    "Reference",
    "SavedFault",
    "TrainedState",
    "ValueHead",
    "adapter_folder",
    "adapter_settings",
    "apart",
    "causal_lm",
    "check_checkpointing",
    "check_model",
    "compile_layer",
    "compile_layers",
    "context_length",
    "detached",
    "embedding_rows",
    "end_token_ids",
    "eos_token_ids",
    "foreign_errors",
    "given_policy",
    "layers",
    "lm_head",
    "load_policy",
    "load_tokenizer",
    "lora_config",
    "model_named",
    "pad_within",
    "peft_unwarned",
    "policy_dtype",
    "policy_source",
    "prepare_tokenizer",
    "probe",
    "save_description",
    "save_heads",
    "save_policy",
    "saved_fault",
    "tolerance",
    "weights_digest",
    "with_adapter",
    "without_bars",
]
