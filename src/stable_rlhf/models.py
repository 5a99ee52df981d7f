"""The policy and its value heads in one module with one forward, the reference, and how they are loaded."""

from __future__ import annotations

import contextlib
import copy
import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.modeling_layers import GradientCheckpointingLayer

from stable_rlhf.attention import UNBOUNDED, UNMASKED, attending, attention_span
from stable_rlhf.config import ConfigError, CriticConfig, ModelConfig
from stable_rlhf.ops.logprobs import token_statistics
from stable_rlhf.ops.objective import soft_min
from stable_rlhf.records import Tokens

ASSETS = Path(__file__).parent / "assets"
HEAD_TOLERANCE = 1e-3
"""Largest difference, in nats, between the model's own log-probs and ours that the check at loading lets pass: float32
rounding stays below 1e-4, a head with a bias, a scale or a soft cap is far above."""


class ValueHead(nn.Module):
    """LayerNorm -> Linear(h, h/4) -> GELU -> Linear(1), float32 (the published code's head): [..., h] -> [...]."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(hidden_size)
        self.up = nn.Linear(hidden_size, hidden_size // 4)
        self.out = nn.Linear(hidden_size // 4, 1)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.out(nn.functional.gelu(self.up(self.norm(hidden)))).squeeze(-1)


@dataclass(frozen=True, kw_only=True)
class Output:
    """What one forward gives, [B, T] float32 unless said otherwise. Entries outside the mask mean nothing."""

    logp: Tensor
    """log pi(a_t | s_t) at the sampling temperature, nats."""
    entropy: Tensor
    """Entropy of pi(. | s_t), nats."""
    values: Tensor
    """[H, B, T] each head's V(s_t)."""
    state: Tensor
    """[B, T, h] what the heads read: the last hidden state, without a gradient unless critic.backbone_gradient."""
    exact_kl: Tensor | None
    """KL(pi || pi_ref) at s_t over the whole vocabulary, where asked for."""


class ActorCritic(nn.Module):
    """Policy, value heads and Polyak target heads. Dropout is off always, so that a ratio is of one policy.

    ``policy`` is a causal language model or a PEFT model around one. With PEFT the reference is the policy with its
    adapter off; otherwise it is a frozen copy of the policy as given.
    """

    def __init__(self, policy: PreTrainedModel | PeftModel, critic: CriticConfig, *, autocast: bool = False) -> None:
        super().__init__()
        self.policy = policy
        self.critic = critic
        self.autocast = autocast
        device = next(policy.parameters()).device
        hidden_size = causal_lm(policy).get_output_embeddings().weight.shape[1]
        self.heads = nn.ModuleList(ValueHead(hidden_size) for _ in range(critic.heads)).to(device, torch.float32)
        self.target_heads = copy.deepcopy(self.heads).requires_grad_(False)
        self.peft = isinstance(policy, PeftModel)
        self.span = attention_span(causal_lm(policy))
        own = causal_lm(policy).config._attn_implementation
        self.attention = UNMASKED if own == "sdpa" and self.span == UNBOUNDED else own
        for module in policy.modules():
            if autocast and hasattr(module, "cast_input_dtype_enabled"):
                # PEFT would widen an adapter's input to the float32 of its weights, and autocast narrow it again.
                setattr(module, "cast_input_dtype_enabled", False)  # noqa: B010
        # A list hides the copy from state dicts, optimisers and wrappers: it never changes.
        self._policy_parameters = [p for p in policy.parameters() if p.requires_grad]
        self._reference = [] if self.peft else [copy.deepcopy(policy).requires_grad_(False).eval()]
        self.eval()

    @property
    def device(self) -> torch.device:
        return next(self.heads.parameters()).device

    def forward(self, tokens: Tokens, *, temperature: float, exact_kl: bool = False) -> Output:
        """Log-probs, entropy and values of the response tokens in one pass; see ``Output``.

        ``exact_kl`` adds the KL over the vocabulary, at the price of a pass of the reference.
        """
        hidden = self._hidden(self.policy, tokens)
        against: tuple[Any, Any] = (None, None)
        if exact_kl:
            with torch.no_grad(), self.reference() as reference:
                against = self._hidden(reference, tokens), lm_head(reference)
        statistics = token_statistics(hidden, lm_head(self.policy), tokens.response, temperature, *against)
        state = hidden.float() if self.critic.backbone_gradient else hidden.detach().float()
        return Output(
            logp=statistics.logp,
            entropy=statistics.entropy,
            values=torch.stack([head(state) for head in self.heads]),
            state=state,
            exact_kl=statistics.kl,
        )

    @torch.no_grad()
    def reference_logp(self, tokens: Tokens, *, temperature: float) -> Tensor:
        """[B, T] log pi_ref(a_t | s_t), nats."""
        with self.reference() as reference:
            hidden = self._hidden(reference, tokens)
            return token_statistics(hidden, lm_head(reference), tokens.response, temperature).logp

    @torch.no_grad()
    def target_values(self, state: Tensor) -> Tensor:
        """[H, B, T]: the target heads on ``Output.state``."""
        return torch.stack([head(state) for head in self.target_heads])

    def combine(self, head_values: Tensor) -> Tensor:
        """[H, B, T] -> [B, T]: the one value of a single head, the soft-min of two."""
        if len(head_values) == 1:
            return head_values[0]
        return soft_min(head_values[0], head_values[1], self.critic.temperature)

    def _hidden(self, policy: nn.Module, tokens: Tokens) -> Tensor:
        """[B, T, h]: the last hidden state at s_0 .. s_{T-1}; position t has not seen a_t."""
        ids, lm = tokens.ids, causal_lm(policy)
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
        if self.peft:
            with self.policy.disable_adapter():  # pyright: ignore[reportCallIssue]
                yield self.policy
        else:
            yield self._reference[0]

    @contextlib.contextmanager
    def checkpointing(self, enabled: bool) -> Iterator[None]:
        """Recompute layers in the backward pass inside the context. Only the layers themselves are told that they
        train: their dropouts stay off, and outside (when sampling) the KV cache works."""
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
        """target <- (1 - tau) target + tau online, tau = critic.target_tau (Polyak average); nothing where ``stepped``
        (scalar, bool, on the device) is False."""
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
        """Of all of ``trained_state``; NaN or infinite where any number is. It waits for the device."""
        norms = torch._foreach_norm(list(self.trained_state().values()))  # pyright: ignore[reportPrivateImportUsage]
        return float(torch.stack([norm.to(self.device, torch.float32) for norm in norms]).square().sum().sqrt())

    @torch.no_grad()
    def load_trained_state(self, state: dict[str, Tensor]) -> None:
        """Copies ``trained_state`` back. Raises ValueError when names or shapes are another model's."""
        own = self.trained_state()
        if own.keys() != state.keys():
            odd = sorted(own.keys() ^ state.keys())[:3]
            raise ValueError(f"the checkpoint is of another model or adapter: {odd} are not in both")
        for name, tensor in own.items():
            if tensor.shape != state[name].shape:
                raise ValueError(f"{name} is {tuple(state[name].shape)} in the checkpoint, {tuple(tensor.shape)} here")
            tensor.copy_(state[name])

    def reference_fingerprint(self) -> str:
        """SHA-256 over a sample of every reference weight: tells whether a resumed run has the same reference."""
        digest = hashlib.sha256()
        with self.reference() as model:
            for name, parameter in sorted(causal_lm(model).named_parameters()):
                if "lora_" not in name and ".modules_to_save." not in name:
                    values = parameter.detach().flatten()
                    sample = values[:: max(1, len(values) // 1024)].float().cpu()  # 1,024 a tensor: fast at any size
                    digest.update(f"{name}{tuple(parameter.shape)}".encode() + sample.numpy().tobytes())
        return digest.hexdigest()


def causal_lm(policy: Any) -> Any:
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


def refuse_many_processes() -> None:
    """Raises ConfigError under a launcher: the processes would train a policy each, in one run folder."""
    if (size := os.environ.get("WORLD_SIZE", "1")) != "1":
        raise ConfigError(f"WORLD_SIZE={size}: this release trains in one process; start it without a launcher")


def resolve_device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(name)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"model.device={name!r}: no CUDA device is available; set model.device=cpu or auto")
    return device


def replays_graphs(config: ModelConfig, device: torch.device) -> bool:
    """Whether passes and sampling are CUDA graphs: as ``cuda_graphs`` says, or else wherever they can be."""
    return device.type == "cuda" if config.cuda_graphs is None else config.cuda_graphs


def load_tokenizer(config: ModelConfig) -> PreTrainedTokenizerBase:
    name, arguments = policy_source(config)
    return prepare_tokenizer(AutoTokenizer.from_pretrained(name, **arguments))


def prepare_tokenizer(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """Padding on the left, pad = EOS where there is none (masks are built from the first EOS, not from the pad id)."""
    if tokenizer.eos_token_id is None:
        raise ConfigError(f"the tokenizer of {tokenizer.name_or_path!r} has no EOS token: no completion could end")
    tokenizer.padding_side = "left"
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_policy(config: ModelConfig, peft_config: LoraConfig | None = None) -> tuple[Any, bool]:
    """(model on its device, whether to run it under bfloat16 autocast). Weights come from safetensors or GGUF only."""
    name, arguments = policy_source(config)
    device = resolve_device(config.device)
    dtype, low = policy_dtype(config, adapter=peft_config is not None)
    model: Any = AutoModelForCausalLM.from_pretrained(name, dtype=dtype, use_safetensors=True, **arguments)
    if config.gguf_file is not None:  # dequantised on loading, but it still calls itself quantised: no saving then
        model.hf_quantizer = None
        model.is_quantized = False
        model.config.__dict__.pop("quantization_config", None)
    return wrap_policy(model.to(device), config, peft_config), low


def policy_dtype(config: ModelConfig, adapter: bool = False) -> tuple[torch.dtype, bool]:
    """(dtype in which weights are loaded, whether to run under bfloat16 autocast)."""
    low = config.dtype == "bfloat16" or (config.dtype == "auto" and resolve_device(config.device).type == "cuda")
    # Weights that are trained stay float32: bfloat16 has 8 bits of mantissa, and a step of 1e-5 would round away.
    return torch.bfloat16 if low and (adapter or config.lora_r > 0) else torch.float32, low


def wrap_policy(model: Any, config: ModelConfig, peft_config: LoraConfig | None = None) -> Any:
    """The model with the adapter that the settings or ``peft_config`` ask for; checked to be one we can train."""
    check_lm_head(model)
    if getattr(model, "_hf_peft_config_loaded", False):
        raise ConfigError(
            f"model.name={config.name!r}: is an adapter, which would stay frozen under a new one; merge it "
            "(merge_and_unload, save_pretrained) and name the merged folder, or pass a PeftModel with is_trainable=True"
        )
    if isinstance(model, PeftModel):
        return check_adapter(model)
    peft_config = peft_config or lora_config(config)
    return model if peft_config is None else check_adapter(get_peft_model(model, peft_config))


def lora_config(config: ModelConfig) -> LoraConfig | None:
    """The adapter that the settings ask for."""
    if config.lora_r == 0:
        return None
    return LoraConfig(
        r=config.lora_r,
        lora_alpha=config.lora_alpha or 2 * config.lora_r,  # pyright: ignore[reportArgumentType]
        lora_dropout=0.0,  # dropout would make the ratio of two different policies
        target_modules=config.lora_target_modules or "all-linear",
        task_type="CAUSAL_LM",
    )


def given_policy(model: Any, config: ModelConfig, peft_config: LoraConfig | None = None) -> tuple[Any, bool]:
    """As ``load_policy``, of a model that came as an object; ``model.dtype=auto`` is the object's own."""
    if config.device != "auto" or torch.cuda.is_available():
        model = model.to(resolve_device(config.device))
    own = next(model.parameters()).dtype
    low = own == torch.bfloat16 if config.dtype == "auto" else config.dtype == "bfloat16"
    model = wrap_policy(model if low or own == torch.float32 else model.float(), config, peft_config)
    for parameter in model.parameters():
        if parameter.requires_grad:  # trained weights are float32: see load_policy
            parameter.data = parameter.data.float()
    return model, low


def check_adapter(model: PeftModel) -> PeftModel:
    """Raises ConfigError for an adapter that would not train, or whose "off" would not be the reference."""
    for name, adapter in model.peft_config.items():
        kind = str(getattr(adapter.peft_type, "value", adapter.peft_type))
        if kind != "LORA":
            raise ConfigError(f"the adapter {name!r} is {kind}: the forward runs the layers, where only LoRA acts")
        if (bias := getattr(adapter, "bias", "none")) != "none":
            raise ConfigError(f"the adapter {name!r} trains biases (bias={bias!r}), which stay on in the reference")
    if isinstance(causal_lm(model).get_output_embeddings(), LoraLayer):
        raise ConfigError("the adapter is on the LM head, whose weight the chunked head reads without it: leave it out")
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ConfigError("no weight of the policy is trainable: load the adapter with is_trainable=True")
    return model


@torch.no_grad()
def check_lm_head(model: Any) -> None:
    """Raises ConfigError unless logits = hidden @ lm_head.weight.T, which is what the chunked head computes."""
    lm = causal_lm(model.eval())
    head = lm.get_output_embeddings()
    device = next(lm.parameters()).device
    ids = torch.arange(2, 10, device=device)[None] % head.weight.shape[0]
    own = lm(input_ids=ids).logits
    hidden = lm.get_decoder()(input_ids=ids, use_cache=False).last_hidden_state
    ours = nn.functional.linear(hidden, head.weight)  # in the model's own precision: the very product, or another head
    difference = (own.float().log_softmax(-1) - ours.float().log_softmax(-1)).abs().amax().item()
    tolerance = HEAD_TOLERANCE if own.dtype == torch.float32 else 100 * HEAD_TOLERANCE
    if not difference < tolerance:
        raise ConfigError(
            f"{type(lm).__name__}: its logits differ from hidden @ lm_head.weight by {difference:.2g} nats (a bias, a "
            "scale or a soft cap on the logits), which the chunked LM head does not compute; choose another model"
        )


def eos_token_ids(model: Any, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Every id that ends a completion: the tokenizer's EOS and those of the model's generation settings, sorted."""
    own = getattr(causal_lm(model).generation_config, "eos_token_id", None)
    own = [] if own is None else [own] if isinstance(own, int) else list(own)
    return sorted({int(tokenizer.eos_token_id), *own})  # pyright: ignore[reportArgumentType]


def context_length(model: Any) -> int | None:
    """Positions that the model can attend to, or None where its configuration sets no bound."""
    return getattr(causal_lm(model).config, "max_position_embeddings", None)


def policy_source(config: ModelConfig) -> tuple[str, dict[str, Any]]:
    if config.name == "builtin":
        return str(ASSETS / "policy"), {}
    arguments: dict[str, Any] = {"trust_remote_code": config.trust_remote_code}
    if config.revision is not None:
        arguments["revision"] = config.revision
    if config.gguf_file is not None:
        arguments["gguf_file"] = config.gguf_file
    return config.name, arguments
