"""The policy, its value heads and the reference in one module with one forward."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel

from stable_rlhf.config import CriticConfig
from stable_rlhf.errors import ConfigError
from stable_rlhf.hardware import UNBOUNDED, UNMASKED, attending, attention_span
from stable_rlhf.ops.logprobs import token_statistics
from stable_rlhf.ops.objective import soft_min
from stable_rlhf.policy.adapter import adapter_is_new
from stable_rlhf.policy.self_check import forward_fault, reference_fault
from stable_rlhf.policy.transformer import (
    causal_lm,
    compile_layer,
    context_length,
    frozen_copy,
    layers,
    lm_head,
    switch_dropout_off,
)
from stable_rlhf.records import Tokens


class ValueHead(nn.Module):
    """LayerNorm -> Linear(h, h/4) -> GELU -> Linear(1), float32 (the published code's head): [..., h] -> [...].

    ``zero`` sets the last layer to 0, so that the head says 0 until it has learned; heads differ in their hidden layer.
    """

    def __init__(self, hidden_size: int, zero: bool = False) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(hidden_size)
        self.up = nn.Linear(hidden_size, hidden_size // 4)
        self.out = nn.Linear(hidden_size // 4, 1)
        if zero:
            nn.init.zeros_(self.out.weight)
            nn.init.zeros_(self.out.bias)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.out(nn.functional.gelu(self.up(self.norm(hidden)))).squeeze(-1)


@dataclass(frozen=True, kw_only=True)
class Output:
    """The results of one forward, [B, T] float32 unless said otherwise. Entries outside the mask mean nothing."""

    logp: Tensor
    """log pi(a_t | s_t) at the sampling temperature, nats."""
    entropy: Tensor
    """Entropy of pi(. | s_t), nats."""
    values: Tensor
    """[H, B, T] each head's V(s_t); H is 0 without a critic."""
    state: Tensor
    """[B, T, h] the input of the heads: the last hidden state, without a gradient unless critic.backbone_gradient."""
    exact_kl: Tensor | None
    """KL(pi || pi_ref) at s_t over the whole vocabulary, nats, where asked for."""


class ActorCritic(nn.Module):
    """Policy, value heads and Polyak target heads. Dropout is always off, so that a ratio is of one policy.

    ``policy`` is a causal language model or a PEFT model around one. The reference is the policy as given: with a new
    adapter the policy with its adapter off, otherwise a copy whose trained weights are frozen.

    ``self_check`` tries the forward on a few tokens. Raises ConfigError where it is not the model's own.
    """

    def __init__(
        self,
        policy: PreTrainedModel | PeftModel,
        critic: CriticConfig,
        *,
        autocast: bool = False,
        self_check: bool = True,
    ) -> None:
        super().__init__()
        self.policy = policy
        self.critic = critic
        self.autocast = autocast
        device = next(policy.parameters()).device
        hidden_size = causal_lm(policy).get_output_embeddings().weight.shape[1]
        made = [ValueHead(hidden_size, critic.zero_init) for _ in range(critic.heads)]
        self.heads = nn.ModuleList(made).to(device, torch.float32)
        self.target_heads = copy.deepcopy(self.heads).requires_grad_(False)
        self.peft = isinstance(policy, PeftModel)
        self.span = attention_span(causal_lm(policy))
        self.context = context_length(policy)
        switch_dropout_off(policy)
        for module in policy.modules():
            if autocast and hasattr(module, "cast_input_dtype_enabled"):
                # PEFT would widen an adapter's input to the float32 of its weights, and autocast narrow it again.
                setattr(module, "cast_input_dtype_enabled", False)  # noqa: B010
        # A list hides the copy from state dicts, optimisers and wrappers: it never changes.
        self._policy_parameters = [p for p in policy.parameters() if p.requires_grad]
        self._reference = [] if self.peft and adapter_is_new(policy) else [frozen_copy(policy)]
        self._all = [module for part in (self, *self._reference) for module in part.modules()]
        self.dropout_off()
        own = causal_lm(policy).config._attn_implementation
        ways = [UNMASKED, own] if own == "sdpa" and self.span == UNBOUNDED else [own]
        self.hidden_dtype = torch.float32  # of the last forward
        self.attention = self._first_sound(ways) if self_check else ways[0]

    def _first_sound(self, ways: list[str]) -> str:
        """The first of these attention functions with which the forward is the model's own."""
        fault: str | None = None
        for way in ways:
            self.attention = way
            fault = forward_fault(self)
            if fault is None:
                break
        if fault := fault or reference_fault(self):
            raise ConfigError(f"{type(causal_lm(self.policy)).__name__}: {fault}; choose another model")
        return self.attention

    def dropout_off(self) -> None:
        """Puts policy, reference and heads into evaluation mode; code of the user's may have put them into another."""
        for module in self._all:  # eval() would walk through the tree, some milliseconds at each event of a large model
            if module.training:
                module.training = False

    @property
    def device(self) -> torch.device:
        return next(self.policy.parameters()).device

    def forward(self, tokens: Tokens, *, temperature: float, exact_kl: bool = False) -> Output:
        """Log-probs, entropy and values of the response tokens in one pass; see ``Output``.

        ``exact_kl`` adds the KL over the vocabulary, at the cost of a forward of the reference.
        """
        hidden = self._hidden(self.policy, tokens)
        self.hidden_dtype = hidden.dtype
        against: tuple[Any, Any] = (None, None)
        if exact_kl:
            with torch.no_grad(), self.reference() as reference:
                against = self._hidden(reference, tokens), lm_head(reference)
        statistics = token_statistics(hidden, lm_head(self.policy), tokens.response, temperature, *against)
        state = hidden.float() if self.critic.backbone_gradient else hidden.detach().float()
        return Output(
            logp=statistics.logp,
            entropy=statistics.entropy,
            values=values(self.heads, state),
            state=state,
            exact_kl=statistics.kl,
        )

    def hidden(self, tokens: Tokens) -> Tensor:
        """[B, T, h] the policy's last hidden state at s_0 .. s_{T-1}, which its LM head reads."""
        return self._hidden(self.policy, tokens)

    def head(self) -> Tensor:
        """[V, h] the weight of the policy's LM head."""
        return lm_head(self.policy)

    @torch.no_grad()
    def reference_logp(self, tokens: Tokens, *, temperature: float) -> Tensor:
        """[B, T] log pi_ref(a_t | s_t), nats."""
        with self.reference() as reference:
            hidden = self._hidden(reference, tokens)
            return token_statistics(hidden, lm_head(reference), tokens.response, temperature).logp

    @torch.no_grad()
    def reference_kl(self, tokens: Tokens, state: Tensor, *, temperature: float) -> tuple[Tensor, Tensor]:
        """([B, T] log pi_ref(a_t | s_t), [B, T] KL(pi || pi_ref) at s_t over the whole vocabulary), nats.

        ``state`` is the ``Output.state`` of the same tokens: the policy's logits are made from it again, which costs a
        product with the LM head and no forward.
        """
        weight = lm_head(self.policy)  # before the context, which may switch the head's adapter off
        with self.reference() as reference:
            hidden = self._hidden(reference, tokens)
            # float32 holds every number of a narrower type, so the way back loses nothing
            given = state.to(self.hidden_dtype)
            found = token_statistics(given, weight, tokens.response, temperature, hidden, lm_head(reference))
        assert found.ref_logp is not None
        assert found.kl is not None
        return found.ref_logp, found.kl

    @torch.no_grad()
    def target_values(self, state: Tensor) -> Tensor:
        """[H, B, T]: the target heads on ``Output.state``."""
        return values(self.target_heads, state)

    def combine(self, head_values: Tensor) -> Tensor:
        """[H, B, T] -> [B, T]: the one value of a single head, the soft-min of two."""
        if len(head_values) == 1:
            return head_values[0]
        return soft_min(head_values[0], head_values[1], self.critic.temperature)

    def _hidden(self, policy: nn.Module, tokens: Tokens) -> Tensor:
        """[B, T, h]: the last hidden state at s_0 .. s_{T-1}; position t has not seen a_t."""
        ids, lm = tokens.ids, causal_lm(policy)
        if self.context is not None and ids.shape[1] > self.context:
            raise ConfigError(
                f"{type(lm).__name__}: {ids.shape[1]} tokens in a row, but the model reads {self.context}; lower "
                "data.max_prompt_length or rollout.max_completion_length"
            )
        with torch.autocast(ids.device.type, torch.bfloat16, enabled=self.autocast), attending(lm, self.attention):
            # No mask and no positions: padding is on the right, where a causal model does not look.
            out = lm.get_decoder()(input_ids=ids, use_cache=False)
        at = tokens.start[:, None] - 1 + torch.arange(tokens.response.shape[1], device=ids.device)
        # Beyond a row's end stands its last position again: a number that means nothing, under the mask.
        at = at.clamp(max=ids.shape[1] - 1)[..., None]
        return out.last_hidden_state.gather(1, at.expand(-1, -1, out.last_hidden_state.shape[2]))

    @contextlib.contextmanager
    def reference(self) -> Iterator[Any]:
        """The reference policy, for as long as the context lasts."""
        if self._reference:
            yield self._reference[0]
        else:
            with self.policy.disable_adapter():  # pyright: ignore[reportCallIssue]
                yield self.policy

    @contextlib.contextmanager
    def checkpointing(self, enabled: bool) -> Iterator[None]:
        """Recomputes layers in the backward pass, inside the context.

        Only the layers themselves are set to train: their dropouts stay off, and outside the context, when sampling,
        the KV cache works. Raises ConfigError where the model does not support it.
        """
        blocks = layers(self.policy) if enabled else []
        if enabled and not blocks:
            raise ConfigError(
                f"model.gradient_checkpointing=true: {type(causal_lm(self.policy)).__name__} does not support it in "
                "Transformers; set model.gradient_checkpointing=false"
            )
        if enabled:
            model = causal_lm(self.policy)  # renamed in Transformers 5.23
            enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
            # Nothing random happens in a layer, so no generator's state has to be kept for the second pass.
            enable({"use_reentrant": False, "preserve_rng_state": False})
        before = [block.training for block in blocks]
        for block in blocks:
            block.training = True
        try:
            with attending(causal_lm(self.policy), self.attention):  # the second pass comes with the backward
                yield
        finally:
            for block, was in zip(blocks, before, strict=True):
                block.training = was

    def policy_parameters(self) -> list[nn.Parameter]:
        return self._policy_parameters

    def critic_parameters(self) -> list[nn.Parameter]:
        return list(self.heads.parameters())

    @torch.no_grad()
    def update_targets(self, stepped: Tensor) -> None:
        """target <- (1 - tau) target + tau online, tau = critic.target_tau (Polyak average).

        Nothing changes where ``stepped`` (scalar, bool, on the device) is False.
        """
        share = self.critic.target_tau * stepped.float()
        for target, online in zip(self.target_heads.parameters(), self.heads.parameters(), strict=True):
            target.lerp_(online, share)

    def trained_state(self) -> dict[str, Tensor]:
        """Every tensor that training changes, by name: trained policy weights, heads, target heads."""
        return {
            name: parameter.detach()
            for name, parameter in self.named_parameters()
            if parameter.requires_grad or name.startswith("target_heads.")
        }

    @torch.no_grad()
    def norm(self) -> float:
        """The norm of all of ``trained_state``: NaN or infinite where any number is. The host waits for the device."""
        norms = torch._foreach_norm(list(self.trained_state().values()))  # pyright: ignore[reportPrivateImportUsage]
        return float(torch.stack([norm.to(self.device, torch.float32) for norm in norms]).square().sum().sqrt())

    @torch.no_grad()
    def load_trained_state(self, state: dict[str, Tensor]) -> None:
        """Copies a saved ``trained_state`` back. Raises ValueError where names or shapes differ from the model's."""
        own = self.trained_state()
        if own.keys() != state.keys():
            odd = sorted(own.keys() ^ state.keys())[:3]
            raise ValueError(f"the checkpoint is of another model or adapter: {odd} are not in both")
        for name, tensor in own.items():
            if tensor.shape != state[name].shape:
                raise ValueError(f"{name} is {tuple(state[name].shape)} in the checkpoint, {tuple(tensor.shape)} here")
            tensor.copy_(state[name])

    def reference_fingerprint(self) -> str:
        """SHA-256 over a sample of every reference weight, to check that a resumed run has the same reference."""
        with self.reference() as model:
            return weights_digest(
                (name, parameter)
                for name, parameter in causal_lm(model).named_parameters()
                if self._reference or ("lora_" not in name and ".modules_to_save." not in name)
            )


def values(heads: nn.ModuleList, state: Tensor) -> Tensor:
    """[H, B, T] each head's values of states [B, T, h]; H is 0 without a critic."""
    return torch.stack([head(state) for head in heads]) if heads else state.new_zeros(0, *state.shape[:2])


def weights_digest(named: Iterable[tuple[str, Tensor]]) -> str:
    """SHA-256 over a sample of every weight, by name."""
    digest = hashlib.sha256()
    for name, parameter in sorted(named, key=lambda pair: pair[0]):
        values = parameter.detach().flatten()
        sample = values[:: max(1, len(values) // 1024)].float().cpu()  # 1,024 a tensor: fast at any size
        digest.update(f"{name}{tuple(parameter.shape)}".encode() + sample.numpy().tobytes())
    return digest.hexdigest()


def compile_layers(model: ActorCritic) -> None:
    """Has torch.compile fuse the operations of each layer of the policy and of its reference.

    All layers share one program, compiled once, for any number of rows and columns. Raises ConfigError where
    Transformers does not mark the model's layers.
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
    """The output without its autograd graph, which would keep every activation."""
    parts: dict[str, Any] = {field.name: getattr(out, field.name) for field in dataclasses.fields(out)}
    for name, part in parts.items():
        parts[name] = part if part is None else part.detach()
    return Output(**parts)
