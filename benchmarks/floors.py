"""The least time that a step can take on a device: counted bytes and operations over ceilings measured there.

An operation is a multiplication or an addition: a weight that meets a token costs two. What is counted is the
arithmetic of the algorithm and not of any way to run it: no padding, no recomputation, half of the square of causal
attention, LoRA merged while sampling, the LM head where a token is chosen or scored only. Element-wise work, the value
heads (h^2 / 4 weights each) and the optimiser are left out, so that a floor stays a floor.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from transformers import PreTrainedConfig


@dataclass(frozen=True, kw_only=True)
class Geometry:
    """Sizes of a Llama or Qwen2 decoder: L layers, h hidden, q and k widths of queries and of keys (heads x size)."""

    layers: int
    hidden: int
    query: int
    key: int
    intermediate: int
    vocabulary: int
    biased: bool
    """Whether the projections to queries, keys and values have a bias (Qwen2 does)."""

    @classmethod
    def of(cls, config: PreTrainedConfig) -> Geometry:
        if config.model_type not in ("llama", "qwen2"):
            raise ValueError(f"model type {config.model_type!r}: only llama and qwen2 are counted here")
        size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        return cls(
            layers=config.num_hidden_layers,
            hidden=config.hidden_size,
            query=size * config.num_attention_heads,
            key=size * config.num_key_value_heads,
            intermediate=config.intermediate_size,
            vocabulary=config.vocab_size,
            biased=config.model_type == "qwen2",
        )


@dataclass(frozen=True, kw_only=True)
class Work:
    """What a step does: B rows of P prompt and T response tokens, learned from in ``iterations`` passes."""

    batch: int
    prompt: int
    response: int
    iterations: int
    rank: int
    """Rank of the LoRA adapter on every linear layer of the decoder."""

    @property
    def tokens(self) -> int:
        """B (P + T - 1): the last response token is predicted, and never fed in."""
        return self.batch * (self.prompt + self.response - 1)

    @property
    def pairs(self) -> int:
        return self.batch * causal_pairs(self.prompt + self.response - 1)


@dataclass(frozen=True, kw_only=True)
class Ceilings:
    """What the device does at best: bytes a second read + written by a copy, operations a second of a square matmul."""

    bandwidth: float
    arithmetic: float


@dataclass(frozen=True, kw_only=True)
class Floor:
    """The least seconds of a part of the step; ``bound`` says by what, ``flops`` and ``bytes`` are what was counted."""

    seconds: float
    flops: float
    bytes: float
    bound: str


# -- weights ------------------------------------------------------------------------------------------------------


def projections(shape: Geometry) -> list[tuple[int, int]]:
    """(inputs, outputs) of a layer's linear maps: q, k, v, o, gate, up, down."""
    h, q, k, i = shape.hidden, shape.query, shape.key, shape.intermediate
    return [(h, q), (h, k), (h, k), (q, h), (h, i), (h, i), (i, h)]


def linear_weights(shape: Geometry) -> int:
    """L (2 h q + 2 h k + 3 h i): the weights that every token meets."""
    return shape.layers * sum(inputs * outputs for inputs, outputs in projections(shape))


def head_weights(shape: Geometry) -> int:
    """V h."""
    return shape.vocabulary * shape.hidden


def lora_weights(shape: Geometry, rank: int) -> int:
    """L r sum(inputs + outputs): A is [r, inputs], B is [outputs, r]."""
    return shape.layers * rank * sum(inputs + outputs for inputs, outputs in projections(shape))


def read_weights(shape: Geometry) -> int:
    """Weights that a forward of one token reads: linear maps, LM head, biases, 2 L + 1 norms; one row of embeddings
    is nothing beside them."""
    biases = shape.layers * (shape.query + 2 * shape.key) if shape.biased else 0
    return linear_weights(shape) + head_weights(shape) + biases + (2 * shape.layers + 1) * shape.hidden


# -- operations and bytes -----------------------------------------------------------------------------------------


def causal_pairs(length: int) -> int:
    """S (S + 1) / 2: positions that the S tokens of a row attend to, each to itself and to those before."""
    return length * (length + 1) // 2


def attention_flops(shape: Geometry, pairs: int) -> int:
    """4 L q pairs: q k^T and the weighted sum of v, two operations each, for every (token, position) pair."""
    return 4 * shape.layers * shape.query * pairs


def forward_flops(shape: Geometry, tokens: int, pairs: int, head_tokens: int, rank: int = 0) -> int:
    """2 tokens (linear + LoRA weights) + 4 L q pairs + 2 V h head_tokens."""
    weights = linear_weights(shape) + lora_weights(shape, rank)
    return 2 * tokens * weights + attention_flops(shape, pairs) + 2 * head_tokens * head_weights(shape)


def training_flops(shape: Geometry, tokens: int, pairs: int, head_tokens: int, rank: int) -> int:
    """Forward, and backward to the LoRA weights alone, of one pass.

    tokens (4 linear + 6 LoRA) + 12 L q pairs + 4 V h head_tokens - 2 tokens (what the first layer's q, k and v would
    pass down to the embeddings, which are frozen). A frozen weight costs two operations forward and two to pass the
    gradient on; a trained one two more for its own gradient; attention has two inputs to each product, so its backward
    costs twice its forward.
    """
    to_embeddings = sum(inputs * (outputs + rank) for inputs, outputs in projections(shape)[:3])
    return (
        tokens * (4 * linear_weights(shape) + 6 * lora_weights(shape, rank) - 2 * to_embeddings)
        + 3 * attention_flops(shape, pairs)
        + 4 * head_tokens * head_weights(shape)
    )


def prefill_flops(shape: Geometry, work: Work) -> int:
    """A forward of the prompts, the LM head on the last position of each alone: it gives the first new token."""
    pairs = work.batch * causal_pairs(work.prompt)
    return forward_flops(shape, work.batch * work.prompt, pairs, work.batch)


def decode_flops(shape: Geometry, work: Work) -> int:
    """T - 1 forwards of a token a row, with the LM head."""
    tokens = work.batch * (work.response - 1)
    return forward_flops(shape, tokens, work.pairs - work.batch * causal_pairs(work.prompt), tokens)


def decode_bytes(shape: Geometry, work: Work, itemsize: int) -> int:
    """(T - 1) reads of every weight + the keys and values, 2 L k numbers a position, of all positions attended to."""
    attended = work.pairs - work.batch * causal_pairs(work.prompt)
    return itemsize * ((work.response - 1) * read_weights(shape) + 2 * shape.layers * shape.key * attended)


# -- floors -------------------------------------------------------------------------------------------------------


def slower(flops: float, moved: float, ceilings: Ceilings) -> Floor:
    """max(bytes / bandwidth, operations / arithmetic): the two can overlap, and no better."""
    by_bytes, by_flops = moved / ceilings.bandwidth, flops / ceilings.arithmetic
    bound = "bytes" if by_bytes > by_flops else "operations"
    return Floor(seconds=max(by_bytes, by_flops), flops=flops, bytes=moved, bound=bound)


def floors(shape: Geometry, work: Work, ceilings: Ceilings, itemsize: int) -> dict[str, Floor]:
    """Floor of rollout, log-probs and update. The other parts have none: what they compute is next to nothing.

    rollout = slower(decode) + slower(prefill); log-probs = policy (with its adapter) and reference, one forward each;
    update = iterations x training pass. Every forward reads the weights at least once.
    """
    weights = itemsize * read_weights(shape)
    decode = slower(decode_flops(shape, work), decode_bytes(shape, work, itemsize), ceilings)
    prefill = slower(prefill_flops(shape, work), weights, ceilings)
    head_tokens = work.batch * work.response
    reference = forward_flops(shape, work.tokens, work.pairs, head_tokens)
    policy = forward_flops(shape, work.tokens, work.pairs, head_tokens, work.rank)
    training = work.iterations * training_flops(shape, work.tokens, work.pairs, head_tokens, work.rank)
    return {
        "rollout": Floor(
            seconds=decode.seconds + prefill.seconds,
            flops=decode.flops + prefill.flops,
            bytes=decode.bytes + prefill.bytes,
            bound=decode.bound,
        ),
        "log-probs": slower(policy + reference, 2 * weights, ceilings),
        "update": slower(training, 2 * work.iterations * weights, ceilings),
    }


# -- ceilings -----------------------------------------------------------------------------------------------------


def measure_ceilings(device: torch.device, repeats: int = 10) -> Ceilings:
    """Copies 4 GiB and multiplies two random 8192 x 8192 bfloat16 matrices on a GPU; on the CPU 64 MiB and 1024 x 1024
    float32. Random, because a GPU multiplies zeros faster: they take less power. The best of ``repeats``."""
    on_gpu = device.type == "cuda"
    side, dtype, size = (8192, torch.bfloat16, 4 * 2**30) if on_gpu else (1024, torch.float32, 64 * 2**20)
    first, second = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    product = torch.empty_like(first)
    arithmetic = 2 * side**3 / best_seconds(lambda: torch.mm(first, second, out=product), device, repeats)
    source = torch.zeros(size, device=device, dtype=torch.uint8)
    target = torch.empty_like(source)
    bandwidth = 2 * size / best_seconds(lambda: target.copy_(source), device, repeats)
    return Ceilings(bandwidth=bandwidth, arithmetic=arithmetic)


def best_seconds(call: Callable[[], object], device: torch.device, repeats: int, inner: int = 5) -> float:
    """Least seconds of a call over ``repeats`` runs of ``inner`` calls, after one run to warm up."""
    seconds = []
    for _ in range(repeats + 1):
        synchronize(device)
        started = time.perf_counter()
        for _ in range(inner):
            call()
        synchronize(device)
        seconds.append((time.perf_counter() - started) / inner)
    return min(seconds[1:])


def synchronize(device: torch.device) -> None:
    """Waits for what the device was given to do; the CPU has done it already."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
