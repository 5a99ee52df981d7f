"""Log-probability, entropy and exact KL per token, chunked through the LM head.

The logits [B, T, V] are never held, forward or backward: a chunk of their rows is made, reduced and dropped, and made
again for the gradient, which is known in closed form. Rows that fit one chunk are not made again: their log-softmax is
kept, so that a graph holds one chunk of logits at most. With z the logits over the temperature, p = softmax(z), a the
token, H the entropy and K the KL to q, the reference's distribution:

    d log p_a / d z_j = [j = a] - p_j
    d H / d z_j       = -p_j (log p_j + H)
    d K / d z_j       = p_j (log p_j - log q_j - K)

Precision. Logits, softmax, statistics and the gradient dL/dz are float32 or wider, whatever the inputs. On CUDA, where
hidden and weight are both bfloat16, the matrix products take them as they are and add up and answer in float32:

- Logits. A product of two bfloat16 numbers (8 bits each) has 16 bits and is exact in float32, so the logits are those
  of the widened inputs except for the order of the additions: 3e-6 off float64 instead of 1e-6 (H100, h = 256). The
  temperature then divides float32 logits, not hidden.
- Gradients. dL/dz is rounded to bfloat16 once, before its products with W and with hidden. Each entry is then off by
  2^-8 of itself at most, in either direction, and a gradient by about 2^-8 of the root of the sum of its squared terms.
  A gradient that leaves in bfloat16 is rounded by 2^-8 anyway: hidden's own dtype carries no more. bfloat16 has the
  exponents of float32, so small probabilities do not underflow. Sums over chunks stay float32.

Other inputs are widened first. So is float16, in which p_j times a mean's 1 / tokens would underflow.

Nothing here makes the host wait for the device, so forward and backward can be captured into a CUDA graph.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

# Bytes of one chunk's logits; two or three tensors of this size live at once. On one H100 (1,024 rows, V = 151,936,
# h = 2,048, bfloat16, frozen weight) forward and backward took 11.1 ms and 0.16 GB with chunks of 128 rows, 7.9 and
# 0.32 with 256, 7.1 and 0.63 with 512, which is 311 MB; all rows in one chunk, which is then not made again, 5.3 and
# 1.56. On a CPU (float32, V = 4,096, h = 256) the size hardly matters, 132 ms at 32 rows and 117 at 1,100, but not
# making the logits again saves a product of four, and 1,100 rows are 18 MB.
CHUNK_BYTES = 320_000_000

# Chunks are multiples of this where they can be: the tiles of a GPU's matrix product have 64 to 256 rows.
CHUNK_ROWS_MULTIPLE = 128


class TokenStatistics(NamedTuple):
    """Per token, in nats, float32 or wider: logp of the token, entropy of the policy, exact KL(pi || ref), and the
    token's logp under the reference. The last two are None without a reference."""

    logp: Tensor
    entropy: Tensor
    kl: Tensor | None
    ref_logp: Tensor | None


def token_statistics(
    hidden: Tensor,
    lm_head_weight: Tensor,
    tokens: Tensor,
    temperature: float = 1.0,
    ref_hidden: Tensor | None = None,
    ref_lm_head_weight: Tensor | None = None,
    chunk: int | None = None,
) -> TokenStatistics:
    """log pi(a_t|s_t), H(pi(.|s_t)) and sum_v pi(v|s_t) (log pi(v|s_t) - log pi_ref(v|s_t)).

    pi(.|s_t) = softmax(lm_head_weight @ hidden_t / temperature); the temperature applies to the reference as well.

    Logits are float32 even when the inputs are narrower (bfloat16 logits put 0.03 of error on a log-probability), also
    under autocast; float64 stays float64. A narrower weight is widened once a pass, a [V, h] copy, except on CUDA when
    hidden and weight are both bfloat16 (see the module).

    Args:
        hidden: [B, T, h], the last hidden state that predicts token t. Any leading shape will do: selecting the
            response tokens first, hidden[mask] with tokens[mask], spares the work on padding.
        lm_head_weight: [V, h]. No bias and no soft-cap on the logits.
        tokens: integer ids [B, T], each 0 to V - 1, also where padded.
        temperature: that of sampling; positive.
        ref_hidden: [B, T, h'], the reference's hidden state; None for no KL.
        ref_lm_head_weight: [V, h'], given with ref_hidden.
        chunk: rows of logits held at once, 1 or more; None takes those that fit CHUNK_BYTES. It changes memory and
            speed, and no result.

    Returns:
        logp, entropy and kl [B, T], differentiable once in hidden and lm_head_weight, never in the reference; ref_logp
        [B, T] has no gradient. Where B * T rows fit one chunk, their graph keeps that chunk's log-softmax.

    Raises:
        ValueError: for a temperature or a chunk that is not positive, half a reference, or shapes that do not match.
    """
    if not temperature > 0:
        raise ValueError(f"temperature is {temperature}: give a positive number, the one that tokens are sampled with")
    if chunk is not None and chunk < 1:
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
    dtype = torch.promote_types(torch.promote_types(hidden.dtype, lm_head_weight.dtype), torch.float32)
    if chunk is None:
        chunk = _chunk_rows(lm_head_weight.shape[0], dtype)
    figures = _ChunkedStatistics.apply(
        rows, lm_head_weight, tokens.reshape(-1), temperature, ref_hidden, ref_lm_head_weight, chunk, dtype
    )
    logp, entropy, *against = figures
    kl, ref_logp = (None if figure is None else figure.view(tokens.shape) for figure in against)
    return TokenStatistics(logp.view(tokens.shape), entropy.view(tokens.shape), kl, ref_logp)


def _check_shapes(hidden: Tensor, weight: Tensor, tokens: Tensor, prefix: str = "") -> None:
    if hidden.shape[:-1] != tokens.shape or weight.ndim != 2 or hidden.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"{prefix}hidden {tuple(hidden.shape)}, {prefix}lm_head_weight {tuple(weight.shape)} and tokens "
            f"{tuple(tokens.shape)} do not match: give [B, T, h], [V, h] and [B, T]"
        )


def _chunk_rows(vocabulary: int, dtype: torch.dtype) -> int:
    rows = max(1, CHUNK_BYTES // (vocabulary * dtype.itemsize))
    return rows - rows % CHUNK_ROWS_MULTIPLE if rows > CHUNK_ROWS_MULTIPLE else rows


class _ChunkedStatistics(torch.autograd.Function):
    """hidden [N, h], weight [V, h], tokens [N] -> logp [N], entropy [N], kl [N] or None, ref_logp [N] or None."""

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
        dtype: torch.dtype,
    ) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        policy, reference = _heads(hidden, weight, ref_hidden, ref_weight, temperature, dtype)
        logp = hidden.new_empty(len(tokens), dtype=dtype)
        entropy = torch.empty_like(logp)
        kl = None if reference is None else torch.empty_like(logp)
        ref_logp = None if reference is None else torch.empty_like(logp)
        kept = policy.log_softmax(slice(None)) if len(tokens) <= chunk else None
        for start in range(0, len(tokens), chunk):
            part = slice(start, start + chunk)
            log_p = policy.log_softmax(part) if kept is None else kept
            p = log_p.exp()
            logp[part] = log_p.gather(1, tokens[part, None]).squeeze(1)
            if reference is not None and kl is not None and ref_logp is not None:
                log_q = reference.log_softmax(part)
                ref_logp[part] = log_q.gather(1, tokens[part, None]).squeeze(1)
                kl[part] = log_q.neg_().add_(log_p).mul_(p).sum(1)
                del log_q
            entropy[part] = p.mul_(log_p).sum(1).neg_()
            del log_p, p  # before the next chunk's are made
        # Without a graph (no_grad, frozen inputs) autograd lets go of all of it, `kept` too.
        ctx.save_for_backward(hidden, weight, tokens, ref_hidden, ref_weight, entropy, kl, kept)
        ctx.temperature, ctx.chunk, ctx.dtype = temperature, chunk, dtype
        ctx.set_materialize_grads(False)  # None, not zeros, for what nothing was asked of
        if ref_logp is not None:
            ctx.mark_non_differentiable(ref_logp)
        return logp, entropy, kl, ref_logp

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        hidden, weight, tokens, ref_hidden, ref_weight, entropy, kl, kept = ctx.saved_tensors
        grads = grads[:3]  # ref_logp has none
        if all(g is None for g in grads):
            return (None,) * 8
        policy, reference = _heads(hidden, weight, ref_hidden, ref_weight, ctx.temperature, ctx.dtype)
        for_hidden, for_weight = ctx.needs_input_grad[:2]
        grad_hidden = torch.empty_like(hidden) if for_hidden else None
        # One buffer that every chunk adds to, wide so that adding many chunks loses nothing.
        grad_weight: Tensor | None = None
        # dz / d logits = 1 / temperature: it divides N numbers here.
        by_logits = [None if g is None else g[:, None] / ctx.temperature for g in grads]
        for start in range(0, len(tokens), ctx.chunk):
            part = slice(start, start + ctx.chunk)
            grad = _grad_logits(
                policy.log_softmax(part) if kept is None else kept,
                kept is None,
                reference.log_softmax(part) if reference is not None and by_logits[2] is not None else None,
                tokens[part, None],
                entropy[part, None],
                None if kl is None else kl[part, None],
                [None if g is None else g[part] for g in by_logits],
                policy.operand_dtype,
            )
            if grad_hidden is not None:
                grad_hidden[part] = _mm(grad, policy.weight, ctx.dtype)
            if for_weight:
                grad_weight = _mm(grad.T, policy.rows(part), ctx.dtype, onto=grad_weight)
            del grad
        if for_weight:
            grad_weight = torch.zeros_like(weight) if grad_weight is None else grad_weight.to(weight.dtype)
        return grad_hidden, grad_weight, None, None, None, None, None, None


class _Head:
    """An LM head and the hidden states it reads, in the dtype that their products take, and their log-softmax."""

    def __init__(self, hidden: Tensor, weight: Tensor, temperature: float, dtype: torch.dtype) -> None:
        self.operand_dtype = hidden.dtype if _multiplies_narrow(hidden, weight, dtype) else dtype
        self.hidden, self.weight = hidden, weight.to(self.operand_dtype)
        self.temperature, self.dtype = temperature, dtype

    def rows(self, part: slice) -> Tensor:
        return self.hidden[part].to(self.operand_dtype)

    def log_softmax(self, part: slice) -> Tensor:
        """log softmax(logits / temperature) of some rows, [n, V], a tensor of its own."""
        rows = self.rows(part)
        if self.temperature != 1 and self.operand_dtype == self.dtype:
            rows = rows / self.temperature  # h numbers a row, not V
        logits = _mm(rows, self.weight.T, self.dtype)
        if self.temperature != 1 and self.operand_dtype != self.dtype:
            logits /= self.temperature  # a narrow hidden state would lose digits
        return torch.log_softmax(logits, dim=1)


def _heads(
    hidden: Tensor,
    weight: Tensor,
    ref_hidden: Tensor | None,
    ref_weight: Tensor | None,
    temperature: float,
    dtype: torch.dtype,
) -> tuple[_Head, _Head | None]:
    policy = _Head(hidden, weight, temperature, dtype)
    if ref_hidden is None or ref_weight is None:
        return policy, None
    return policy, _Head(ref_hidden, ref_weight, temperature, dtype)


def _multiplies_narrow(hidden: Tensor, weight: Tensor, dtype: torch.dtype) -> bool:
    """Whether the products take hidden and weight in bfloat16, as they are, and return float32. See the module."""
    narrow = hidden.dtype == weight.dtype == torch.bfloat16 and dtype == torch.float32
    return narrow and hidden.is_cuda


def _mm(a: Tensor, b: Tensor, dtype: torch.dtype, onto: Tensor | None = None) -> Tensor:
    """a @ b, added up and returned in `dtype`, on top of `onto` (in place) where there is one."""
    with torch.autocast(a.device.type, enabled=False):  # it would narrow the product again
        if a.dtype != dtype and a.is_cuda:
            if onto is None:
                return torch.mm(a, b, out_dtype=dtype)
            return torch.addmm(onto, a, b, out_dtype=dtype, out=onto)
        a, b = a.to(dtype), b.to(dtype)  # out_dtype exists only on CUDA: the same arithmetic without it
        return torch.mm(a, b) if onto is None else onto.addmm_(a, b)


def _grad_logits(
    log_p: Tensor,
    log_p_is_ours: bool,
    log_q: Tensor | None,
    tokens: Tensor,
    entropy: Tensor,
    kl: Tensor | None,
    grads: list[Tensor | None],
    dtype: torch.dtype,
) -> Tensor:
    """The gradient [n, V] of a chunk's logits, in `dtype`, from those of logp, entropy and KL; see the module.

    log_p and log_q are [n, V], the rest [n, 1]. log_q is overwritten, and log_p where it is ours: a kept one may be
    asked for again (retain_graph). One of `grads` at least is not None.
    """
    grad_logp, grad_entropy, grad_kl = grads
    factor: Tensor | None = None  # what multiplies p_j, besides -grad_logp
    if grad_kl is not None:
        assert log_q is not None
        assert kl is not None
        factor = log_q.neg_().add_(log_p).sub_(kl).mul_(grad_kl)
    if grad_entropy is not None:
        share = (log_p + entropy).mul_(-grad_entropy)
        factor = share if factor is None else factor.add_(share)
    p = log_p.exp_() if log_p_is_ours else log_p.exp()
    if factor is not None:
        if grad_logp is None:
            return factor.mul_(p).to(dtype)
        return factor.sub_(grad_logp).mul_(p).scatter_add_(1, tokens, grad_logp).to(dtype)
    assert grad_logp is not None
    # p - [j = a] first: near p_a = 1 the difference is exact, and the product then rounds once, to `dtype` at once.
    p.scatter_add_(1, tokens, torch.full_like(grad_logp, -1))
    return torch.mul(p, -grad_logp, out=p if dtype == p.dtype else torch.empty_like(p, dtype=dtype))


@torch.no_grad()
def logits(hidden: Tensor, lm_head_weight: Tensor) -> Tensor:
    """[N, V]: lm_head_weight @ hidden_n, float32 or wider, as exact as those in `token_statistics` and by its products.

    For sampling: the whole vocabulary of some rows, without a gradient.

    Args:
        hidden: [N, h].
        lm_head_weight: [V, h].
    """
    dtype = torch.promote_types(torch.promote_types(hidden.dtype, lm_head_weight.dtype), torch.float32)
    head = _Head(hidden, lm_head_weight, 1.0, dtype)
    return _mm(head.rows(slice(None)), head.weight.T, dtype)
