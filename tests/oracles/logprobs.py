"""Token statistics from the whole logits, by their definitions, differentiated by torch's own autograd."""

from __future__ import annotations

import torch
from torch import Tensor


def token_statistics(
    hidden: Tensor,
    weight: Tensor,
    tokens: Tensor,
    temperature: float = 1.0,
    ref_hidden: Tensor | None = None,
    ref_weight: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """logp, entropy, and of the reference KL and logp or None, each [B, T]."""
    p = torch.softmax(hidden @ weight.T / temperature, -1)
    logp = p.gather(-1, tokens[..., None]).squeeze(-1).log()
    entropy = -(p * p.log()).sum(-1)
    if ref_hidden is None or ref_weight is None:
        return logp, entropy, None, None
    q = torch.softmax(ref_hidden @ ref_weight.T / temperature, -1)
    ref_logp = q.gather(-1, tokens[..., None]).squeeze(-1).log()
    return logp, entropy, (p * (p / q).log()).sum(-1), ref_logp
