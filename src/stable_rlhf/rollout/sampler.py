"""Samples completions and has them scored: prompts in, a ``Rollout`` out."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from stable_rlhf.config import RolloutConfig
from stable_rlhf.data import EncodedPrompts, StreamedPrompts
from stable_rlhf.records import Rollout, Tokens
from stable_rlhf.rewards import Scorer
from stable_rlhf.rollout.backend import Generator, Sampling
from stable_rlhf.rollout.stopping import stopped


@dataclass(frozen=True, kw_only=True)
class Sampler:
    """Collects rollouts. Its parts stay the same for the whole run."""

    tokenizer: PreTrainedTokenizerBase
    scorer: Scorer
    config: RolloutConfig
    eos_token_ids: list[int]
    decoder: Generator

    def collect(
        self,
        dataset: Any,
        encoded: EncodedPrompts | StreamedPrompts,
        indices: Sequence[int],
        gold: Scorer | None = None,
        generations: int = 1,
    ) -> tuple[Rollout, dict[str, float]]:
        """Samples and scores completions for each of the rows; returns (rollout, seconds by part).

        ``generations``: completions of a row; those of one row follow one another. ``gold``: rewards that are only
        measured. Draws from torch's global generator of the model's device. The rollout's tensors are on the CPU.
        """
        started = time.perf_counter()
        truncated = sum(encoded.truncated[i] for i in indices)
        indices = [i for i in indices for _ in range(generations)]
        prompt, prompt_mask = pad_left([encoded.input_ids[i] for i in indices], self.pad_token_id)
        response = self.generate(prompt, prompt_mask)
        mask, ended = response_mask(response, self.eos_token_ids)
        completions = self.decode(prompt, prompt_mask, response, mask)
        if self.config.stop_strings:

            def beginning(row: int, count: int) -> str:
                rows = slice(row, row + 1)
                first = torch.arange(mask.shape[1]) < count
                return self.decode(prompt[rows], prompt_mask[rows], response[rows], mask[rows] & first)[0]

            completions, mask, ended = stopped(completions, mask, ended, self.config.stop_strings, beginning)
        asked = self.scorer.special_tokens or (gold is not None and gold.special_tokens)
        whole = self.decode(prompt, prompt_mask, response, mask, skip_special_tokens=False) if asked else None
        ids = [row[keep].tolist() for row, keep in zip(response, mask, strict=True)]
        sampled = time.perf_counter()
        rows = dataset[indices]
        columns = {name: values for name, values in rows.items() if name != "prompt"}
        scores = self.scorer.score(rows["prompt"], completions, columns, ended.tolist(), ids, whole)
        measured = {} if gold is None else gold.answers(rows["prompt"], completions, columns, ids, whole)
        rollout = Rollout(
            indices=indices,
            prompts=rows["prompt"],
            completions=completions,
            tokens=Tokens.pack(prompt, prompt_mask, response, mask),
            ended=ended.tolist(),
            scores=scores.total,
            valid=scores.valid,
            per_function=scores.per_function,
            disagreement=scores.disagreement,
            metrics=scores.metrics,
            extra=scores.extra,
            gold=measured,
            truncated=truncated,
            columns=columns,
            whole=whole,
        )
        return rollout, {"rollout_s": sampled - started, "scoring_s": time.perf_counter() - sampled}

    @property
    def pad_token_id(self) -> int:
        return int(self.tokenizer.pad_token_id)  # pyright: ignore[reportArgumentType]

    def generate(self, prompt: Tensor, prompt_mask: Tensor) -> Tensor:
        """Samples tokens [B, T], T <= max_completion_length, from the whole distribution at the temperature.

        ``prompt`` [B, P] is padded on the left; ``prompt_mask`` is True for tokens. The result is on the CPU.
        """
        sampling = Sampling(
            max_new_tokens=self.config.max_completion_length,
            temperature=self.config.temperature,
            eos_token_ids=tuple(self.eos_token_ids),
            pad_token_id=self.pad_token_id,
        )
        device = self.decoder.device
        return self.decoder.sample(prompt.to(device), prompt_mask.to(device), sampling).cpu()

    def decode(
        self, prompt: Tensor, prompt_mask: Tensor, response: Tensor, mask: Tensor, skip_special_tokens: bool = True
    ) -> list[str]:
        """Decodes completions, without special tokens unless told otherwise, each as the text it adds to its prompt.

        Decoded by itself, a completion would lose the space it begins with under SentencePiece tokenizers. Both masks
        are True for tokens.
        """
        before = [row[keep].tolist() for row, keep in zip(prompt, prompt_mask, strict=True)]
        after = [row[keep].tolist() for row, keep in zip(response, mask, strict=True)]
        texts = partial(self.tokenizer.batch_decode, skip_special_tokens=skip_special_tokens)
        heads = texts(before)
        whole = texts([p + r for p, r in zip(before, after, strict=True)])
        alone = texts(after)
        # A prompt that was cut inside a character has no text to take away: there the completion is decoded by itself.
        return [
            text[len(head) :] if text.startswith(head) else own
            for text, head, own in zip(whole, heads, alone, strict=True)
        ]


def pad_left(rows: list[list[int]], pad: int) -> tuple[Tensor, Tensor]:
    """Pads rows on the left to the longest: ([B, P] int64, [B, P] bool, True for tokens)."""
    width = max(len(row) for row in rows)
    ids = torch.tensor([[pad] * (width - len(row)) + row for row in rows])
    mask = torch.tensor([[False] * (width - len(row)) + [True] * len(row) for row in rows])
    return ids, mask


def response_mask(response: Tensor, eos_token_ids: list[int]) -> tuple[Tensor, Tensor]:
    """([B, T] bool, True for response tokens, the first EOS included; [B] bool, True where there is an EOS).

    It depends only on the first EOS, since the pad id may be the EOS id or a token that the model samples as text.
    """
    is_eos = torch.isin(response, torch.tensor(eos_token_ids, device=response.device))
    before = is_eos.long().cumsum(1) - is_eos.long()
    return before == 0, is_eos.any(1)
