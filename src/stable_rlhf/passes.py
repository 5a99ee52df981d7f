"""Forward and backward of one microbatch: run directly, or replayed as CUDA graphs.

At the sizes that RLHF trains, a GPU waits for the host: 3B parameters and 1,800 tokens keep an H100 busy for 59 ms, and
launching those operations takes 200 ms (docs/LOG.md, 2026-11-25). A replay launches them all at once.

A shape's graphs are two, forward and loss with backward. Measuring a rollout replays the first, an update both, so what
the ratio divides is one computation: on the first minibatch it is exactly 1.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from stable_rlhf import graphs, processor
from stable_rlhf.config import Config, ConfigError
from stable_rlhf.microbatches import Grain
from stable_rlhf.models import ActorCritic, Output, causal_lm, compile_layer, context_length, layers, replays_graphs
from stable_rlhf.ops.masked import masked_mean
from stable_rlhf.ops.objective import approx_kl, kl_penalty, ppo_clip_loss, value_loss
from stable_rlhf.records import Batch, Tokens

COLUMNS = 32
"""With graphs, columns are a multiple of this: fewer shapes, and tiles that a GPU's matrix product takes whole."""
DIRECT_COLUMNS = 8
"""Without graphs: oneDNN makes a kernel for every shape. On two CPU cores, by turns, a step took 1.23 s at 8 and 1.32
at 1."""
ROWS = 8
"""Rows of a graph are a multiple of this, for the same reason; what is left over is under a mask of False."""
GRAPHS = 64
"""Shapes that are kept; the one not used for longest goes first. Each keeps its inputs; the memory that it works in is
shared. 120 steps of 64 texts as long as HH-RLHF's (up to 512 + 64 tokens) had 35 shapes in 988 passes."""
SIGHTINGS = 2
"""A shape is captured when it comes for the second time: a capture takes two passes to warm up and one to record."""


@dataclass(frozen=True, kw_only=True)
class Scale:
    """What the loss of a microbatch is scaled by; 0-dimensional float32 tensors, so that a graph reads them anew."""

    kl_coef: Tensor
    """The controller's coefficient, of the KL in the loss."""
    tokens: Tensor
    """Response tokens of the whole minibatch: one denominator, so that accumulation changes nothing."""


def objective(
    out: Output, batch: Batch, model: ActorCritic, scale: Scale, config: Config, learns_policy: bool
) -> tuple[Tensor, dict[str, Tensor]]:
    """(loss of a microbatch, its metrics); both are this microbatch's share: sums over its tokens / ``scale.tokens``.

    L = L_clip + vf_coef L_V + kl_coef KL(kl.in_loss) - entropy_coef H; during the critic's warm-up, vf_coef L_V alone.
    """
    mask, critic, optim, tokens = batch.tokens.mask, config.critic, config.optim, scale.tokens
    fitted = zip(out.values, batch.values, strict=True)
    if critic.heads == 2 and critic.regress == "soft_min":
        fitted = [(model.combine(out.values), model.combine(batch.values))]
    losses = [
        value_loss(
            new, old, batch.returns, mask,
            kind=critic.loss, huber_delta=critic.huber_delta, cliprange=critic.cliprange_value,
            reduction=critic.clip_reduction, denominator=tokens,
        )
        for new, old in fitted
    ]  # fmt: skip
    value = torch.stack([v.loss for v in losses]).mean()
    policy = ppo_clip_loss(out.logp, batch.logp, batch.advantages, mask, optim.epsilon, tokens)
    entropy = masked_mean(out.entropy, mask, tokens)
    loss = critic.vf_coef * value
    metrics = {
        "loss/policy_avg": policy.loss,
        "loss/value_avg": value,
        "policy/clipfrac_avg": policy.clip_fraction,
        "policy/approxkl_avg": approx_kl(out.logp, batch.logp, mask, tokens),
        "policy/entropy_avg": entropy,
        "val/clipfrac_avg": torch.stack([v.clip_fraction for v in losses]).mean(),
        "val/ratio": masked_mean(policy.ratio, mask, tokens),
        # About 1, where the ratios are, so that little is lost when `update` makes it the variance about their mean.
        "val/ratio_var": masked_mean((policy.ratio - 1).square(), mask, tokens),
    }
    if learns_policy:
        loss = loss + policy.loss
        if optim.entropy_coef > 0:
            loss = loss - optim.entropy_coef * entropy
        if config.kl.in_loss != "none":
            kl = kl_penalty(out.logp, batch.ref_logp, out.exact_kl, config.kl.in_loss, mask, tokens)
            loss = loss + scale.kl_coef * kl
            metrics["loss/kl_avg"] = scale.kl_coef * kl
    return loss, {name: figure.detach() for name, figure in metrics.items()}


class Passes(Protocol):
    """The passes over a model's microbatches, the same from the first step of a run to its last.

    What they return is valid until the next pass: a graph writes where it wrote before.
    """

    model: ActorCritic
    grain: Grain
    """What the numbers of rows and of columns are multiples of."""

    def training(self) -> contextlib.AbstractContextManager[None]:
        """Inside, gradients are collected; on leaving, none is left."""
        ...

    def zero_grad(self) -> None: ...

    def measure(self, tokens: Tokens, learns_policy: bool) -> tuple[Output, Tensor]:
        """(the policy's output, the reference's log-probs [n, T])."""
        ...

    def learn(self, batch: Batch, scale: Scale, learns_policy: bool) -> tuple[list[str], Tensor]:
        """Adds a microbatch's gradient to the parameters'; (names of its metrics, its share of each [K])."""
        ...

    def logp(self, tokens: Tokens) -> Tensor:
        """[n, T]: the policy's log-probs alone, nats."""
        ...


class DirectPasses:
    """Passes that launch every operation."""

    def __init__(self, model: ActorCritic, config: Config) -> None:
        self.model, self.config = model, config
        self.compiled = config.model.torch_compile
        if self.compiled:
            compile_layers(model)
        self.parameters = [*model.policy_parameters(), *model.critic_parameters()]
        self.grain = Grain(1, DIRECT_COLUMNS, context_length(model.policy) or Grain().limit)

    @contextlib.contextmanager
    def training(self) -> Iterator[None]:
        self.zero_grad()
        try:
            with self.model.checkpointing(self.config.model.gradient_checkpointing):
                yield
        finally:
            self.zero_grad()

    def zero_grad(self) -> None:
        for parameter in self.parameters:
            parameter.grad = None

    def measure(self, tokens: Tokens, learns_policy: bool) -> tuple[Output, Tensor]:
        with processor.exact_products(self.model.device):
            # A compiled forward that keeps what its backward needs rounds otherwise than one that does not.
            with torch.set_grad_enabled(self.compiled):
                out = detached(self.model(tokens, temperature=self.config.rollout.temperature))
            return out, self.reference(tokens)

    def learn(self, batch: Batch, scale: Scale, learns_policy: bool) -> tuple[list[str], Tensor]:
        with processor.exact_products(self.model.device):
            return self.backward(self.forward(batch.tokens, learns_policy), batch, scale, learns_policy)

    def logp(self, tokens: Tokens) -> Tensor:
        with processor.exact_products(self.model.device), torch.set_grad_enabled(self.compiled):
            return self.forward(tokens, False).logp.detach()

    def forward(self, tokens: Tokens, learns_policy: bool) -> Output:
        exact_kl = self.config.kl.in_loss == "exact" and learns_policy
        return self.model(tokens, temperature=self.config.rollout.temperature, exact_kl=exact_kl)

    def reference(self, tokens: Tokens) -> Tensor:
        return self.model.reference_logp(tokens, temperature=self.config.rollout.temperature)

    def backward(self, out: Output, batch: Batch, scale: Scale, learns_policy: bool) -> tuple[list[str], Tensor]:
        loss, metrics = objective(out, batch, self.model, scale, self.config, learns_policy)
        loss.backward()
        return list(metrics), torch.stack(list(metrics.values()))


class ReplayedPasses:
    """Passes replayed as CUDA graphs, one set for each shape; a shape that is not captured yet runs directly.

    Rows and columns are rounded up alike in both cases, so both are the same computation.
    """

    def __init__(self, direct: DirectPasses) -> None:
        self.direct, self.model = direct, direct.model
        self.pool = graphs.pool()
        self.grain = Grain(ROWS, COLUMNS, direct.grain.limit)
        self._gradients = [torch.zeros_like(p) for p in direct.parameters]
        self._captures: OrderedDict[tuple[Any, ...], Any] = OrderedDict()
        self._sightings: dict[tuple[Any, ...], int] = {}

    @contextlib.contextmanager
    def training(self) -> Iterator[None]:
        self.direct.zero_grad()
        with self._collecting():
            self.zero_grad()
            yield

    def zero_grad(self) -> None:
        torch._foreach_zero_(self._gradients)  # pyright: ignore[reportPrivateImportUsage]

    def measure(self, tokens: Tokens, learns_policy: bool) -> tuple[Output, Tensor]:
        captured = self._captured(_PassGraphs, tokens, learns_policy)
        return (captured or self.direct).measure(tokens, learns_policy)

    def learn(self, batch: Batch, scale: Scale, learns_policy: bool) -> tuple[list[str], Tensor]:
        captured = self._captured(_PassGraphs, batch.tokens, learns_policy)
        return (captured or self.direct).learn(batch, scale, learns_policy)

    def logp(self, tokens: Tokens) -> Tensor:
        return (self._captured(_LogpGraph, tokens) or self.direct).logp(tokens)

    @contextlib.contextmanager
    def _collecting(self) -> Iterator[None]:
        """Inside, the parameters' gradients are the tensors that the graphs add to."""
        parameters = self.direct.parameters
        before = [parameter.grad for parameter in parameters]
        for parameter, gradient in zip(parameters, self._gradients, strict=True):
            parameter.grad = gradient
        try:
            with self.model.checkpointing(self.direct.config.model.gradient_checkpointing):
                yield
        finally:
            for parameter, gradient in zip(parameters, before, strict=True):
                parameter.grad = gradient

    def _captured(self, kind: Callable[..., Any], tokens: Tokens, *details: bool) -> Any:
        """The graphs for these tokens, captured if it is time to; None where they are run directly."""
        key = (kind, *tokens.ids.shape, tokens.response.shape[1], *details)
        self._sightings[key] = self._sightings.get(key, 0) + 1
        if key not in self._captures:
            if self._sightings[key] < SIGHTINGS:
                return None
            if len(self._captures) == GRAPHS:
                self._captures.popitem(last=False)
            with self._collecting():
                self._captures[key] = kind(self.direct, self.pool, *key[1:])
        self._captures.move_to_end(key)
        return self._captures[key]


def make_passes(model: ActorCritic, config: Config) -> Passes:
    """Replayed where ``model.cuda_graphs`` says so, or, without a word of it, where the device is CUDA; else direct."""
    direct = DirectPasses(model, config)
    return ReplayedPasses(direct) if replays_graphs(config.model, model.device) else direct


class _PassGraphs:
    """The graphs of one shape, and the tensors that they read."""

    def __init__(
        self, passes: DirectPasses, pool: Any, rows: int, width: int, length: int, learns_policy: bool
    ) -> None:
        model, device = passes.model, passes.model.device

        def zeros(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        tokens = _no_tokens(rows, width, length, device)
        grids = {name: zeros(rows, length) for name in ("logp", "ref_logp", "entropy", "advantages", "returns")}
        self.batch = Batch(tokens=tokens, values=zeros(len(model.heads), rows, length), **grids)
        self.scale = Scale(kl_coef=zeros(), tokens=zeros() + 1)
        self.names: list[str] = []
        last: dict[str, Output] = {}

        def forward() -> Output:
            last["out"] = passes.forward(tokens, learns_policy)
            return detached(last["out"])

        def backward() -> Tensor:  # lets the activations go
            self.names, figures = passes.backward(last.pop("out"), self.batch, self.scale, learns_policy)
            return figures

        def reference() -> Tensor:
            return passes.reference(tokens)

        with torch.enable_grad():  # also when it is a measurement that asks first
            # Under an empty mask: what this adds to the gradients is 0.
            graphs.warm_up(lambda: (forward(), backward(), reference()), device)
            # One pool for all: they are replayed one after another, and what one leaves is read before the next runs.
            self._forward = graphs.capture(forward, device, pool)
            self._backward = graphs.capture(backward, device, pool)
            self._reference = graphs.capture(reference, device, pool)

    def measure(self, tokens: Tokens, learns_policy: bool) -> tuple[Output, Tensor]:
        _copy(self.batch.tokens, tokens)
        self._forward.replay()
        self._reference.replay()
        return self._forward.result, self._reference.result

    def learn(self, batch: Batch, scale: Scale, learns_policy: bool) -> tuple[list[str], Tensor]:
        _copy(self.batch, batch)
        _copy(self.scale, scale)
        self._forward.replay()
        self._backward.replay()
        return self.names, self._backward.result.clone()


class _LogpGraph:
    """The graph of the policy's log-probs alone, of one shape."""

    def __init__(self, passes: DirectPasses, pool: Any, rows: int, width: int, length: int) -> None:
        device = passes.model.device
        self.tokens = tokens = _no_tokens(rows, width, length, device)

        def look() -> Tensor:
            return passes.forward(tokens, False).logp.detach()

        with torch.set_grad_enabled(passes.compiled):
            graphs.warm_up(look, device)
            self._look = graphs.capture(look, device, pool)

    def logp(self, tokens: Tokens) -> Tensor:
        _copy(self.tokens, tokens)
        self._look.replay()
        return self._look.result


def _no_tokens(rows: int, width: int, length: int, device: torch.device) -> Tokens:
    """Tokens for a graph to be recorded with, under an empty mask."""
    return Tokens(
        ids=torch.zeros(rows, width, dtype=torch.int64, device=device),
        start=torch.ones(rows, dtype=torch.int64, device=device),
        response=torch.zeros(rows, length, dtype=torch.int64, device=device),
        mask=torch.zeros(rows, length, dtype=torch.bool, device=device),
    )


def compile_layers(model: ActorCritic) -> None:
    """Has torch.compile fuse the operations of each layer of the policy and of its reference.

    Layer by layer: all are one program, compiled once, for any number of rows and columns.
    """
    with model.reference() as reference:
        blocks = {id(block): block for block in [*layers(model.policy), *layers(reference)]}
    if not blocks:
        raise ConfigError(
            f"model.torch_compile=true: {type(causal_lm(model.policy)).__name__} does not mark its layers in "
            "Transformers; set model.torch_compile=false"
        )
    for block in blocks.values():
        compile_layer(block)

    def requires_grad(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        """The first layer's input has a gradient like every other's, or it would be a program of its own."""
        return output.requires_grad_() if torch.is_grad_enabled() and not output.requires_grad else output

    causal_lm(model.policy).get_input_embeddings().register_forward_hook(requires_grad)


def detached(out: Output) -> Output:
    """Without the autograd graph, which would keep every activation."""
    parts: dict[str, Any] = {field.name: getattr(out, field.name) for field in dataclasses.fields(out)}
    for name, part in parts.items():
        parts[name] = part if part is None else part.detach()
    return Output(**parts)


def _copy(into: Any, given: Any) -> None:
    """Fills the tensors that a graph reads."""
    for field in dataclasses.fields(into):
        target, source = getattr(into, field.name), getattr(given, field.name)
        if isinstance(target, Tensor):
            target.copy_(source)
        else:
            _copy(target, source)
