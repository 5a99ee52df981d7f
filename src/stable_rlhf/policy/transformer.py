"""The parts of a Transformers model: LM head, layers, end tokens, context length; its dropout switched off, a copy."""

from __future__ import annotations

import copy
from typing import Any

from peft import PeftModel
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd  # pyright: ignore[reportPrivateUsage]
from transformers import PreTrainedTokenizerBase
from transformers.modeling_layers import GradientCheckpointingLayer

NOISE = ("drop", "jitter")
"""Parts of the names under which Transformers' layers keep what they drop or add at random while they train."""


def causal_lm(policy: Any) -> Any:
    """The causal language model itself, without a PEFT wrapper."""
    return policy.get_base_model() if isinstance(policy, PeftModel) else policy


def lm_head(policy: Any) -> Tensor:
    """[V, h]: the weight that turns a hidden state into logits."""
    return causal_lm(policy).get_output_embeddings().weight


def layers(policy: Any) -> list[nn.Module]:
    """The transformer's blocks, in order; none where Transformers does not mark them."""
    return [module for module in policy.modules() if isinstance(module, GradientCheckpointingLayer)]


def compile_layer(layer: nn.Module) -> None:
    """Has torch.compile fuse the layer's operations, for any number of rows and columns, once it first runs."""
    # Inductor would time every product with padded operands while it compiles; these are multiples of 8 as they are.
    layer.compile(dynamic=True, options={"shape_padding": False})


def eos_token_ids(model: Any, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Every id that ends a completion: the tokenizer's EOS and those of the model's generation settings, sorted."""
    own = getattr(causal_lm(model).generation_config, "eos_token_id", None)
    own = [] if own is None else [own] if isinstance(own, int) else list(own)
    return sorted({int(tokenizer.eos_token_id), *own})  # pyright: ignore[reportArgumentType]


def context_length(model: Any) -> int | None:
    """Positions that the model can attend to, or None where its configuration sets no bound.

    Some rotary embeddings (LongRoPE) have other frequencies for a text that is longer than the original context. There
    a row's log-probs would depend on the longest row beside it, so the bound is the original context.
    """
    config = causal_lm(model).config.get_text_config(decoder=True)
    bounds = [getattr(config, name, None) for name in ("max_position_embeddings", "max_seq_len")]
    rotary = getattr(config, "rope_parameters", None) or {}
    for kind in [rotary, *(part for part in rotary.values() if isinstance(part, dict))]:
        if kind.get("rope_type") == "longrope":
            bounds += [kind.get("original_max_position_embeddings")]
            bounds += [getattr(config, "original_max_position_embeddings", None)]
    return min((bound for bound in bounds if bound is not None), default=None)


def frozen_copy(policy: Any) -> Any:
    """A copy whose trained weights never change; weights that are not trained are shared."""
    shared: dict[int, Any] = {id(p): p for p in policy.parameters() if not p.requires_grad}
    return copy.deepcopy(policy, shared).requires_grad_(False).eval()


def switch_dropout_off(policy: nn.Module) -> None:
    """Sets every dropout, layer drop and router noise to 0, in modules and in the numbers that layers keep.

    The mode alone would not do: a layer that is recomputed is in training mode, and a callback may call ``train()``.
    """
    for module in policy.modules():
        if isinstance(module, _DropoutNd):
            module.p = 0.0
        for name, value in vars(module).items():
            if isinstance(value, float) and any(part in name.lower() for part in NOISE):
                setattr(module, name, 0.0)
