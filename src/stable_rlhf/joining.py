"""Linear layers that read the same input as one product: for one token, each product costs its launch and its start.

At 3B on one H100 the rollout of 16 x 128 tokens took 642 ms with a product for each layer and 574 ms with these joined
(and attention by plain products; docs/LOG.md, 2026-11-25).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

SIBLINGS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""Names, under one parent, of layers that Transformers' Llama-like models call on the same tensor."""


class Joined:
    """The product of siblings, from the first of them that is called until the last has its part."""

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
