"""Names of settings in TRL, Transformers and other libraries, and what they are here.

Names that are the same here in a section, such as ``learning_rate`` and ``optim.learning_rate``, need no entry.
"""

from __future__ import annotations

_PRICE = "kl.settings.beta with kl.controller=fixed, as in preset ppo; preset safe has kl.settings.budget instead"
_BATCH = "rollout.batch_size, the completions of a step; optim.microbatch_tokens bounds the memory that it takes"
_POLICY = "none, nor is one needed: completions are drawn from the policy itself, whose KL and ratios are measured"
_ALWAYS = "none, nor is one needed: every step is written to metrics.jsonl"
_REFERENCE = "none, nor is one needed: the reference is the policy as it was before training"

ELSEWHERE: dict[str, str] = {
    # -- the KL
    "kl_coef": _PRICE,
    "init_kl_coef": f"kl.settings.init_beta with kl.controller=adaptive, or {_PRICE}",
    "kl_penalty_coef": _PRICE,
    "beta": "kl.settings.budget, a KL in nats per token; with preset ppo a price, kl.settings.beta",
    "target_kl": "kl.settings.budget, or kl.settings.target with kl.controller=adaptive",
    "kl_target": "kl.settings.budget, or kl.settings.target with kl.controller=adaptive",
    "max_preview_kl": "optim.max_update_kl, the bound on a whole update",
    "kl_horizon": "kl.settings.horizon with kl.controller=adaptive",
    "adap_kl_ctrl": "kl.controller=adaptive",
    "use_kl_loss": "kl.in_loss",
    "kl_estimator": "none: k1 in the reward, or kl.in_loss",
    "ref_model": _REFERENCE,
    "ref_model_path": _REFERENCE,
    "sync_ref_model": "none: the reference stays as it was before training",
    # -- the update
    "lr": "optim.learning_rate",
    "actor_learning_rate": "optim.learning_rate",
    "critic_learning_rate": "critic.learning_rate",
    "num_ppo_epochs": "optim.num_iterations",
    "ppo_epochs": "optim.num_iterations",
    "max_epochs": "optim.num_iterations, passes over a rollout; max_steps counts rollouts",
    "num_minibatches": "optim.num_mini_batches",
    "mini_batch_size": "optim.num_mini_batches, into which rollout.batch_size is divided",
    "gradient_accumulation_steps": "optim.num_mini_batches, optimiser steps of a pass; optim.microbatch_tokens bounds "
    "the memory",
    "local_rollout_forward_batch_size": "optim.microbatch_tokens, which counts tokens",
    "cliprange": "optim.epsilon",
    "clip_range": "optim.epsilon",
    "clip_eps": "optim.epsilon",
    "value_clip": "critic.cliprange_value",
    "gae_lambda": "optim.lam",
    "lambd": "optim.lam",
    "ent_coef": "optim.entropy_coef",
    "warmup_ratio": "optim.warmup_steps, a number of steps",
    "whiten_rewards": "reward.normalise, which scales rewards over the whole run",
    "scale_rewards": "optim.advantage: grpo divides by the group's deviation, dr_grpo does not",
    "adv_estimator": "optim.advantage",
    "advantage_estimator": "optim.advantage",
    "whiten_advantages": "none: optim.advantage=gae and reinforce_pp always whiten, down to optim.whiten_floor",
    "importance_sampling_level": "optim.importance",
    "loss_type": "optim.denominator (token for dapo, bnpo, sequence for grpo, length for dr_grpo) or optim.loss=cispo",
    "loss_agg_mode": "optim.denominator",
    # -- sampling
    "response_length": "rollout.max_completion_length",
    "max_new_tokens": "rollout.max_completion_length",
    "max_tokens": "rollout.max_completion_length",
    "generate_max_len": "rollout.max_completion_length",
    "prompt_max_len": "data.max_prompt_length",
    "stop_token": "rollout.stop_tokens",
    "stop_token_id": "rollout.stop_tokens",
    "num_return_sequences": "rollout.num_generations",
    "n_samples_per_prompt": "rollout.num_generations",
    "rloo_k": "rollout.num_generations",
    "top_p": _POLICY,
    "top_k": _POLICY,
    "min_p": _POLICY,
    "repetition_penalty": _POLICY,
    "use_vllm": "none: the policy samples in the process that trains it",
    # -- rewards and models
    "reward_weights": "reward.weights",
    "reward_model": "reward.functions",
    "reward_model_path": "reward.functions",
    "reward_pretrain": "reward.functions",
    "remote_rm_url": "reward.url",
    "reward_funcs": "reward.functions",
    "sft_model_path": "model.name",
    "model_name_or_path": "model.name",
    "pretrain": "model.name",
    "value_model": "none, nor is one needed: the value heads sit on the policy",
    "model_revision": "model.revision",
    "use_peft": "model.lora_r, above 0",
    "lora_rank": "model.lora_r",
    "lora_dropout": "model.lora_options={lora_dropout: ...}",
    "use_rslora": "model.lora_options={use_rslora: true}",
    "torch_dtype": "model.dtype",
    "bf16": "model.dtype=bfloat16",
    "fp16": "none: model.dtype is float32 or bfloat16",
    "disable_dropout": "none, nor is one needed: dropout is always off",
    # -- data
    "dataset_name": "data.train",
    "dataset_config": "data.config_name",
    "dataset_train_split": "data.split",
    "dataset_test_split": "data.eval_split",
    "eval_dataset": "data.eval",
    "max_train_samples": "data.limit",
    "max_samples": "data.limit",
    "remove_unused_columns": "none, nor is one needed: every column reaches the rewards",
    # -- the run
    "per_device_train_batch_size": _BATCH,
    "per_device_eval_batch_size": "none: an evaluation takes data.eval_size prompts",
    "train_batch_size": _BATCH,
    "rollout_batch_size": _BATCH,
    "num_train_epochs": "max_steps, a number of rollouts",
    "num_epochs": "max_steps, a number of rollouts",
    "total_episodes": "max_steps: completions / rollout.batch_size",
    "eval_strategy": "eval_steps; 0 evaluates only before and after training",
    "evaluation_strategy": "eval_steps; 0 evaluates only before and after training",
    "save_strategy": "save_steps; 0 saves only at the end",
    "logging_steps": _ALWAYS,
    "logging_strategy": _ALWAYS,
    "logging_first_step": _ALWAYS,
    "log_completions": "log.completions_steps",
    "disable_tqdm": "log.progress=false",
    "resume_from_checkpoint": "`stable-rlhf resume RUN`, or train(resume_from_checkpoint=True) in Python",
}
"""Name of a setting elsewhere -> the setting here, or "none" and why."""


def here(name: str) -> str | None:
    """What another library's setting is called here, as a clause that follows its name; None for an unknown name."""
    found = ELSEWHERE.get(name)
    if found is None:
        return None
    return f"; here there is {found}" if found.startswith("none") else f"; here it is {found}"
