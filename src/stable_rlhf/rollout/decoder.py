"""Samples tokens from the policy: a cache of fixed size and the loop over tokens.

The loop runs the policy's own forward, one token at a time. (Models with a shorter window, or that keep other states
than keys, use Transformers' loop.) On CUDA one step of it is one graph, replayed without waiting for the device;
elsewhere rows that have ended leave the batch. Random numbers are drawn before the first token, one for each token, so
that a row's completion does not depend on when other rows end.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import torch
from peft.tuners.lora import Linear as LoraLinear
from torch import Tensor, nn
from transformers import Cache, GenerationConfig, LogitsProcessorList

from stable_rlhf.hardware import attention, cpu_matmul, cuda_graphs
from stable_rlhf.hardware import cuda_graphs as hardware_cuda_graphs
from stable_rlhf.ops.logprobs import logits
from stable_rlhf.ops.sampling import draw
from stable_rlhf.policy import ActorCritic, compile_layer, layers, lm_head
from stable_rlhf.rollout.agreement import Forced, choose_ways
from stable_rlhf.rollout.attend import ATTENTION
from stable_rlhf.rollout.backend import Sampling
from stable_rlhf.rollout.merged_weights import decoding_model, merge
from stable_rlhf.rollout.slots import Slots

ROOMS = 8
"""Most shapes (rows and prompt width) whose keys, values and graphs are kept; the least recently used goes first."""

SHORTEST = 64
"""Least room for a prompt in a graph's cache; longer ones have the next power of two, so that prompts of any length up
to P need log2(P / 64) graphs."""


CHECK_EVERY = 16
"""Steps between two checks whether every row has ended, where a check waits for the device. At 3.6 ms a step
(3B on one H200) a rollout runs on for 58 ms at most after the last row's end, half of it on average."""

LEAVE_AT = 0.75
"""Share of rows still running at which those that have ended leave the batch, where shapes are free: copying the rest
then saves a quarter of every later step."""


class Decoder:
    """Samples completions from a policy.

    A policy with an adapter, or that computes in bfloat16, is sampled from a copy of its adapted or narrowed weights.
    The copy is updated for every rollout: W + scale B A in the dtype that the forward computes in.

    ``self_check`` tries each way of sampling on a few tokens, and keeps those whose log-probs are the ones that are
    trained. Raises ConfigError where there is none.
    """

    def __init__(
        self, model: ActorCritic, *, cuda_graphs: bool = False, torch_compile: bool = False, self_check: bool = True
    ) -> None:
        self.model = model
        self.lm, self._refreshed = decoding_model(model)
        # What a setting leaves open (min_p, no_repeat_ngram_size, ...) would come from the model's own.
        self.lm.generation_config = GenerationConfig()
        # Where all is bfloat16, as with an adapter on a model of that dtype, there is nothing for it to do.
        self.autocast = model.autocast and any(p.dtype == torch.float32 for p in self.lm.parameters())
        self.graphs = cuda_graphs
        self.loops = model.span > 0
        """Whether our loop samples, up to the model's span; Transformers' does otherwise."""
        self.pads = True
        """Whether Transformers' loop takes prompts of different lengths together."""
        if self_check:
            choose_ways(self)
        if (
            torch_compile and self.loops and model.span == attention.UNBOUNDED
        ):  # otherwise a rollout may be left to Transformers
            _compile_layers(self.lm)
        self._pool = hardware_cuda_graphs.pool() if cuda_graphs else None
        self._rooms: OrderedDict[tuple[Any, ...], Room] = OrderedDict()

    @property
    def device(self) -> torch.device:
        return self.model.device

    @torch.no_grad()
    def sample(self, prompt: Tensor, prompt_mask: Tensor, sampling: Sampling) -> Tensor:
        """Samples completions of prompts [B, P] padded on the left: tokens [B, T], T <= max_new_tokens.

        ``prompt_mask`` [B, P] is True for tokens. Pad tokens follow a row's end. Tokens come from the whole
        distribution at the temperature. Draws max_new_tokens x B numbers from torch's global generator
        of the model's device.
        """
        rows, width = prompt.shape
        room = max(SHORTEST, 1 << (width - 1).bit_length()) if self.graphs else width
        autocast = torch.autocast(prompt.device.type, torch.bfloat16, enabled=self.autocast)
        with cpu_matmul.exact_products(prompt.device), autocast:
            self.refresh()
            if not self.loops or room + sampling.max_new_tokens > self.model.span:
                return self._generate(prompt, prompt_mask, sampling)
            uniform = torch.rand(sampling.max_new_tokens, rows, dtype=torch.float64, device=prompt.device)
            with attention.attending(self.lm, ATTENTION):
                if not self.graphs:
                    return Room(self.lm, rows, room, sampling).run(prompt, prompt_mask, uniform)
                prompt, prompt_mask = (nn.functional.pad(part, (room - width, 0)) for part in (prompt, prompt_mask))
                if (key := (rows, room, sampling)) not in self._rooms:
                    if len(self._rooms) == ROOMS:
                        self._rooms.popitem(last=False)
                    self._rooms[key] = Room(self.lm, rows, room, sampling)
                self._rooms.move_to_end(key)
                return self._rooms[key].replay(prompt, prompt_mask, uniform, self._pool)

    def _generate(self, prompt: Tensor, prompt_mask: Tensor, sampling: Sampling) -> Tensor:
        """Samples by Transformers' own loop, for layers that do not keep every key; it is slower."""
        out = prompt.new_full((len(prompt), sampling.max_new_tokens), sampling.pad_token_id)
        longest = 0
        for rows in self.groups(prompt_mask):
            wide = prompt_mask[rows].any(0)  # False: padding of all these rows
            tokens = self.generate_tokens(prompt[rows][:, wide], prompt_mask[rows][:, wide], sampling)
            out[rows, : tokens.shape[1]] = tokens
            longest = max(longest, tokens.shape[1])
        return out[:, :longest]

    def forced(self, width: int, sampling: Sampling, response: Tensor) -> ForcedRoom:
        """Our loop on given responses [B, T], for prompts of this width."""
        room = ForcedRoom(self.lm, len(response), width, sampling)
        room.response = response
        return room

    def groups(self, prompt_mask: Tensor) -> list[Tensor]:
        """Rows that Transformers' loop may take together; ``prompt_mask`` [B, P] is True for tokens."""
        lengths = prompt_mask.sum(1)
        together = torch.zeros_like(lengths) if self.pads else lengths
        return [(together == length).nonzero().squeeze(1) for length in together.unique()]

    def generate_tokens(
        self, prompt: Tensor, prompt_mask: Tensor, sampling: Sampling, forced: Forced | None = None
    ) -> Tensor:
        settings = GenerationConfig(
            max_new_tokens=sampling.max_new_tokens,
            do_sample=True,
            temperature=sampling.temperature,
            # Everything that would make the sampled distribution another than the one that is trained is off.
            top_k=0,
            top_p=1.0,
            repetition_penalty=1.0,
            eos_token_id=list(sampling.eos_token_ids) or None,
            pad_token_id=sampling.pad_token_id,
        )
        forcing: dict[str, Any] = {"logits_processor": LogitsProcessorList([forced])} if forced else {}
        out = self.lm.generate(
            input_ids=prompt, attention_mask=prompt_mask.long(), generation_config=settings, **forcing
        )
        return out[:, prompt.shape[1] :]

    @torch.no_grad()
    def refresh(self) -> None:
        """Updates the copied weights from the policy's."""
        for target, source in self._refreshed:
            if isinstance(source, LoraLinear):
                merge(target, source)
            else:
                target.copy_(source)


class Room:
    """The tensors of a loop over tokens, for one number of rows and one width of prompts."""

    def __init__(self, lm: Any, rows: int, width: int, sampling: Sampling) -> None:
        device = lm.device
        self.lm, self.width, self.sampling = lm, width, sampling
        length = width + sampling.max_new_tokens
        self.position = torch.zeros(1, dtype=torch.int64, device=device)
        self.slots = [
            Slots(length, self.position) for _ in range(lm.config.get_text_config(decoder=True).num_hidden_layers)
        ]
        self.cache = Cache(layers=list(self.slots))
        self.cache.each = [Cache(layers=[slots]) for slots in self.slots]  # pyright: ignore[reportAttributeAccessIssue]
        self.columns = torch.arange(length, device=device)
        self.seen = torch.ones(rows, 1, 1, length, dtype=torch.bool, device=device)  # False: a prompt's padding
        self.turn = torch.zeros(1, dtype=torch.int64, device=device)
        self.token = torch.zeros(rows, dtype=torch.int64, device=device)
        self.positions = torch.zeros(rows, 1, dtype=torch.int64, device=device)
        self.done = torch.zeros(rows, dtype=torch.bool, device=device)
        self.out = torch.zeros(rows, sampling.max_new_tokens, dtype=torch.int64, device=device)
        self.uniform = torch.zeros(sampling.max_new_tokens, rows, dtype=torch.float64, device=device)
        self.eos = torch.tensor(sampling.eos_token_ids, device=device)
        self._given: list[Tensor] = []
        self._graphs: list[cuda_graphs.Graph[None]] = []

    def run(self, prompt: Tensor, prompt_mask: Tensor, uniform: Tensor) -> Tensor:
        """Runs the loop with free shapes: a step reads only filled columns, and rows that have ended leave."""
        self.begin(prompt, prompt_mask, uniform)
        whole, rows = self.out.clone(), torch.arange(len(prompt), device=prompt.device)
        for turn in range(1, self.sampling.max_new_tokens):
            running = ~self.done
            count = int(running.sum())
            if count == 0:
                break
            if count <= LEAVE_AT * len(running):
                whole[rows] = self.out
                keep = running.nonzero().squeeze(1)
                rows = rows[keep]
                self.keep(keep)
            for slots in self.slots:
                slots.filled = self.width + turn
            self.step(self.seen[..., : self.width + turn])
        whole[rows] = self.out
        return self._ended(whole)

    def replay(self, prompt: Tensor, prompt_mask: Tensor, uniform: Tensor, pool: Any = None) -> Tensor:
        """Runs the loop with fixed shapes: reading the prompts is one CUDA graph, every step after that another."""
        self._given = [part.clone() for part in (prompt, prompt_mask, uniform)] if not self._given else self._given
        for own, given in zip(self._given, (prompt, prompt_mask, uniform), strict=True):
            own.copy_(given)
        if not self._graphs:
            self._first_step()  # allocates the slots
            work = [self._first_step, self.one_step][: self.sampling.max_new_tokens]
            cuda_graphs.warm_up(lambda: [self._first_step(), *(step() for step in work[1:])], prompt.device)
            self._graphs = [cuda_graphs.capture(step, prompt.device, pool) for step in work]
        first, *step = self._graphs
        first.replay()
        for turn in range(1, self.sampling.max_new_tokens):
            if turn % CHECK_EVERY == 0 and bool(self.done.all()):
                break
            step[0].replay()
        return self._ended(self.out.clone())

    def begin(self, prompt: Tensor, prompt_mask: Tensor, uniform: Tensor) -> None:
        """Reads the prompts and draws each row's first token."""
        width = prompt.shape[1]
        for slots in self.slots:
            slots.filled = width
        self.seen[..., :width] = prompt_mask[:, None, None]
        self.uniform.copy_(uniform)
        self.out.fill_(self.sampling.pad_token_id)
        for counter in (self.position, self.turn, self.done):
            counter.zero_()
        # A padding column sees itself: if it saw nothing, its values would be NaN, and 0 x NaN would reach the others.
        earlier = torch.ones(width, width, dtype=torch.bool, device=prompt.device)
        mask = (earlier.tril() & prompt_mask[:, None]) | earlier.tril().triu()
        positions = (prompt_mask.long().cumsum(1) - 1).clamp(min=0)
        # Compiled, prompts would be two programs of their own, with and without slots: half a minute to save some
        # milliseconds of each rollout.
        with torch.compiler.set_stance("force_eager"):
            hidden = self.forward(prompt, mask[:, None], positions)
        self.choose(hidden)
        self.position.fill_(width)
        self.positions.copy_(prompt_mask.sum(1, keepdim=True))
        for slots in self.slots:
            slots.filled = slots.max_cache_len

    def one_step(self) -> None:
        """``step`` as a graph records it, where tensors hold the position of the rows."""
        self.step(self.seen & (self.columns <= self.position))

    def step(self, seen: Tensor) -> None:
        """Reads each row's last token and draws the next; ``seen`` [B, 1, 1, columns] is True where it may look."""
        self.choose(self.forward(self.token[:, None], seen, self.positions))
        self.position.add_(1)
        self.positions.add_(1)

    def forward(self, ids: Tensor, mask: Tensor, positions: Tensor) -> Tensor:
        """[B, h]: the hidden state at the last position."""
        out = self.lm.get_decoder()(
            input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=self.cache, use_cache=True
        )
        return out.last_hidden_state[:, -1]

    def choose(self, hidden: Tensor) -> None:
        """Draws each row's next token from its distribution."""
        uniform = self.uniform.index_select(0, self.turn).squeeze(0)
        self.take(draw(logits(hidden, lm_head(self.lm)), uniform, self.sampling.temperature))

    def take(self, drawn: Tensor) -> None:
        drawn = torch.where(self.done, self.sampling.pad_token_id, drawn)
        self.out.index_copy_(1, self.turn, drawn[:, None])
        self.done.logical_or_((drawn[:, None] == self.eos).any(1))
        self.token.copy_(drawn)
        self.turn.add_(1)

    def keep(self, rows: Tensor) -> None:
        """Keeps only these rows in the loop."""
        for slots in self.slots:
            slots.keep(rows)
        self.uniform = self.uniform[:, rows]
        for name in ("seen", "token", "positions", "done", "out"):
            setattr(self, name, getattr(self, name)[rows])

    def _first_step(self) -> None:
        self.begin(*self._given)

    def _ended(self, out: Tensor) -> Tensor:
        """The tokens without the columns after the last row's end."""
        ends = (out[..., None] == self.eos).any(-1)
        running = ends.cumsum(1) - ends.long() == 0
        return out[:, : int(running.any(0).sum())]


class ForcedRoom(Room):
    """The loop on completions that are given, whose log-probs it keeps: `response` [B, T], `logp` T times [B]."""

    def __init__(self, lm: Any, rows: int, width: int, sampling: Sampling) -> None:
        super().__init__(lm, rows, width, sampling)
        self.response = self.out
        self.logp: list[Tensor] = []

    def choose(self, hidden: Tensor) -> None:
        token = self.response[:, len(self.logp)]
        scores = logits(hidden, lm_head(self.lm)).float().log_softmax(-1)
        self.logp.append(scores.gather(1, token[:, None])[:, 0])
        self.take(token)


class _Block(nn.Module):
    """A layer with a cache of its own, as if it were the model's first, so that all layers compile to one program."""

    def __init__(self, layer: nn.Module, index: int) -> None:
        super().__init__()
        self.layer, self.index = layer, index
        for module in layer.modules():
            if hasattr(module, "layer_idx"):
                setattr(module, "layer_idx", 0)  # noqa: B010
        compile_layer(layer)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("layer"), name)

    def forward(self, *args: Any, past_key_values: Any = None, **kwargs: Any) -> Any:
        return self.layer(*args, past_key_values=past_key_values.each[self.index], **kwargs)


def _compile_layers(lm: Any) -> None:
    blocks = set(layers(lm))
    for module in list(lm.modules()):
        if isinstance(module, nn.ModuleList) and blocks & set(module):
            for index, layer in enumerate(module):
                module[index] = _Block(layer, index)
