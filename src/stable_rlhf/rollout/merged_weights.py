"""Merges weights for decoding: folds adapters in and joins sibling projections."""

from __future__ import annotations

import copy
from typing import Any

import torch
from peft.tuners.lora import Linear as LoraLinear
from torch import Tensor, nn

from stable_rlhf.policy import ActorCritic, causal_lm, lm_head

SIBLINGS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""Names, under one parent, of layers that Transformers' Llama-like models call on the same tensor."""


def decoding_model(model: ActorCritic) -> tuple[Any, list[tuple[Tensor, Any]]]:
    """Makes a plain causal language model that shares the policy's weights, for decoding.

    Returns (model, weights to refresh). Each of these is (the model's own weight, the policy's weight or LoRA layer
    that it is made from). A LoRA layer that is not plain (DoRA, an adapter on an embedding) stays a separate layer,
    which is correct but slower. Under autocast the weights of linear layers are kept in bfloat16; norms, embedding and
    head stay float32.
    """
    base = causal_lm(model.policy)
    narrow = torch.bfloat16 if model.autocast else None
    shared: dict[int, Any] = {}
    refreshed: list[tuple[Tensor, Any]] = []
    merged: list[Any] = [module for module in base.modules() if _mergeable(module)]
    adapters = {id(p) for layer in merged for name, p in layer.named_parameters() if "base_layer" not in name}
    sources: list[tuple[Tensor, Any]] = [(layer.get_base_layer().weight, layer) for layer in merged]
    linear = {id(p) for layer in base.modules() if isinstance(layer, nn.Linear) for p in layer.parameters(False)}
    wide = linear - adapters - {id(lm_head(base))} if narrow else set()
    sources += [(p, p) for p in base.parameters() if id(p) in wide and p.dtype == torch.float32]
    for weight, source in sources:
        if id(weight) not in shared:
            own = nn.Parameter(torch.empty_like(weight, dtype=narrow or weight.dtype), requires_grad=False)
            shared[id(weight)] = own
            refreshed.append((own, source))
    for parameter in base.parameters():
        shared.setdefault(id(parameter), parameter)
    lm = copy.deepcopy(base, shared)  # a parameter that is in the memo is not copied
    for name, module in list(lm.named_modules()):
        if _mergeable(module):
            parent, _, child = name.rpartition(".")
            plain: Any = module
            setattr(lm.get_submodule(parent), child, plain.get_base_layer())
    join(lm, refreshed)
    return lm.eval(), refreshed


def _mergeable(module: nn.Module) -> bool:
    """Whether it is a linear layer with a plain LoRA adapter, of W + scale B A."""
    if not isinstance(module, LoraLinear) or module.lora_variant or any(module.lora_bias.values()):
        return False
    return isinstance(module.get_base_layer(), nn.Linear)


def merge(target: Tensor, layer: Any) -> None:
    """target <- W + sum over adapters of scale B A, in target's dtype, A and B narrowed as the forward narrows them.

    In bfloat16 the sum is rounded to the nearest, which loses a part of an update far smaller than the weights' last
    digit. The forward loses about as much: it adds the adapter's output to one that is already rounded (docs/LOG.md,
    2026-11-25).
    """
    weight = layer.get_base_layer().weight.to(target.dtype)
    for name in layer.active_adapters:
        if name in layer.lora_A:
            up, down = (part[name].weight.to(target.dtype) for part in (layer.lora_B, layer.lora_A))
            torch.addmm(weight, up, down, alpha=layer.scaling[name], out=target)
            weight = target  # a second adapter adds to the first
    if weight is not target:
        target.copy_(weight)


class Joined:
    """The joined product of siblings: made when the first is called, kept until the last has taken its part."""

    def __init__(self, parts: list[nn.Linear]) -> None:
        self.sizes = [part.out_features for part in parts]
        self.weight = torch.cat([part.weight.detach() for part in parts])
        self.bias = None if parts[0].bias is None else torch.cat([part.bias.detach() for part in parts])
        self.input: Tensor | None = None
        self.outputs: tuple[Tensor, ...] = ()
        self.left = 0

    def part(self, x: Tensor, index: int) -> Tensor:
        if self.input is not x:  # whatever is called, in whatever order: a part is of its own input
            self.input, self.left = x, len(self.sizes)
            self.outputs = nn.functional.linear(x, self.weight, self.bias).split(self.sizes, -1)
        out = self.outputs[index]
        self.left -= 1
        if self.left == 0:
            self.input, self.outputs = None, ()
        return out


class Part(nn.Module):
    """One of the siblings: x [..., in] -> its columns of the joined product."""

    def __init__(self, joined: Joined, index: int) -> None:
        super().__init__()
        self.joined, self.index = joined, index

    def forward(self, x: Tensor) -> Tensor:
        return self.joined.part(x, self.index)


def join(lm: Any, refreshed: list[tuple[Tensor, Any]]) -> None:
    """Joins the siblings of a model whose weights are all its own.

    ``refreshed``: (weight, what it is made from) of those weights; the entries become views of the joined ones.
    """
    own = {id(weight): number for number, (weight, _) in enumerate(refreshed)}
    for parent in list(lm.modules()):
        for names in SIBLINGS:
            parts: list[Any] = [getattr(parent, name, None) for name in names]
            if not all(type(part) is nn.Linear and id(part.weight) in own for part in parts):
                continue
            if len({part.bias is None for part in parts}) > 1:
                continue
            joined = Joined(parts)
            for index, (name, part) in enumerate(zip(names, parts, strict=True)):
                for tensor, whole in ((part.weight, joined.weight), (part.bias, joined.bias)):
                    if whole is not None and id(tensor) in own:  # a bias is the policy's own unless it is narrowed
                        number = own[id(tensor)]
                        refreshed[number] = (whole.split(joined.sizes)[index], refreshed[number][1])
                    elif whole is not None and tensor.requires_grad:
                        refreshed.append((whole.split(joined.sizes)[index], tensor))
                setattr(parent, name, Part(joined, index))
