"""Estimates the memory that a run needs, from the policy's shapes and the settings.

The formula uses only shapes, so the policy may be a skeleton without weights (`skeleton`). Reward models, which are
loaded by then, and the memory of their forward pass are not included. All sizes are bytes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from stable_rlhf.config import Config
from stable_rlhf.hardware import SHORT, replays_graphs
from stable_rlhf.ops.logprobs import CHUNK_BYTES
from stable_rlhf.policy import (
    ValueHead,
    adapter_folder,
    adapter_settings,
    causal_lm,
    layers,
    lm_head,
    model_named,
    policy_dtype,
    policy_source,
    with_adapter,
)
from stable_rlhf.rollout import SHORTEST

FLOAT = 4
"""Bytes of a float32, the type of trained weights, gradients, moments, value heads and log-probs."""

CHUNKS = 3
"""Most tensors of a chunk's logits that exist at once (ops/logprobs.py)."""

KERNELS = {"cpu": 150_000_000, "cuda": 200_000_000}
"""Memory of a process besides tensors. On a CPU: oneDNN's kernels for every shape, and what the allocator keeps; on two
cores the built-in policy's steps took 150 MB more than the other parts, with an adapter 320 MB. On CUDA: cuBLAS's
workspaces (68 MB on the graphs' stream alone, on an H100) and what the allocator keeps; with this value eight runs took
0.73 to 1.23 times the estimate (docs/LOG.md, 2026-11-26)."""


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Memory that a run holds on its device, in bytes by part, and the size of its files on disk."""

    held: dict[str, int]
    """Held during the whole run: weights, reference, value heads, gradients, moments, generation copy."""
    passing: dict[str, int]
    """Held at the peak of a step: KV cache, activations, logits, kernels."""
    checkpoint: int
    """One checkpoint on disk: trained weights, value heads and their targets, both moments."""
    final: int
    """The model in ``final/``: its weights, or the adapter's."""

    @property
    def total(self) -> int:
        return sum(self.held.values()) + sum(self.passing.values())


def skeleton(config: Config) -> Any:
    """The policy as it will be loaded, with its adapter, on the meta device: shapes and dtypes without memory."""
    name, arguments = policy_source(config.model)
    trust = {"trust_remote_code": config.model.trust_remote_code}
    with model_named(config.model):
        known = AutoConfig.from_pretrained(name, **arguments)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(known, dtype=policy_dtype(config.model)[0], **trust)
    folder = adapter_folder(config.model)
    with torch.device("meta"):
        return with_adapter(model, config.model, None if folder is None else adapter_settings(folder))


def estimate(policy: Any, config: Config, *, device: torch.device, low: bool, prompt: int) -> Memory:
    """The memory for training ``policy``. ``low``: it computes in bfloat16. ``prompt``: tokens of the longest prompt.

    The sizes of gradients, moments and heads are exact. KV cache and logits are those of the largest rollout and
    microbatch. Activations are those of a Llama-like layer; its attention is fused except on the CPU.
    """
    peft = isinstance(policy, PeftModel)
    weights = sum(_bytes(parameter) for parameter in policy.parameters())
    trained = FLOAT * sum(p.numel() for p in policy.parameters() if p.requires_grad)
    with torch.device("meta"):
        head = ValueHead(lm_head(policy).shape[1])
    heads = config.critic.heads * FLOAT * sum(parameter.numel() for parameter in head.parameters())
    element = 2 if low else FLOAT
    held = {
        "policy": weights,
        # With a new adapter it is the policy with the adapter off; one that has learned has a frozen copy.
        "reference": weights if not peft else trained if adapter_folder(config.model) else 0,
        "value heads and their targets": 2 * heads,
        "gradients": trained + heads,
        "AdamW's two moments": 2 * (trained + heads),
        "weights to sample from": _decoding_copy(policy, low),
    }
    rows, width = _microbatch(config, prompt)
    activations = _activations(policy, config, device, low, rows, width)
    logits = _logits(policy, rows * config.rollout.max_completion_length)
    graphs = replays_graphs(config.model.cuda_graphs, device)
    passing = {
        "KV cache of the rollout": _kv_cache(policy, config, graphs, element, prompt),
        "activations of a microbatch": activations,
        "logits of a chunk": logits,
        "both again in CUDA graphs": activations + logits if graphs else 0,
        "weights before a step": trained if config.optim.preview else 0,
        "kernels and allocator": KERNELS["cpu" if device.type == "cpu" else "cuda"],
    }
    adapter = sum(_bytes(p) for p in policy.parameters() if p.requires_grad)
    return Memory(
        held=held,
        passing=passing,
        checkpoint=3 * trained + 4 * heads,  # of the heads: online, target, and two moments
        final=(adapter if peft else weights) + 2 * heads,
    )


def _bytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _decoding_copy(policy: Any, low: bool) -> int:
    """Second copy of the weights that are merged with an adapter or narrowed to bfloat16
    (rollout/merged_weights.py)."""
    base, adapters = causal_lm(policy), set()
    copied: dict[int, int] = {}
    for module in base.modules():
        if isinstance(module, LoraLayer):
            adapted: Any = module
            weight = adapted.get_base_layer().weight
            adapters |= {id(p) for name, p in adapted.named_parameters() if "base_layer" not in name}
            copied[id(weight)] = weight.numel() * (2 if low else weight.element_size())
    for module in base.modules() if low else ():
        if isinstance(module, nn.Linear) and module.weight.dtype == torch.float32:
            copied[id(module.weight)] = 2 * module.weight.numel()
    for wide in {id(lm_head(base)), *adapters}:
        copied.pop(wide, None)
    return sum(copied.values())


def _microbatch(config: Config, prompt: int) -> tuple[int, int]:
    """(rows, columns) of the largest forward and backward pass (learner/microbatches.py)."""
    width = prompt + config.rollout.max_completion_length - 1  # the last token predicts nothing
    most = config.rollout.batch_size // config.optim.num_mini_batches
    return max(1, min(most, config.optim.microbatch_tokens // width)), width


def _shape(policy: Any) -> tuple[int, int, int, int]:
    """(layers, heads, heads of keys, size of a head)."""
    text = causal_lm(policy).config.get_text_config(decoder=True)
    heads = text.num_attention_heads
    groups = getattr(text, "num_key_value_heads", None) or heads
    size = getattr(text, "head_dim", None) or text.hidden_size // heads
    return text.num_hidden_layers, heads, groups, size


def _kv_cache(policy: Any, config: Config, graphs: bool, element: int, prompt: int) -> int:
    """Keys and values of every layer for the whole rollout. With CUDA graphs the room for a prompt is a power of
    two."""
    depth, _, groups, size = _shape(policy)
    room = max(SHORTEST, 1 << (prompt - 1).bit_length()) if graphs else prompt
    length = room + config.rollout.max_completion_length
    return 2 * depth * groups * size * config.rollout.batch_size * length * element


def _activations(policy: Any, config: Config, device: torch.device, low: bool, rows: int, width: int) -> int:
    """Memory that the forward pass keeps for the backward pass, and the layer that is being differentiated.

    A layer keeps, for a token: around its two norms 2 x (float32 input and output); queries, their output and, once
    for each query head, keys and values; of the MLP gate, its activation, up and their product. Attention by plain
    products (short texts on a CPU) also keeps scores and shares, [rows, heads, width, width].
    """
    depth, heads, _, size = _shape(policy)
    text = causal_lm(policy).config.get_text_config(decoder=True)
    hidden, inner = text.hidden_size, getattr(text, "intermediate_size", None) or 4 * text.hidden_size
    element = 2 if low else FLOAT
    layer = rows * width * (4 * hidden * FLOAT + (4 * heads * size + 4 * inner) * element)
    if device.type == "cpu" and not low and width <= SHORT:
        layer += 2 * rows * heads * width * width * FLOAT
    kept = rows * width * hidden * element if config.model.gradient_checkpointing and layers(policy) else layer
    linear = sum(m.weight.numel() for m in causal_lm(policy).modules() if isinstance(m, nn.Linear))
    narrowed = 2 * linear if low and not isinstance(policy, PeftModel) else 0  # autocast's copies, for one pass
    return depth * kept + layer + narrowed


def _logits(policy: Any, tokens: int) -> int:
    """Chunks of logits, and the LM head's own gradient or widened copy."""
    weight = lm_head(policy)
    chunk = min(tokens * weight.shape[0] * FLOAT, CHUNK_BYTES)
    return CHUNKS * chunk + FLOAT * weight.numel()
