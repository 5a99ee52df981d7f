"""Log-probability, entropy and exact KL per token, chunked through the LM head.

The logits [B, T, V] are never held, forward or backward: `chunk` rows of them are made, reduced and dropped, and made
again for the gradient, which is known in closed form. With z the logits over the temperature, p = softmax(z), a the
token, H the entropy and K the KL to q, the reference's distribution:

    d log p_a / d z_j = [j = a] - p_j
    d H / d z_j       = -p_j (log p_j + H)
    d K / d z_j       = p_j (log p_j - log q_j - K)
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

# Rows of logits held at once. On one H100 (2,048 rows, V = 49,152, h = 576, bfloat16, with the KL) forward and backward
# took 53 ms and 0.32 GB at 64, 27 ms and 0.41 GB at 128, 24 ms and 0.58 GB at 256, 21 ms and 2.6 GB at 2,048.
CHUNK_ROWS = 128


class TokenStatistics(NamedTuple):
    """Per token, in nats, float32 or wider: logp of the token, entropy of the policy, exact KL(pi || ref) or None."""

    logp: Tensor
    entropy: Tensor
    kl: Tensor | None


def token_statistics(
    hidden: Tensor,
    lm_head_weight: Tensor,
    tokens: Tensor,
    temperature: float = 1.0,
    ref_hidden: Tensor | None = None,
    ref_lm_head_weight: Tensor | None = None,
    chunk: int = CHUNK_ROWS,
) -> TokenStatistics:
    """log pi(a_t|s_t), H(pi(.|s_t)) and sum_v pi(v|s_t) (log pi(v|s_t) - log pi_ref(v|s_t)).

    pi(.|s_t) = softmax(lm_head_weight @ hidden_t / temperature); the temperature applies to the reference as well.

    Logits are float32 even when the inputs are narrower (bfloat16 logits put 0.03 of error on a log-probability), also
    under autocast; float64 stays float64. A narrower weight is widened once a pass, a [V, h] copy.

    Args:
        hidden: [B, T, h], the last hidden state that predicts token t. Any leading shape will do: selecting the
            response tokens first, hidden[mask] with tokens[mask], spares the work on padding.
        lm_head_weight: [V, h]. No bias and no soft-cap on the logits.
        tokens: integer ids [B, T], each 0 to V - 1, also where padded.
        temperature: that of sampling; positive.
        ref_hidden: [B, T, h'], the reference's hidden state; None for no KL.
        ref_lm_head_weight: [V, h'], given with ref_hidden.
        chunk: rows of logits held at once, 1 or more. Changes memory and speed, no figure.

    Returns:
        logp, entropy and kl [B, T], differentiable once in hidden and lm_head_weight, never in the reference.

    Raises:
        ValueError: for a temperature or a chunk that is not positive, half a reference, or shapes that do not match.
    """
    if not temperature > 0:
        raise ValueError(f"temperature is {temperature}: give a positive number, the one that tokens are sampled with")
    if chunk < 1:
        raise ValueError(f"chunk is {chunk}: give at least 1 row")
    _check_shapes(hidden, lm_head_weight, tokens)
    if (ref_hidden is None) != (ref_lm_head_weight is None):
        raise ValueError("the KL needs both ref_hidden and ref_lm_head_weight: give both or neither")
    if ref_hidden is not None and ref_lm_head_weight is not None:
        _check_shapes(ref_hidden, ref_lm_head_weight, tokens, prefix="ref_")
        if ref_lm_head_weight.shape[0] != lm_head_weight.shape[0]:
            raise ValueError(
                f"the policy's vocabulary has {lm_head_weight.shape[0]} tokens and the reference's "
                f"{ref_lm_head_weight.shape[0]}: the KL needs the same vocabulary"
            )
        ref_hidden = ref_hidden.reshape(-1, ref_hidden.shape[-1])
    rows = hidden.reshape(-1, hidden.shape[-1])
    logp, entropy, kl = _ChunkedStatistics.apply(
        rows, lm_head_weight, tokens.reshape(-1), temperature, ref_hidden, ref_lm_head_weight, chunk
    )
    shape = tokens.shape
    return TokenStatistics(logp.view(shape), entropy.view(shape), None if kl is None else kl.view(shape))


def _check_shapes(hidden: Tensor, weight: Tensor, tokens: Tensor, prefix: str = "") -> None:
    if hidden.shape[:-1] != tokens.shape or weight.ndim != 2 or hidden.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"{prefix}hidden {tuple(hidden.shape)}, {prefix}lm_head_weight {tuple(weight.shape)} and tokens "
            f"{tuple(tokens.shape)} do not match: give [B, T, h], [V, h] and [B, T]"
        )


class _ChunkedStatistics(torch.autograd.Function):
    """hidden [N, h], weight [V, h], tokens [N] -> logp [N], entropy [N], kl [N] or None."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        tokens: Tensor,
        temperature: float,
        ref_hidden: Tensor | None,
        ref_weight: Tensor | None,
        chunk: int,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        ctx.save_for_backward(hidden, weight, tokens, ref_hidden, ref_weight)
        ctx.temperature, ctx.chunk = temperature, chunk
        ctx.set_materialize_grads(False)  # None, not zeros, for what nothing was asked of
        heads = _Heads(hidden, weight, temperature, ref_hidden, ref_weight)
        logp = hidden.new_empty(len(tokens), dtype=heads.dtype)
        entropy = torch.empty_like(logp)
        kl = None if ref_hidden is None else torch.empty_like(logp)
        for start in range(0, len(tokens), chunk):
            part = slice(start, start + chunk)
            log_p = heads.log_p(part)
            p = log_p.exp()
            logp[part] = log_p.gather(1, tokens[part, None]).squeeze(1)
            entropy[part] = -(p * log_p).sum(1)
            if kl is not None:
                kl[part] = (p * (log_p - heads.log_q(part))).sum(1)
        return logp, entropy, kl

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        hidden, weight, tokens, ref_hidden, ref_weight = ctx.saved_tensors
        heads = _Heads(hidden, weight, ctx.temperature, ref_hidden, ref_weight)
        for_hidden, for_weight = ctx.needs_input_grad[:2]
        grad_hidden = torch.empty_like(hidden) if for_hidden else None
        # One buffer that every chunk adds to, wide so that adding many chunks loses nothing.
        grad_weight = torch.zeros_like(weight, dtype=heads.dtype) if for_weight else None
        for start in range(0, len(tokens), ctx.chunk):
            part = slice(start, start + ctx.chunk)
            grad_z = _grad_logits(heads, part, tokens[part], *(None if g is None else g[part, None] for g in grads))
            with heads.exact():
                if grad_hidden is not None:
                    grad_hidden[part] = (grad_z @ heads.weight / ctx.temperature).to(hidden.dtype)
                if grad_weight is not None:
                    grad_weight.addmm_(grad_z.T, heads.scaled(hidden, part))
        return grad_hidden, None if grad_weight is None else grad_weight.to(weight.dtype), None, None, None, None, None


class _Heads:
    """The widened LM heads of policy and reference, and their log-softmax for some of the rows."""

    def __init__(
        self,
        hidden: Tensor,
        weight: Tensor,
        temperature: float,
        ref_hidden: Tensor | None,
        ref_weight: Tensor | None,
    ) -> None:
        self.dtype = torch.promote_types(torch.promote_types(hidden.dtype, weight.dtype), torch.float32)
        self.temperature = temperature
        self.hidden, self.weight = hidden, weight.to(self.dtype)
        self.ref_hidden, self.ref_weight = ref_hidden, None if ref_weight is None else ref_weight.to(self.dtype)

    def exact(self) -> torch.autocast:
        """Autocast off: it would narrow the matrix products again."""
        return torch.autocast(self.hidden.device.type, enabled=False)

    def scaled(self, hidden: Tensor, part: slice) -> Tensor:
        # The temperature divides h numbers a row here, V numbers a row if it divided the logits.
        return hidden[part].to(self.dtype) / self.temperature

    def log_p(self, part: slice) -> Tensor:
        return self._log_softmax(self.hidden, self.weight, part)

    def log_q(self, part: slice) -> Tensor:
        assert self.ref_hidden is not None
        assert self.ref_weight is not None
        return self._log_softmax(self.ref_hidden, self.ref_weight, part)

    def _log_softmax(self, hidden: Tensor, weight: Tensor, part: slice) -> Tensor:
        with self.exact():
            return torch.log_softmax(self.scaled(hidden, part) @ weight.T, dim=1)


def _grad_logits(
    heads: _Heads,
    part: slice,
    tokens: Tensor,
    grad_logp: Tensor | None,
    grad_entropy: Tensor | None,
    grad_kl: Tensor | None,
) -> Tensor:
    """Gradient of the chunk's scaled logits [n, V]; each incoming gradient is [n, 1] or None. See the module."""
    log_p = heads.log_p(part)
    p = log_p.exp()
    factor = torch.zeros_like(log_p)  # what multiplies p_j
    if grad_entropy is not None:
        entropy = -(p * log_p).sum(1, keepdim=True)
        factor -= grad_entropy * (log_p + entropy)
    if grad_kl is not None:
        log_ratio = log_p - heads.log_q(part)
        factor += grad_kl * (log_ratio - (p * log_ratio).sum(1, keepdim=True))
    if grad_logp is None:
        return factor.mul_(p)
    factor -= grad_logp
    return factor.mul_(p).scatter_add_(1, tokens[:, None], grad_logp)
